"""``wsss train``: from a configuration to a finished run, or to the two runs of a study.

Each run leaves a folder that says how it was made. Repeating the command skips what is finished
and goes on where it was interrupted, be it in the middle of a stage or between two.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from wsss.core.devices import choose_device
from wsss.core.files import make_writable
from wsss.core.lock import lock
from wsss.core.ranks import is_first_process
from wsss.runs.compose import compose_run
from wsss.runs.config import checked_config, second_stage_config
from wsss.runs.folder import load_run
from wsss.runs.label_writer import write_pseudo_labels
from wsss.runs.origin import check_resumed, write_origin
from wsss.runs.prepare import finished_folder, prepare
from wsss.runs.scoring import score, supervision_of_run
from wsss.runs.wandb import wandb_run
from wsss.training.random_walk import trained_walk
from wsss.training.trainer import accelerate, build_trainer, fit


def train(config: Mapping[str, Any] | Sequence[str]) -> Path:
    """Train a run and, where it has a ``second_stage``, that one on its pseudo labels.

    Args:
        config: a resolved configuration, or what follows ``wsss train`` on the command line, as
            ``["method=toco", "data=minivoc"]``.

    Returns:
        The folder of the last run.

    Raises:
        WSSSError: bad configuration or data, before anything is written.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, with a checkpoint that resumes.
    """
    settings = checked_config(config) if isinstance(config, Mapping) else compose_run(list(config))
    folder = _train_run(settings)
    if not settings.get("second_stage"):
        return folder
    second = settings["second_stage"]
    first = load_run(folder).to(_device(settings))
    walk = trained_walk(first, second["random_walk"]) if second.get("refine") else None
    labels = write_pseudo_labels(first, source=second.get("source", "cam"), walk=walk)
    return _train_run(second_stage_config(settings, str(labels)))


def _train_run(config: dict[str, Any]) -> Path:
    """Train, evaluate and report one run; a finished run is left as it is."""
    _silence_libraries()
    if folder := finished_folder(config):
        return folder
    run = prepare(config)
    accelerate(run.module, config["trainer"])
    trainer = build_trainer(run)
    make_writable(run.folder)
    with lock(run.folder):
        check_resumed(run)
        if is_first_process():
            write_origin(run)
            print(f"run folder: {run.folder}")
        followed, kind = config["logger"]["wandb"], supervision_of_run(run.module, run.data)
        started = run.module.backbone.weights_info.pretraining
        wandb = wandb_run(run.config, run.folder, kind, started) if followed else nullcontext()
        with wandb as logger:
            trainer.loggers += [logger] if logger else []
            run = fit(run, trainer)
            score(run.to(trainer.strategy.root_device), logger=logger)
    return run.folder


def _silence_libraries() -> None:
    """Silence library notices that are about us, not about the user's run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")


def _device(config: Mapping[str, Any]) -> torch.device:
    """Give the device that this process trains on."""
    if config["trainer"].get("accelerator") == "cpu":
        return torch.device("cpu")
    device = choose_device("auto")
    if device.type == "cuda" and torch.distributed.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return device
