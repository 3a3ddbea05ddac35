"""Pairwise relations between the tokens of one image."""

from __future__ import annotations

import torch
from torch import Tensor


def pair_masks(label: Tensor, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """Compare every token label with every other one (toco.md section 2, PTC).

    Args:
        label: (B, h, w) integer token labels.
        ignore_index: Label of tokens that take part in no pair.

    Returns:
        Two (B, N, N) boolean masks, N = h * w in row-major order: pairs of equal labels and pairs
        of different labels. The diagonal and every pair with an ignored token are in neither; both
        orders of a pair count.
    """
    flat = label.flatten(1)
    valid = flat != ignore_index
    usable = valid[:, :, None] & valid[:, None, :]
    usable.diagonal(dim1=1, dim2=2).fill_(False)
    equal = flat[:, :, None] == flat[:, None, :]
    return usable & equal, torch.logical_and(usable, ~equal)
