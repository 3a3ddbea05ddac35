"""The localisation maps of a run's images, kept beside it so that several labels share them.

``RUN/maps/LIST-HASH`` holds one NAME.npy an image and a card with all that decides them. The maps
are float32, so that labels made from them are those that `wsss pseudo` makes without them.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss.core.arrays import Declared, read_npy
from wsss.core.errors import WSSSError
from wsss.core.files import file_sha256, read_json, write_atomically
from wsss.evaluation.inference import localise
from wsss.runs.folder import Run
from wsss.runs.label_folder import digest_of, plain_values

FOLDER = "maps"  # inside a run folder
CARD_FILE = "maps.json"
#: gives the maps (1, K, H, W) of an item of an evaluation data set, zero for absent classes
Maps = Callable[[dict[str, Any]], Tensor]


def maps_of(run: Run) -> Maps:
    """Give what computes a run's maps, where its module is."""

    def compute(item: dict[str, Any]) -> Tensor:
        image, labels = item["image"][None].to(run.device), item["labels"][None].to(run.device)
        return localise(run.module, image, labels, item["rgb"].shape[:2], run.protocol)

    return compute


class MapCache:
    """Maps of a run's training list, each computed once.

    Several processes may share it: a file appears whole. One that is damaged, or another image's,
    is made again.

    Args:
        run: a trained run, with its checkpoint.

    Raises:
        WSSSError: its folder holds something else.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.compute = run, maps_of(run)
        split = run.data.train_split
        identity = plain_values(
            {
                "checkpoint_sha256": file_sha256(run.checkpoint),
                "split": split,
                "list_sha256": run.data.list_hash(split),
                "labels_sha256": run.data.unmasked_dataset(split).label_sha256(),
                "cam_resize": run.protocol.cam_resize,
                "resize_long": run.protocol.resize_long,
            }
        )
        self.folder = run.folder / FOLDER / f"{Path(split).stem}-{digest_of(identity)}"
        card, mend = self.folder / CARD_FILE, f"remove {self.folder}"
        if not card.is_file():
            write_atomically(card, f"{json.dumps(identity, indent=2)}\n".encode())
        elif read_json(card, mend) != identity:
            raise WSSSError(f"{card}: is of other maps; {mend}")

    def __call__(self, item: dict[str, Any]) -> Tensor:
        """Give the maps (1, K, H, W) of an item of the training list, in [0, 1]."""
        labels, size = item["labels"], item["rgb"].shape[:2]
        ids = labels.nonzero().flatten()
        path = self.folder / f"{item['name']}.npy"
        maps = _read(path, (len(ids), *size)) if path.is_file() else None
        if maps is None:
            found = self.compute(item)
            maps = found[0, ids.to(found.device)].cpu().numpy()
            buffer = io.BytesIO()
            np.save(buffer, maps, allow_pickle=False)
            write_atomically(path, buffer.getvalue())
        every = torch.zeros(1, len(labels), *size)
        every[0, ids] = torch.from_numpy(maps)
        return every.to(self.run.device)


def _read(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """Read maps of a shape; None, said in a line, where they are not these."""

    def check(name: str, declared: Declared) -> None:
        if declared != Declared(shape, False, np.dtype(np.float32)):
            raise ValueError(f"{name} declares {declared}, expected float32 {shape}")

    try:
        maps = read_npy(path, check)
        # a NaN is in no range
        if maps is None or not ((maps >= 0) & (maps <= 1)).all():
            raise WSSSError(f"{path}: holds no maps in [0, 1]")
    except WSSSError as error:
        print(f"warning: damaged maps are made again: {error}")
        return None
    return maps
