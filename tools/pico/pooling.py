"""What pupil and teacher share: how tokens become the logits of a picture."""

from __future__ import annotations

import math

from torch import Tensor

TOP = {1: 0.08, 2: 0.15, 3: 0.2}  # share of a picture's tokens that show a class, by tiles


def split_tiles(tokens: Tensor, tiles: int) -> Tensor:
    """Split the tokens ``(b, s * s, d)`` of canvases into those of their pictures.

    Args:
        tokens: in row-major order.
        tiles: pictures on a side of a canvas.

    Returns:
        ``(b * tiles ** 2, (s / tiles) ** 2, d)``, pictures in reading order.
    """
    part = math.isqrt(tokens.shape[1]) // tiles
    local = tokens.unflatten(1, (tiles, part, tiles, part)).transpose(2, 3)
    return local.reshape(-1, part * part, tokens.shape[-1])


def top_mean(logits: Tensor, share: float) -> Tensor:
    """Average the largest ``share`` of a picture's token logits ``(m, n, k)``: ``(m, k)``."""
    top = max(1, round(share * logits.shape[1]))
    return logits.topk(top, dim=1).values.mean(1)
