"""A small MCTformer+, what its tests feed it, and its network written out as its page states it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from wsss.maps.pixels import normalise
from wsss.methods.base import Batch, Step
from wsss.methods.mctformer import MCTformerPlus, MCTformerPlusSettings
from wsss.methods.mctformer.official import CORRECTED, Quirks
from wsss.models.backbone import Backbone

SIDE = 64
NUM_CLASSES = 4


def backbone_of(*, depth: int = 3, **overrides: Any) -> Backbone:
    sizes = {"embed_dim": 48, "depth": depth, "num_heads": 3, "img_size": 64}
    return Backbone(name="vit_tiny_patch16_224", weights="random", overrides=sizes | overrides)


def built(
    backbone: Backbone,
    quirks: Quirks = CORRECTED,
    *,
    num_classes: int = NUM_CLASSES,
    **settings: Any,
) -> MCTformerPlus:
    """Build with settings of tests: 90 steps, positions of 64 px, no dropped path."""
    fixed = {"max_steps": 90, "input_size": SIDE, "drop_path": 0.0}
    chosen = MCTformerPlusSettings(**(fixed | settings))
    return MCTformerPlus(backbone=backbone, num_classes=num_classes, settings=chosen, quirks=quirks)


def tiny(quirks: Quirks = CORRECTED, *, depth: int = 3, **changes: Any) -> MCTformerPlus:
    """Build three blocks with weights that are not nearly uniform, tokens that have parted."""
    torch.manual_seed(0)
    module = built(backbone_of(depth=depth), quirks, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            elif name.endswith(("cls_token", "pos_embed")):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise * np.prod(parameter.shape[1:]) ** -0.5)
    return module.eval()


def make_pictures(
    height: int = SIDE, width: int = SIDE, count: int = 1, seed: int = 1
) -> NDArray[np.uint8]:
    """Pictures (B, H, W, 3) of coarse blobs."""
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.rand(count, 3, 6, 6, generator=generator)
    full = F.interpolate(blobs, size=(height, width), mode="bilinear", align_corners=False)
    return (255 * full).round().byte().permute(0, 2, 3, 1).numpy()


def make_images(height: int = SIDE, width: int = SIDE, count: int = 2, seed: int = 1) -> Tensor:
    return torch.stack([normalise(one) for one in make_pictures(height, width, count, seed)])


def make_batch(seed: int = 1) -> Batch:
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])
    return {"image": make_images(seed=seed), "labels": labels, "name": ["a", "b"]}


def losses_at(module: MCTformerPlus, step: int = 0) -> Step:
    return module.losses(make_batch(), step)


def fit(module: MCTformerPlus, folder: Path, steps: int) -> lightning.Trainer:
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
    trainer.fit(module.train(), DataLoader(samples, batch_size=2))  # type: ignore[arg-type]
    return trainer


# ---- the network of the page (mctformer.md 1 and 3) ----------------------------------------------


@dataclass
class Page:
    """What the page's network makes of images; attention of every block is kept whole."""

    tokens: Tensor  # after every block, (L, B, K+N, D)
    attentions: Tensor  # P, head mean, (L, B, K+N, K+N)
    features: Tensor  # F, (B, D, h, w)
    patch_map: Tensor  # U, (B, K, h, w)

    @property
    def count(self) -> int:
        return self.patch_map.shape[1]

    def class_maps(self, layers: int) -> Tensor:
        """R, the mean over the last blocks, (B, K, h, w)."""
        rows = self.attentions[-layers:, :, : self.count, self.count :].mean(0)
        return rows.view_as(self.patch_map)

    @property
    def affinity(self) -> Tensor:
        """Omega, (B, N, N)."""
        return self.attentions[:, :, self.count :, self.count :].sum(0)

    def spread(self, maps: Tensor) -> Tensor:
        values = maps.flatten(2)  # (B, K, N)
        whole = (self.affinity[:, None] * values[:, :, None]).sum(-1)
        return whole.view_as(maps)

    def fused(self, layers: int) -> Tensor:
        return (self.class_maps(layers) * self.patch_map.clamp_min(0)) ** 0.5


def norm(layer: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centred / deviation * layer.weight + layer.bias


@torch.no_grad()
def network_of_the_page(module: MCTformerPlus, images: Tensor) -> Page:
    """Run the network on images of whole patches, section 1."""
    vit: Any = module.backbone.vit
    count, conv = module.num_classes, vit.patch_embed.proj
    embedded = F.conv2d(images, conv.weight, conv.bias, stride=16)
    grid = embedded.shape[-2:]
    classes, patches = vit.pos_embed[:, :count], vit.pos_embed[:, count:]
    side = round(patches.shape[1] ** 0.5)
    stored = patches.mT.reshape(1, -1, side, side)
    if grid != (side, side):
        factor = (grid[0] / side, grid[1] / side)
        stored = F.interpolate(stored, scale_factor=factor, mode="bicubic", align_corners=False)
    tokens = torch.cat(
        [
            (vit.cls_token + classes).expand(len(images), -1, -1),
            (embedded + stored).flatten(2).mT,
        ],
        dim=1,
    )
    after, attentions = [], []
    for block in vit.blocks:
        heads = block.attn.num_heads
        parts = block.attn.qkv(norm(block.norm1, tokens)).chunk(3, dim=-1)
        queries, keys, values = (torch.stack(part.chunk(heads, -1), 1) for part in parts)
        weights = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)
        mixed = torch.cat(list((weights @ values).unbind(1)), dim=-1)
        tokens = tokens + block.attn.proj(mixed)
        tokens = tokens + block.mlp(norm(block.norm2, tokens))
        after.append(tokens)
        attentions.append(weights.mean(1))
    features = tokens[:, count:].mT.unflatten(2, grid)
    head = module.patch_head
    patch_map = F.conv2d(features, head.weight, head.bias, padding=1)
    return Page(torch.stack(after), torch.stack(attentions), features, patch_map)
