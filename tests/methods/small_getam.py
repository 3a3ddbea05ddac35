"""A small GETAM and a batch for it."""

from typing import Any

import torch
from torch import nn

from wsss.methods.base import Batch, Step
from wsss.methods.getam.method import GETAM, GETAMSettings
from wsss.methods.getam.official import CORRECTED, Quirks
from wsss.models.backbone import Backbone

SIDE = 96
NAMES = {
    "plain": "vit_tiny_patch16_224",
    "distilled": "deit_tiny_distilled_patch16_224",
    "hybrid": "vit_base_r50_s16_384",
    "fourteen": "vit_small_patch14_dinov2",
}


def tiny(
    kind: str = "plain",
    depth: int = 4,
    method: type[GETAM] = GETAM,
    quirks: Quirks = CORRECTED,
    **changes: Any,
) -> GETAM:
    """Build a GETAM of a few blocks on 64 px positions; its thresholds suit a random network."""
    torch.manual_seed(0)
    backbone = Backbone(
        name=NAMES[kind],
        weights="random",
        overrides={"embed_dim": 48, "depth": depth, "num_heads": 3, "img_size": 64},
    )
    settings: dict[str, Any] = {
        "max_steps": 100,
        "decoder_channels": 16,
        "low_threshold": 0.5,
        "high_threshold": 0.7,
    }
    chosen = GETAMSettings(**{**settings, **changes})
    return method(backbone=backbone, num_classes=4, settings=chosen, quirks=quirks).train()


def make_batch(seed: int = 1, *, saliency: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(2, 3, 6, 6, generator=generator)
    batch: Batch = {
        "image": nn.functional.interpolate(patches, size=(SIDE, SIDE), mode="bicubic"),
        "labels": torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]]),
        "box": torch.tensor([[0, SIDE, 0, SIDE], [10, 90, 0, 80]]),
        "name": ["a", "b"],
    }
    if saliency:
        grey = torch.rand(2, 1, 4, 4, generator=generator)
        batch["saliency"] = nn.functional.interpolate(grey, size=SIDE)[:, 0] > 0.6
    return batch


def losses_at(module: GETAM, step: int, **batch: Any) -> Step:
    torch.manual_seed(1)
    return module.losses(make_batch(**batch), step)
