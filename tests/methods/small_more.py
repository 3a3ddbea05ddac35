"""A small MoRe, and what its tests feed it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.methods.base import Batch, Step
from wsss.methods.more import MoRe, MoReSettings
from wsss.methods.more.official import CORRECTED, Quirks
from wsss.models.backbone import Backbone

SIDE = 128  # 8 x 8 tokens: UNE's windows are 6 x 6
NUM_CLASSES = 4
MAX_STEPS = 100
TERMS = ("cls", "cls_aux", "distinct", "ptc", "cle", "une", "seg", "reg")


def tiny(
    quirks: Quirks = CORRECTED, *, num_classes: int = NUM_CLASSES, depth: int = 4, **changes: Any
) -> MoRe:
    """Build four blocks on 64 px positions; the thresholds suit a random network's maps."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 48, "depth": depth, "num_heads": 3, "img_size": 64}
    backbone = Backbone(name="vit_tiny_patch16_224", weights="random", overrides=sizes)
    settings: dict[str, Any] = {
        "max_steps": MAX_STEPS,
        "warmup_steps": 2,
        "decoder_channels": 16,
        "decoder_dilation": 1,
        "scales": (1.0, 0.5),
        "low_threshold": 0.55,
        "high_threshold": 0.75,
        "cle_high_threshold": 0.65,
        "late_low_threshold": 0.5,
        "late_high_threshold": 0.7,
    }
    chosen = MoReSettings(**(settings | changes))
    return MoRe(backbone=backbone, num_classes=num_classes, settings=chosen, quirks=quirks).train()


def make_images(height: int = SIDE, width: int = SIDE, count: int = 2, seed: int = 1) -> Tensor:
    patches = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(patches, size=(height, width), mode="bicubic")


def make_batch(*, side: int = SIDE, num_classes: int = NUM_CLASSES, seed: int = 1) -> Batch:
    labels = torch.zeros(2, num_classes)
    labels[0, 0] = labels[0, -1] = labels[1, num_classes // 2] = 1
    box = torch.tensor([[0, side, 0, side], [10, side, 0, side - 16]])
    images = make_images(side, side, seed=seed)
    return {"image": images, "labels": labels, "box": box, "index": torch.tensor([5, 9])}


def losses_at(module: MoRe, step: int, seed: int = 1, **changes: Any) -> Step:
    torch.manual_seed(seed)
    return module.losses(make_batch(seed=seed) | changes, step)
