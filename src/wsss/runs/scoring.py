"""What a run leaves behind: ``results.json``, the table, the gallery, the same on W&B."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from wsss.core.errors import WSSSError
from wsss.core.files import make_writable
from wsss.core.ranks import is_first_process
from wsss.core.supervision import PIXEL_MASKS
from wsss.data.datamodule import ImageDataModule
from wsss.data.train_masks import read_card
from wsss.evaluation.card import protocol_card
from wsss.evaluation.evaluator import evaluate
from wsss.evaluation.holdout import HOLDOUT, Holdout, choose_threshold
from wsss.evaluation.ledger import record_reading
from wsss.evaluation.protocol import Protocol
from wsss.methods.base import WSSSModule
from wsss.results.gallery import write_gallery
from wsss.results.store import CELLS_FILE, RESULTS_FILE, print_table, write_cells, write_results
from wsss.runs.config import config_hash
from wsss.runs.wandb import log_results


def evaluate_and_report(
    module: WSSSModule,
    data: ImageDataModule,
    protocol: Protocol,
    *,
    config: dict[str, Any],
    folder: Path,
    splits: Sequence[str],
    step: int,
    device: torch.device,
    logger: Any = None,
    cost: dict[str, Any] | None = None,
    run: Path | None = None,
    train_list: str | None = None,
    purpose: str = "report",
) -> dict[str, Any]:
    """Evaluate on every split, store numbers with their protocol, print and draw.

    Args:
        module: trained module.
        data: its data.
        protocol: how numbers are taken.
        config: resolved configuration of the run.
        folder: where ``results.json``, ``images.npz`` and ``gallery/`` go.
        splits: lists to evaluate; ``holdout`` is the declared holdout of the training data.
        step: optimiser steps behind the weights.
        device: where to run.
        logger: W&B logger that gets tables and gallery too, or None.
        cost: what training cost (:func:`wsss.runs.costs.training_cost`), where that is known.
        run: run folder or checkpoint that is evaluated; default ``folder``. Readings are entered in
            the ledger of a run folder, wherever their numbers go.
        train_list: SHA-256 of the list that the module was trained on, where that is known.
        purpose: of these readings.

    Returns:
        The content of ``results.json``.
    """
    results = results_header(module.title, data, config)
    results |= {"run": str(run or folder), "cost": cost}
    cells: dict[str, dict[str, Any]] = {}
    ledger = run if run and run.is_dir() else folder
    first = is_first_process()
    if first:
        make_writable(folder)
    holdout = Holdout(data, protocol) if protocol.holdout_per_class else None
    chosen = choose_threshold(module, holdout, protocol, device=device) if holdout else None
    if first and chosen:
        record_reading(ledger, split=HOLDOUT, purpose="choosing a threshold", step=step)
    for split in splits:
        dataset, loader, list_hash = _split(split, data, holdout)
        metrics = evaluate(
            module,
            loader,
            protocol,
            data.class_names,
            device=device,
            description=f"evaluating {split}" if first else None,
        )
        cells[split] = {"names": dataset.names, **metrics.pop("cells")}
        metrics["protocol"] = protocol_card(
            protocol=protocol,
            split=split,
            list_hash=list_hash,
            num_images=int(metrics["num_images"]),
            backbone=module.backbone.weights_info.as_dict(),
            crop_size=config["budget"]["crop_size"],
            iterations=step,
            global_batch_size=config["budget"]["global_batch_size"],
            seed=config["seed"],
            supervision=league(module, data),
        ) | {
            "label_source": data.label_source,
            "train_list_sha256": train_list,
            "train_masks": read_card(data.train_masks),
        }
        if split != HOLDOUT:
            metrics["data_sha256"] = data_hashes(data, split)
        if chosen:
            apply_threshold(metrics, chosen)
        if first:
            metrics["readings"] = record_reading(
                ledger, split=split, purpose=purpose, step=step, list_sha256=list_hash
            )
        results["splits"][split] = metrics
    if not first:
        return results
    gallery = None
    if config["gallery"] > 0:
        gallery = write_gallery(
            module,
            _split(splits[0], data, holdout)[0],
            folder / "gallery",
            data.class_names,
            n=config["gallery"],
            protocol=protocol,
        )
    store_and_show(results, cells, folder)
    if config["gallery"] > 0:
        print(f"{folder / 'gallery'}")
    if logger is not None:
        log_results(logger, results, gallery)
    return results


def results_header(method: str, data: ImageDataModule, config: dict[str, Any]) -> dict[str, Any]:
    """What ``results.json`` says before its splits."""
    return {
        "method": method,
        "data": data.name,
        "seed": config["seed"],
        "study": config["study"],
        "config_hash": config_hash(config),
        "config": config,
        "status": "finished",
        "splits": {},
    }


def data_hashes(data: ImageDataModule, split: str) -> dict[str, str | None]:
    """What tells that two results are of the same labels and masks."""
    dataset = data.eval_dataset(split)
    return {"labels": dataset.label_sha256(), "masks": dataset.mask_sha256()}


def store_and_show(results: dict[str, Any], cells: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write results and each image's counts, print the tables."""
    write_cells(folder / CELLS_FILE, cells)
    write_results(folder / RESULTS_FILE, results)
    print_table(results)
    print(f"{folder / RESULTS_FILE}")


def _split(
    name: str, data: ImageDataModule, holdout: Holdout | None
) -> tuple[Any, Iterable[dict[str, Any]], str]:
    """Data set, loader and list hash of a split, or of the holdout under its name.

    Raises:
        WSSSError: the holdout is asked for and not declared.
    """
    if name != HOLDOUT:
        return data.eval_dataset(name), data.eval_dataloader(name), data.list_hash(name)
    if holdout is None:
        raise WSSSError(
            "splits=[holdout]: no holdout is declared; give eval.holdout_per_class=5 (and "
            "eval.holdout_split where the training list has no masks)"
        )
    return holdout, holdout.loader(), holdout.list_hash


def apply_threshold(metrics: dict[str, Any], chosen: dict[str, Any]) -> None:
    """Add the seed score at a threshold that a holdout chose; the curve holds it already."""
    position = metrics["seed_curve"]["thresholds"].index(chosen["threshold"])
    metrics["seed_miou_holdout"] = metrics["seed_curve"]["miou"][position]
    metrics["seed_threshold_holdout"] = chosen["threshold"]
    metrics["protocol"]["holdout"] = {k: v for k, v in chosen.items() if k != "curve"}


def league(module: WSSSModule, data: ImageDataModule) -> str:
    """The supervision league: what training sees, and what the encoder was trained with."""
    if PIXEL_MASKS in module.backbone.weights_info.pretraining:
        return PIXEL_MASKS
    info = module.backbone.weights_info.as_dict()
    if "clip" in f"{info.get('name')} {info.get('pretraining')}".lower():
        return f"{data.supervision} + CLIP"
    return data.supervision
