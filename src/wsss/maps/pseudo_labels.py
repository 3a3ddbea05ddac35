"""From class activation maps to label maps (toco.md sections 2 and 3).

Label maps hold 0 for background, k + 1 for foreground class k and ``ignore_index`` where nothing is
claimed. Scores are compared with thresholds in the scores' own precision: a float32 score of 0.7 is
not above a threshold of 0.7.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.maps.pixels import numbers_beside
from wsss.maps.refine.par import PAR

#: how :func:`refine_cam_to_label` gets the best slots; arguments as of :func:`best_slots`
RefineSlots = Callable[[PAR, Tensor, Tensor, Tensor, tuple[int, int]], Tensor]


def _best_class(cam: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Find the highest score over the labelled classes and its id: (B, H, W) float, int64."""
    value, index = (cam * labels[:, :, None, None].to(cam.dtype)).max(dim=1)
    return value, index + 1


def cam_to_label(cam: Tensor, labels: Tensor, *, bg_threshold: float) -> Tensor:
    """Take the best labelled class where its score is above the background threshold.

    Args:
        cam: (B, K, H, W) scores in [0, 1].
        labels: (B, K) image-level labels, 0 or 1.
        bg_threshold: scores at or below it are background.

    Returns:
        (B, H, W) int64 class ids.
    """
    value, best = _best_class(cam, labels)
    return best.masked_fill_(value <= bg_threshold, 0)


def cam_to_label_with_ignore(
    cam: Tensor, labels: Tensor, *, high: float, low: float, ignore_index: int = 255
) -> Tensor:
    """Label as :func:`cam_to_label` does, with an undecided range between two thresholds.

    Args:
        cam: (B, K, H, W) scores in [0, 1].
        labels: (B, K) image-level labels, 0 or 1.
        high: scores above it are foreground.
        low: scores at or below it are background.
        ignore_index: written where the score is in ``(low, high]``.

    Returns:
        (B, H, W) int64 class ids.
    """
    value, best = _best_class(cam, labels)
    best.masked_fill_(value <= high, ignore_index)
    return best.masked_fill_(value <= low, 0)


def cam_probabilities(cam: Tensor, labels: Tensor, *, bg_threshold: float) -> Tensor:
    """Make background and labelled classes' probabilities with argmax :func:`cam_to_label`.

    A score s stands for the odds s / (1 - s), and the background for those of its threshold. From
    TKP-PCL's maps and a threshold of 0.5 that is ViT-PCM's merged label map (tkp_pcl.md 3.2).

    Args:
        cam: (B, K, H, W) scores in [0, 1].
        labels: (B, K) image-level labels, 0 or 1; other classes get 0.
        bg_threshold: scores at or below it are background.

    Returns:
        (B, K+1, H, W), background first, adding up to 1.
    """
    eps = 1e-6
    odds = cam.clamp(eps, 1 - eps).logit()
    odds = odds.masked_fill(labels[:, :, None, None] == 0, -torch.inf)
    threshold = cam.new_tensor(bg_threshold).clamp(eps, 1 - eps).logit()
    return torch.cat([threshold.expand_as(odds[:, :1]), odds], dim=1).softmax(dim=1)


def alpha_background(maps: Tensor, alpha: float) -> Tensor:
    """Score the background by ``(1 - max_k m_k) ** alpha`` (mctformer.md section 5).

    A larger ``alpha`` leaves less to the background: it then wins only where every map is low.

    Args:
        maps: (B, K, H, W) scores in [0, 1], zero for classes that an image does not show.
        alpha: exponent, above 0.

    Returns:
        (B, 1, H, W) scores in [0, 1].
    """
    return (1.0 - maps.amax(dim=1, keepdim=True)) ** alpha


def confident_labels(
    against_high: Tensor, against_low: Tensor, *, ignore_index: int = 255
) -> Tensor:
    """Keep what two levels of the background agree on (mctformer.md section 5, step 1).

    Args:
        against_high: (..., H, W) class ids that won against a high background score.
        against_low: (..., H, W) class ids that won against a low one.
        ignore_index: written where only the high background won.

    Returns:
        (..., H, W): 0 where even the low background won, else the class, or ``ignore_index``.
    """
    label = against_high.masked_fill(against_high == 0, ignore_index)
    return label.masked_fill(against_low == 0, 0)


