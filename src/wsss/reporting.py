"""What a run leaves behind: ``results.json``, the table, the gallery, the same on W&B."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wsss.config import config_hash
from wsss.data.datamodule import WSSSDataModule
from wsss.data.train_masks import PIXEL_MASKS, read_card
from wsss.errors import WSSSError
from wsss.evaluation.evaluator import evaluate
from wsss.evaluation.protocol import Protocol, protocol_card
from wsss.gallery import write_gallery
from wsss.methods.base import WSSSModule
from wsss.results.store import RESULTS_FILE, print_table, write_results
from wsss.tracking import log_results


def evaluate_and_report(
    module: WSSSModule,
    data: WSSSDataModule,
    protocol: Protocol,
    *,
    config: dict[str, Any],
    folder: Path,
    splits: Sequence[str],
    step: int,
    device: torch.device,
    logger: Any = None,
) -> dict[str, Any]:
    """Evaluate on every split, store numbers with their protocol, print and draw.

    Args:
        module: trained module.
        data: its data.
        protocol: how numbers are taken.
        config: resolved configuration of the run.
        folder: where ``results.json`` and ``gallery/`` go.
        splits: lists to evaluate.
        step: optimiser steps behind the weights.
        device: where to run.
        logger: W&B logger that gets tables and gallery too, or None.

    Returns:
        The content of ``results.json``.
    """
    results: dict[str, Any] = {
        "method": type(module).__name__,
        "data": data.name,
        "seed": config["seed"],
        "config_hash": config_hash(config),
        "status": "finished",
        "splits": {},
    }
    first = _is_first()
    if first:
        make_writable(folder)
    for split in splits:
        metrics = evaluate(
            module,
            data.eval_dataloader(split),
            protocol,
            data.class_names,
            device=device,
            description=f"evaluating {split}" if first else None,
        )
        metrics["protocol"] = protocol_card(
            protocol=protocol,
            split=split,
            list_hash=data.list_hash(split),
            num_images=int(metrics["num_images"]),
            backbone=module.backbone.weights_info.as_dict(),
            crop_size=config["budget"]["crop_size"],
            iterations=step,
            global_batch_size=config["budget"]["global_batch_size"],
            seed=config["seed"],
            supervision=league(module, data),
        ) | {"label_source": data.label_source, "train_masks": read_card(data.train_masks)}
        results["splits"][split] = metrics
    if not first:
        return results
    if config["gallery"] > 0:
        write_gallery(
            module,
            data.eval_dataset(splits[0]),
            folder / "gallery",
            data.class_names,
            n=config["gallery"],
            protocol=protocol,
        )
    write_results(folder / RESULTS_FILE, results)
    print_table(results)
    print(f"{folder / RESULTS_FILE}")
    if config["gallery"] > 0:
        print(f"{folder / 'gallery'}")
    if logger is not None:
        log_results(logger, results, folder / "gallery")
    return results


def league(module: WSSSModule, data: WSSSDataModule) -> str:
    """The supervision league: what training sees, and what the encoder was trained with."""
    if PIXEL_MASKS in module.backbone.weights_info.pretraining:
        return PIXEL_MASKS
    return data.supervision


def _is_first() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def choose_device(name: str) -> torch.device:
    """``auto`` is the first GPU where there is one, else the CPU.

    Raises:
        WSSSError: no device of that name here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WSSSError(f"device={name}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise WSSSError(f"device={name}: torch sees no such GPU; use device=auto or device=cpu")
    return device


def make_writable(folder: Path) -> None:
    """Create a folder, and prove that it can be written before hours of work go into it.

    Raises:
        WSSSError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WSSSError(
            f"{folder}: cannot be written ({error.strerror}); choose another folder"
        ) from error
