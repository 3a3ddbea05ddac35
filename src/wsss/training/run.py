"""``wsss train``: compose, train, evaluate, and leave a run folder that says how it was made."""

import json
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import CSVLogger, Logger

from wsss.core.errors import WSSSError
from wsss.core.files import make_writable, write_atomically
from wsss.core.ranks import is_first_process
from wsss.data.datamodule import ImageDataModule
from wsss.evaluation.holdout import Holdout
from wsss.evaluation.protocol import Protocol
from wsss.maps.refine.dense_crf import import_pydensecrf
from wsss.methods.base import WSSSModule
from wsss.results.store import RESULTS_FILE, print_table, read_results
from wsss.runs.costs import CostMeter, training_cost
from wsss.runs.folder import LAST_CHECKPOINT, build_data, build_module, run_folder, write_config
from wsss.runs.scoring import evaluate_and_report
from wsss.runs.wandb import import_wandb, wandb_run
from wsss.training.callbacks import SaveOnStop
from wsss.training.lock import lock
from wsss.training.trainer import accelerate, build_trainer

DATA_FILE = "data.json"  # in the run folder: hashes of what it was trained and evaluated on


def train(config: dict[str, Any]) -> Path:
    """Train, evaluate and report one run; a finished run is left as it is.

    Args:
        config: resolved configuration.

    Returns:
        The run folder.

    Raises:
        WSSSError: bad configuration or data, before anything is written.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, with a checkpoint that resumes.
    """
    _quiet()
    lightning.seed_everything(config["seed"], workers=True, verbose=False)
    data = build_data(config)
    # a table may name its classes only in its file, which `wsss predict` need not have
    config["data"]["class_names"] = list(data.class_names)
    folder = run_folder(config)
    if _is_finished(folder, data):
        return folder
    data.setup("fit")
    data.check_contents()  # bad data is told before anything is written
    protocol = Protocol(**config["eval"])
    if protocol.holdout_per_class:
        Holdout(data, protocol)
    module = build_module(config, data.num_classes)
    accelerate(module, config["trainer"])
    if module.backbone.patch_size > config["budget"]["crop_size"]:
        raise WSSSError(
            f"budget.crop_size={config['budget']['crop_size']}: smaller than one patch of "
            f"{module.backbone.patch_size} px"
        )
    # what is missing or impossible is told before anything is written, not after hours
    if protocol.crf and protocol.crf_backend == "pydensecrf":
        import_pydensecrf()
    if config["logger"]["wandb"]:
        import_wandb()
    trainer = build_trainer(config, folder, data, protocol)
    data.trainer = trainer  # whose accumulation has its share in a batch
    data.per_device_batch_size()
    make_writable(folder)
    with lock(folder):
        if is_first_process():
            write_config(folder, config)
            text = json.dumps(data.fingerprint(), indent=2)
            write_atomically(folder / DATA_FILE, f"{text}\n".encode())
            print(f"run folder: {folder}")
        with wandb_run(config, folder) if config["logger"]["wandb"] else nullcontext() as logger:
            trainer.loggers += [logger] if logger else []
            _fit_and_report(config, folder, data, module, trainer)
    return folder


def _is_finished(folder: Path, data: ImageDataModule) -> bool:
    """Whether the folder holds this run's results, which are then printed.

    Raises:
        WSSSError: it holds results of other images under the same configuration.
    """
    if not (folder / RESULTS_FILE).is_file():
        return False
    results = read_results(folder / RESULTS_FILE)
    if results.get("status") != "finished":
        return False
    for split, metrics in results["splits"].items():
        if metrics["protocol"]["list_sha256"] != data.list_hash(split):
            raise WSSSError(
                f"{folder} holds results of another list {split!r} than data.root has; give "
                "another study= or runs_dir="
            )
    print_table(results)
    print(f"{folder} is finished; change the configuration, or remove the folder")
    return True


def _fit_and_report(
    config: dict[str, Any],
    folder: Path,
    data: ImageDataModule,
    module: WSSSModule,
    trainer: lightning.Trainer,
) -> None:
    """Train from the last checkpoint, if there is one, then evaluate."""
    protocol = Protocol(**config["eval"])
    checkpoint = folder / LAST_CHECKPOINT
    if checkpoint.is_file() and is_first_process():
        print(f"resuming from {checkpoint}")
    left = False
    try:
        trainer.fit(
            module,
            datamodule=data,
            ckpt_path=str(checkpoint) if checkpoint.is_file() else None,
            weights_only=True,
        )
    except SystemExit:  # how Lightning ends after Ctrl-C
        left = True
    except WSSSError as error:
        if not checkpoint.is_file():
            raise
        raise WSSSError(f"{error}; once mended, the same command resumes") from error
    asked = next(c for c in trainer.callbacks if isinstance(c, SaveOnStop)).asked  # type: ignore[attr-defined]
    # a signal may also have come after the last step; all processes leave then, or none
    if left or trainer.strategy.reduce_boolean_decision(bool(asked), all=False):
        if is_first_process():
            text = f"stopped at step {trainer.global_step}; the same command resumes"
            print(text, file=sys.stderr)
        if asked == signal.SIGUSR2:
            signal.raise_signal(asked)  # submitit queues the job again
        raise SystemExit(128 + (asked or signal.SIGINT))
    evaluate_and_report(
        module,
        data,
        protocol,
        config=config,
        folder=folder,
        splits=[data.val_split, *data.test_splits],
        step=trainer.global_step,
        device=trainer.strategy.root_device,
        logger=_wandb(trainer),
        cost=_cost(trainer),
        train_list=data.list_hash(data.train_split),
    )


def _quiet() -> None:
    """Silence library notices that are about us, not about the user's run."""
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")


def _cost(trainer: lightning.Trainer) -> dict[str, Any] | None:
    """What training cost, over all sessions of the run."""
    meter = next((c for c in trainer.callbacks if isinstance(c, CostMeter)), None)  # type: ignore[attr-defined]
    return training_cost(meter.state_dict()) if meter and meter.sessions else None


def _wandb(trainer: lightning.Trainer) -> Logger | None:
    return next((log for log in trainer.loggers if not isinstance(log, CSVLogger)), None)