def roi_mask(cam: Tensor, labels: Tensor, *, high: float, low: float) -> Tensor:
    """Divide the image into background (0), uncertain (1) and foreground (2), for CTC crops.

    Unlike the labels, a score equal to ``high`` counts as foreground.

    Args:
        cam: (B, K, H, W) scores in [0, 1].
        labels: (B, K) image-level labels, 0 or 1.
        high: scores at or above it are foreground.
        low: scores at or below it are background.

    Returns:
        (B, H, W) int64 mask.
    """
    value, best = _best_class(cam, labels)
    roi = torch.ones_like(best).masked_fill_(value <= low, 0)
    return roi.masked_fill_(value >= high, 2)


def inside_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Rasterise boxes.

    Args:
        boxes: (B, 4) integers: row start, row end, column start, column end, ends excluded.
        height: rows of the mask.
        width: columns of the mask.

    Returns:
        (B, height, width) boolean mask, true inside.
    """
    r0, r1, c0, c1 = (edge[:, None] for edge in boxes.long().unbind(1))
    rows = torch.arange(height, device=boxes.device)[None]
    columns = torch.arange(width, device=boxes.device)[None]
    in_rows = (rows >= r0) & (rows < r1)
    in_columns = (columns >= c0) & (columns < c1)
    return in_rows[:, :, None] & in_columns[:, None, :]


def whole_boxes(images: Tensor) -> Tensor:
    """Give boxes (B, 4) that hold every pixel of images (B, C, H, W)."""
    return torch.tensor([[0, images.shape[-2], 0, images.shape[-1]]]).repeat(len(images), 1)


def boxes_in_patches(boxes: Tensor, patch: int) -> Tensor:
    """Give the patches that lie wholly inside boxes of pixels.

    Args:
        boxes: (B, 4) integers: row start, row end, column start, column end, ends excluded.
        patch: side of a patch in pixels.

    Returns:
        (B, 4), the same in patches; an end may lie before its start, where none fits.
    """
    start = (boxes[:, 0::2] + patch - 1).div(patch, rounding_mode="floor")
    end = boxes[:, 1::2].div(patch, rounding_mode="floor")
    return torch.stack([start[:, 0], end[:, 0], start[:, 1], end[:, 1]], dim=1)


def ignore_outside_boxes(label: Tensor, boxes: Tensor, ignore_index: int = 255) -> Tensor:
    """Replace labels outside each image's box (the real pixels of a padded crop).

    Args:
        label: (B, H, W) label maps.
        boxes: (B, 4) integers: row start, row end, column start, column end, ends excluded, in
            pixels of ``label``.
        ignore_index: label written outside.

    Returns:
        (B, H, W) label maps; the input is left alone.
    """
    inside = inside_boxes(boxes.to(label.device), *label.shape[-2:])
    return label.masked_fill(~inside, ignore_index)


def token_labels(
    cam: Tensor,
    labels: Tensor,
    grid: tuple[int, int],
    boxes: Tensor,
    *,
    high: float,
    low: float,
) -> Tensor:
    """Label tokens as :func:`cam_to_label_with_ignore` does, from maps resized to their grid.

    Args:
        cam: (B, K, H, W) scores in [0, 1].
        labels: (B, K) image-level labels, 0 or 1.
        grid: h and w in tokens.
        boxes: as of :func:`ignore_outside_boxes`, in tokens.
        high: scores above it are foreground.
        low: scores at or below it are background.

    Returns:
        (B, h, w) int64 class ids, 255 where undecided and outside the boxes.
    """
    small = F.interpolate(cam, size=grid, mode="bilinear", align_corners=False)
    return ignore_outside_boxes(cam_to_label_with_ignore(small, labels, high=high, low=low), boxes)


def present_slots(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pack background and the present classes of every image to the left, ascending.

    Keeping the ascending order keeps argmax ties as they are with all classes in place.

    Returns:
        (B, M) class ids and (B, M) boolean validity; M - 1 is the largest number of present classes
        in one image of the batch.
    """
    present = F.pad(labels > 0, (1, 0), value=True)
    ids = torch.argsort(present.int(), dim=1, descending=True, stable=True)
    ids = ids[:, : int(present.sum(1).max())]
    return ids, present.gather(1, ids)


