"""GETAM's labels of a whole batch, and the losses that read them (getam.md sections 2 and 3)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.maps.pseudo_labels import cam_to_label_with_ignore
from wsss.methods.getam.maps import by_class
from wsss.methods.losses import balanced_segmentation_loss, full_precision, widened

BACKGROUND_POWER = 32  # background score (1 - max)^32: foreground from 0.077 on


class Labels(NamedTuple):
    """Labels of a batch.

    Attributes:
        label: (B, H, W) int64, 0 background, class + 1, 255 undecided.
        saliency: (B, H, W) uint8 after completion, 0 nothing, 1 as given, 255 added; None where
            there was no saliency.
    """

    label: Tensor
    saliency: Tensor | None


class Targets(NamedTuple):
    """What the second phase learns from; an image has up to S present classes, one a slot.

    Attributes:
        maps: maps of the slots on the token grid, summed over blocks, (B, S, h, w).
        refined: the same at image size, refined and normalised, (B, S, H, W).
        guide: pixels in 0..255, (B, 3, H, W).
        labels: made from all that.
    """

    maps: Tensor
    refined: Tensor
    guide: Tensor
    labels: Labels


def completion_thresholds(maps: Tensor, quantile: float | None) -> Tensor:
    """Find the value above which a class claims pixels outside the saliency.

    It is the entry int(quantile * count) of the ascending positive values of a map, infinite where
    that index is 0 (getam.md section 2, "Label completion", step 4).

    Args:
        maps: normalised maps (B, S, H, W).
        quantile: 0.9; 0.95 on COCO; None: no class claims any.

    Returns:
        (B, S).
    """
    if quantile is None:
        return maps.new_full(maps.shape[:2], torch.inf)
    values = maps.flatten(2).sort(dim=2).values
    count = (values > 0).sum(dim=2)
    index = (quantile * count.double()).long()  # truncated, as Python's int
    position = (values.shape[2] - count + index).clamp_max(values.shape[2] - 1)
    found = values.gather(2, position[..., None])[..., 0]
    return found.masked_fill(index == 0, torch.inf)


def open_region(region: Tensor, size: int, *, centred: bool = True) -> Tensor:
    """Open a region with a square of ones (morphology); pixels beyond the border do not count.

    Args:
        region: (B, H, W) boolean.
        size: side of the square in pixels.
        centred: False dilates with the erosion's own offsets, which for an even side moves the
            region by one pixel to the lower right, as the official code does.

    Returns:
        (B, H, W) boolean.
    """
    before = size // 2
    after = size - 1 - before
    first = (before, after) * 2
    second = (after, before) * 2 if centred else first
    closed = F.max_pool2d(F.pad((~region)[:, None].float(), first), size, stride=1)
    opened = F.max_pool2d(F.pad(1 - closed, second), size, stride=1)
    return opened[:, 0] > 0


def complete_labels(
    maps: Tensor,
    ids: Tensor,
    saliency: Tensor,
    *,
    quantile: float | None = 0.9,
    opening: int = 10,
    contested_to_lowest: bool = False,
    shifted_opening: bool = False,
    unopened_saliency: bool = False,
) -> Labels:
    """Make labels from maps and saliency (getam.md section 2, "Label completion").

    Salient pixels get their best class, or 255 where the background score (1 - max)^32 wins.
    Others are background, but for those that a class claims with its highest tenth; they become
    salient, too.

    Args:
        maps: normalised, refined maps of the slots, (B, S, H, W); zero for empty slots.
        ids: class indices of the slots, ascending in each image, (B, S).
        saliency: (B, H, W) boolean.
        quantile: of a map's positive values; None: nothing outside the saliency is claimed.
        opening: side of the square of the final opening in pixels.
        contested_to_lowest: the lowest class gets a pixel that several claim, which otherwise is
            255.
        shifted_opening: the opening moves labels to the lower right; see :func:`open_region`.
        unopened_saliency: what the opening removes from the labels stays in the saliency.
    """
    best, slot = maps.max(dim=1)  # (B, H, W)
    classes = ids + 1
    label = classes.gather(1, slot.flatten(1)).view_as(slot)
    label = torch.where((1 - best) ** BACKGROUND_POWER >= best, 255, label)
    label = torch.where(saliency, label, 0)
    above = maps > completion_thresholds(maps, quantile)[..., None, None]
    above &= ~saliency[:, None]
    claims = above.sum(dim=1)
    first = above.int().argmax(dim=1)  # the lowest class that claims
    claimed = classes.gather(1, first.flatten(1)).view_as(first)
    if not contested_to_lowest:
        claimed = torch.where(claims > 1, 255, claimed)
    label = torch.where(claims > 0, claimed, label)
    completed = torch.where(claims > 0, 255, saliency.to(torch.uint8))
    opened = open_region(label != 0, opening, centred=not shifted_opening)
    label = torch.where(opened, label, 0)
    if not unopened_saliency:
        completed = torch.where((claims > 0) & ~opened, 0, completed)
    return Labels(label, completed.to(torch.uint8))


def threshold_labels(
    maps: Tensor, ids: Tensor, present: Tensor, *, low: float, high: float, opening: int
) -> Labels:
    """Make labels by our rule without saliency: two thresholds on the best map, then the opening.

    Args:
        maps: normalised, refined maps of the slots, (B, S, H, W).
        ids: class indices of the slots, (B, S).
        present: image-level labels, (B, K) in {0, 1}.
        low: background up to it.
        high: foreground above it; undecided between the two.
        opening: side of the square in pixels.
    """
    every = by_class(maps, ids, present.shape[1])
    label = cam_to_label_with_ignore(every, present, high=high, low=low)
    return Labels(torch.where(open_region(label != 0, opening), label, 0), None)


def split_cross_entropy(logits: Tensor, label: Tensor, *, guard: bool = True) -> Tensor:
    """Add the mean cross-entropy over background pixels to that over foreground pixels.

    Args:
        logits: (B, K+1, H, W).
        label: (B, H, W), 255 ignored.
        guard: a half without pixels is 0, not NaN.
    """
    return 2 * balanced_segmentation_loss(logits, label, guard=guard)


def saliency_target(completed: Tensor, *, inverted: bool = False) -> Tensor:
    """Say where the background is, from completed saliency (B, H, W) in {0, 1, 255}: boolean.

    ``inverted``: 1 - int(s / 255), which calls the given saliency (1) background.
    """
    return completed != 255 if inverted else completed == 0


def saliency_loss(
    logits: Tensor,
    completed: Tensor,
    inside: Tensor | None = None,
    *,
    inverted: bool = False,
) -> Tensor:
    """Compute the binary cross-entropy of the background probability with "not salient".

    Args:
        logits: segmentation logits (B, K+1, H, W).
        completed: saliency after completion, (B, H, W) in {0, 1, 255}.
        inside: (B, H, W) boolean, pixels that count; None: all.
        inverted: see :func:`saliency_target`.
    """
    with full_precision(logits):
        background = widened(logits).softmax(dim=1)[:, 0]
        target = saliency_target(completed, inverted=inverted)
        loss = F.binary_cross_entropy(background, target.to(background), reduction="none")
    return loss.mean() if inside is None else (loss * inside).sum() / inside.sum().clamp_min(1)
