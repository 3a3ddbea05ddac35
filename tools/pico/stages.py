"""The schedule: what a stage of the pretraining draws, and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pico.network import GRID

#: pictures on a side of a canvas, in turn from batch to batch
MOSAIC_TILES, DISTIL_TILES = (3, 2, 3, 1), (1, 3, 1, 2, 1)


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
            the grid to 20 patches for MiniVOC's 160 pixels; the net should know that grid as well.
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
        """Give the learning rate of a step of this stage."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
