"""ToCo's losses that other methods use as well (toco.md section 2).

Balanced cross-entropy, patch token contrast (PTC), gated dense energy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.core.ranks import sum_over_ranks
from wsss.maps.permutohedral import PermutohedralLattice
from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD, numbers_beside
from wsss.maps.pseudo_labels import inside_boxes

Kernel = Literal["lattice", "gaussian"]
_CHUNK_ENTRIES = 2**25  # kernel values held at once by the exact Gaussian: 128 MiB


def full_precision(tensor: Tensor) -> torch.autocast:
    """Switch autocast off: bfloat16 products have too few digits for what follows them."""
    return torch.autocast(tensor.device.type, enabled=False)


def widened(tensor: Tensor) -> Tensor:
    """Widen to float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def balanced_segmentation_loss(
    logits: Tensor,
    label: Tensor,
    *,
    ignore_index: int = 255,
    guard: bool = True,
    eps: float = 0.0,
    over_ranks: bool = False,
) -> Tensor:
    """Take half the mean cross-entropy over background pixels, half that over foreground.

    Args:
        logits: (B, K+1, H, W).
        label: (B, H, W) class ids, 0 for background.
        ignore_index: Label of pixels that do not count.
        guard: A half without pixels counts as 0. Without the guard the value is NaN then, as in
            the official code; the gradients are finite and the same either way (toco.md Q4).
        eps: Added to the pixels of a half before its sum is divided by them (more.md section 2).
        over_ranks: Count the pixels of all processes, see :func:`~wsss.core.ranks.sum_over_ranks`.

    Returns:
        Scalar loss; over ranks, this process's part of their mean.
    """
    label = label.long()
    loss = F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="none")
    background = label == 0
    foreground = ~background & (label != ignore_index)
    total = loss.new_zeros(())
    for mask in (background, foreground):
        count, ranks = sum_over_ranks(mask.sum(), enabled=over_ranks)
        pixels = count.to(loss.dtype) + eps if eps else count.clamp_min(1)
        total = total + 0.5 * ranks * (loss * mask).sum() / pixels
        if not guard:
            # Added as a constant: dividing by zero would spoil the gradients as well.
            total = total + torch.where(count == 0, torch.nan, 0.0)
    return total


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


def ptc_loss(
    tokens: Tensor, same: Tensor, different: Tensor, *, over_ranks: bool = False
) -> Tensor:
    """Contrast patch tokens: those of one class alike, of different classes orthogonal.

    L = 1/2 (1 - sum A[same] / (#same + 1)) + 1/2 sum A[different] / (#different + 1), with
    A_ij = |cos(F_i, F_j)| and sums over the whole batch (toco.md section 2, "PTC").

    Args:
        tokens: final patch tokens as a map, (B, D, h, w).
        same: pairs of one class, (B, N, N), boolean.
        different: pairs of different classes, (B, N, N), boolean.
        over_ranks: count the pairs of all processes, see :func:`~wsss.core.ranks.sum_over_ranks`.

    Returns:
        A scalar; 0.5 with zero gradient when both masks are empty (Q5). Over ranks, this process's
        part of their mean.
    """
    with full_precision(tokens):
        unit = F.normalize(widened(tokens).flatten(2), dim=1, eps=1e-8)  # (B, D, N)
        similarity = (unit.transpose(1, 2) @ unit).abs()  # (B, N, N)
    same_pairs, ranks = sum_over_ranks(same.sum(), enabled=over_ranks)
    different_pairs, _ = sum_over_ranks(different.sum(), enabled=over_ranks)
    alike = (similarity * same).sum() / (same_pairs + 1)
    unlike = (similarity * different).sum() / (different_pairs + 1)
    half = 0.5 * ranks
    return 0.5 - half * alike + half * unlike


def energy_features(images: Tensor, *, sigma_rgb: float, sigma_xy: float) -> Tensor:
    """Give position and colour of every pixel in units of the kernel: (B, N, 5)."""
    batch, _, height, width = images.shape
    columns = torch.arange(width, device=images.device, dtype=images.dtype)
    rows = torch.arange(height, device=images.device, dtype=images.dtype)
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy")) / sigma_xy
    features = torch.cat([grid.expand(batch, -1, -1, -1), images / sigma_rgb], dim=1)
    return features.flatten(2).transpose(1, 2).contiguous()


