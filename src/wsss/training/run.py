"""``wsss train``: from a configuration to a finished run, or to the two runs of a study.

Each run leaves a folder that says how it was made. Repeating the command skips what is finished
and goes on where it was interrupted, be it in the middle of a stage or between two.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from wsss.core.devices import choose_device
from wsss.core.files import make_writable
from wsss.core.lock import lock
from wsss.core.ranks import is_first_process
from wsss.runs.compose import compose_run
from wsss.runs.config import LoggerConfig, checked_config, second_stage_config
from wsss.runs.folder import load_run
from wsss.runs.label_writer import write_pseudo_labels
from wsss.runs.loggers import open_loggers
from wsss.runs.origin import check_resumed, write_origin
from wsss.runs.prepare import finished_folder, prepare
from wsss.runs.scoring import score
from wsss.runs.starts import with_start
from wsss.runs.stored import trusted_packages
from wsss.runs.supervision import supervision_of_run
from wsss.training.labels import with_labels
from wsss.training.random_walk import trained_walk
from wsss.training.trainer import accelerate, build_trainer, fit


def train(config: Mapping[str, Any] | Sequence[str]) -> Path:
    """Train a run and, where it has a ``second_stage``, that one on its pseudo labels.

    With ``maps`` the labels that it learns from are made first, where they are missing.

    Args:
        config: a resolved configuration, or what follows ``wsss train`` on the command line, as
            ``["method=toco", "data=minivoc"]``.

    Returns:
        The folder of the last run.

    Raises:
        WSSSError: bad configuration or data, before anything is written.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, with a checkpoint that resumes.
    """
    _silence_libraries()
    settings = checked_config(config) if isinstance(config, Mapping) else compose_run(list(config))
    settings = with_labels(settings, _device(settings))
    folder, finished = _train_run(settings)
    if not settings.get("second_stage") or not finished:
        return folder
    second = settings["second_stage"]
    first = load_run(folder, trust=trusted_packages(settings)).to(_device(settings))
    walk = trained_walk(first, second["random_walk"]) if second.get("refine") else None
    labels = write_pseudo_labels(first, source=second.get("source", "cam"), walk=walk)
    folder, _ = _train_run(second_stage_config(settings, str(labels)))
    return folder


def _train_run(config: dict[str, Any]) -> tuple[Path, bool]:
    """Train, evaluate and report one run; a finished run is left as it is.

    Returns:
        Its folder, and whether it is finished: a limited run has no scores.
    """
    config = with_start(config)
    if folder := finished_folder(config):
        return folder, True
    run = prepare(config)
    accelerate(run.module, config["trainer"])
    trainer = build_trainer(run)
    make_writable(run.folder)
    with lock(run.folder):
        check_resumed(run)
        if is_first_process():
            write_origin(run)
            print(f"run folder: {run.folder}")
        # a smoke test logs nothing, as Lightning has it
        smoke = run.config["trainer"].get("fast_dev_run")
        settings = LoggerConfig() if smoke else LoggerConfig(**run.config["logger"])
        kind, started = supervision_of_run(run), run.module.backbone.weights_info.pretraining
        with open_loggers(settings, run.config, run.folder, kind, started) as loggers:
            trainer.loggers += loggers
            run = fit(run, trainer)
            if run.unfinished:
                if is_first_process():
                    print(
                        f"not a finished run: {run.unfinished}; it has no scores and enters no "
                        f"comparison ({run.folder})"
                    )
                return run.folder, False
            score(run.to(trainer.strategy.root_device), loggers=loggers)
    return run.folder, True


def _silence_libraries() -> None:
    """Silence library notices that are about us, not about the user's run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    warnings.filterwarnings("ignore", message=".*requested to overfit.*")
    warnings.filterwarnings("ignore", message="The dirpath has changed.*")
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")
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
