"""The fully connected CRF in plain torch: batched, on any device, with pydensecrf's labels.

Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials"
(NIPS 2011): mean-field updates in which every pixel hears from every other through two Gaussian
kernels, position alone and position with colour. Messages are filtered on the permutohedral lattice
(`wsss.maps.permutohedral`) with the scheme of the C++ code, so that the labels agree; only the
order of floating-point sums differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.maps.permutohedral import PermutohedralLattice
from wsss.maps.refine.dense_crf import CRFPreset, Image, Labels, Probabilities, prune

_CLIP = 1e-5  # of the probabilities, as pydensecrf's unary_from_softmax
_NORM_EPS = 1e-20


class _Kernel:
    """One Gaussian kernel: symmetrically normalised filter with a Potts weight."""

    def __init__(self, features: Tensor, weight: float) -> None:
        """Build the lattice over (N, d) or (B, N, d) features and its normalisation."""
        self.lattice = PermutohedralLattice(features)
        self.weight = weight
        mass = self.lattice.filter(features.new_ones(*features.shape[:-1], 1))
        self.scale = (mass + _NORM_EPS).rsqrt()

    def message(self, marginals: Tensor) -> Tensor:
        """Sum what all pixels say to each: (..., N, C) -> (..., N, C)."""
        return self.lattice.filter(marginals * self.scale).mul_(self.scale * self.weight)


def mean_field(images: Tensor, prob: Tensor, preset: CRFPreset) -> Tensor:
    """Run mean-field inference on a batch of images of one size.

    Args:
        images: (B, H, W, 3) uint8 RGB.
        prob: (B, C, H, W) probabilities on the same device; clipped at 1e-5 before the logarithm.
        preset: CRF parameters.

    Returns:
        (B, C, H, W) float32 posterior probabilities.

    Raises:
        WSSSError: images and probabilities do not fit together.
    """
    batch, classes, height, width = prob.shape
    if images.dtype != torch.uint8 or images.shape != (batch, height, width, 3):
        raise WSSSError(
            f"the dense CRF wants uint8 images (B, H, W, 3) and probabilities (B, C, H, W), got "
            f"{images.dtype} {tuple(images.shape)} and {tuple(prob.shape)}"
        )
    rows, columns = torch.meshgrid(
        torch.arange(height, device=prob.device, dtype=torch.float32),
        torch.arange(width, device=prob.device, dtype=torch.float32),
        indexing="ij",
    )
    place = torch.stack([columns, rows], dim=-1).view(1, -1, 2)  # (1, N, 2)
    ordered = images.flip(-1) if preset.bgr else images
    colour = ordered.to(prob.device).float().view(batch, -1, 3)
    bilateral = torch.cat(
        [place.expand(batch, -1, -1) / preset.bi_xy, colour / preset.bi_rgb], dim=-1
    )
    near, alike = _Kernel(place[0] / preset.pos_xy, preset.pos_w), _Kernel(bilateral, preset.bi_w)

    # (B, C, H, W) -> (B, N, C)
    logits = prob.float().clamp(_CLIP, 1).log().flatten(2).transpose(1, 2).contiguous()
    marginals = logits.softmax(-1)
    for _ in range(preset.iterations):
        energy = logits + alike.message(marginals)
        # positions are those of every image: one lattice, (B, N, C) -> (N, B * C)
        flat = marginals.transpose(0, 1).reshape(-1, batch * classes)
        energy += near.message(flat).view(-1, batch, classes).transpose(0, 1)
        marginals = energy.softmax(-1)
    return marginals.transpose(1, 2).reshape(prob.shape)


class MeanFieldPool:
    """:func:`mean_field` behind the interface of `wsss.maps.refine.dense_crf.CRFPool`.

    Results are ready when :meth:`submit` returns; nothing runs beside the caller.
    """

    jobs = 1

    def __init__(self, preset: CRFPreset, *, device: torch.device) -> None:
        """Set up for one preset on one device."""
        self.preset = preset
        self.device = device

    def __enter__(self) -> MeanFieldPool:
        """Return the pool itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End nothing: no process was started."""

    def submit(
        self, image: Image, prob: Probabilities, present: Sequence[int] | None = None
    ) -> Future[Labels]:
        """Label one image.

        Args:
            image: (H, W, 3) uint8 RGB.
            prob: (C, H, W) probabilities.
            present: class ids to keep beside the background, or None for all classes.

        Returns:
            A finished future of the (H, W) uint8 label map.
        """
        kept, chosen = (list(range(len(prob))), prob) if present is None else prune(prob, present)
        posterior = mean_field(
            torch.from_numpy(image)[None].to(self.device, non_blocking=True),
            torch.from_numpy(np.ascontiguousarray(chosen))[None].to(self.device, non_blocking=True),
            self.preset,
        )
        ids = torch.tensor(kept, dtype=torch.uint8).to(self.device, non_blocking=True)
        future: Future[Labels] = Future()
        future.set_result(ids[posterior[0].argmax(0)].cpu().numpy())
        return future