def gaussian_filter(features: Tensor, values: Tensor) -> Tensor:
    """Compute sum_j exp(-|f_i - f_j|^2 / 2) v_j, the point itself included, in chunks of rows.

    Args:
        features: (N, d) points in units of the kernel's standard deviations.
        values: (N, C).

    Returns:
        (N, C) filtered values.
    """
    rows = max(1, _CHUNK_ENTRIES // len(features))
    # Not through a matrix product: its cancellation costs five of the seven digits.
    return torch.cat(
        [
            torch.cdist(part, features, compute_mode="donot_use_mm_for_euclid_dist")
            .square_()
            .mul_(-0.5)
            .exp_()
            @ values
            for part in features.split(rows)
        ]
    )


def filter_maps(features: Tensor, maps: Tensor, kernel: Kernel) -> Tensor:
    """Filter (B, C, H, W) maps over (B, N, 5) features with the lattice or the exact Gaussian."""
    values = maps.flatten(2).transpose(1, 2).contiguous()
    if kernel == "lattice":
        filtered = PermutohedralLattice(features).filter(values)
    else:
        filtered = torch.stack(
            [gaussian_filter(f, v) for f, v in zip(features, values, strict=True)]
        )
    return filtered.transpose(1, 2).reshape(maps.shape)


class _GatedEnergy(torch.autograd.Function):
    """-weight / B * sum S * gate * A S, with the backward that the method defines."""

    @staticmethod
    def forward(
        ctx: Any, prob: Tensor, roi: Tensor, gate: Tensor, filtered: Tensor, weight: float
    ) -> Tensor:
        factor = weight / prob.shape[0]
        ctx.save_for_backward(gate * filtered * roi * (-2 * factor))
        # Summed in float64: thousands of terms of one sign, and the value is reported.
        return (-factor * (prob * roi * gate * filtered).double().sum()).to(prob.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None, None


def energy_inputs(
    images: Tensor,
    prob: Tensor,
    label: Tensor,
    boxes: Tensor,
    *,
    scale_factor: float,
    mean: Sequence[float],
    std: Sequence[float],
    ignore_index: int = 255,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduce everything that the energy needs (toco.md section 2, Reg).

    The reduced size is (floor(s H), floor(s W)), s the factor. Pixels are sampled by the ratio of
    the two sizes, which at an odd size is not s.

    Args:
        images: (B, 3, H, W) normalised images.
        prob: (B, C, H, W) probabilities.
        label: (B, H, W) class ids.
        boxes: (B, 4) real pixels: row start, row end, column start, column end, ends excluded.
        scale_factor: Factor of the image size.
        mean: Mean with which the images were normalised.
        std: Standard deviation with which the images were normalised.
        ignore_index: Label of undecided pixels, whose gate is open.

    Returns:
        Reduced images as 0-255 floats (nearest), probabilities (bilinear, differentiable), box
        mask (B, 1, h, w) and gate (B, 1, h, w).
    """
    colour_mean = numbers_beside(images, [255 * m for m in mean]).view(3, 1, 1)
    colour_std = numbers_beside(images, [255 * s for s in std]).view(3, 1, 1)
    # The size, not the factor: at odd sizes the factor would sample beside the right positions.
    size = [int(scale_factor * side) for side in images.shape[-2:]]
    colours = F.interpolate(images * colour_std + colour_mean, size)
    reduced = F.interpolate(prob, size, mode="bilinear", align_corners=False)
    inside = inside_boxes(boxes.to(images.device), *images.shape[-2:])[:, None].to(prob.dtype)
    roi = F.interpolate(inside, size)
    ignored = (label == ignore_index)[:, None].to(prob.dtype)
    ignored = F.interpolate(ignored, size) > 0
    gate = (roi - reduced.detach().amax(1, keepdim=True)).clamp_min(0)
    return colours, reduced, roi, gate.masked_fill(ignored, 1.0)


def dense_energy_from_prob(
    images: Tensor,
    prob: Tensor,
    label: Tensor,
    boxes: Tensor,
    *,
    weight: float = 1e-7,
    sigma_rgb: float = 15.0,
    sigma_xy: float = 100.0,
    scale_factor: float = 0.5,
    kernel: Kernel = "lattice",
    gaussian_scale: float = 1.0,
    mean: Sequence[float],
    std: Sequence[float],
    ignore_index: int = 255,
) -> Tensor:
    """Compute the gated dense-CRF energy of probabilities at image size.

    See :func:`dense_energy_loss` for the arguments; ``prob`` (B, C, H, W) replaces the logits.

    Returns:
        Scalar energy.
    """
    if kernel not in ("lattice", "gaussian"):
        raise WSSSError(f"energy kernel must be 'lattice' or 'gaussian', got '{kernel}'")
    colours, reduced, roi, gate = energy_inputs(
        images,
        prob,
        label,
        boxes,
        scale_factor=scale_factor,
        mean=mean,
        std=std,
        ignore_index=ignore_index,
    )
    features = energy_features(colours, sigma_rgb=sigma_rgb, sigma_xy=sigma_xy * scale_factor)
    filtered = filter_maps(features, reduced.detach() * roi, kernel)
    if kernel == "gaussian":
        filtered = filtered * gaussian_scale
    energy: Tensor = _GatedEnergy.apply(reduced, roi, gate, filtered, weight)
    return energy


def dense_energy_loss(
    images: Tensor,
    logits: Tensor,
    label: Tensor,
    boxes: Tensor,
    *,
    weight: float = 1e-7,
    sigma_rgb: float = 15.0,
    sigma_xy: float = 100.0,
    scale_factor: float = 0.5,
    kernel: Kernel = "lattice",
    gaussian_scale: float = 1.0,
    mean: Sequence[float],
    std: Sequence[float],
    ignore_index: int = 255,
) -> Tensor:
    """Compute the energy that rewards equal predictions on similar pixels (toco.md, Reg).

    At ``scale_factor`` of the image size: -weight / B * sum S * gate * A S, where S are the
    softmax probabilities inside the boxes, A filters over position and colour, and the gate is one
    minus the highest probability inside the box and 1 on ignored pixels. The backward is the
    method's own: -2 * weight / B * gate * A S, with the gate as a constant.

    Args:
        images: (B, 3, H, W) normalised images.
        logits: (B, C, H, W) at image size.
        label: (B, H, W) class ids.
        boxes: (B, 4) real pixels: row start, row end, column start, column end, ends excluded.
        weight: Factor of the energy.
        sigma_rgb: Width of the kernel in grey levels.
        sigma_xy: Width of the kernel in pixels of the full-size image.
        scale_factor: Factor of the image size.
        kernel: ``lattice`` is the permutohedral filter of the official code. ``gaussian`` is the
            exact kernel exp(-d^2 / 2), quadratic in the pixels; the lattice gives about half of it
            (0.47-0.57 measured), so the same ``weight`` doubles the energy.
        gaussian_scale: Factor of the exact Gaussian, ignored by the lattice; 0.5 brings it to
            about the lattice's size.
        mean: Mean with which the images were normalised.
        std: Standard deviation with which the images were normalised.
        ignore_index: Label of undecided pixels, whose gate is open.

    Returns:
        Scalar energy, at most 0.

    Raises:
        WSSSError: Unknown kernel, or a kernel too narrow for the lattice's keys.
    """
    return dense_energy_from_prob(
        images,
        logits.softmax(1),
        label,
        boxes,
        weight=weight,
        sigma_rgb=sigma_rgb,
        sigma_xy=sigma_xy,
        scale_factor=scale_factor,
        kernel=kernel,
        gaussian_scale=gaussian_scale,
        mean=mean,
        std=std,
        ignore_index=ignore_index,
    )


def imagenet_energy_loss(
    images: Tensor, logits: Tensor, label: Tensor, boxes: Tensor, kernel: Kernel
) -> Tensor:
    """Compute :func:`dense_energy_loss` of images normalised as for ImageNet's encoders.

    The lattice is 0.47-0.57 of the exact Gaussian: halving the latter keeps the weight's meaning.
    """
    return dense_energy_loss(
        images,
        logits,
        label,
        boxes,
        kernel=kernel,
        gaussian_scale=0.5,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
