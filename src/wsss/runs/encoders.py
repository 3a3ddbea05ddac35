"""What follows from the name of an encoder where a preset says otherwise."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hydra_plugins.wsss_encoders import EncoderSource
from wsss.core.errors import WSSSError
from wsss.core.places import config_root
from wsss.core.schema import targets
from wsss.runs.targets import ENCODERS

#: of encoders without a file, in Hydra's search path
SOURCE = f"{EncoderSource.scheme()}://"
COLOURS = ("mean", "std")
DERIVED = (
    "pretraining follows from the weights and cannot be set; leave it out, or say what a file of "
    "your own was trained on with +backbone.declared_pretraining='...', which is recorded as yours"
)
CONVOLUTIONAL = "wsss.ConvBackbone"
#: encoder of torchvision -> its weights that a run takes where it says no other
TORCHVISION = {
    "resnet50": "ResNet50_Weights.IMAGENET1K_V1",
    "resnet101": "ResNet101_Weights.IMAGENET1K_V1",
    "mobilenet_v3_large": "MobileNet_V3_Large_Weights.IMAGENET1K_V1",
    "mobilenet_v3_small": "MobileNet_V3_Small_Weights.IMAGENET1K_V1",
}


def check_encoders(content: Mapping[str, Any]) -> None:
    """Refuse a sentence on an encoder's pretraining beside its weights.

    Raises:
        WSSSError: it names the key.
    """
    for path, node in targets(content):
        if "pretraining" in node and node["_target_"] in ENCODERS:
            raise WSSSError(f"{path}.{DERIVED}")


def dependents(config: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Give the overrides that follow from ``backbone.name=`` on a preset of another name.

    The preset's weights, sizes and colours belong to its own name: under another one they are
    those of timm, unless the user sets them.

    Args:
        config: composed, with Hydra's own part.
        overrides: of the user, whose word stays.
    """
    found: list[str] = []
    given = {line.lstrip("+~").partition("=")[0] for line in overrides}
    for key, choice in config.hydra.runtime.choices.items():
        group, _, package = str(key).partition("@")
        node = OmegaConf.select(config, package or group) if group == "backbone" else None
        if not isinstance(node, DictConfig) or not node.get("name"):
            continue
        file = config_root() / "conf" / "backbone" / f"{choice}.yaml"
        preset = _content(OmegaConf.load(file)) if file.is_file() else _named(str(choice))
        if node.name != preset.get("name"):
            found += _followed(package or group, _content(node), preset, given)
    return found


def _named(choice: str) -> dict[str, Any]:
    """Describe an encoder that no file describes; timm is imported for it."""
    return _content(EncoderSource("wsss", SOURCE).load_config(f"backbone/{choice}").config)


def _content(node: Any) -> dict[str, Any]:
    """Give a group as it stands, references unresolved."""
    content = OmegaConf.to_container(node)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _followed(
    path: str, node: Mapping[str, Any], preset: Mapping[str, Any], given: set[str]
) -> Iterator[str]:
    """Give the overrides of one encoder, whose name is not the preset's."""
    name, weights = str(node["name"]), node.get("weights")
    convolutional = preset.get("_target_") == CONVOLUTIONAL
    if weights == preset.get("weights") and f"{path}.weights" not in given:
        weights = TORCHVISION.get(name, weights) if convolutional else "timm"
        if weights != preset.get("weights"):
            yield f"{path}.weights={weights}"
    for key, value in (preset.get("overrides") or {}).items():
        inner = f"{path}.overrides.{key}"
        if inner not in given and node["overrides"].get(key) == value:
            yield f"~{inner}"
    own = _named(name) if weights == "timm" and not convolutional else {}
    for key in COLOURS:
        if f"{path}.{key}" in given or node.get(key) != preset.get(key):
            continue
        if key in own:
            yield f"++{path}.{key}={own[key]}"
        elif key in preset:
            yield f"~{path}.{key}"
