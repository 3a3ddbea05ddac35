"""The data set: endless composites of the pool's cut-outs and photographs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from cutouts import (
    CLASSES,
    HOLDOUT_BACKGROUNDS,
    CutOut,
    composite,
    load_media,
    premultiplied,
    warp,
)
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pico.images import backdrop, distort, random_place
from pico.network import PATCH
from pico.stages import Stage

MEAN, STD = (np.array(v, np.float32) * 255 for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
MAX_OBJECTS = 3
EMPTY = 0.3  # share of a mosaic's pictures without an object


@dataclass(frozen=True)
class Pool:
    """What the training may paste: class cut-outs first, then extras; and photographs."""

    cutouts: list[CutOut]
    photos: list[np.ndarray]

    @property
    def num_classed(self) -> int:
        """Number of cut-outs that carry one of the classes."""
        return sum(c.label > 0 for c in self.cutouts)


def build_pool(debs: Path) -> tuple[Pool, list[np.ndarray], dict[str, object]]:
    """Read the packages: give the training pool, held-out photographs and facts for the card."""
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


class Composites(Dataset):
    """Endless composites; item ``i`` is always the same image, so a resumed run continues exactly.

    Items are dicts. ``t`` is the number of pictures on the canvas, 1 except in mosaics.

    * ``image``: float32 ``(3, s, s)``, normalised.
    * ``identity``: int64 ``(t, 3)``, the cut-outs, -1 where there are fewer objects.
    * ``classes``: float32 ``(t, 8)`` of 0 and 1.
    * ``window``: float32 ``(2,)`` in 0..1, where on the position grid the image lies.
    * ``patches``: int64 ``(k,)``, the patches to read.
    """

    def __init__(self, pool: Pool, stage: Stage, seed: int) -> None:
        """Prepare the cut-outs of ``pool`` for ``stage``."""
        self.pool, self.stage, self.seed = pool, stage, seed
        self.sources = [premultiplied(c) for c in pool.cutouts]
        labels = np.array([c.label for c in pool.cutouts])
        self.groups = [np.nonzero(labels == i)[0] for i in range(1, len(CLASSES) + 1)]
        self.groups = [g for g in self.groups if len(g)]
        self.extras = np.nonzero(labels == 0)[0]

    def __len__(self) -> int:
        """Give the number of images of the stage."""
        return self.stage.images

    def _choose(self, rng: np.random.Generator, kind: str) -> list[int]:
        """Draw the cut-outs of one picture, the main one first."""
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
        """Give the range of an object's longer side, as shares of the picture's."""
        if kind == "scenes":
            return (0.3, 1.0) if main else (0.2, 0.65)
        if kind == "tile":  # up to a close-up of a part
            return (0.5, 2.2)
        return (0.55, 1.3) if main else (0.35, 0.6)

    def _picture(
        self, background: np.ndarray, kind: str, rng: np.random.Generator
    ) -> tuple[np.ndarray, list[int]]:
        """Make one picture on ``background``, uint8 ``(s, s, 3)``, and name the cut-outs in it."""
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
        """Make image ``index``."""
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
    """Yield the batches of a stage from step ``start`` on, in order."""
    loader = DataLoader(
        data,
        batch_size=batch,
        sampler=range(start * batch, len(data) // batch * batch),
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        worker_init_fn=lambda _: cv2.setNumThreads(0),
    )
    yield from loader
