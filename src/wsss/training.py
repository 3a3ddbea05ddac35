"""``wsss train``: compose, train, evaluate, and leave a run folder that says how it was made."""

import argparse
import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import lightning
import torch
from hydra import main as hydra_main
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig

from wsss.checkpoints import save_atomically
from wsss.cli import run_verb, telling_errors
from wsss.config import (
    check_config,
    compose_config,
    config_root,
    plain,
    sweep_jobs,
    with_search_path,
)
from wsss.costs import CostMeter, training_cost
from wsss.data.datamodule import ImageDataModule
from wsss.errors import WSSSError
from wsss.evaluation.evaluator import Evaluator
from wsss.evaluation.holdout import Holdout
from wsss.evaluation.protocol import Protocol
from wsss.methods.base import WSSSModule
from wsss.refine.dense_crf import import_pydensecrf
from wsss.reporting import evaluate_and_report, make_writable
from wsss.results.store import RESULTS_FILE, print_table, read_results, write_atomically
from wsss.runs import LAST_CHECKPOINT, build, build_data, build_module, run_folder, write_config
from wsss.tracking import import_wandb, wandb_run

DATA_FILE = "data.json"  # in the run folder: hashes of what it was trained and evaluated on


def main(arguments: list[str]) -> int:
    """The verb: Hydra's own command line, with what is wrong told in one line first."""
    overrides, flags = _read_command_line(arguments)
    for each in sweep_jobs(overrides).samples if "--multirun" in flags else [overrides]:
        compose_config(each)
    # this file, not the console script: DDP starts its other processes from sys.argv
    sys.argv = [__file__, *with_search_path(overrides), *flags]
    conf = str(config_root() / "conf")
    statuses: list[int] = []

    def job(config: DictConfig) -> None:
        """One job of Hydra; a sweep goes on after one that failed."""
        statuses.append(_run_job(config))

    hydra_main(version_base="1.3", config_path=conf, config_name="train")(job)()
    if len(statuses) > 1 and any(statuses):
        failed = sum(status != 0 for status in statuses)
        print(f"wsss train: {failed} of {len(statuses)} jobs failed, see above", file=sys.stderr)
    return max(statuses, default=0)


class _OneLineParser(argparse.ArgumentParser):
    """argparse that tells an error like all others here."""

    def error(self, message: str) -> NoReturn:
        raise WSSSError(f"{message} (wsss train --help)")


def _read_command_line(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Overrides, then those of Hydra's flags that are supported (it wants them apart)."""
    parser = _OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("-p", "--package")
    parser.add_argument("--resolve", action="store_true")
    read = parser.parse_intermixed_args(arguments)
    flags = [f"--{name}" for name in ("multirun", "resolve") if getattr(read, name)]
    for name in ("cfg", "package"):
        if getattr(read, name) is not None:
            flags += [f"--{name}", getattr(read, name)]
    return read.overrides, flags


def _run_job(config: DictConfig) -> int:
    """One run; its exit status."""

    def run() -> int:
        check_config(config)
        from wsss.stages import train_stages  # which imports this module

        train_stages(plain(config))
        return 0

    # told here, since Hydra would wrap an exception in lines of its own
    return telling_errors("train", run)


def train(config: dict[str, Any]) -> Path:
    """Train, evaluate and report one run; a finished run is left as it is.

    Args:
        config: resolved configuration.

    Returns:
        The run folder.

    Raises:
        WSSSError: bad configuration or data, before anything is written.
        SystemExit: 130 after Ctrl-C, with a checkpoint that resumes.
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
    with holding(folder):
        write_config(folder, config)
        if _is_first_process():
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
    if checkpoint.is_file():
        print(f"resuming from {checkpoint}")
    try:
        trainer.fit(
            module,
            datamodule=data,
            ckpt_path=str(checkpoint) if checkpoint.is_file() else None,
            weights_only=True,
        )
    except SystemExit as leave:  # how Lightning ends after Ctrl-C
        print(f"stopped at step {trainer.global_step}; the same command resumes", file=sys.stderr)
        raise SystemExit(130) from leave
    except WSSSError as error:
        if not checkpoint.is_file():
            raise
        raise WSSSError(f"{error}; once mended, the same command resumes") from error
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


def build_trainer(
    config: dict[str, Any], folder: Path, data: ImageDataModule, protocol: Protocol
) -> lightning.Trainer:
    """The Trainer of a configuration with the callbacks that every run has."""
    every = config["budget"]["eval_every"]
    callbacks: list[Callback] = [
        SaveOnStop(folder / LAST_CHECKPOINT),
        ModelCheckpoint(
            dirpath=folder / LAST_CHECKPOINT.parent,
            filename=LAST_CHECKPOINT.stem,
            every_n_train_steps=every,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        ),
        Evaluator(
            protocol=protocol,
            class_names=data.class_names,
            split=data.val_split,
            ledger=folder,
        ),
        CostMeter(),
        NamedLosses(),
    ]
    return build(
        config["trainer"],
        callbacks=callbacks,
        # a resumed run gets a folder of its own: CSVLogger would delete the first one's file
        logger=[CSVLogger(folder, name="logs")],
        default_root_dir=str(folder),
        val_check_interval=every * config["trainer"]["accumulate_grad_batches"],
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the data module's own samplers share images out
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
    )


def _is_first_process() -> bool:
    """Whether this is no further process of a DDP run."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; the system lets go when the process ends.

    Raises:
        WSSSError: another process trains there.
    """
    if not _is_first_process():  # which holds it for all
        yield
        return
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise WSSSError(f"{folder}: another process is training here") from error
        yield


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that the previous checkpoint survives a full disk.

    Lightning's own way goes through the system's temporary folder, whence a move may be a copy.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            WSSSError: the disk is full or read-only.
        """
        save_atomically(checkpoint, Path(path))


class SaveOnStop(Callback):
    """A checkpoint whenever training stops: at the end, on Ctrl-C, on an error.

    Ctrl-C waits for the step in progress, so that what is saved stands between two steps; a second
    one stops at once and leaves the previous checkpoint.

    Args:
        path: the checkpoint to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked = False

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Take over Ctrl-C; sweeps and notebooks may train outside the main thread, without it."""
        if threading.current_thread() is threading.main_thread():
            self.default = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.default)
        print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Stop here if asked to."""
        if self.asked:
            raise KeyboardInterrupt

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Stop here if asked to."""
        if self.asked:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """The last iterate is the result; nothing is selected on a validation split."""
        trainer.save_checkpoint(self.path)

    def teardown(self, trainer: lightning.Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give Ctrl-C back."""
        if hasattr(self, "default"):
            signal.signal(signal.SIGINT, self.default)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save where training stood, unless the weights are what broke or a step was cut."""
        cut = isinstance(exception, KeyboardInterrupt) and not self.asked
        finite = all(bool(torch.isfinite(p).all()) for p in pl_module.parameters())
        if trainer.global_step > 0 and finite and not cut:
            try:
                trainer.save_checkpoint(self.path)
            except WSSSError as error:  # what ended the run is told, not this
                print(f"wsss train: {error}", file=sys.stderr)


class NamedLosses(TQDMProgressBar):
    """Progress bar with the named losses, without Lightning's version number."""

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Losses without their ``train/`` prefix."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {
            name.removeprefix("train/").removesuffix("_loss"): value
            for name, value in metrics.items()
        }


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


if __name__ == "__main__":
    sys.exit(run_verb("train", sys.argv[1:]))
