"""Pixel-adaptive refinement (PAR): diffusion of masks along local colour similarity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wsss.maps.refine.neighbours import OFFSETS, deviation, diffuse, shifted

_COLOUR_WIDTH = 0.3  # of a neighbourhood's standard deviation
_POSITION_WIDTH = 0.3
_POSITION_WEIGHT = 0.01


class PAR(nn.Module):
    """Pixel-adaptive refinement (toco.md and clustercam.md section 3, "PAR").

    Each pixel looks at its eight neighbours at every dilation (the edge is replicated). The weight
    of a neighbour is a softmax of its colour distance plus 0.01 times a softmax of its distance.
    The weights of a pixel add up to 1.01 and are not renormalised.

    Args:
        dilations: distances of the neighbours in pixels.
        num_iter: number of diffusion steps.
        eps: added to standard deviations; 1e-8 in ToCo, 1e-5 in ClusterCAM.
    """

    position: Tensor  # (n,) weights by distance alone

    def __init__(
        self,
        *,
        dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
        num_iter: int = 10,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.dilations = tuple(int(d) for d in dilations)
        self.num_iter = num_iter
        self.eps = eps
        distance = torch.tensor(
            [d * math.hypot(dr, dc) for d in self.dilations for dr, dc in OFFSETS]
        )
        logits = -((distance / (distance.std() + eps) / _POSITION_WIDTH) ** 2)
        self.register_buffer("position", _POSITION_WEIGHT * logits.softmax(0), persistent=False)

    def affinity(self, images: Tensor) -> Tensor:
        """Weigh every neighbour of every pixel.

        Args:
            images: (B, 3, H, W), any common scale of the values.

        Returns:
            (B, n, H, W) with n = 8 * len(dilations), 48 by default.
        """
        logits: Tensor | None = None
        # One colour channel at a time keeps the peak at a few times n x H x W.
        for channel in images.split(1, dim=1):
            neighbours = torch.cat(list(shifted(channel, self.dilations)), dim=1)
            width = deviation(neighbours) + self.eps
            term = ((neighbours - channel).abs_() / width / _COLOUR_WIDTH).square_()
            logits = term if logits is None else logits.add_(term)
        assert logits is not None
        weights = (logits / -images.shape[1]).softmax(dim=1)
        return weights.add_(self.position.to(weights)[None, :, None, None])

    def propagate(self, affinity: Tensor, masks: Tensor) -> Tensor:
        """Diffuse masks ``num_iter`` times.

        Args:
            affinity: (B, n, H, W) from :meth:`affinity`.
            masks: (B, C, h, w); another size is first resized bilinearly with aligned corners.

        Returns:
            (B, C, H, W) refined masks.
        """
        return diffuse(affinity, masks, self.dilations, self.num_iter)

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """Refine ``masks`` (B, C, h, w) along ``images`` (B, 3, H, W) to (B, C, H, W)."""
        return self.propagate(self.affinity(images), masks)
