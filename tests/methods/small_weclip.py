"""A WeCLIP of a few thousand parameters, on a CLIP tower with random weights."""

from collections.abc import Mapping
from typing import Any

import torch

from wsss.methods.weclip import CLIPCAM, CLIPCAMSettings, WeCLIP, WeCLIPSettings
from wsss.methods.weclip.official import CORRECTED, Quirks
from wsss.models.backbone import Backbone

DEPTH, DIM, WIDTH, PATCH = 4, 24, 16, 8
TOWER = {
    "embed_dim": DIM,
    "depth": DEPTH,
    "num_heads": 3,
    "img_size": 32,
    "patch_size": PATCH,
    "num_classes": WIDTH,
}
SMALL: dict[str, Any] = {
    "max_steps": 100,
    "text": "random",
    "decoder_channels": 16,
    "decoder_layers": 1,
    "decoder_heads": 2,
    "static_layers": 3,
    "rfm_layers": 3,
    "rfm_start": 11,
}


def tower(
    *, frozen: bool = True, colours: Mapping[str, Any] | None = None, **overrides: Any
) -> Backbone:
    """A CLIP tower whose attention and tokens differ from patch to patch."""
    name = "vit_base_patch16_clip_quickgelu_224"
    changed = {**TOWER, **overrides}
    if not frozen:  # it has no projection
        del changed["num_classes"]
    backbone = Backbone(
        name=name, weights="random", overrides=changed, frozen=frozen, **(colours or {})
    )
    for parameter in backbone.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    return backbone.eval()


def tiny(
    num_classes: int = 3,
    quirks: Quirks = CORRECTED,
    backbone: Backbone | None = None,
    **settings: Any,
) -> WeCLIP:
    torch.manual_seed(0)
    backbone = backbone or tower()
    chosen = WeCLIPSettings(**{**SMALL, **settings})
    return WeCLIP(backbone=backbone, num_classes=num_classes, settings=chosen, quirks=quirks).eval()


def tiny_cam(num_classes: int = 3, **settings: Any) -> CLIPCAM:
    torch.manual_seed(0)
    chosen = CLIPCAMSettings(**{"max_steps": 1, "text": "random", "static_layers": 3, **settings})
    return CLIPCAM(backbone=tower(), num_classes=num_classes, settings=chosen).eval()


def batch_of(labels: torch.Tensor, size: int = 48) -> dict[str, Any]:
    """Random images with the given labels (B, K), all of them real pixels."""
    box = torch.tensor([0, size, 0, size]).expand(len(labels), 4)
    return {"image": torch.randn(len(labels), 3, size, size), "labels": labels, "box": box}
