"""Dense CRFs computed behind the forward pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol as Interface

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss.evaluation.label_maps import LabelMapCounts, Regions
from wsss.evaluation.protocol import Protocol
from wsss.maps.refine.dense_crf import CRFPool
from wsss.maps.refine.mean_field import MeanFieldPool


class CRFPoolLike(Interface):
    """Where images go for a dense CRF: worker processes, or our own on this device."""

    jobs: int

    def submit(
        self,
        image: NDArray[np.uint8],
        prob: NDArray[np.float32],
        present: Sequence[int] | None = None,
    ) -> Future[NDArray[np.uint8]]:
        """Queue one image: (H, W, 3), (C, H, W) and the class ids to keep -> (H, W) labels."""


class CRFQueue:
    """Dense CRFs computed behind the forward pass; nothing is written to disk.

    Results are counted as they arrive, and at most a few images a worker wait, so that memory does
    not grow with the data set.

    Args:
        pool: an open pool.
        per_job: images that may wait for each worker.
    """

    def __init__(self, pool: CRFPoolLike, *, per_job: int = 2) -> None:
        self.pool = pool
        self.limit = per_job * pool.jobs
        self.waiting: deque[tuple[Future[NDArray[np.uint8]], Regions, int, LabelMapCounts]] = (
            deque()
        )

    def submit(
        self,
        logits: Tensor,
        rgb: Tensor,
        regions: Sequence[Regions],
        indices: Sequence[int],
        labels: Tensor | None,
        counts: LabelMapCounts,
    ) -> None:
        """Queue a batch; count finished images first where the queue is full.

        Args:
            logits: (B, C, H, W), already merged over scales and flip.
            rgb: (B, H, W, 3) uint8.
            regions: of the B ground truths.
            indices: numbers of the B images in their split.
            labels: (B, K) image labels to prune by, or None.
            counts: where to count.
        """
        prob = logits.softmax(1).cpu().numpy()
        images = rgb.cpu().numpy()
        for b in range(len(prob)):
            while len(self.waiting) >= self.limit:
                self._count_oldest()
            present = None if labels is None else (labels[b].nonzero().flatten() + 1).tolist()
            future = self.pool.submit(images[b], prob[b], present)
            self.waiting.append((future, regions[b], indices[b], counts))

    def drain(self) -> None:
        """Count everything that is still waiting."""
        while self.waiting:
            self._count_oldest()

    def _count_oldest(self) -> None:
        future, regions, index, counts = self.waiting.popleft()
        counts.update(torch.from_numpy(future.result()), regions, index)


def crf_pool(
    protocol: Protocol, device: torch.device, jobs: int | None
) -> AbstractContextManager[CRFPoolLike | None]:
    """Open what computes the protocol's CRF, as a context."""
    preset = protocol.crf_preset
    if preset is None:
        return nullcontext(None)
    if protocol.crf_backend == "torch":
        return MeanFieldPool(preset, device=device)
    return CRFPool(preset, jobs=jobs)
