"""Fully connected CRF through pydensecrf, with the presets of the field, on one or many cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt

from wsss.core.errors import WSSSError
from wsss.core.processes import serve


@dataclass(frozen=True)
class CRFPreset:
    """Parameters of one dense CRF; the kernels are diagonal and symmetrically normalised.

    Attributes:
        name: name under which the preset is known and reported.
        pos_xy: width of the position kernel in pixels.
        pos_w: its weight.
        bi_xy: width of the bilateral kernel in pixels.
        bi_rgb: width of the bilateral kernel in grey levels.
        bi_w: its weight.
        iterations: mean-field iterations.
        bgr: give the image with its colour channels reversed. The kernel does not know their
            order, but the lattice that computes it does: under one label in a hundred changes.
    """

    name: str
    pos_xy: float
    pos_w: float
    bi_xy: float
    bi_rgb: float
    bi_w: float
    iterations: int = 10
    bgr: bool = False


# Collected in field.md section F; `toco` and `toco_cam` also in toco.md section 5, `clustercam`,
# `weclip` and `getam` in the tests' sections of their pages, `tkp_pcl` in its refinement of
# ViT-PCM.
CRF_PRESETS: dict[str, CRFPreset] = {
    p.name: p
    for p in (
        CRFPreset(name="toco", pos_xy=1, pos_w=1, bi_xy=121, bi_rgb=5, bi_w=4),
        CRFPreset(name="toco_cam", pos_xy=3, pos_w=3, bi_xy=36, bi_rgb=3, bi_w=4),
        CRFPreset(name="getam", pos_xy=3, pos_w=3, bi_xy=83, bi_rgb=5, bi_w=4, iterations=20),
        CRFPreset(
            name="getam_bgr", pos_xy=3, pos_w=3, bi_xy=83, bi_rgb=5, bi_w=4, iterations=20, bgr=True
        ),
        CRFPreset(name="psa", pos_xy=3, pos_w=3, bi_xy=80, bi_rgb=13, bi_w=10),
        CRFPreset(name="irn", pos_xy=3, pos_w=3, bi_xy=50, bi_rgb=5, bi_w=10),
        CRFPreset(name="afa", pos_xy=3, pos_w=3, bi_xy=64, bi_rgb=5, bi_w=4),
        CRFPreset(name="clip_es", pos_xy=1, pos_w=3, bi_xy=67, bi_rgb=3, bi_w=4),
        CRFPreset(name="mctformer", pos_xy=4, pos_w=3, bi_xy=83, bi_rgb=5, bi_w=3),
        CRFPreset(name="clustercam", pos_xy=4, pos_w=3, bi_xy=83, bi_rgb=5, bi_w=3),
        CRFPreset(name="tkp_pcl", pos_xy=1, pos_w=3, bi_xy=67, bi_rgb=3, bi_w=4),
        CRFPreset(name="weaktr", pos_xy=3, pos_w=3, bi_xy=83, bi_rgb=5, bi_w=3),
        CRFPreset(name="weclip", pos_xy=3, pos_w=3, bi_xy=64, bi_rgb=5, bi_w=4),
        CRFPreset(name="fma", pos_xy=2, pos_w=2, bi_xy=65, bi_rgb=3, bi_w=4),
    )
}
Image = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]


def import_pydensecrf() -> None:
    """Raise WSSSError unless pydensecrf is installed."""
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError as error:
        raise WSSSError(
            "the dense CRF needs the package pydensecrf2 (pip install pydensecrf2; the older "
            "pydensecrf does not compile on current Pythons), or eval.crf_backend=torch"
        ) from error


def dense_crf(image: Image, prob: Probabilities, preset: CRFPreset) -> Probabilities:
    """Run mean-field inference on one image.

    Args:
        image: (H, W, 3) uint8 RGB.
        prob: (C, H, W) probabilities over the classes; clipped at 1e-5 before the logarithm.
        preset: CRF parameters.

    Returns:
        (C, H, W) float32 posterior probabilities.

    Raises:
        WSSSError: pydensecrf is not installed, or image and probabilities do not fit together.
    """
    import_pydensecrf()
    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_softmax

    height, width = image.shape[:2]
    if image.dtype != np.uint8 or image.shape != (*prob.shape[1:], 3):
        raise WSSSError(
            f"the dense CRF wants a uint8 image (H, W, 3) and probabilities (C, H, W), got "
            f"{image.dtype} {image.shape} and {prob.shape}"
        )
    crf = DenseCRF2D(width, height, prob.shape[0])
    unary = unary_from_softmax(np.ascontiguousarray(prob, dtype=np.float32))
    crf.setUnaryEnergy(np.ascontiguousarray(unary))
    crf.addPairwiseGaussian(sxy=preset.pos_xy, compat=preset.pos_w)
    crf.addPairwiseBilateral(
        sxy=preset.bi_xy,
        srgb=preset.bi_rgb,
        rgbim=np.ascontiguousarray(image[..., ::-1] if preset.bgr else image),
        compat=preset.bi_w,
    )
    posterior = np.asarray(crf.inference(preset.iterations), dtype=np.float32)
    return posterior.reshape(prob.shape)


def dense_crf_pruned(
    image: Image, prob: Probabilities, preset: CRFPreset, present: Sequence[int]
) -> Probabilities:
    """Run the CRF over the background and the present classes only.

    This uses the image's labels, so it is allowed for pseudo-labels and not for test predictions.

    Args:
        image: (H, W, 3) uint8 RGB.
        prob: (C, H, W) probabilities, background first; the kept ones are renormalised per pixel.
        preset: CRF parameters.
        present: class ids (1 .. C-1) that the image holds; may be empty.

    Returns:
        (C, H, W) float32 posterior, zero for the classes left out.
    """
    kept, chosen = prune(prob, present)
    posterior = np.zeros(prob.shape, dtype=np.float32)
    posterior[kept] = dense_crf(image, chosen, preset)
    return posterior


def prune(prob: Probabilities, present: Sequence[int]) -> tuple[list[int], Probabilities]:
    """Keep background and present classes of (C, H, W) probabilities, renormalised."""
    kept = [0, *sorted(set(present) - {0})]
    chosen = prob[kept]
    return kept, chosen / np.maximum(chosen.sum(axis=0, keepdims=True), 1e-12)


def crf_label(
    image: Image, prob: Probabilities, preset: CRFPreset, present: Sequence[int] | None = None
) -> Labels:
    """Give the CRF's (H, W) uint8 argmax; at module level so that a worker can import it.

    Args:
        image: (H, W, 3) uint8 RGB.
        prob: (C, H, W) probabilities.
        preset: CRF parameters.
        present: class ids to keep beside the background, or None for all classes.
    """
    if present is None:
        posterior = dense_crf(image, prob, preset)
    else:
        posterior = dense_crf_pruned(image, prob, preset, present)
    return posterior.argmax(axis=0).astype(np.uint8)


class CRFPool:
    """Dense CRFs in worker processes, while the caller goes on with the next image.

    Used as a context manager; leaving it waits for what was submitted, or drops what has not begun
    when an exception leaves it.

    Raises:
        WSSSError: when it is left, if a worker was killed.
    """

    def __init__(self, preset: CRFPreset, *, jobs: int | None = None) -> None:
        """Set up the pool; the workers start with the first image.

        Args:
            preset: CRF parameters for all images.
            jobs: worker processes; by default one for each core.
        """
        self.preset = preset
        self.jobs = jobs or os.cpu_count() or 1
        # Spawned, not forked: the caller has threads (torch, CUDA) that a fork would break.
        self._pool = ProcessPoolExecutor(
            max_workers=self.jobs,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=serve,
            initargs=(os.getpid(),),
        )

    def __enter__(self) -> CRFPool:
        """Return the pool itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the workers and end them; say so if one was killed."""
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if isinstance(error, BrokenProcessPool):
            raise WSSSError(
                "dense CRF: a process was killed, most likely out of memory; repeat the command, "
                "with eval.crf_backend=torch if it happens again"
            ) from error

    def submit(
        self, image: Image, prob: Probabilities, present: Sequence[int] | None = None
    ) -> Future[Labels]:
        """Queue one image.

        Args:
            image: (H, W, 3) uint8 RGB.
            prob: (C, H, W) probabilities.
            present: class ids to keep beside the background, or None for all classes.

        Returns:
            A future of the (H, W) uint8 label map.
        """
        return self._pool.submit(crf_label, image, prob, self.preset, present)
