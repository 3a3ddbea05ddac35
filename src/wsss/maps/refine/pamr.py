"""Pixel-adaptive mask refinement (PAMR): diffusion of masks along local colour similarity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wsss.maps.refine.neighbours import deviation, diffuse, shifted

_COLOUR_WIDTH = 0.1  # of a neighbourhood's standard deviation
_EPS = 1e-8


class PAMR(nn.Module):
    """Pixel-adaptive mask refinement as in GETAM (getam.md section 2, "PAMR").

    Each pixel looks at its eight neighbours at every dilation (the edge is replicated). The weight
    of neighbour q of pixel p is a softmax over all of them of the mean over colour channels c of
    -|I_c(q) - I_c(p)| / (1e-8 + 0.1 std_c); std_c is unbiased over the 3x3 samples of every
    dilation, so the centre counts once a dilation. Nothing here is differentiable.

    Args:
        dilations: distances of the neighbours in pixels.
        num_iter: number of diffusion steps.
    """

    def __init__(
        self, *, dilations: Sequence[int] = (1, 2, 4, 8, 12, 24), num_iter: int = 10
    ) -> None:
        super().__init__()
        self.dilations = tuple(int(d) for d in dilations)
        self.num_iter = num_iter

    @torch.no_grad()
    def affinity(self, images: Tensor) -> Tensor:
        """Weigh every neighbour of every pixel.

        Args:
            images: (B, 3, H, W), any common scale of the values.

        Returns:
            (B, n, H, W) with n = 8 * len(dilations), 48 by default; they add up to one.
        """
        logits: Tensor | None = None
        # One colour channel at a time keeps the peak at a few times n x H x W.
        for channel in images.split(1, dim=1):
            neighbours = torch.cat(list(shifted(channel, self.dilations)), dim=1)
            centres = channel.expand(-1, len(self.dilations), -1, -1)
            width = deviation(torch.cat([neighbours, centres], dim=1))
            term = (neighbours - channel).abs_().div_(_EPS + _COLOUR_WIDTH * width)
            logits = term if logits is None else logits.add_(term)
        assert logits is not None
        return (logits / -images.shape[1]).softmax(dim=1)

    @torch.no_grad()
    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """Refine ``masks`` (B, C, h, w) along ``images`` (B, 3, H, W) to (B, C, H, W).

        Masks of another size are first resized bilinearly with aligned corners.
        """
        return diffuse(self.affinity(images), masks, self.dilations, self.num_iter)
