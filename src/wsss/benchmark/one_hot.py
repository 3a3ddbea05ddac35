"""Diffusion along neighbours as the official codes of PAR and PAMR gather them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.maps.refine.neighbours import at_affinity_size
from wsss.maps.refine.par import PAR


def diffuse_by_convolution(
    affinity: Tensor, masks: Tensor, dilations: Sequence[int], num_iter: int
) -> Tensor:
    """Diffuse as :func:`wsss.maps.refine.neighbours.diffuse`, by one-hot convolutions.

    Args:
        affinity: (B, n, H, W) weights, eight neighbours a dilation.
        masks: (B, C, h, w); another size is first resized bilinearly with aligned corners.
        dilations: distances of the neighbours in pixels.
        num_iter: number of steps.

    Returns:
        (B, C, H, W) refined masks.
    """
    masks = at_affinity_size(masks, affinity)
    kernels = torch.eye(9, dtype=masks.dtype, device=masks.device).view(9, 1, 3, 3)
    kernels = torch.cat([kernels[:4], kernels[5:]])  # the centre is no neighbour
    for _ in range(num_iter):
        planes = masks.flatten(0, 1)[:, None]  # (B C, 1, H, W)
        gathered = [
            F.conv2d(F.pad(planes, (d,) * 4, mode="replicate"), kernels, dilation=d)
            for d in dilations
        ]
        neighbours = torch.cat(gathered, dim=1).unflatten(0, masks.shape[:2])  # (B, C, n, H, W)
        masks = (neighbours * affinity[:, None]).sum(dim=2)
    return masks


class ConvolvingPAR(PAR):
    """PAR whose neighbours come from convolutions."""

    def propagate(self, affinity: Tensor, masks: Tensor) -> Tensor:
        """Propagate as :meth:`PAR.propagate`."""
        return diffuse_by_convolution(affinity, masks, self.dilations, self.num_iter)


def with_neighbours(par: PAR, *, sliced: bool) -> PAR:
    """Give a PAR of the same settings whose neighbours come from slices, or from convolutions."""
    kind = PAR if sliced else ConvolvingPAR
    own = kind(dilations=par.dilations, num_iter=par.num_iter, eps=par.eps)
    return own.to(par.position.device)
