"""``wsss pseudo``: label maps of a training list, written one by one as index PNGs.

They come from what the evaluator sees, ``cams`` or ``forward``, so every method has them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.core.files import file_sha256
from wsss.evaluation.card import git_commit, package_versions
from wsss.evaluation.crf_queue import CRFPoolLike, crf_pool
from wsss.evaluation.inference import predict, pseudo_label, refinement
from wsss.maps.pseudo_labels import cam_probabilities
from wsss.runs.config import config_hash
from wsss.runs.folder import Run
from wsss.runs.label_folder import Labels, digest_of, fill_folder, plain_values
from wsss.runs.label_sources import check_source
from wsss.runs.map_cache import Maps, maps_of
from wsss.runs.origin import check_origin
from wsss.runs.random_walk import RandomWalk, supervision_with
from wsss.runs.supervision import supervision_of_run

FOLDER = "pseudo_labels"  # inside a run folder


def write_pseudo_labels(
    run: Run,
    *,
    split: str | None = None,
    source: str = "cam",
    out: Path | str | None = None,
    crf_jobs: int | None = None,
    walk: RandomWalk | None = None,
    maps: Maps | None = None,
) -> Path:
    """Label every image of a list, going on where an earlier call stopped.

    It runs where the run's module is. Where ``torch.distributed`` is initialised, each rank labels
    its share of the images.

    Args:
        run: a trained run, with its checkpoint.
        split: list to label; None: the training list.
        source: ``cam`` or ``seg``.
        out: folder; None: one inside the run folder, named after all that decides the labels.
        crf_jobs: processes of the dense CRF.
        walk: refines the maps, in the place of thresholds, ``eval.refine`` and ``eval.crf``; from
            :func:`wsss.training.random_walk.trained_walk`.
        maps: gives the run's maps of the training list; None: they are computed.

    Returns:
        The folder: one NAME.png an image and ``pseudo_labels.json``.

    Raises:
        WSSSError: unknown source, or one that the walk does not go with, ``out`` holds labels made
            in another way, or another process works there.
    """
    check_source(source, refine=None if walk is None else "random_walk")
    split = split or run.data.train_split
    check_origin(run, [split], with_masks=False)
    identity = _identity(run, split, source)
    supervision = supervision_of_run(run)
    card = {"made_from": identity, "supervision": supervision, **_origin(run)}
    if walk is not None:
        identity["refine"] = walk.identity
        card["supervision"] = supervision_with(run, walk)
        card["refinement"] = walk.card
    inside = run.folder / FOLDER / f"{Path(split).stem}-{digest_of(identity)}"
    fill_folder(
        run,
        split,
        Labeller(run, source, walk, maps),
        Path(out) if out else inside,
        card,
        what="pseudo labels",
        mend="give another out=" if out else "remove that folder",
        crf_jobs=crf_jobs,
    )
    return Path(out) if out else inside


def _identity(run: Run, split: str, source: str) -> dict[str, Any]:
    """Gather all that decides the labels, as JSON would give it back."""
    return plain_values(
        {
            "checkpoint_sha256": file_sha256(run.checkpoint),
            "split": split,
            "list_sha256": run.data.list_hash(split),
            "label_source": run.data.label_source,
            "source": source,
            "eval": asdict(run.protocol),
        }
    )


def _origin(run: Run) -> dict[str, Any]:
    """Say where the labels come from, for whoever reads a second stage's results."""
    return {
        "method": run.module.title,
        "run": run.folder.name,
        "config_hash": config_hash(run.config),
        "seed": run.config["seed"],
        "iterations": run.step,
        "backbone": run.module.backbone.weights_info.as_dict(),
        "uses_image_labels": True,
        "commit": git_commit(),
        "versions": package_versions(),
    }


@dataclass(frozen=True)
class Soft:
    """Probabilities of the categories that an image may show.

    Attributes:
        probabilities: (M, H, W) float32.
        ids: (M,) their class ids, 0 first.
    """

    probabilities: NDArray[np.float32]
    ids: Labels


class Labeller:
    """Make an image's label map, or probabilities that a CRF is still to smooth.

    ``source="cam"`` with two thresholds (``eval.cam_high``) gives the pseudo labels that the
    evaluator scores, 255 where undecided; with one the odds of :func:`cam_probabilities`.
    ``source="seg"`` gives the segmentation head's probabilities. In all only the background and
    the image's labels are possible.

    Args:
        run: a trained run.
        source: ``cam`` or ``seg``.
        walk: lets the maps walk, and decides without a threshold.
        maps: gives the run's maps; None: they are computed.
    """

    def __init__(
        self,
        run: Run,
        source: str,
        walk: RandomWalk | None = None,
        maps: Maps | None = None,
    ) -> None:
        self.module, self.protocol, self.source = run.module, run.protocol, source
        self.device, self.walk, self.maps = run.device, walk, maps or maps_of(run)
        refine = refinement(run.protocol)
        self.refine = None if refine is None else refine.to(self.device)
        #: whether a CRF may follow
        self.smooths = walk is None and (source == "seg" or run.protocol.cam_high is None)

    def crf(self, jobs: int | None) -> AbstractContextManager[CRFPoolLike | None]:
        """Open what computes the protocol's CRF, where one may follow."""
        return crf_pool(self.protocol, self.device, jobs) if self.smooths else nullcontext(None)

    def begin(self, item: dict[str, Any], crf: CRFPoolLike | None) -> Callable[[], Labels]:
        """Label an item; give what waits for its CRF."""
        result = self(item)
        if isinstance(result, np.ndarray):
            return lambda: result
        ids = result.ids
        if crf is None:
            return lambda: ids[result.probabilities.argmax(0)]
        future = crf.submit(item["rgb"], result.probabilities)
        return lambda: ids[future.result()]

    def __call__(self, item: dict[str, Any]) -> Soft | Labels:
        """Label one item of an evaluation data set without masks."""
        image, labels = item["image"][None].to(self.device), item["labels"][None].to(self.device)
        height, width = item["rgb"].shape[:2]
        if self.source == "seg":
            return _kept(self._segmentation(image, (height, width)), labels)
        cams = self.maps(item)
        if self.walk is not None:
            return self.walk.label(image, cams, labels)
        if self.smooths:
            threshold = self.protocol.cam_threshold
            return _kept(cam_probabilities(cams, labels, bg_threshold=threshold), labels)
        rgb = torch.from_numpy(item["rgb"])[None]
        label = pseudo_label(self.refine, rgb, cams, labels, self.protocol)
        return label[0].cpu().numpy().astype(np.uint8)

    def _segmentation(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        prediction = predict(self.module, image, size, self.protocol)
        logits = prediction.single if prediction.merged is None else prediction.merged
        if logits is None:
            raise WSSSError(
                f"source=seg: {self.module.title} has no segmentation head; use source=cam (in "
                "`wsss train`: second_stage.source=cam)"
            )
        return logits.softmax(1)


def _kept(probabilities: Tensor, labels: Tensor) -> Soft:
    """Keep background and labelled classes of one image, renormalised."""
    ids = torch.cat([labels.new_ones(1), labels[0]]).nonzero().flatten()
    kept = probabilities[0, ids]
    kept = kept / kept.sum(0, keepdim=True).clamp_min(1e-12)
    return Soft(kept.float().cpu().numpy(), ids.cpu().numpy().astype(np.uint8))
