"""PAR's refinement one image and one background score at a time, as official codes call it."""

import torch
from torch import Tensor

from wsss.maps.pseudo_labels import best_slots
from wsss.maps.refine.par import PAR


def best_slots_one_by_one(
    par: PAR, images: Tensor, scores: Tensor, valid: Tensor, size: tuple[int, int]
) -> Tensor:
    """Give the same as :func:`wsss.maps.pseudo_labels.best_slots`, without sharing an affinity.

    Args:
        par: the refinement module; it computes its affinity anew for every image and score.
        images: (B, 3, h, w) reduced images.
        scores: (B, T, M, h, w) raw scores for T background scores.
        valid: (B, M) which slots are classes of the image.
        size: height and width of the result.

    Returns:
        (B, T, *size) slots of the highest refined score.
    """
    return torch.cat(
        [
            torch.cat(
                [
                    best_slots(par, image, one[:, :, : int(kept.sum())], kept[:, kept[0]], size)
                    for one in score.split(1, dim=1)
                ],
                dim=1,
            )
            for image, score, kept in zip(
                images.split(1), scores.split(1), valid.split(1), strict=True
            )
        ]
    )
