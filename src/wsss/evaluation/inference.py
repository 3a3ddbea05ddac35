"""From a module's ``forward`` and ``cams`` to maps at mask size, as a protocol says.

Evaluation, the gallery and `wsss predict` share these functions, so that what one looks at is what
was scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol as Interface
from typing import runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wsss.evaluation.protocol import Merge, Protocol
from wsss.maps.cams import normalise_maximum
from wsss.maps.pixels import squash_pixels
from wsss.maps.pseudo_labels import cam_to_label_with_ignore, refine_cam_to_label
from wsss.maps.refine.dense_crf import crf_label
from wsss.maps.refine.mean_field import MeanFieldPool
from wsss.maps.refine.pamr import PAMR
from wsss.maps.refine.par import PAR


class OutputsLike(Interface):
    """Result of a forward pass (`wsss.methods.base.Outputs`)."""

    @property
    def class_logits(self) -> Tensor:
        """(B, K) image-level logits."""

    @property
    def seg_logits(self) -> Tensor | None:
        """(B, K+1, h, w) logits with the background first, or None."""


class ModuleLike(Interface):
    """All that evaluation may see of a method."""

    def __call__(self, images: Tensor) -> OutputsLike:
        """Compute the logits of normalised images (B, 3, H, W)."""

    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute maps (B, K, H, W) in [0, 1], zero for classes that ``labels`` (B, K) lacks."""


@runtime_checkable
class HasFurtherMaps(Interface):
    """A method with further localisation maps that are scored beside its CAMs."""

    @property
    def further_map_names(self) -> tuple[str, ...]:
        """Keys of :meth:`further_cams`."""

    def further_cams(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute maps as those of :meth:`ModuleLike.cams`, by name."""


@dataclass(frozen=True)
class Prediction:
    """Logits of a batch.

    Attributes:
        class_logits: (B, K).
        single: (B, K+1, H, W) single-scale logits at mask size, None without a segmentation head.
        merged: the same over scales and flip; None where the protocol has only one scale. Where
            probabilities were merged these are their logarithms.
    """

    class_logits: Tensor
    single: Tensor | None
    merged: Tensor | None


def resized(maps: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Resize bilinearly in float32; the same size is left untouched."""
    maps = maps.float()
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)


def _squash(images: Tensor, side: int | None) -> Tensor:
    return images if side is None else resized(images, (side, side))


def _long_side(images: Tensor, length: int | None) -> Tensor:
    """Resize images (B, 3, H, W) so that the long side has so many pixels."""
    if length is None:
        return images
    most = max(images.shape[-2:])
    return resized(images, [max(1, int(length * side / most)) for side in images.shape[-2:]])


def _by_factor(images: Tensor, scale: float, *, align_corners: bool) -> Tensor:
    """Resize by exactly a factor: pixels are 1 / scale apart, whatever is left at the edge."""
    return F.interpolate(
        images.float(),
        scale_factor=scale,
        mode="bilinear",
        align_corners=align_corners,
        recompute_scale_factor=False,
    )


def _merge(first: Tensor, second: Tensor, how: Merge) -> Tensor:
    """Merge by maximum or sum; a mean is a sum until all are there."""
    return torch.maximum(first, second) if how == "max" else first + second


def predict(
    module: ModuleLike, images: Tensor, size: Sequence[int], protocol: Protocol
) -> Prediction:
    """Run the module at every scale of the protocol.

    The unflipped scale 1 is run once and serves the image-level logits, the single-scale result
    and (unless it is squashed differently) the merge. Order as in ToCo (toco.md section 5): logits
    to mask size, merge the mirror image, then merge the scales (as probabilities where the
    protocol says so).

    Args:
        module: the method, in eval mode.
        images: (B, 3, H, W) normalised.
        size: height and width of the result.
        protocol: scales and merges.
    """
    images = _long_side(images, protocol.resize_long)
    outputs = module(_squash(images, protocol.single_resize))
    if outputs.seg_logits is None:
        return Prediction(outputs.class_logits.float(), None, None)
    single = resized(outputs.seg_logits, size)
    shared = protocol.single_resize == protocol.resize
    merged: Tensor | None = None
    count = 0
    small = protocol.merge_at == "logits"
    at = tuple(outputs.seg_logits.shape[-2:]) if small else size
    first = outputs.seg_logits.float() if small else single
    for scale, scaled in _scaled_images(images, protocol):
        logits = first if scale == 1 and shared else _segment(module, scaled, at)
        if protocol.flip:
            mirrored = _segment(module, scaled.flip(-1), at).flip(-1)
            logits = _merge(logits, mirrored, protocol.flip_merge)
            logits = logits / 2 if protocol.flip_merge == "mean" else logits
        if protocol.merge_of == "probabilities":
            logits = logits.softmax(1)
        merged = logits if merged is None else _merge(merged, logits, protocol.scale_merge)
        count += 1
    if merged is not None and protocol.scale_merge == "mean":
        merged = merged / count
    if merged is not None and protocol.merge_of == "probabilities":
        merged = merged.log()
    if merged is not None:
        merged = resized(merged, size)
    return Prediction(outputs.class_logits.float(), single, merged)


