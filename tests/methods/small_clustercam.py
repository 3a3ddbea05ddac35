"""A small ClusterCAM, and what its tests feed it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from wsss.methods.base import Batch, Step
from wsss.methods.clustercam import ClusterCAM, ClusterCAMSettings
from wsss.methods.clustercam.official import CORRECTED, Quirks
from wsss.models.backbone import Backbone

SIDE = 96
NUM_CLASSES = 4
MAX_STEPS = 80


def backbone_of(*, depth: int = 4, heads: int = 3, **overrides: Any) -> Backbone:
    sizes = {"embed_dim": 48, "depth": depth, "num_heads": heads, "img_size": 64}
    return Backbone(name="vit_tiny_patch16_224", weights="random", overrides=sizes | overrides)


def built(
    backbone: Backbone,
    quirks: Quirks = CORRECTED,
    *,
    num_classes: int = NUM_CLASSES,
    max_steps: int = MAX_STEPS,
    **settings: Any,
) -> ClusterCAM:
    chosen = ClusterCAMSettings(max_steps=max_steps, **settings)
    return ClusterCAM(backbone=backbone, num_classes=num_classes, settings=chosen, quirks=quirks)


def tiny(
    quirks: Quirks = CORRECTED, *, depth: int = 4, heads: int = 3, **changes: Any
) -> ClusterCAM:
    """Build four blocks on 64 px positions with weights that are not nearly uniform."""
    torch.manual_seed(0)
    settings = {"drop_path": 0.0, "decoder_channels": 16} | changes
    module = built(backbone_of(depth=depth, heads=heads), quirks, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("mixing"):
                parameter.copy_(0.5 + 0.6 * noise)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            elif name.endswith(("cls_token", "pos_embed")):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise * np.prod(parameter.shape[1:]) ** -0.5)
    return module.train()


def make_images(height: int = SIDE, width: int = SIDE, count: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(count, 3, 6, 6, generator=generator)
    return F.interpolate(patches, size=(height, width), mode="bicubic")


def make_batch(seed: int = 1) -> Batch:
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])
    return {"image": make_images(seed=seed), "labels": labels, "name": ["a", "b"]}


def losses_at(module: ClusterCAM, step: int, seed: int = 1) -> Step:
    torch.manual_seed(seed)
    return module.losses(make_batch(seed), step)


@torch.no_grad()
def logits_of(module: ClusterCAM, images: Tensor) -> Tensor:
    return module(images).seg_logits


def fit(module: ClusterCAM, folder: Path, steps: int) -> lightning.Trainer:
    samples = [{"image": make_images(count=1, seed=s)[0], "name": str(s)} for s in range(4)]
    for index, sample in enumerate(samples):
        sample["labels"] = torch.eye(NUM_CLASSES)[index]
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(samples, batch_size=2))  # type: ignore[arg-type]
    return trainer


@contextmanager
def changed(thing: object, name: str, value: object) -> Iterator[None]:
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)
