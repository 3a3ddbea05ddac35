r"""Pretrains ViT-Pico, the small backbone that ships with wsss, from image-level labels only.

Images are composites made on the fly from the cut-outs and backgrounds that MiniVOC's ``train``
split uses. No mask is ever a target; val_unseen cut-outs and the backgrounds of both validation
splits are never read by the training.

* Stage ``objects``: one cut-out fills most of a small image. The target is *which* cut-out it is
  (some 800 identities, most of them of no class), as ImageNet's 1000 classes teach more than eight
  would, plus the eight classes as multi-label.
* Stage ``scenes``: one to three objects in a wider range of sizes; the same two targets.
* Stage ``mosaics``: in turn 3 x 3 or 2 x 2 pictures side by side on one canvas, and one scene; some
  pictures are empty; each keeps its own image-level label and is pooled by itself. A token then
  has to say what is near it, which is what a CAM is read from.
* Stage ``distil``: scenes and mosaics; every token learns the features and class probabilities
  that a convolutional teacher (``teacher.py``, itself fine-tuned from the same image-level labels)
  has at its place. It is what makes tokens local: a ViT that learns from image-level labels alone
  spreads what it knows over the whole image.

    python tools/pretrain_pico.py --debs CACHE --out runs/pico --resume \
        --teacher-start efficientnet-lite0-57934424.pth
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
import torch.nn.functional as F
from cutouts import (
    CLASSES,
    HOLDOUT_BACKGROUNDS,
    CutOut,
    Placement,
    composite,
    load_media,
    premultiplied,
    warp,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from teacher import DIM as TEACHER_DIM
from teacher import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Teacher,
    identity_loss,
    split_tiles,
    top_mean,
    train_teacher,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

MEAN, STD = (np.array(v, np.float32) * 255 for v in (IMAGENET_MEAN, IMAGENET_STD))
PATCH = 8
GRID = 12  # patches on a side of the position embedding: 96 / 8
MAX_OBJECTS = 3
BLOCKS = 5
MOSAIC_TILES, DISTIL_TILES = (3, 2, 3, 1), (1, 3, 1, 2, 1)
EMPTY = 0.3  # share of a mosaic's pictures without an object
TOP = {1: 0.08, 2: 0.15, 3: 0.2}  # share of a picture's tokens that show a class, by tiles


@dataclass(frozen=True)
class Stage:
    """One part of the schedule.

    Attributes:
        name: ``objects``, ``scenes``, ``mosaics`` or ``distil``.
        images: how many images the stage draws.
        size: side of the images in pixels, a multiple of 8 (times the tiles).
        batch: images in a step.
        lr: peak learning rate.
        warmup: steps until the peak; after it a cosine falls to a fiftieth of it.
        keep: patches of an image that are read, drawn at random; 0 reads all.
        grids: sides of the position grid, taken in turn from step to step. The methods stretch
            the grid to 20 patches for MiniVOC's 160 pixels; the net should know it so as well.
        tiles: pictures on a side of a canvas, in turn from batch to batch; 1 is a single picture.
    """

    name: str
    images: int
    size: int
    batch: int
    lr: float
    warmup: int
    keep: int = 0
    grids: tuple[int, ...] = (GRID,)
    tiles: tuple[int, ...] = (1,)

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.images // self.batch

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step of this stage."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


# ---------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Pool:
    """What the training may paste: class cut-outs first, then extras; and photographs."""

    cutouts: list[CutOut]
    photos: list[np.ndarray]

    @property
    def num_classed(self) -> int:
        """Number of cut-outs that carry one of the classes."""
        return sum(c.label > 0 for c in self.cutouts)


def texture(size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a random coloured texture, float32 ``(size, size, 3)`` in 0..255.

    Smooth noise of two wavelengths and sometimes stripes: it stands in for backgrounds that the
    two dozen photographs do not show.
    """
    image = np.zeros((size, size, 3), np.float32)
    for cells in rng.choice((1, 2, 4, 8, 16, 32), 2, replace=False):
        noise = rng.normal(0, 45, (cells + 1, cells + 1, 3)).astype(np.float32)
        image += cv2.resize(noise, (size, size), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.4:
        u, v = rng.normal(0, 0.5, 2)
        phase = u * np.arange(size)[None, :] + v * np.arange(size)[:, None]
        wave = np.sin(phase) if rng.random() < 0.5 else np.sign(np.sin(phase))
        image += wave.astype(np.float32)[..., None] * rng.normal(0, 30, 3).astype(np.float32)
    return np.clip(image + rng.uniform(30, 225, 3).astype(np.float32), 0, 255)


def backdrop(photos: list[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a random background, uint8 ``(size, size, 3)``: photo crop, texture or a blend."""
    kind = rng.random()
    if kind < 0.15 or not photos:
        return texture(size, rng).astype(np.uint8)
    photo = photos[int(rng.integers(len(photos)))]
    height, width = photo.shape[:2]
    side = int(rng.uniform(0.25, 1.0) * min(height, width))
    x, y = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    crop = cv2.resize(photo[y : y + side, x : x + side], (size, size), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    crop = crop.astype(np.float32)
    if kind < 0.25:
        crop = crop * 0.6 + texture(size, rng) * 0.4
    gain = rng.uniform(0.7, 1.3) * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    return np.clip(crop * gain + rng.uniform(-25, 25), 0, 255).astype(np.uint8)


def random_place(
    cutout: CutOut, size: int, sides: tuple[float, float], rng: np.random.Generator
) -> Placement:
    """Places one object at random.

    Args:
        cutout: the object.
        size: side of the canvas in pixels.
        sides: range of the object's longer side in pixels.
        rng: source of randomness.
    """
    height, width = cutout.rgba.shape[:2]
    scale = float(np.exp(rng.uniform(*np.log(sides)))) / max(height, width)
    half = np.array((width, height)) * scale / 2
    # An eighth of the object may leave the canvas; an object wider than it hangs over both sides.
    low = np.minimum(half * 0.75, size - half * 0.75)
    centre = rng.uniform(np.minimum(low, size - low), np.maximum(low, size - low))
    return Placement(
        cutout,
        centre=(float(centre[0]), float(centre[1])),
        scale=scale,
        angle=float(rng.uniform(-15, 15)),
        flip=bool(rng.random() < 0.5),
        gain=tuple(rng.uniform(0.8, 1.2) * rng.uniform(0.93, 1.07, 3)),
        offset=float(rng.uniform(-15, 15)),
    )


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Greys, blurs, adds noise to or covers a part of an image at random.

    Args:
        image: uint8 ``(s, s, 3)``.
        rng: source of randomness.

    Returns:
        float32 ``(s, s, 3)`` in about 0..255.
    """
    out = image.astype(np.float32)
    chance = rng.random(4)
    size = out.shape[0]
    if chance[0] < 0.03:
        out[:] = out.mean(axis=2, keepdims=True)
    if chance[1] < 0.2:
        out = cv2.GaussianBlur(out, (5, 5), float(rng.uniform(0.4, 1.2)))
    if chance[2] < 0.2:
        out += rng.normal(0, rng.uniform(2, 10), out.shape).astype(np.float32)
    if chance[3] < 0.1:
        h, w = (rng.uniform(0.1, 0.3, 2) * size).astype(int)
        y, x = int(rng.integers(size - h)), int(rng.integers(size - w))
        out[y : y + h, x : x + w] = rng.uniform(0, 255, 3)
    return out


class Composites(Dataset):
    """Endless composites; item ``i`` is always the same image, so a resumed run continues exactly.

    Items are dicts: ``image`` float32 ``(3, s, s)`` normalised, ``identity`` int64 ``(t, 3)`` with
    -1 where there are fewer objects, ``classes`` float32 ``(t, 8)``, ``window`` float32 ``(2,)`` in
    0..1, where on the position grid the image lies, ``patches`` int64 ``(k,)`` the patches to read.
    ``t`` is the number of pictures on the canvas, 1 except in mosaics.
    """

    def __init__(self, pool: Pool, stage: Stage, seed: int) -> None:
        """Prepares the cut-outs of ``pool`` for ``stage``."""
        self.pool, self.stage, self.seed = pool, stage, seed
        self.sources = [premultiplied(c) for c in pool.cutouts]
        labels = np.array([c.label for c in pool.cutouts])
        self.groups = [np.nonzero(labels == i)[0] for i in range(1, len(CLASSES) + 1)]
        self.groups = [g for g in self.groups if len(g)]
        self.extras = np.nonzero(labels == 0)[0]

    def __len__(self) -> int:
        """Returns the number of images of the stage."""
        return self.stage.images

    def _choose(self, rng: np.random.Generator, kind: str) -> list[int]:
        """Draws the cut-outs of one picture, the first being the main one."""
        counts = {"objects": (0.8, 0.2, 0.0), "scenes": (0.35, 0.4, 0.25), "tile": (1.0, 0.0, 0.0)}
        extra_share = {"objects": 0.4, "scenes": 0.12, "tile": 0.15}[kind]
        chosen = []
        for _ in range(1 + int(rng.choice(MAX_OBJECTS, p=counts[kind]))):
            from_extras = len(self.extras) and rng.random() < extra_share
            group = self.extras if from_extras else self.groups[int(rng.integers(len(self.groups)))]
            chosen.append(int(group[int(rng.integers(len(group)))]))
        return chosen

    @staticmethod
    def _sides(kind: str, main: bool) -> tuple[float, float]:
        """Returns the range of an object's longer side as shares of the picture's."""
        if kind == "scenes":
            return (0.3, 1.0) if main else (0.2, 0.65)
        if kind == "tile":  # up to a close-up of a part
            return (0.5, 2.2)
        return (0.55, 1.3) if main else (0.35, 0.6)

    def _picture(
        self, background: np.ndarray, kind: str, rng: np.random.Generator
    ) -> tuple[np.ndarray, list[int]]:
        """Returns one picture on ``background``, uint8 ``(s, s, 3)``, and the cut-outs in it."""
        size = background.shape[0]
        if kind == "tile" and rng.random() < EMPTY:
            return background, []
        for _ in range(8):
            chosen = self._choose(rng, kind)
            order = [int(i) for i in rng.permutation(len(chosen))]
            sides = [[size * share for share in self._sides(kind, i == 0)] for i in order]
            places = [
                random_place(self.pool.cutouts[chosen[i]], size, (low, high), rng)
                for i, (low, high) in zip(order, sides, strict=True)
            ]
            layers = [
                warp(p, size, self.sources[chosen[i]]) for i, p in zip(order, places, strict=True)
            ]
            ids = [chosen[i] for i in order]
            # Labels tell which object is where only to count what stays visible.
            image, _, visible = composite(background, layers, range(1, len(ids) + 1))
            drawn = [max(1, int((layer[..., 3] >= 128).sum())) for layer in layers]
            if all(v >= max(40, 0.35 * d) for v, d in zip(visible, drawn, strict=True)):
                break
        return image, ids

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Makes image ``index``."""
        rng = np.random.default_rng((self.seed, index))
        size = self.stage.size
        tiles = self.stage.tiles[index // self.stage.batch % len(self.stage.tiles)]
        kind = "tile" if tiles > 1 else "objects" if self.stage.name == "objects" else "scenes"
        side = size // tiles
        # Half of the mosaics share one backdrop: nothing but an object may tell pictures apart.
        shared = backdrop(self.pool.photos, size, rng)
        separate = tiles > 1 and rng.random() < 0.5
        image, pictures = np.empty_like(shared), []
        for y in range(0, size, side):
            for x in range(0, size, side):
                ground = shared[y : y + side, x : x + side]
                if separate:
                    ground = backdrop(self.pool.photos, side, rng)
                picture, ids = self._picture(ground, kind, rng)
                image[y : y + side, x : x + side] = picture
                pictures.append((picture, ids))
        identity = np.full((tiles * tiles, MAX_OBJECTS), -1)
        classes = np.zeros((tiles * tiles, len(CLASSES)), np.float32)
        for tile, (_, ids) in enumerate(pictures):
            identity[tile, : len(ids)] = ids
            for i in ids:
                if self.pool.cutouts[i].label:
                    classes[tile, self.pool.cutouts[i].label - 1] = 1
        total = (size // PATCH) ** 2
        normal = (distort(image, rng) - MEAN) / STD
        return {
            "image": np.ascontiguousarray(normal.transpose(2, 0, 1), np.float32),
            "identity": identity,
            "classes": classes,
            "window": rng.random(2, np.float32),
            "patches": rng.permutation(total)[: self.stage.keep or total],
        }


def batches(data: Dataset, batch: int, start: int, workers: int) -> Iterator[dict[str, Tensor]]:
    """Yields the batches of a stage from step ``start`` on, in order."""
    loader = DataLoader(
        data,
        batch_size=batch,
        sampler=range(start * batch, len(data) // batch * batch),
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        worker_init_fn=lambda _: cv2.setNumThreads(0),
    )
    yield from loader


# ----------------------------------------------------------------------------------- model


def pico(depth: int = BLOCKS) -> nn.Module:
    """Returns the backbone: a ViT-Tiny of fewer blocks with 8-pixel patches."""
    return timm.create_model(
        "vit_tiny_patch16_224", patch_size=PATCH, depth=depth, img_size=GRID * PATCH, num_classes=0
    )


def positions(vit: nn.Module, grid: int) -> Tensor:
    """Returns the patch positions ``(grid ** 2, 192)``, resampled where ``grid`` is not 12."""
    table = vit.pos_embed[:, 1:]
    if grid != GRID:
        square = table.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
        square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
        table = square.flatten(2).transpose(1, 2)
    return table[0]


def tokens(
    vit: nn.Module,
    images: Tensor,
    window: Tensor | None = None,
    patches: Tensor | None = None,
    grid: int = GRID,
) -> Tensor:
    """Runs the backbone on images that may be smaller than the grid of positions.

    Args:
        vit: the backbone.
        images: ``(b, 3, s, s)``.
        window: ``(b, 2)`` in 0..1, where each image lies on the position grid from top to bottom
            and left to right; ``None`` is the top left corner. Drawing it at random makes the net
            independent of the absolute place.
        patches: int64 ``(b, k)``, the patches to read; ``None`` reads all. Leaving half of them
            out costs little accuracy and halves the time.
        grid: patches on a side of the position grid.

    Returns:
        Normalised tokens ``(b, 1 + k, 192)``, cls first.
    """
    x = vit.patch_embed.proj(images)
    batch, dim, side, _ = x.shape
    x = x.flatten(2).transpose(1, 2)
    if window is None:
        window = torch.zeros(batch, 2, device=x.device)
    window = (window * (grid - side + 1)).long()
    steps = torch.arange(side, device=x.device)
    rows, cols = window[:, :1] + steps, window[:, 1:] + steps
    index = (rows[:, :, None] * grid + cols[:, None, :]).flatten(1)
    x = x + positions(vit, grid)[index]
    if patches is not None:
        x = x.gather(1, patches[:, :, None].expand(-1, -1, dim))
    cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(batch, 1, dim)
    return vit.norm(vit.blocks(torch.cat((cls, x), dim=1)))


class Pupil(nn.Module):
    """Backbone with the throw-away heads of the pretraining."""

    def __init__(self, identities: int) -> None:
        """Makes heads for ``identities`` cut-outs and the eight classes."""
        super().__init__()
        self.vit = pico()
        dim = self.vit.embed_dim
        self.identity_cls = nn.Linear(dim, identities)
        self.identity_mean = nn.Linear(dim, identities)
        self.classes_cls = nn.Linear(dim, len(CLASSES))
        self.classes_mean = nn.Linear(dim, len(CLASSES))
        self.classes_max = nn.Linear(dim, len(CLASSES))
        self.classes_token = nn.Linear(dim, len(CLASSES))
        self.teacher = nn.Linear(dim, TEACHER_DIM)

    def forward(
        self,
        images: Tensor,
        window: Tensor | None = None,
        patches: Tensor | None = None,
        grid: int = GRID,
        tiles: int = 1,
    ) -> dict[str, Tensor]:
        """Returns identity logits ``(b, n)`` and class logits ``(b, 8)`` of each kind of pooling.

        The max over tokens is the pooling that the methods' classifiers use; ``classes_token`` is
        the mean of the largest logits of a token, what a CAM shows: so many tokens, a share of
        ``TOP``, must show a class, and no token of a picture without it may. All but those of the
        class token are of each of the ``tiles ** 2`` pictures of a mosaic: ``(b * tiles ** 2, .)``.
        ``token_logits`` are those of every token, ``(b, n, 8)``; ``tokens`` is what they are read
        from, ``(b, n, 192)``.
        """
        out = tokens(self.vit, images, window, patches, grid)
        cls, local = out[:, 0], out[:, 1:]
        token_logits = self.classes_token(local)
        pictures = split_tiles(local, tiles) if tiles > 1 else local
        pooled = split_tiles(token_logits, tiles) if tiles > 1 else token_logits
        mean, peak = pictures.mean(1), pictures.amax(1)
        return {
            "tokens": local,
            "token_logits": token_logits,
            "identity_cls": self.identity_cls(cls),
            "identity_mean": self.identity_mean(mean),
            "classes_cls": self.classes_cls(cls),
            "classes_mean": self.classes_mean(mean),
            "classes_max": self.classes_max(peak),
            "classes_token": top_mean(pooled, TOP[tiles]),
        }


def whiten_patches(vit: nn.Module, images: Tensor) -> None:
    """Sets the patch embedding to the whitened principal components of image patches.

    192 numbers in a patch, 192 channels: nothing is lost, and the blocks start from inputs of
    equal variance in place of ones that brightness dominates.

    Args:
        vit: the backbone, changed in place.
        images: ``(n, 3, s, s)`` normalised images to learn the components from.
    """
    patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH * PATCH)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T).double())
    # The floor keeps sensor noise, the smallest components, from being blown up to full size.
    scale = 0.5 / (values + 0.02 * values.mean()).sqrt()
    weight = (vectors * scale).T.to(patches.dtype)
    weight = torch.linalg.qr(torch.randn(len(weight), len(weight)))[0] @ weight
    vit.patch_embed.proj.weight.data.copy_(weight.view_as(vit.patch_embed.proj.weight))
    vit.patch_embed.proj.bias.data.copy_(-weight @ mean)


def seed_positions(vit: nn.Module) -> None:
    """Sets the position embedding to 2-D sines, so that nearness is known from the start."""
    dim = vit.embed_dim // 4
    freq = 1.0 / 100 ** (torch.arange(dim) / dim)
    angle = torch.arange(GRID)[:, None] * freq
    wave = torch.cat((angle.sin(), angle.cos()), dim=1)
    rows = wave[:, None].expand(GRID, GRID, -1)
    cols = wave[None].expand(GRID, GRID, -1)
    vit.pos_embed.data[0, 1:] = 0.25 * torch.cat((rows, cols), dim=2).reshape(GRID * GRID, -1)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Returns roughly the nearest orthogonal matrix ``(r, c)``, by Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for the matrices of the blocks, in float32.

    PyTorch's own Muon iterates in bfloat16, which is slow on processors without that arithmetic.
    Updates are scaled to the size of AdamW's so that one learning rate serves both.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, decay: float) -> None:
        """Takes the matrices ``(r, c)`` to optimise."""
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Makes one update."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])
                # qkv holds three matrices, each with directions of its own.
                parts = update.chunk(3) if p.shape[0] == 3 * p.shape[1] else (update,)
                update = torch.cat([orthogonalise(part) for part in parts])
                size = 0.2 * math.sqrt(max(parts[0].shape))
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update, alpha=-group["lr"] * size)


def optimisers(model: Pupil) -> list[torch.optim.Optimizer]:
    """Returns Muon for the blocks' matrices and AdamW for all else."""
    matrices = [p for p in model.vit.blocks.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.05},
        {"params": [p for p in rest if p.ndim != 2], "weight_decay": 0.0},
    ]
    return [Muon(matrices, 1e-3, 0.05), torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))]


