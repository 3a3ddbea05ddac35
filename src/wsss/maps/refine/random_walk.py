"""Random walk: score maps spread along learnt affinities of neighbours (mctformer.md section 5).

Every position of a grid is joined with those within a radius. A step lets each position take the
mean of its neighbours' scores, weighed by their affinities. Ahn and Kwak, "Learning Pixel-level
Semantic Affinity with Image-level Supervision" (CVPR 2018).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.core.ranges import Fraction, Positive, one_of
from wsss.core.schema import check_fields
from wsss.maps.refine.dense_crf import CRF_PRESETS

Slices = tuple[slice, slice]
Steps = Annotated[int, Ge(1), Le(2**16)]


@dataclass(frozen=True, kw_only=True)
class WalkSettings:
    """What is taken for certain before the affinities are learnt, and how maps walk after.

    Attributes:
        alphas: exponents of a high and of a low background score; see
            :func:`wsss.maps.pseudo_labels.alpha_background`.
        crf: preset of the dense CRF that smooths the scores of both levels.
        beta: exponent of the affinities; a larger one keeps the walk within edges.
        steps: of the walk; 64 is the transition matrix squared six times.
        background: constant score of the background, which walks too.

    Raises:
        WSSSError: a value out of range; it names the key, ``random_walk.beta``.
    """

    alphas: tuple[Positive, Positive] = (1.0, 12.0)
    crf: one_of(list(CRF_PRESETS)) = "psa"  # type: ignore[valid-type]
    beta: Positive = 8.0
    steps: Steps = 64
    background: Fraction = 0.39

    def __post_init__(self) -> None:
        check_fields(self, "random_walk")
        first, second = self.alphas
        if first >= second:
            raise WSSSError(
                f"random_walk.alphas=[{first:g}, {second:g}]: expected two rising exponents, of "
                "the higher background first"
            )


def half_plane(radius: int) -> list[tuple[int, int]]:
    """List the offsets (rows, columns) to neighbours nearer than ``radius``, each pair once.

    They lie below, or on the right in the same row: 34 for a radius of 5.
    """
    return [
        (dy, dx)
        for dy in range(radius)
        for dx in range(1 - radius, radius)
        if (dy > 0 or dx > 0) and dy * dy + dx * dx < radius * radius
    ]


def pairs(size: tuple[int, int], radius: int) -> Iterator[tuple[Slices, Slices]]:
    """Give, for each offset, where on a grid of (h, w) its pairs begin and where they end.

    Offsets that are longer than the grid have no pair and are left out.
    """
    height, width = size
    for dy, dx in half_plane(radius):
        if dy < height and abs(dx) < width:
            here = (slice(0, height - dy), slice(max(0, -dx), width - max(0, dx)))
            there = (slice(dy, height), slice(max(0, dx), width + min(0, dx)))
            yield here, there


def affinity(features: Tensor, here: Slices, there: Slices) -> Tensor:
    """Give exp(-mean_c |f_i - f_j|) of the pairs of an offset, (B, h', w') in (0, 1].

    Args:
        features: (B, C, h, w) float32.
        here: where the pairs begin, from :func:`pairs`.
        there: where they end.
    """
    difference = features[(..., *here)] - features[(..., *there)]
    return difference.abs().mean(1).neg().exp()


def pad_to_multiple(maps: Tensor, multiple: int) -> Tensor:
    """Append zeros on the right and at the bottom of (..., H, W) up to a multiple."""
    height, width = maps.shape[-2:]
    return F.pad(maps, (0, -width % multiple, 0, -height % multiple))


@torch.no_grad()
def walk(features: Tensor, scores: Tensor, *, radius: int, beta: float, steps: int) -> Tensor:
    """Let scores walk on the grid.

    The transition matrix is affinity^beta with a diagonal of 1, its columns divided by their sums.
    Its power is never formed: a step is applied to the scores ``steps`` times. That needs the
    affinities of one half-plane (34 numbers a position for a radius of 5, 0.4 MB for a VOC image
    at stride 8) where the matrix and its square have 2 (h w)^2 (70 MB), and a fifteenth of the
    time on one core.

    Args:
        features: (B, C, h, w) float32.
        scores: (B, M, h, w), any number of maps.
        radius: neighbours are nearer than that.
        beta: exponent of the affinities.
        steps: of the walk.

    Returns:
        (B, M, h, w).
    """
    edges = []
    degree = torch.ones_like(scores[:, :1])  # the diagonal
    for here, there in pairs((features.shape[-2], features.shape[-1]), radius):
        weight = affinity(features, here, there).pow_(beta)[:, None]
        degree[(..., *here)] += weight
        degree[(..., *there)] += weight
        edges.append((here, there, weight))
    for _ in range(steps):
        total = scores.clone()
        for here, there, weight in edges:
            total[(..., *there)].addcmul_(weight, scores[(..., *here)])
            total[(..., *here)].addcmul_(weight, scores[(..., *there)])
        scores = total.div_(degree)
    return scores


def walked_maps(
    features: Tensor, maps: Tensor, *, stride: int, radius: int, settings: WalkSettings
) -> Tensor:
    """Let score maps and the constant background walk, at the size of the features.

    Maps are padded with zeros to multiples of the stride and averaged to the grid; what has walked
    is resized bilinearly to the padded size, and the padding is cut off.

    Args:
        features: (B, C, ceil(H / stride), ceil(W / stride)) float32.
        maps: (B, K, H, W) scores in [0, 1].
        stride: pixels a position.
        radius: neighbours are nearer than that, in positions.
        settings: background, beta and steps.

    Returns:
        (B, K+1, H, W), background first; its argmax is the label.
    """
    height, width = maps.shape[-2:]
    background = maps.new_full((len(maps), 1, height, width), settings.background)
    padded = pad_to_multiple(torch.cat([background, maps], dim=1).float(), stride)
    reduced = F.avg_pool2d(padded, stride)
    walked = walk(features, reduced, radius=radius, beta=settings.beta, steps=settings.steps)
    full = F.interpolate(walked, padded.shape[-2:], mode="bilinear", align_corners=False)
    return full[..., :height, :width]
