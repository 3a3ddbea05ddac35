"""``wsss pseudo``: label maps of a training list, written one by one as index PNGs.

They come from what the evaluator sees, ``cams`` or ``forward``, so every method has them. Images
that are done are not done again, and at most a few wait for the CRF at any time.
"""

import hashlib
import json
import time
from collections import deque
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.core.files import file_sha256, make_writable, write_atomically
from wsss.core.lock import lock
from wsss.core.modes import evaluating
from wsss.core.ranks import rank_and_count
from wsss.data.images import write_mask
from wsss.data.train_masks import CARD_FILE, read_card
from wsss.evaluation.card import git_commit, package_versions
from wsss.evaluation.crf_queue import crf_pool
from wsss.evaluation.inference import localise, predict, pseudo_label, refinement
from wsss.maps.pseudo_labels import cam_probabilities
from wsss.runs.config import config_hash
from wsss.runs.folder import Run
from wsss.runs.origin import check_origin
from wsss.runs.scoring import supervision_of_run

Labels = NDArray[np.uint8]
FOLDER = "pseudo_labels"  # inside a run folder
SOURCES = ("cam", "seg")


def write_pseudo_labels(
    run: Run,
    *,
    split: str | None = None,
    source: str = "cam",
    out: Path | str | None = None,
    crf_jobs: int | None = None,
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

    Returns:
        The folder: one NAME.png an image and ``pseudo_labels.json``.

    Raises:
        WSSSError: unknown source, ``out`` holds labels made in another way, or another process
            works there.
    """
    check_source(source)
    split = split or run.data.train_split
    check_origin(run, [split], with_masks=False)
    identity = _identity(run, split, source)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    inside = run.folder / FOLDER / f"{Path(split).stem}-{digest[:8]}"
    folder = Path(out) if out else inside
    mend = "give another out=" if out else "remove that folder"
    if _is_finished(folder, identity, mend):
        print(f"{folder} is finished")
        return folder
    supervision = supervision_of_run(run.module, run.data)
    card = {"made_from": identity, "supervision": supervision, **_origin(run)}
    first = rank_and_count()[0] == 0
    _barrier()
    if first:
        make_writable(folder)
    _barrier()
    with lock(folder, "labelling"):
        if first:
            _write_card(folder, card | {"status": "begun"})
        _barrier()
        _label_all(run, split, source, folder, crf_jobs)
        _barrier()
        if first:
            _write_card(folder, card | {"status": "finished"})
            print(f"pseudo labels in {folder}")
    return folder


def check_source(source: str) -> None:
    """Raise WSSSError unless labels can be made from ``source``."""
    if source not in SOURCES:
        raise WSSSError(f"source={source}: expected {' or '.join(SOURCES)}")


def _is_finished(folder: Path, identity: dict[str, Any], mend: str) -> bool:
    """Say whether these labels are all there; False where they are begun or not.

    Raises:
        WSSSError: the folder holds something else.
    """
    card = read_card(str(folder))
    if card is None:
        # a hidden file is what a kill left of a card
        if folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir()):
            raise WSSSError(f"{folder} holds files that are not these labels; {mend}")
        return False
    made_from = card.get("made_from", {})
    other = [key for key in identity if made_from.get(key) != identity[key]]
    if other:
        raise WSSSError(f"{folder} holds pseudo labels of another {', '.join(other)}; {mend}")
    return bool(card.get("status") == "finished")


def _identity(run: Run, split: str, source: str) -> dict[str, Any]:
    """Gather all that decides the labels, as JSON would give it back."""
    identity = {
        "checkpoint_sha256": file_sha256(run.checkpoint),
        "split": split,
        "list_sha256": run.data.list_hash(split),
        "label_source": run.data.label_source,
        "source": source,
        "eval": asdict(run.protocol),
    }
    return dict(json.loads(json.dumps(identity)))  # tuples become lists


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


def _label_all(run: Run, split: str, source: str, folder: Path, crf_jobs: int | None) -> None:
    """Label this rank's images that have no file yet."""
    started = time.perf_counter()
    dataset = run.data.unmasked_dataset(split)
    rank, ranks = rank_and_count()
    own = range(rank, len(dataset), ranks)  # whatever is done, or ranks would disagree
    todo = [i for i in own if not (folder / f"{dataset.names[i]}.png").is_file()]
    labeller = Labeller(run, source)
    pool = crf_pool(run.protocol, run.device, crf_jobs) if labeller.smooths else nullcontext(None)
    waiting: deque[Waiting] = deque()
    with evaluating(run.module), pool as crf:
        bar = track(todo, description=f"labelling {split}", disable=rank > 0)
        for item in (dataset[index] for index in bar):
            result = labeller(item)
            if crf is None or isinstance(result, np.ndarray):
                write_mask(_hard(result), folder / f"{item['name']}.png")
                continue
            future = crf.submit(item["rgb"], result.probabilities)
            waiting.append(Waiting(item["name"], future, result.ids))
            while len(waiting) > 2 * crf.jobs:
                waiting.popleft().save(folder)
        while waiting:
            waiting.popleft().save(folder)
    seconds = time.perf_counter() - started
    print(f"{len(todo)} images in {seconds:.0f} s, {len(own) - len(todo)} done before")


@dataclass(frozen=True)
class Soft:
    """Probabilities of the categories that an image may show.

    Attributes:
        probabilities: (M, H, W) float32.
        ids: (M,) their class ids, 0 first.
    """

    probabilities: NDArray[np.float32]
    ids: Labels


@dataclass(frozen=True)
class Waiting:
    """An image whose CRF is being computed."""

    name: str
    future: Future[Labels]
    ids: Labels

    def save(self, folder: Path) -> None:
        """Wait for the CRF and write the labels."""
        write_mask(self.ids[self.future.result()], folder / f"{self.name}.png")


def _hard(result: Soft | Labels) -> Labels:
    if isinstance(result, Soft):
        return result.ids[result.probabilities.argmax(0)]
    return result


class Labeller:
    """Make an image's label map, or probabilities that a CRF is still to smooth.

    ``source="cam"`` with two thresholds (``eval.cam_high``) gives the pseudo labels that the
    evaluator scores, 255 where undecided; with one the odds of :func:`cam_probabilities`.
    ``source="seg"`` gives the segmentation head's probabilities. In both only the background and
    the image's labels are possible.

    Args:
        run: a trained run.
        source: ``cam`` or ``seg``.
    """

    def __init__(self, run: Run, source: str) -> None:
        self.module, self.protocol, self.source = run.module, run.protocol, source
        self.device = run.device
        refine = refinement(run.protocol)
        self.refine = None if refine is None else refine.to(self.device)
        #: whether a CRF may follow
        self.smooths = source == "seg" or run.protocol.cam_high is None

    def __call__(self, item: dict[str, Any]) -> Soft | Labels:
        """Label one item of an evaluation data set without masks."""
        image, labels = item["image"][None].to(self.device), item["labels"][None].to(self.device)
        height, width = item["rgb"].shape[:2]
        if self.source == "seg":
            return _kept(self._segmentation(image, (height, width)), labels)
        cams = localise(self.module, image, labels, (height, width), self.protocol)
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


def _write_card(folder: Path, card: dict[str, Any]) -> None:
    write_atomically(folder / CARD_FILE, f"{json.dumps(card, indent=2)}\n".encode())


def _barrier() -> None:
    if rank_and_count()[1] > 1:
        torch.distributed.barrier()
