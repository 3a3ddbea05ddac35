"""Convolutional encoders of the second stage: torchvision's, dilated as in DeepLab."""

from collections.abc import Mapping
from pathlib import Path

import torchvision
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.core.files import file_sha256, first_line
from wsss.core.pretraining import pretraining_of
from wsss.core.supervision import PIXEL_MASKS
from wsss.models.backbone import WeightsInfo
from wsss.models.weights import load_state_dict_strictly, read_state_dict, state_sha256

# name -> stride and width of the last feature map, dilated
ENCODERS = {
    "resnet50": (8, 2048),
    "resnet101": (8, 2048),
    "mobilenet_v3_large": (16, 960),
    "mobilenet_v3_small": (16, 576),
}
HEADS = ("fc.", "classifier.", "aux_classifier.")  # never used here


class ConvBackbone(nn.Module):
    """A torchvision ResNet or MobileNetV3 up to its last feature map.

    Args:
        name: one of ``ENCODERS``.
        weights: ``random``; a torchvision name such as ``ResNet101_Weights.IMAGENET1K_V1`` or
            ``DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1`` (downloads once); or a ``.pth``
            or ``.safetensors`` file, of classification or of a segmentation network.
        declared_pretraining: the data behind a file that nobody knows, recorded as declared by the
            user. Weights that were trained to segment are recorded as pixel masks in any case.

    Raises:
        WSSSError: unknown name, missing or unfitting weights.
    """

    frozen = False

    def __init__(
        self, *, name: str, weights: str = "random", declared_pretraining: str | None = None
    ) -> None:
        super().__init__()
        if name not in ENCODERS:
            raise WSSSError(f"backbone.name={name}: expected one of {', '.join(ENCODERS)}")
        self.patch_size, self.dim = ENCODERS[name]
        self.body = _dilated(name)
        source, file_hash, segments = weights, None, False
        if weights != "random":
            state, source, file_hash = _read(weights)
            # torchvision's segmentation networks call their encoder so, its classifiers do not
            segments = any(key.startswith("backbone.") for key in state)
            load_state_dict_strictly(self.body, self._encoder_state(state), weights)
        pretraining = pretraining_of(name, weights, file_hash, declared_pretraining)
        if segments:
            pretraining = f"{pretraining} ({PIXEL_MASKS})"
        self.weights_info = WeightsInfo(
            name, source, pretraining, file_hash, state_sha256(self.body.state_dict())
        )

    def thaw(self) -> None:
        """Learn from now on, all of it."""
        self.requires_grad_(True)

    def _encoder_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take a file's encoder under our names; its heads are left out."""
        # files older than torch 1.0 lack the counters, which nothing here reads
        counters = {k: v for k, v in self.body.state_dict().items() if k.endswith("_tracked")}
        kept = {k: v for k, v in state.items() if not k.startswith(HEADS)}
        return counters | {
            k.removeprefix("backbone.").removeprefix("features."): v for k, v in kept.items()
        }

    def forward(self, images: Tensor) -> Tensor:
        """Compute features (B, D, H / stride, W / stride) of normalised images (B, 3, H, W)."""
        return self.body(images)


def _dilated(name: str) -> nn.Sequential:
    """Make the layers before pooling and classifier: torchvision's names, random weights."""
    build = torchvision.models.get_model_builder(name)
    if name.startswith("resnet"):
        layers = build(weights=None, replace_stride_with_dilation=[False, True, True])
        kept = {key: part for key, part in layers.named_children() if key not in ("avgpool", "fc")}
    else:
        kept = dict(build(weights=None, dilated=True).features.named_children())
    body = nn.Sequential()
    for key, part in kept.items():
        body.add_module(key, part)
    return body


def _read(weights: str) -> tuple[dict[str, Tensor], str, str | None]:
    """Read parameters, where they came from, and the hash of a local file."""
    path = Path(weights).expanduser()
    if path.suffix in (".pth", ".pt", ".safetensors"):
        state = {k.removeprefix("module."): v for k, v in read_state_dict(path).items()}
        return state, f"file:{path.name}", file_sha256(path)
    try:
        entry = torchvision.models.get_weight(weights)
    except (ValueError, AttributeError, KeyError) as error:
        raise WSSSError(
            f"backbone.weights={weights}: neither random, nor a .pth or .safetensors file, nor a "
            "torchvision name such as ResNet101_Weights.IMAGENET1K_V1"
        ) from error
    try:
        fetched = entry.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise WSSSError(
            f"backbone.weights={weights}: not cached and cannot be downloaded "
            f"({first_line(error)}); fetch {entry.url} on a machine with internet and pass "
            "backbone.weights=/path/to/file.pth"
        ) from error
    return dict(fetched), f"torchvision:{weights}", None
