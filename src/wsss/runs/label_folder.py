"""A folder of label maps: its card, its lock, and the loop that fills it image by image.

Images that are done are not done again, and at most a few wait for a CRF at any time.
"""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from wsss.core.errors import WSSSError
from wsss.core.failures import one_line
from wsss.core.files import make_writable, write_atomically
from wsss.core.lock import lock
from wsss.core.modes import evaluating
from wsss.core.ranks import rank_and_count
from wsss.data.dataset import ImageDataset, in_threads
from wsss.data.images import image_size, read_mask, write_mask
from wsss.data.train_masks import CARD_FILE, read_card
from wsss.evaluation.crf_queue import CRFPoolLike
from wsss.runs.folder import Run

Labels = NDArray[np.uint8]


class LabellerLike(Interface):
    """What makes the label map of an image."""

    def crf(self, jobs: int | None) -> AbstractContextManager[CRFPoolLike | None]:
        """Open what computes the CRF that images wait for, with so many processes."""

    def begin(self, item: dict[str, Any], crf: CRFPoolLike | None) -> Callable[[], Labels]:
        """Begin an item of an evaluation data set; give what waits for its label map (H, W)."""


def digest_of(identity: Mapping[str, Any]) -> str:
    """Give the eight hex digits that a folder is named by."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def plain_values(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Give an identity as JSON would give it back: tuples become lists."""
    return dict(json.loads(json.dumps(identity)))


def fill_folder(
    run: Run,
    split: str,
    labeller: LabellerLike,
    folder: Path,
    card: Mapping[str, Any],
    *,
    what: str,
    mend: str = "remove that folder",
    crf_jobs: int | None = None,
) -> None:
    """Label every image of a list, going on where an earlier call stopped.

    A label map that is there is opened: one that is damaged is made again, also in a folder that
    was finished. Where ``torch.distributed`` is initialised, each rank labels its share of the
    images.

    Args:
        run: whose module makes the maps, where it is.
        split: the list.
        labeller: makes the label maps.
        folder: one NAME.png an image and a card.
        card: what is said of the labels; ``made_from`` is all that decides them.
        what: they are, for a line at the end.
        mend: what helps where the folder holds something else.
        crf_jobs: processes of the dense CRF.

    Raises:
        WSSSError: the folder holds labels made in another way, or another process works there.
    """
    dataset = run.data.unmasked_dataset(split)
    if _is_finished(folder, card["made_from"], mend) and not _unlabelled(
        dataset, run.data.num_classes, folder, range(len(dataset))
    ):
        print(f"{folder} is finished")
        return
    first = rank_and_count()[0] == 0
    _barrier()
    if first:
        make_writable(folder)
    _barrier()
    with lock(folder, "labelling"):
        if first:
            write_card(folder, {**card, "status": "begun"})
        _barrier()
        seconds = _label_all(run, dataset, split, labeller, folder, crf_jobs)
        _barrier()
        if first:
            write_card(folder, {**card, "seconds_per_image": seconds, "status": "finished"})
            print(f"{what} in {folder}")


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
    keys = dict.fromkeys([*identity, *made_from])
    other = [key for key in keys if made_from.get(key) != identity.get(key)]
    if other:
        shown = one_line(", ".join(other), 200)
        raise WSSSError(f"{folder} holds pseudo labels of another {shown}; {mend}")
    return bool(card.get("status") == "finished")


def _unlabelled(
    dataset: ImageDataset, num_classes: int, folder: Path, indices: Sequence[int]
) -> dict[int, str]:
    """Give which images have no label map of their size and classes, and why: '' where no file is.

    Args:
        dataset: the images.
        num_classes: K; a map holds 0..K and 255.
        folder: of the maps.
        indices: of the images to look at.
    """

    def fault(index: int) -> str | None:
        sample = dataset.samples[index]
        path = folder / f"{sample.name}.png"
        if not path.is_file():
            return ""
        size = image_size(sample.image)  # a broken image is no fault of its label map
        try:
            read_mask(path, num_classes=num_classes, size=size)
        except WSSSError as error:
            return str(error)
        return None

    faults = zip(indices, in_threads(fault, indices), strict=True)
    return {index: found for index, found in faults if found is not None}


def _label_all(
    run: Run,
    dataset: ImageDataset,
    split: str,
    labeller: LabellerLike,
    folder: Path,
    crf_jobs: int | None,
) -> float | None:
    """Label this rank's images that have no whole file yet; give the seconds an image, if any.

    An interrupted call took as long for each of its images, so these seconds stand for all.
    """
    rank, ranks = rank_and_count()
    own = range(rank, len(dataset), ranks)  # whatever is done, or ranks would disagree
    todo = _unlabelled(dataset, run.data.num_classes, folder, own)
    if damaged := [found for found in todo.values() if found]:
        first = damaged[0].partition(";")[0]
        print(f"warning: {len(damaged)} damaged label maps are made again: {first}")
    started = time.perf_counter()
    waiting: deque[tuple[str, Callable[[], Labels]]] = deque()

    def save_oldest() -> None:
        name, finish = waiting.popleft()
        write_mask(finish(), folder / f"{name}.png")

    with evaluating(run.module), labeller.crf(crf_jobs) as crf:
        most = 2 * crf.jobs if crf else 0
        bar = track(todo, description=f"labelling {split}", disable=rank > 0)
        for item in (dataset[index] for index in bar):
            waiting.append((item["name"], labeller.begin(item, crf)))
            while len(waiting) > most:
                save_oldest()
        while waiting:
            save_oldest()
    seconds = time.perf_counter() - started
    print(f"{len(todo)} images in {seconds:.0f} s, {len(own) - len(todo)} done before")
    return seconds / len(todo) if todo else None


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write what is said of a folder's labels beside them, atomically."""
    write_atomically(folder / CARD_FILE, f"{json.dumps(card, indent=2)}\n".encode())


def _barrier() -> None:
    if rank_and_count()[1] > 1:
        torch.distributed.barrier()
