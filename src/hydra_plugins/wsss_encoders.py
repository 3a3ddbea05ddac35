"""``backbone=NAME``: any ViT of timm, or ``hf_hub:ORG/NAME``, where a preset's name goes.

Hydra takes sources of configurations from this namespace only. It asks this one last, for what no
file of ours describes.
"""

from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

GROUP = "backbone/"


class EncoderSource(ConfigSource):
    """Describes encoders by name (:func:`wsss.models.named.encoder_named`)."""

    @staticmethod
    def scheme() -> str:
        """Give the word before ``://`` in Hydra's search path."""
        return "encoders"

    def load_config(self, config_path: str) -> ConfigResult:
        """Describe the encoder of ``backbone/NAME``."""
        from wsss.models.named import encoder_named  # imports timm, and Hydra this in every run

        node = OmegaConf.create(encoder_named(config_path.removeprefix(GROUP)))
        path = f"{self.scheme()}://{config_path}"
        return ConfigResult(self.provider, path, node, header={"package": None})

    def available(self) -> bool:
        """Say that this source can be asked."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Say that nothing here is a folder."""
        return False

    def is_config(self, config_path: str) -> bool:
        """Say whether a path may be an encoder's: names of timm have digits, typing errors not."""
        name = config_path.removeprefix(GROUP)
        return config_path.startswith(GROUP) and (":" in name or any(map(str.isdigit, name)))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List nothing: timm has hundreds."""
        return []