def _scaled_images(images: Tensor, protocol: Protocol) -> Iterator[tuple[float | None, Tensor]]:
    """Give the inputs of multi-scale segmentation with their scales (None: a size instead)."""
    if protocol.seg_sizes is not None:
        for side in protocol.seg_sizes:
            yield None, squash_pixels(images, side)
        return
    native, images = images, _squash(images, protocol.resize)
    for scale in protocol.seg_scales if protocol.multi_scale else ():
        if protocol.scale_by == "factor" and scale != 1:
            yield scale, _by_factor(images, scale, align_corners=protocol.align_corners)
            continue
        height, width = (max(1, int(scale * side)) for side in images.shape[-2:])
        source = native if protocol.scale_from == "native" else images
        yield scale, resized(source, (height, width), align_corners=protocol.align_corners)


def _segment(module: ModuleLike, images: Tensor, size: Sequence[int]) -> Tensor:
    logits = module(images).seg_logits
    assert logits is not None  # the same module gave some at scale 1
    return resized(logits, size)


def _for_maps(images: Tensor, protocol: Protocol) -> Tensor:
    """Resize images (B, 3, H, W) to where localisation maps are computed."""
    return _squash(_long_side(images, protocol.resize_long), protocol.cam_resize)


def localise(
    module: ModuleLike, images: Tensor, labels: Tensor, size: Sequence[int], protocol: Protocol
) -> Tensor:
    """Compute CAMs at mask size.

    Args:
        module: the method, in eval mode.
        images: (B, 3, H, W) normalised.
        labels: (B, K) in {0, 1}; CAMs of other classes are zero.
        size: height and width of the result.
        protocol: gives the size at which CAMs are computed.

    Returns:
        (B, K, H, W) in [0, 1].
    """
    cams = module.cams(_for_maps(images, protocol), labels)
    return resized(cams, size) * labels[:, :, None, None].to(cams.device)


def localise_further(
    module: HasFurtherMaps, images: Tensor, labels: Tensor, size: Sequence[int], protocol: Protocol
) -> dict[str, Tensor]:
    """Compute further maps at mask size, by name; else as :func:`localise`."""
    maps = module.further_cams(_for_maps(images, protocol), labels)
    shown = labels[:, :, None, None]
    return {name: resized(own, size) * shown.to(own.device) for name, own in maps.items()}


def smoothed_label(
    rgb: NDArray[np.uint8],
    logits: Tensor,
    protocol: Protocol,
    present: Sequence[int] | None = None,
) -> NDArray[np.uint8]:
    """Label one image by the protocol's CRF, or plainly where it has none.

    Args:
        rgb: (H, W, 3) uint8.
        logits: (C, H, W), already merged over scales and flip.
        protocol: gives preset and backend.
        present: class ids to keep beside the background, or None for all classes.

    Returns:
        uint8 (H, W).
    """
    prob = logits.softmax(0).cpu().numpy()
    preset = protocol.crf_preset
    if preset is None:
        return prob.argmax(0).astype(np.uint8)
    if protocol.crf_backend == "torch":
        pool = MeanFieldPool(preset, device=logits.device)
        return pool.submit(rgb, prob, present).result()
    return crf_label(rgb, prob, preset, present)


def predicted_labels(class_logits: Tensor) -> Tensor:
    """Predict the classes above probability 0.5, and always the strongest one: (B, K) in {0, 1}."""
    labels = (class_logits > 0).float()
    return labels.scatter(1, class_logits.argmax(1, keepdim=True), 1.0)


def refinement(protocol: Protocol) -> PAR | PAMR | None:
    """Make the module that refines pseudo labels under a protocol."""
    if protocol.refine is None:
        return None
    return PAMR() if protocol.refine == "pamr" else PAR()


def pseudo_label(
    refine: PAR | PAMR | None, rgb: Tensor, cams: Tensor, labels: Tensor, protocol: Protocol
) -> Tensor:
    """Make pseudo labels at mask size: refine CAMs and cut at two thresholds, alike for all.

    ToCo trains on these. GETAM also opens its labels, and completes them where it has saliency
    maps; ClusterCAM's PAR has another epsilon in training (1e-5).

    Args:
        refine: what :func:`refinement` gives for the protocol.
        rgb: (B, H, W, 3) uint8 images.
        cams: (B, K, H, W) at the same size.
        labels: (B, K) image-level labels.
        protocol: thresholds, which must be set.

    Returns:
        (B, H, W) int64 class ids, 255 where undecided.
    """
    high, low = protocol.cam_high, protocol.cam_low
    if high is None or low is None:
        raise ValueError("pseudo labels need cam_high and cam_low")
    if refine is None:
        return cam_to_label_with_ignore(cams, labels, high=high, low=low)
    images = rgb.to(cams.device).permute(0, 3, 1, 2).float()
    if isinstance(refine, PAMR):
        refined = normalise_maximum(refine(images, cams))
        return cam_to_label_with_ignore(refined, labels, high=high, low=low)
    return refine_cam_to_label(refine, images / 255, cams, labels, high=high, low=low)
