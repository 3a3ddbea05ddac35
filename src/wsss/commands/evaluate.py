"""``wsss eval``: the numbers of a run, of a checkpoint, or of maps that somebody else made."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from wsss.core.arguments import parse_arguments
from wsss.core.devices import choose_device
from wsss.core.errors import WSSSError
from wsss.core.files import make_writable
from wsss.data.datamodule import ImageDataModule
from wsss.evaluation.card import folder_card
from wsss.evaluation.folders import find_files, read_class_maps, read_label_map
from wsss.evaluation.inference import resized
from wsss.evaluation.ledger import record_reading
from wsss.evaluation.protocol import Protocol
from wsss.evaluation.tally import LABEL_MAPS, Tally, Truth
from wsss.results.store import print_table
from wsss.runs.compose import compose_run
from wsss.runs.config import config_hash
from wsss.runs.folder import build_data, load_run
from wsss.runs.scoring import data_hashes, evaluate_and_report, results_header, store_and_show


@dataclass
class EvalArguments:
    """Arguments of ``wsss eval``: one of ``run``, ``cams`` and ``masks``.

    Attributes:
        run: run folder or ``.ckpt`` file.
        cams: folder of class maps (`wsss.evaluation.folders` lists the layouts).
        masks: folder of label maps.
        splits: lists to evaluate; null: those of the data's configuration (of a folder: the
            validation split).
        out: where results go. Of a run, null is the run folder, or ``eval/HASH`` inside it where
            splits or the protocol are not the run's own. Of a folder, null prints only.
        name: what ``wsss compare`` calls the folder's method; null: the folder's name.
        supervision: the folder's league, such as ``image labels + saliency``.
        seed: the folder's seed, where it is one of several.
        kind: what the masks are: ``pseudo_label`` (255 allowed), ``seed``, ``seg``, ``seg_ms``,
            ``seg_crf`` or ``seg_ms_crf``.
        first_class: what the class maps call the first foreground class, 0 or 1.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
    """

    run: str | None = None
    cams: str | None = None
    masks: str | None = None
    splits: list[str] | None = None
    out: str | None = None
    name: str | None = None
    supervision: str = "image labels"
    seed: int = 0
    kind: str = "pseudo_label"
    first_class: int = 0
    device: str = "auto"


#: arguments that say of a folder what a run knows of itself
OF_FOLDERS = ("name", "supervision", "seed", "kind", "first_class")


def main(arguments: list[str]) -> int:
    """The verb."""
    chosen, overrides = parse_arguments(
        EvalArguments, arguments, passed_on=("eval", "data", "gallery")
    )
    sources = [key for key in ("run", "cams", "masks") if getattr(chosen, key) is not None]
    if len(sources) != 1:
        raise WSSSError(
            "give one of run=RUN_DIR, cams=FOLDER and masks=FOLDER"
            + (f", not {' and '.join(sources)}" if sources else "; run is missing")
        )
    if sources == ["run"]:
        for key in OF_FOLDERS:
            if getattr(chosen, key) != getattr(EvalArguments, key):
                raise WSSSError(
                    f"{key}={getattr(chosen, key)}: is for cams= and masks=; a run says it itself"
                )
    if chosen.kind not in LABEL_MAPS:
        raise WSSSError(f"kind={chosen.kind}: expected one of {', '.join(LABEL_MAPS)}")
    if sources == ["run"]:
        return _evaluate_run(chosen, overrides)
    return evaluate_folder(chosen, overrides)


def _evaluate_run(chosen: EvalArguments, overrides: list[str]) -> int:
    """A run or checkpoint of ours."""
    assert chosen.run is not None
    run = load_run(Path(chosen.run), overrides)
    folder = Path(chosen.out) if chosen.out else run.folder
    if not chosen.out and (overrides or chosen.splits):
        # other numbers than the run's own must not take their place
        folder = run.folder / "eval" / config_hash({**run.config, "splits": chosen.splits})
    evaluate_and_report(
        run.module,
        run.data,
        run.protocol,
        config=run.config,
        folder=folder,
        splits=chosen.splits or [run.data.val_split, *run.data.test_splits],
        step=run.step,
        device=choose_device(chosen.device),
        cost=run.cost,
        run=Path(chosen.run),
        train_list=run.train_list,
        purpose="wsss eval",
    )
    return 0


def evaluate_folder(chosen: EvalArguments, overrides: list[str]) -> int:
    """Maps on disk, scored by the counters that runs are scored by.

    Args:
        chosen: its ``cams`` or ``masks``.
        overrides: ``data=NAME``, ``data.KEY=VALUE`` and ``eval.KEY=VALUE``; what ``eval`` keys say
            about scales and CRF is taken down as a declaration.

    Raises:
        WSSSError: files are missing or not as the layouts say.
    """
    config = compose_run([*overrides, f"seed={chosen.seed}"])
    data, protocol = build_data(config), Protocol(**config["eval"])
    source = Path(chosen.cams or chosen.masks or "")
    results = results_header(chosen.name or source.resolve().name, data, config)
    kind = "cams" if chosen.cams else "masks"
    results |= {"cost": None, "source": {kind: str(source), "first_class": chosen.first_class}}
    declared = {item.partition("=")[0].removeprefix("eval.") for item in overrides}
    cells: dict[str, dict[str, Any]] = {}
    out = Path(chosen.out) if chosen.out else None
    if out:
        make_writable(out)
    for split in chosen.splits or [data.val_split]:
        metrics = _score(chosen, data, protocol, split)
        cells[split] = {"names": data.eval_dataset(split).names, **metrics.pop("cells")}
        metrics["protocol"] = folder_card(
            protocol=protocol,
            declared=declared,
            split=split,
            list_hash=data.list_hash(split),
            num_images=int(metrics["num_images"]),
            supervision=chosen.supervision,
            seed=chosen.seed,
        ) | {"label_source": data.label_source}
        metrics["data_sha256"] = data_hashes(data, split)
        if out:
            metrics["readings"] = record_reading(out, split=split, purpose="wsss eval of a folder")
        results["splits"][split] = metrics
    if out:
        store_and_show(results, cells, out)
    else:
        print_table(results)
        print("not stored; give out=FOLDER for wsss compare and wsss report")
    return 0


def _score(
    chosen: EvalArguments, data: ImageDataModule, protocol: Protocol, split: str
) -> dict[str, Any]:
    """The metrics of one split."""
    started = time.perf_counter()
    dataset = data.eval_dataset(split)
    tally = Tally(protocol=protocol, class_names=data.class_names)
    device = choose_device(chosen.device)
    tally.to(device).reset()
    if chosen.cams:
        suffixes: tuple[str, ...] = (".npy", ".npz")
        count: Callable[..., bool] = _count_cams
    else:
        suffixes, count = (".png", ".npy"), _count_masks
    files = find_files(
        Path(chosen.cams or chosen.masks or ""),
        list(dataset.names),
        suffixes,
        "cams" if chosen.cams else "masks",
    )
    agreed = 0
    for index in track(range(len(dataset)), description=f"scoring {split}"):
        item = dataset[index]
        batch = {
            "mask": item["mask"][None],
            "rgb": torch.from_numpy(item["rgb"])[None],
            "labels": item["labels"][None],
            "index": torch.tensor([index]),
        }
        agreed += count(tally, batch, files[item["name"]], chosen)
    if not agreed:
        raise WSSSError(
            f"{chosen.cams or chosen.masks}: no file holds a class of its image's labels; if its "
            "classes count from 1, give first_class=1"
        )
    seconds = time.perf_counter() - started
    return tally.compute() | {
        "num_images": len(dataset),
        "notes": [],
        "cost": {"seconds": seconds, "seconds_per_image": None},
    }


def _count_cams(tally: Tally, batch: dict[str, Any], path: Path, chosen: EvalArguments) -> bool:
    """Count one image's class maps; whether they hold any class that the image holds."""
    labels, truth = batch["labels"].to(tally.device), Truth.of(batch, tally.num_classes)
    maps = read_class_maps(path, num_classes=len(tally.class_names), first_class=chosen.first_class)
    cams = resized(torch.from_numpy(maps)[None], truth.mask.shape[-2:]).to(tally.device)
    held = (cams.amax((2, 3)) > 0).float()
    allowed = labels if tally.protocol.use_image_labels else held
    tally.count_cams(cams, allowed, labels, truth)
    return bool((held * labels).any())


def _count_masks(tally: Tally, batch: dict[str, Any], path: Path, chosen: EvalArguments) -> bool:
    """Count one image's label map."""
    truth = Truth.of(batch, tally.num_classes)
    height, width = truth.mask.shape[-2:]
    labels = read_label_map(path, num_classes=len(tally.class_names), size=(height, width))
    tally.count_labels(chosen.kind, torch.from_numpy(labels)[None], truth)
    return True
