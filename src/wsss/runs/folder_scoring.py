"""Score maps that somebody else made, by the counters that runs are scored by."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track

from wsss.core.devices import choose_device
from wsss.core.errors import WSSSError
from wsss.core.files import make_writable
from wsss.core.lock import lock
from wsss.core.supervision import IMAGE_LABELS
from wsss.data.datamodule import ImageDataModule
from wsss.evaluation.card import folder_card
from wsss.evaluation.folders import find_files, read_class_maps, read_label_map
from wsss.evaluation.inference import resized
from wsss.evaluation.ledger import check_ledger, record_reading
from wsss.evaluation.protocol import Protocol
from wsss.evaluation.tally import Tally, Truth
from wsss.results.store import print_table
from wsss.runs.compose import compose_run
from wsss.runs.folder import build_data
from wsss.runs.scoring import (
    data_hashes,
    results_header,
    shown_on_failure,
    store_and_show,
)


@dataclass(frozen=True, kw_only=True)
class MapFolder:
    """A folder of maps, and what is said of them.

    Attributes:
        path: the folder (`wsss.evaluation.folders` lists the layouts).
        holds: class maps, ``cams``, or label maps, ``masks``.
        kind: what label maps are scored as, a key of `wsss.evaluation.tally.LABEL_MAPS`.
        first_class: what class maps call the first foreground class, 0 or 1.
        name: of the method; None: the folder's name.
        supervision: what the method learnt from.
        seed: of the maps.
    """

    path: Path
    holds: Literal["cams", "masks"]
    kind: str = "pseudo_label"
    first_class: int = 0
    name: str | None = None
    supervision: str = IMAGE_LABELS
    seed: int = 0

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Endings of the files."""
        return (".npy", ".npz") if self.holds == "cams" else (".png", ".npy")

    def count(self, tally: Tally, batch: dict[str, Any], path: Path) -> bool:
        """Count one image's file; tell whether it has any class that the image has."""
        truth = Truth.of(batch, tally.num_classes)
        if self.holds == "cams":
            return self._count_cams(tally, batch["labels"].to(tally.device), truth, path)
        height, width = truth.mask.shape[-2:]
        labels = read_label_map(path, num_classes=len(tally.class_names), size=(height, width))
        tally.count_labels(self.kind, torch.from_numpy(labels)[None], truth)
        return True

    def _count_cams(self, tally: Tally, labels: torch.Tensor, truth: Truth, path: Path) -> bool:
        number = len(tally.class_names)
        height, width = truth.mask.shape[-2:]
        maps = read_class_maps(
            path, num_classes=number, first_class=self.first_class, size=(height, width)
        )
        cams = resized(torch.from_numpy(maps)[None], (height, width)).to(tally.device)
        present = (cams.amax((2, 3)) > 0).float()
        allowed = labels if tally.protocol.use_image_labels else present
        tally.count_cams(cams, allowed, labels, truth)
        return bool((present * labels).any())


def score_folder(
    maps: MapFolder,
    overrides: Sequence[str],
    *,
    splits: Sequence[str] | None = None,
    out: Path | str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Score maps on disk against the masks of a data set, and print the numbers.

    Args:
        maps: the folder.
        overrides: ``data=NAME``, ``data.KEY=VALUE`` and ``eval.KEY=VALUE``; what ``eval`` keys say
            about scales and CRF is taken down as a declaration.
        splits: lists to score; None: the validation split, or every row with a mask of a table
            without splits.
        out: where ``results.json`` and ``images.npz`` go; None: nothing is stored.
        device: where to count.

    Returns:
        The content of ``results.json``.

    Raises:
        WSSSError: files are missing or not as the layouts say.
    """
    config = compose_run([*overrides, f"seed={maps.seed}"])
    data, protocol = build_data(config), Protocol(**config["eval"])
    results = results_header(maps.name or maps.path.resolve().name, data, config)
    source = {maps.holds: str(maps.path), "first_class": maps.first_class}
    results |= {"cost": None, "source": source}
    declared = {item.partition("=")[0].removeprefix("eval.") for item in overrides}
    folder = Path(out) if out else None
    place = choose_device(device)
    if folder:
        make_writable(folder)
        check_ledger(folder)
    with lock(folder, "evaluating") if folder else nullcontext():
        cells: dict[str, dict[str, Any]] = {}
        with shown_on_failure(results):
            for split in splits or [data.scored_split]:
                metrics = _score(maps, data, protocol, split, place)
                cells[split] = {"names": data.eval_dataset(split).names, **metrics.pop("cells")}
                metrics["protocol"] = folder_card(
                    protocol=protocol,
                    declared=declared,
                    split=split,
                    list_hash=data.list_hash(split),
                    num_images=int(metrics["num_images"]),
                    supervision=maps.supervision,
                    seed=maps.seed,
                ) | {"label_source": data.label_source}
                metrics["data_sha256"] = data_hashes(data, split)
                results["splits"][split] = metrics
                if folder:
                    reading = record_reading(folder, split=split, purpose="wsss eval of a folder")
                    metrics["readings"] = reading
        if folder:
            store_and_show(results, cells, folder)
        else:
            print_table(results)
            print("not stored; give out=FOLDER for wsss compare and wsss report")
    return results


def _score(
    maps: MapFolder, data: ImageDataModule, protocol: Protocol, split: str, device: torch.device
) -> dict[str, Any]:
    """Count one split; give its metrics."""
    started = time.perf_counter()
    dataset = data.eval_dataset(split)
    tally = Tally(protocol=protocol, class_names=data.class_names)
    tally.to(device).reset()
    files = find_files(maps.path, list(dataset.names), maps.suffixes, maps.holds)
    agreed = 0
    for index in track(range(len(dataset)), description=f"scoring {split}"):
        item = dataset[index]
        batch = {
            "mask": item["mask"][None],
            "rgb": torch.from_numpy(item["rgb"])[None],
            "labels": item["labels"][None],
            "index": torch.tensor([index]),
        }
        agreed += maps.count(tally, batch, files[item["name"]])
    if not agreed:
        raise WSSSError(
            f"{maps.path}: no file holds a class of its image's labels; if its classes count from "
            "1, give first_class=1"
        )
    seconds = time.perf_counter() - started
    return tally.compute() | {
        "num_images": len(dataset),
        "notes": [],
        "cost": {"seconds": seconds, "seconds_per_image": None},
    }