def packed_scores(
    cam: Tensor,
    labels: Tensor,
    ids: Tensor,
    size: tuple[int, int],
    backgrounds: tuple[float, ...],
) -> Tensor:
    """Reduce the slots' scores, (B, T, M, h, w): once for each of T background scores."""
    chosen = (ids - 1).clamp_min(0)[:, :, None, None].expand(-1, -1, *cam.shape[-2:])
    packed = (cam * labels[:, :, None, None].to(cam.dtype)).gather(1, chosen)
    packed = F.interpolate(packed, size=size, mode="bilinear", align_corners=False)
    scores = packed[:, None].repeat(1, len(backgrounds), 1, 1, 1)
    scores[:, :, 0] = numbers_beside(cam, backgrounds)[None, :, None, None]
    return scores


def refined_scores(par: PAR, images: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """Take the softmax over the valid slots, then propagate.

    Args:
        par: the refinement module.
        images: (B, 3, h, w) reduced images.
        scores: (B, T, M, h, w) raw scores for T background scores.
        valid: (B, M) which slots are classes of the image.

    Returns:
        (B, T, M, h, w), zero in slots that are not valid.
    """
    prob = scores.masked_fill(~valid[:, None, :, None, None], float("-inf")).softmax(dim=2)
    return par(images, prob.flatten(1, 2)).unflatten(1, prob.shape[1:3])


def best_slots(
    par: PAR, images: Tensor, scores: Tensor, valid: Tensor, size: tuple[int, int]
) -> Tensor:
    """Find the slot of the highest refined score, (B, T, H, W); see :func:`refined_scores`."""
    refined = refined_scores(par, images, scores, valid)
    full = F.interpolate(refined.flatten(1, 2), size=size, mode="bilinear", align_corners=False)
    full = full.unflatten(1, refined.shape[1:3])
    # a tenth of argmax's time on a CPU, where the dimension is not the last; ties alike
    return full.masked_fill_(~valid[:, None, :, None, None], -1.0).max(dim=2).indices


@torch.no_grad()
def refine_cam_to_label(
    par: PAR,
    images: Tensor,
    cam: Tensor,
    labels: Tensor,
    *,
    boxes: Tensor | None = None,
    high: float,
    low: float,
    down_scale: int = 2,
    ignore_index: int = 255,
    refine: RefineSlots = best_slots,
) -> Tensor:
    """Make segmentation pseudo-labels from CAMs with PAR (toco.md section 3, "Refined label").

    For each of the two background scores ``high`` and ``low``, background and the present classes
    compete in a softmax, are smoothed along the image by PAR at reduced size and resized back. A
    pixel is foreground where it wins against ``high``, background where it loses against both and
    undecided otherwise.

    The whole batch is computed at once. Classes that an image does not have weigh nothing, so the
    result equals that of one image after the other.

    Args:
        par: pixel-adaptive refinement.
        images: (B, 3, H, W) in [0, 1].
        cam: (B, K, H, W) scores in [0, 1].
        labels: (B, K) image-level labels, 0 or 1.
        boxes: (B, 4) real pixels (row start, row end, column start, column end, ends excluded), or
            None for whole images.
        high: background score that foreground must beat.
        low: background score below which only background is left.
        down_scale: the refinement runs at 1/down_scale of the image size.
        ignore_index: written where undecided and outside the boxes.
        refine: gives the slot of the highest refined score; the same labels can be had in other
            ways.

    Returns:
        (B, H, W) int64 labels.

    Raises:
        WSSSError: images and CAMs differ in size, or the reduced size is empty.
    """
    height, width = images.shape[-2:]
    if cam.shape[-2:] != images.shape[-2:]:
        raise WSSSError(
            f"images are {height}x{width} but CAMs {cam.shape[-2]}x{cam.shape[-1]}: resize the "
            "CAMs to the image size first"
        )
    small = (height // down_scale, width // down_scale)
    if min(small) < 1:
        raise WSSSError(f"down_scale {down_scale} leaves nothing of a {height}x{width} image")
    reduced = F.interpolate(images, size=small, mode="bilinear", align_corners=False)
    ids, valid = present_slots(labels)
    scores = packed_scores(cam, labels, ids, small, (high, low))
    slots = refine(par, reduced, scores, valid, (height, width))
    against_high, against_low = (
        ids.gather(1, slots[:, t].flatten(1)).view(-1, height, width) for t in range(2)
    )
    label = against_high.masked_fill(against_high == 0, ignore_index)
    label.masked_fill_((against_high == 0) & (against_low == 0), 0)
    return label if boxes is None else ignore_outside_boxes(label, boxes, ignore_index)
