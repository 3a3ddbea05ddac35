"""A small TKP-PCL, and what its tests feed it."""

from typing import Any

import torch
from torch import Tensor

from wsss.methods.base import Batch
from wsss.methods.tkp_pcl import TKPPCL, TKPPCLSettings
from wsss.models.backbone import Backbone

SIDE, CLASSES = 32, 4


def tiny(*, depth: int = 7, proj_drop: float = 0.1, **changes: Any) -> TKPPCL:
    """Build a TKP-PCL on 16 tokens of width 24; epsilon suits a random network's flat scores."""
    torch.manual_seed(0)
    overrides = {"embed_dim": 24, "depth": depth, "num_heads": 3, "img_size": SIDE, "patch_size": 8}
    backbone = Backbone(
        name="vit_tiny_patch16_224",
        weights="random",
        overrides={**overrides, "proj_drop_rate": proj_drop},
    )
    settings = {"max_steps": 20, "warmup_steps": 2, "lstm_hidden": 6, "epsilon": 0.5}
    chosen = TKPPCLSettings(**{**settings, **changes})
    return TKPPCL(backbone=backbone, num_classes=CLASSES, settings=chosen).train()


def without_dropout(**changes: Any) -> TKPPCL:
    return tiny(proj_drop=0.0, dropout=0.0, **changes)


def make_batch(size: int = 4, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(size, CLASSES)
    for index in range(size):
        labels[index, [index % CLASSES, (index * 2 + 1) % CLASSES]] = 1
    return {
        "image": torch.randn(size, 3, SIDE, SIDE, generator=generator),
        "labels": labels,
        "name": [f"image{index}" for index in range(size)],
    }


def random_scores(*shape: int, seed: int = 0, sharp: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)