def objective(out: dict[str, Tensor], batch: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
    """Returns the weighted loss terms: identities share the probability, classes are independent.

    ``mosaics`` is about place: what asks for one answer about the whole canvas weighs little there,
    since it makes every token tell the same.
    """
    identity, classes = batch["identity"], batch["classes"]
    local = classes.flatten(0, 1)
    terms = {
        "identity_mean": 0.5 * identity_loss(out["identity_mean"], identity.flatten(0, 1)),
        "classes_cls": F.binary_cross_entropy_with_logits(out["classes_cls"], classes.amax(1)),
        "classes_max": F.binary_cross_entropy_with_logits(out["classes_max"], local),
        "classes_token": F.binary_cross_entropy_with_logits(out["classes_token"], local),
    }
    weight = {"objects": 0.5, "scenes": 2.0, "mosaics": 2.0, "distil": 0.5}[stage]
    terms |= {name: weight * term for name, term in terms.items() if name != "identity_mean"}
    if stage in ("mosaics", "distil"):
        terms["classes_cls"] = 0.1 * terms["classes_cls"]
        return terms
    mean = F.binary_cross_entropy_with_logits(out["classes_mean"], local)
    return terms | {
        "identity_cls": 0.5 * identity_loss(out["identity_cls"], identity.flatten(1)),
        "classes_mean": weight * mean,
    }


def distillation(
    model: Pupil, out: dict[str, Tensor], targets: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Returns the weighted terms that tie each token to the teacher at its place.

    Args:
        model: the pupil.
        out: what it gave.
        targets: of :meth:`teacher.Teacher.targets`.
    """
    features, probabilities = targets
    cosine = F.cosine_similarity(model.teacher(out["tokens"]), features, dim=-1)
    token = F.binary_cross_entropy_with_logits(out["token_logits"], probabilities)
    return {"teacher_features": 2 * (1 - cosine).mean(), "teacher_classes": 4 * token}


# ------------------------------------------------------------------------------- evaluation


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Returns the mean over classes of the area under precision and recall.

    Args:
        scores: ``(n, c)``.
        truth: ``(n, c)`` of 0 and 1.
    """
    values = []
    for s, t in zip(scores.T, truth.T, strict=True):
        if t.any():
            hit = t[np.argsort(-s, kind="stable")]
            precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
            values.append(float((precision * hit).sum() / hit.sum()))
    return float(np.mean(values))


@torch.no_grad()
def evaluate(model: Pupil, holdout: dict[str, Tensor]) -> dict[str, float]:
    """Returns image mAP of each class head on the fixed ``holdout`` batch."""
    model.eval()
    parts = [model(chunk) for chunk in holdout["image"].split(64)]
    model.train()
    truth = holdout["classes"].flatten(0, 1).cpu().numpy()
    return {
        name: average_precision(torch.cat([p[name] for p in parts]).cpu().numpy(), truth)
        for name in ("classes_cls", "classes_mean", "classes_max", "classes_token")
    }


def make_holdout(pool: Pool, photos: list[np.ndarray], seed: int) -> dict[str, Tensor]:
    """Returns 240 scenes of training cut-outs on backgrounds the training does not use."""
    classed = pool.cutouts[: pool.num_classed]
    data = Composites(Pool(classed, photos), Stage("scenes", 240, 96, 240, 0, 1), seed)
    return next(batches(data, 240, 0, 0))


# ------------------------------------------------------------------------------------- probe


def read_split(root: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads a MiniVOC split: images ``(n, s, s, 3)``, masks ``(n, s, s)``, labels ``(n, 8)``."""
    names = (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
    images, masks, labels = [], [], []
    for name in names:
        with Image.open(root / "JPEGImages" / f"{name}.jpg") as image:
            images.append(np.array(image.convert("RGB")))
        with Image.open(root / "SegmentationClass" / f"{name}.png") as mask:
            masks.append(np.array(mask))
        text = (root / "Annotations" / f"{name}.xml").read_text()
        labels.append([float(f"<name>{c}</name>" in text) for c in CLASSES])
    return np.stack(images), np.stack(masks), np.array(labels, np.float32)


def normalised(images: np.ndarray) -> Tensor:
    """Returns uint8 ``(n, s, s, 3)`` as the net's float32 input ``(n, 3, s, s)``."""
    return torch.from_numpy(((images - MEAN) / STD).transpose(0, 3, 1, 2).copy())


def probe_crop(image: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """Resizes an image by 0.8 to 1.25 and cuts a random, maybe mirrored, square of ``side``."""
    size = int(image.shape[0] * rng.uniform(0.8, 1.25))
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    y, x = rng.integers(0, size - side + 1, 2)
    crop = image[y : y + side, x : x + side]
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def finetune(vit: nn.Module, root: Path, steps: int, seed: int, device: str) -> nn.Linear:
    """Trains backbone and classifier on MiniVOC ``train``, image-level labels, in place.

    A crop keeps the image's labels even where it has cut an object off, as in WSSS training.

    Args:
        vit: the backbone.
        root: MiniVOC's ``VOC2012``.
        steps: updates, 16 crops of 128 pixels each, AdamW, peak rate 3e-4 (classifier 3e-3).
        seed: of crops and classifier.
        device: torch device.

    Returns:
        The classifier on max-pooled patch tokens, without bias, as the methods use.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images, _, labels = read_split(root, "train")
    head = nn.Linear(vit.embed_dim, len(CLASSES), bias=False).to(device)
    optimiser = torch.optim.AdamW(
        [{"params": vit.parameters(), "lr": 3e-4}, {"params": head.parameters(), "lr": 3e-3}],
        weight_decay=0.05,
    )
    ramp = torch.optim.lr_scheduler.OneCycleLR(optimiser, [3e-4, 3e-3], steps, pct_start=0.1)
    for _ in range(steps):
        chosen = rng.choice(len(images), 16, replace=False)
        crops = normalised(np.stack([probe_crop(images[i], 128, rng) for i in chosen])).to(device)
        logits = head(tokens(vit, crops, grid=16)[:, 1:].amax(1))
        loss = F.multilabel_soft_margin_loss(logits, torch.from_numpy(labels[chosen]).to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        ramp.step()
    return head


@torch.no_grad()
def activation_maps(
    vit: nn.Module, head: nn.Linear, images: np.ndarray, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns class scores ``(n, 8)`` and raw CAMs ``(n, 8, 20, 20)`` of whole images."""
    scores, cams = [], []
    for chunk in normalised(images).split(20):
        out = tokens(vit, chunk.to(device), grid=chunk.shape[-1] // PATCH)[:, 1:]
        side = int(out.shape[1] ** 0.5)
        scores.append(head(out.amax(1)).cpu())
        cams.append(head(out).transpose(1, 2).unflatten(2, (side, side)).cpu())
    return torch.cat(scores).numpy(), torch.cat(cams).numpy()


def cam_miou(cams: np.ndarray, masks: np.ndarray, labels: np.ndarray, threshold: float) -> float:
    """Returns the mIoU, background included, of CAMs of the classes an image is labelled with.

    Args:
        cams: ``(n, 8, h, w)``; negative values are cut and each map is scaled to a maximum of 1.
        masks: ``(n, s, s)``; 255 does not count.
        labels: ``(n, 8)``.
        threshold: background where no map reaches it.
    """
    counts = np.zeros((len(CLASSES) + 1,) * 2, np.int64)
    for cam, mask, label in zip(cams, masks, labels, strict=True):
        cam = np.maximum(cam, 0) * label[:, None, None]
        cam = cam / np.maximum(cam.max((1, 2), keepdims=True), 1e-6)
        full = np.stack([cv2.resize(c, mask.shape, interpolation=cv2.INTER_LINEAR) for c in cam])
        guess = np.where(full.max(0) >= threshold, full.argmax(0) + 1, 0)
        known = mask != 255
        np.add.at(counts, (mask[known], guess[known]), 1)
    hit = np.diag(counts)
    return float((hit / np.maximum(counts.sum(0) + counts.sum(1) - hit, 1)).mean())


def probe(weights: Path | None, root: Path, steps: int, seed: int, device: str) -> dict[str, float]:
    """Fine-tunes shortly and measures image mAP and CAM mIoU.

    Args:
        weights: safetensors file, or ``None`` for timm's random start.
        root: MiniVOC's ``VOC2012``.
        steps: see :func:`finetune`.
        seed: of the random start, the crops and the classifier.
        device: torch device.

    Returns:
        Scores by name. The CAM threshold is the best of nine on the ``train`` masks.
    """
    torch.manual_seed(seed)
    vit = pico()
    if weights:
        vit.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    vit.to(device)
    head = finetune(vit, root, steps, seed, device)
    images, masks, labels = read_split(root, "train")
    _, cams = activation_maps(vit, head, images[:200], device)
    grid = [t / 10 for t in range(1, 10)]
    best = max(grid, key=lambda t: cam_miou(cams, masks[:200], labels[:200], t))
    result = {"cam_threshold": best}
    for split in ("val", "val_unseen"):
        images, masks, labels = read_split(root, split)
        scores, cams = activation_maps(vit, head, images, device)
        result[f"{split}_map"] = round(average_precision(scores, labels), 4)
        result[f"{split}_cam_miou"] = round(cam_miou(cams, masks, labels, best), 4)
    return result


# ----------------------------------------------------------------------------------- running


def export(model: Pupil, path: Path) -> str:
    """Writes the backbone as float16 safetensors, whole or not at all; returns the sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().half().contiguous() for k, v in model.vit.state_dict().items()}
    part = path.with_suffix(".part")
    save_file(state, part)
    os.replace(part, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Trainer:
    """Runs the stages, with checkpoints from which a run continues exactly."""

    def __init__(
        self,
        pool: Pool,
        stages: list[Stage],
        out: Path,
        seed: int = 0,
        device: str = "cpu",
        holdout: dict[str, Tensor] | None = None,
        workers: int = 0,
        weights: Path | None = None,
        compiled: bool = False,
        teacher: Teacher | None = None,
    ) -> None:
        """Builds model, optimisers and average; see :meth:`run`.

        Args:
            pool: what to paste.
            stages: the schedule.
            out: folder for checkpoint and log.
            seed: of weights and images.
            device: torch device.
            holdout: fixed batch to evaluate on.
            workers: loader processes.
            weights: where to export the averaged backbone at each evaluation and at the end.
            compiled: use ``torch.compile``.
            teacher: fine-tuned; a stage ``distil`` needs it.
        """
        torch.manual_seed(seed)
        out.mkdir(parents=True, exist_ok=True)
        self.pool, self.stages, self.out, self.seed = pool, stages, out, seed
        self.device, self.workers, self.weights = device, workers, weights
        self.teacher = teacher
        self.model = Pupil(len(pool.cutouts))
        sample = next(
            batches(Composites(pool, stages[0], seed + 99), min(256, stages[0].images), 0, 0)
        )
        whiten_patches(self.model.vit, sample["image"])
        seed_positions(self.model.vit)
        self.model.to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimisers = optimisers(self.model)
        self.holdout = holdout and {k: v.to(device) for k, v in holdout.items()}
        self.forward = torch.compile(self.model) if compiled else self.model
        self.stage_index = self.step = self.done = 0
        self.seconds = 0.0
        self.stopping = False

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "place": (self.stage_index, self.step, self.done),
            "seconds": self.seconds,
            "stages": [asdict(s) for s in self.stages],
        }
        torch.save(state, self.out / "last.part")
        os.replace(self.out / "last.part", self.out / "last.pt")

    def resume(self) -> None:
        """Continues from the checkpoint of an earlier run."""
        state = torch.load(self.out / "last.pt", map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.stage_index, self.step, self.done = state["place"]
        self.seconds = state["seconds"]

    def log(self, **values: object) -> None:
        """Appends one JSON line to ``log.jsonl`` and prints it."""
        line = json.dumps({"images": self.done, "seconds": round(self.seconds), **values})
        with (self.out / "log.jsonl").open("a") as handle:
            handle.write(line + "\n")
        print(line, flush=True)

    def train_step(self, batch: dict[str, Tensor], stage: Stage) -> dict[str, float]:
        """Makes one update and returns the loss terms."""
        batch = {k: v.to(self.device) for k, v in batch.items()}
        grid = stage.grids[self.step % len(stage.grids)]
        tiles = math.isqrt(batch["classes"].shape[1])
        out = self.forward(batch["image"], batch["window"], batch["patches"], grid, tiles)
        terms = objective(out, batch, stage.name)
        if stage.name == "distil":
            targets = self.teacher.targets(batch["image"], batch["classes"])
            terms |= distillation(self.model, out, targets)
        self.model.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = stage.rate(self.step)
            optimiser.step()
        # A short memory at first, or the random start would linger in the average.
        keep = min(0.998, (1 + self.done / stage.batch) / (10 + self.done / stage.batch))
        with torch.no_grad():
            mine, theirs = list(self.average.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(mine, theirs, 1 - keep)
        return {k: float(v.detach()) for k, v in terms.items()}

    def report(self, stage: Stage, means: dict[str, float]) -> None:
        """Logs the mean losses, evaluates the average, saves and exports."""
        scores = evaluate(self.average, self.holdout) if self.holdout else {}
        self.save()
        if self.weights:
            export(self.average, self.weights)
        short = {k: round(v, 4) for k, v in means.items()}
        marks = {f"map_{k.split('_')[1]}": round(v, 4) for k, v in scores.items()}
        self.log(stage=stage.name, step=self.step, lr=stage.rate(self.step), **short, **marks)

    def run(self, every: float = 240.0, limit: int | None = None) -> None:
        """Trains until the schedule ends, a signal comes or ``limit`` steps are made.

        Args:
            every: seconds between reports and checkpoints.
            limit: steps to make at most.
        """
        while self.stage_index < len(self.stages) and not self.stopping:
            stage = self.stages[self.stage_index]
            data = Composites(self.pool, stage, self.seed + 1000 * (self.stage_index + 1))
            sums: dict[str, float] = {}
            count, last, tick = 0, time.monotonic(), time.monotonic()
            for batch in batches(data, stage.batch, self.step, self.workers):
                for k, v in self.train_step(batch, stage).items():
                    sums[k] = sums.get(k, 0.0) + v
                self.step, self.done, count = self.step + 1, self.done + stage.batch, count + 1
                now = time.monotonic()
                self.seconds, tick = self.seconds + now - tick, now
                if limit is not None:
                    limit -= 1
                    self.stopping = self.stopping or limit <= 0
                if now - last > every or self.stopping:
                    self.report(stage, {k: v / count for k, v in sums.items()})
                    sums, count, last = {}, 0, now
                if self.stopping:
                    return
            self.stage_index, self.step = self.stage_index + 1, 0
            self.report(stage, {k: v / max(1, count) for k, v in sums.items()})


def build_pool(debs: Path) -> tuple[Pool, list[np.ndarray], dict[str, object]]:
    """Reads the packages: training pool, held-out photographs, and facts for the card."""
    media = load_media(debs)
    photos = media.photos("train")
    keep = [photo for name, photo in photos.items() if name not in HOLDOUT_BACKGROUNDS]
    held = [photo for name, photo in photos.items() if name in HOLDOUT_BACKGROUNDS]
    classed = media.pool(unseen=False)
    pool = Pool(classed + [c for _, c in sorted(media.extras.items())], keep)
    facts = {
        "packages": media.versions,
        "class_cutouts": len(classed),
        "extra_cutouts": len(media.extras),
        "backgrounds": len(keep),
        "holdout_backgrounds": len(held),
    }
    return pool, held, facts


def get_teacher(
    pool: Pool, out: Path, start: Path | None, steps: int, seed: int, device: str, workers: int
) -> Teacher:
    """Returns the fine-tuned teacher: ``OUT/teacher.pt``, trained from ``start`` if missing."""
    path = out / "teacher.pt"
    teacher = Teacher(len(pool.cutouts), len(CLASSES), None if path.exists() else start)
    if path.exists():
        teacher.load_state_dict(torch.load(path, map_location="cpu"))
        return teacher.to(device).eval().requires_grad_(False)
    batch = 32
    stage = Stage("mosaics", steps * batch, 96, batch, 0.0, 0, tiles=MOSAIC_TILES)
    losses = train_teacher(
        teacher,
        batches(Composites(pool, stage, seed + 77), batch, 0, workers),
        steps,
        TOP,
        device=device,
    )
    print(json.dumps({"teacher": losses}))
    out.mkdir(parents=True, exist_ok=True)
    torch.save(teacher.state_dict(), path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
    return teacher


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--debs",
        type=Path,
        default=Path.home() / ".cache" / "wsss-debs",
        help="folder for the two Debian packages; filled when it lacks them",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/pico"), help="folder for checkpoint and log"
    )
    parser.add_argument("--weights", type=Path, help="export the averaged backbone here")
    parser.add_argument("--objects", type=int, default=160_000, help="images of stage one")
    parser.add_argument("--scenes", type=int, default=64_000, help="images of stage two")
    parser.add_argument("--mosaics", type=int, default=32_000, help="images of stage three")
    parser.add_argument("--distil", type=int, default=32_000, help="images of stage four")
    parser.add_argument(
        "--teacher-start", type=Path, help="efficientnet-lite0-57934424.pth; see teacher.py"
    )
    parser.add_argument("--teacher-steps", type=int, default=330)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch threads on the CPU")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--every", type=float, default=240.0, help="seconds between reports")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument(
        "--probe",
        type=Path,
        metavar="VOC2012",
        help="no training: fine-tune --weights (or, without it, a random start) "
        "on this MiniVOC folder, print image mAP and CAM mIoU",
    )
    parser.add_argument("--probe-steps", type=int, default=150)
    parser.add_argument("--resume", action="store_true", help="continue if OUT has a checkpoint")
    return parser.parse_args()


def main() -> None:
    """Command line."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    cv2.setNumThreads(0)
    if args.probe:
        print(json.dumps(probe(args.weights, args.probe, args.probe_steps, args.seed, args.device)))
        return
    pool, held, facts = build_pool(args.debs)
    stages = [
        Stage("objects", args.objects, 64, args.batch, args.lr, 150, keep=36),
        Stage("scenes", args.scenes, 96, args.batch, args.lr * 0.7, 50, 80, (12, 20)),
        Stage("mosaics", args.mosaics, 144, 24, args.lr * 0.7, 60, 0, (18, 18, 24), MOSAIC_TILES),
        Stage("distil", args.distil, 144, 24, args.lr * 0.75, 60, 0, (18, 18, 24), DISTIL_TILES),
    ]
    teacher = None
    if args.distil:
        if not (args.teacher_start or (args.out / "teacher.pt").exists()):
            raise SystemExit("--teacher-start FILE is needed, or --distil 0; see tools/teacher.py")
        teacher = get_teacher(
            pool,
            args.out,
            args.teacher_start,
            args.teacher_steps,
            args.seed,
            args.device,
            args.workers,
        )
    trainer = Trainer(
        pool,
        stages,
        args.out,
        args.seed,
        args.device,
        make_holdout(pool, held, args.seed + 7),
        args.workers,
        args.weights,
        args.compile,
        teacher,
    )
    if args.resume and (args.out / "last.pt").exists():
        trainer.resume()

    def stop(*_: object) -> None:
        trainer.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    trainer.log(start=facts, stages=[asdict(s) for s in stages])
    trainer.run(args.every)


if __name__ == "__main__":
    main()
