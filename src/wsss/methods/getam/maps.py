"""GETAM's maps: attention weighted with its gradient (getam.md section 2)."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD, denormalise, numbers_beside
from wsss.maps.pseudo_labels import present_slots
from wsss.methods.losses import full_precision, widened
from wsss.models.vit import AttentionParts

#: how attention and its gradient make a block's share of the map
GradientForm = Literal["coupled", "product", "gradient", "attention"]


def attention_and_slope(
    parts: AttentionParts, gradient: Tensor, rows: int = 1
) -> tuple[Tensor, Tensor]:
    """Compute rows of one block's attention A and of the gradient G of a class logit in it.

    With O = A V, G[q, k] = <dy/dO[q], V[k]>: attention may stay fused, and nothing of size N x N
    is kept (getam.md section 7).

    Args:
        parts: queries, keys and values of the block, (B, heads, P+N, d).
        gradient: dy/dO of the attention's output, (B, heads, P+N, d).
        rows: how many query tokens, from the class token on.

    Returns:
        A and G, each (B, heads, rows, P+N), without a graph.
    """
    queries, keys, values = (
        widened(t.detach()) for t in (parts.queries[:, :, :rows], parts.keys, parts.values)
    )
    with full_precision(keys):
        attention = (queries @ keys.transpose(-2, -1)).softmax(dim=-1)
        return attention, widened(gradient[:, :, :rows]) @ values.transpose(-2, -1)


def attention_term(attention: Tensor, slope: Tensor, form: GradientForm = "coupled") -> Tensor:
    """Compute a block's share of the map: mean_h ReLU(G * A) * mean_h ReLU(G) (getam.md section 2).

    It is a product of two means over heads, not a mean of products. That is ``coupled``; the other
    forms are what it is compared with: its first mean alone (``product``), its second one alone
    (``gradient``), and mean_h A, the same for all classes (``attention``).

    Args:
        attention: A, (B, heads, rows, P+N).
        slope: G, the same shape.
        form: which of these.

    Returns:
        (B, rows, P+N).
    """
    if form == "attention":
        return attention.mean(1)
    if form == "gradient":
        return slope.relu().mean(1)
    product = (slope * attention).relu().mean(1)
    return product if form == "product" else product * slope.relu().mean(1)


def class_slots(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Give the present classes of every image, ascending, (B, S), and which of them are valid.

    There is at least one slot, an empty one where no image has a label.
    """
    ids, valid = present_slots(labels)  # the background leads
    if ids.shape[1] == 1:
        return ids, torch.zeros_like(valid)
    return ids[:, 1:] - 1, valid[:, 1:]


def slot_maps(
    logits: Tensor,
    parts: Mapping[int, AttentionParts],
    ids: Tensor,
    valid: Tensor,
    *,
    num_prefix_tokens: int,
    form: GradientForm = "coupled",
) -> Tensor:
    """Compute maps of every present class on the token grid, for each block.

    Images of a batch do not see each other before the class logits, so the s-th present class of
    every image is differentiated in one backward pass. The graph is kept for the losses.

    Args:
        logits: class logits (B, K) with their graph.
        parts: block index -> parts of its attention.
        ids: class indices of the slots, (B, S).
        valid: which slots hold a class, (B, S); the others' maps are zero.
        num_prefix_tokens: P.
        form: of :func:`attention_term`.

    Returns:
        (B, S, L, N), blocks in the order of ``parts``.
    """
    outputs = [part.output for part in parts.values()]
    slots = []
    for s in range(ids.shape[1]):
        chosen = (logits.gather(1, ids[:, s : s + 1]) * valid[:, s : s + 1]).sum()
        gradients = torch.autograd.grad(chosen, outputs, retain_graph=True)
        terms = [
            # the class token's row over the patches, (B, N)
            attention_term(*attention_and_slope(part, gradient), form)[:, 0, num_prefix_tokens:]
            for part, gradient in zip(parts.values(), gradients, strict=True)
        ]
        slots.append(torch.stack(terms, dim=1))
    return torch.stack(slots, dim=1)


def enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (B, S, h, w) of the token grid to image size (B, S, H, W), corner to corner."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def by_class(slots: Tensor, ids: Tensor, num_classes: int) -> Tensor:
    """Give maps (B, S, H, W) of the slots' classes (B, S) as (B, K, H, W); others are zero."""
    every = slots.new_zeros(len(slots), num_classes, *slots.shape[-2:])
    return every.scatter(1, ids[:, :, None, None].expand_as(slots), slots)


def guide_pixels(images: Tensor, *, truncated: bool = False) -> Tensor:
    """Give the whole grey levels, 0 to 255, behind normalised images, (B, 3, H, W).

    Args:
        images: (B, 3, H, W).
        truncated: cut to integers where otherwise they are rounded.
    """
    if not truncated:
        return denormalise(images).round().clamp(0, 255)
    # the order of these operations decides which pixels truncation lowers by one
    mean, std = (numbers_beside(images, v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images * std + mean) * 255).trunc().clamp(0, 255)
