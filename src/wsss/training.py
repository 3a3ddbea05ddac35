"""``wsss train``: compose, train, evaluate, and leave a run folder that says how it was made."""

import argparse
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import lightning
import torch
from hydra import main as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from wsss.checkpoints import save_atomically
from wsss.cli import JOB_STEM, run_verb, telling_errors
from wsss.config import (
    ACCELERATION,
    check_config,
    compose_config,
    config_root,
    plain,
    quoted,
    sweep_jobs,
    with_search_path,
)
from wsss.costs import CostMeter, training_cost
from wsss.data.datamodule import ImageDataModule
from wsss.errors import WSSSError
from wsss.evaluation.evaluator import Evaluator
from wsss.evaluation.holdout import Holdout
from wsss.evaluation.protocol import Protocol
from wsss.files import write_atomically
from wsss.methods.base import WSSSModule
from wsss.parallel import GradientAveraging, choose_strategy, naming_lost_processes
from wsss.processes import is_alive
from wsss.refine.dense_crf import import_pydensecrf
from wsss.reporting import evaluate_and_report, make_writable
from wsss.results.store import RESULTS_FILE, print_table, read_results
from wsss.runs import LAST_CHECKPOINT, build, build_data, build_module, run_folder, write_config
from wsss.sweeps import (
    end_with_sweep,
    exit_status,
    job_stem,
    new_folder,
    outcomes,
    record,
    summary,
    write_value,
)
from wsss.tracking import import_wandb, wandb_run

DATA_FILE = "data.json"  # in the run folder: hashes of what it was trained and evaluated on
SECONDS_OF_WORKERS = 15  # after which processes that load data have noticed that theirs is gone


def main(arguments: list[str]) -> int:
    """The verb: Hydra's own command line, with what is wrong told in one line first."""
    overrides, flags = _read_command_line(arguments)
    if "--multirun" in flags:
        return _sweep(overrides, flags)
    end_with_sweep()
    compose_config(overrides)
    job = Job()
    _run_hydra(job, overrides, flags)
    return max(job.statuses, default=0)


def _sweep(overrides: list[str], flags: list[str]) -> int:
    """Many jobs, and at the end what failed."""
    jobs = sweep_jobs(overrides)
    configs = [compose_config(each) for each in jobs.samples]
    folder = new_folder(Path(configs[0]["runs_dir"]))
    try:
        _run_hydra(Job(), [*overrides, f"hydra.sweep.dir={quoted(str(folder))}"], flags)
    finally:
        ended = outcomes(folder)
        if ended:
            for line in summary(ended, begun_of=jobs.count):
                print(f"wsss train: {line}", file=sys.stderr)
    return exit_status(ended)


def _run_hydra(job: "Job", overrides: list[str], flags: list[str]) -> None:
    """Let Hydra compose and run."""
    # this file, not the console script: DDP starts its other processes from sys.argv
    sys.argv = [__file__, *with_search_path(overrides), *flags]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors are told by us, in one line
    conf = str(config_root() / "conf")
    hydra_main(version_base="1.3", config_path=conf, config_name="train")(job)()


class Job:
    """What Hydra calls with a composed configuration: here, or where submitit has sent it."""

    def __init__(self) -> None:
        self.statuses: list[int] = []

    def __call__(self, config: DictConfig) -> float:
        """Train one run; gives its objective, NaN where there is none."""
        hydra = HydraConfig.get()
        own_files = hydra.mode == RunMode.MULTIRUN
        if own_files:  # of a sweep whose launcher is not ours
            stem = job_stem(Path(hydra.sweep.dir), hydra.job.num)
            os.environ[JOB_STEM] = str(stem)
            # DDP starts its other processes from here
            sys.argv = [__file__, *with_search_path(list(hydra.overrides.task))]
            sys.modules["__main__"].__spec__ = None
        status, value = _run_job(config)
        self.statuses.append(status)
        if _is_first_process():
            if own := os.environ.get(JOB_STEM):
                write_value(Path(own), value)
            if own_files:
                record(stem, list(hydra.overrides.task), status)
        return float("nan") if value is None else value


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


def _run_job(config: DictConfig) -> tuple[int, float | None]:
    """One run; its exit status and its objective, where it has that number."""
    value: float | None = None

    def run() -> int:
        nonlocal value
        check_config(config)
        from wsss.stages import train_stages  # which imports this module

        content = plain(config)
        with naming_lost_processes():
            folder = train_stages(content)
        if _is_first_process():
            splits = read_results(folder / RESULTS_FILE)["splits"]
            value = splits[content["data"]["val_split"]].get(content["objective"])
        return 0

    # told here, since Hydra would wrap an exception in lines of its own
    return telling_errors("train", run), value


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
    with holding(folder):
        if _is_first_process():
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
    if checkpoint.is_file() and _is_first_process():
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
        if _is_first_process():
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


def build_trainer(
    config: dict[str, Any], folder: Path, data: ImageDataModule, protocol: Protocol
) -> lightning.Trainer:
    """The Trainer of a configuration with the callbacks that every run has.

    Raises:
        WSSSError: a GPU is asked for where torch sees none, or settings that do not go together.
    """
    accelerator = config["trainer"].get("accelerator")
    if accelerator in ("gpu", "cuda") and not torch.accelerator.is_available():
        raise WSSSError(
            f"trainer.accelerator={accelerator}: torch sees no GPU here; give trainer=cpu, or look "
            "at the driver, CUDA_VISIBLE_DEVICES and the build of torch"
        )
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
    settings = {k: v for k, v in config["trainer"].items() if k not in ACCELERATION}
    trainer: lightning.Trainer = build(
        settings,
        strategy=choose_strategy(settings),
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
    if settings.get("profiler"):
        profiler = trainer.profiler  # type: ignore[attr-defined]
        # without a file it would report through a logger that is silent here
        profiler.dirpath, profiler.filename = folder / "profile", "profile"
    return trainer


def accelerate(module: WSSSModule, settings: Mapping[str, Any]) -> None:
    """Compile a method's parts and lay out its convolutions as the trainer's configuration says.

    Args:
        module: changed in place; its parameters keep their names.
        settings: the trainer's configuration, see :class:`wsss.config.Acceleration`.

    Raises:
        WSSSError: no such backend of ``torch.compile``.
    """
    if settings.get("channels_last"):
        module.to(memory_format=torch.channels_last)
    backend = settings.get("compile")
    if backend is None:
        return
    backends = torch.compiler.list_backends(exclude_tags=())
    if backend not in backends:
        raise WSSSError(f"trainer.compile={backend}: expected null or one of {', '.join(backends)}")
    for part in module.compiled_parts():
        part.compile(backend=backend)


def _is_first_process() -> bool:
    """Whether this is no further process of a run, be it on this machine or on another."""
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    return rank == 0


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; the system lets go when the process ends.

    Workers that load data hold it too, and outlive a killed process by seconds: these are waited.

    Raises:
        WSSSError: another process trains there.
    """
    if not _is_first_process():  # which holds it for all
        yield
        return
    with (folder / ".lock").open("a+") as lock:
        until = time.monotonic() + SECONDS_OF_WORKERS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                lock.seek(0)
                holder = lock.read()
                if is_alive(holder) or time.monotonic() > until:
                    raise WSSSError(
                        f"{folder}: another process ({holder or 'unknown'}) is training here"
                    ) from error
                time.sleep(0.2)
        lock.truncate(0)
        lock.write(f"{socket.gethostname()} {os.getpid()}")
        lock.flush()
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
    """A checkpoint whenever training stops: at the end, on Ctrl-C or SIGTERM, on an error.

    A signal waits for the step in progress, so that what is saved stands between two steps; a
    second one stops at once and leaves the previous checkpoint. All processes of a run stop after
    the same step, whichever of them got the signal.

    Args:
        path: the checkpoint to write.

    Attributes:
        asked: the signal that came, if one did.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._stepping = False  # weights and optimiser are being changed
        self._between_steps = False  # it is here that training stopped

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Note what signals did; submitit says with SIGUSR2 that time is up."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if callable(signal.getsignal(signal.SIGUSR2)):
            numbers.append(signal.SIGUSR2)
        self._before = {number: signal.getsignal(number) for number in numbers}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Take signals over, after Lightning and until it gives them back.

        Lightning's own handler would broadcast from within, in the middle of a step. Notebooks may
        train outside the main thread, where no handler can be set.
        """
        if threading.current_thread() is threading.main_thread():
            for number in self._before:
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = signal.Signals(number)
        for each, before in self._before.items():
            signal.signal(each, before)
        again = "Ctrl-C" if number == signal.SIGINT else self.asked.name
        # not print: the interrupted code may be printing
        os.write(2, f"\nstopping after this step ({again} again: at once)\n".encode())

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """From here to the end of the batch there is no state to save."""
        self._stepping = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Stop here if asked to, unless gradients of a step are being accumulated."""
        if not self._stepping:
            return
        self._stepping = False
        if trainer.strategy.reduce_boolean_decision(bool(self.asked), all=False):
            self._between_steps = True
            raise KeyboardInterrupt

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Stop here if asked to; several processes, whose shares differ, go on to the end.

        The checkpoint from before the validation stays: resuming never begins in the middle of one.
        """
        if self.asked and trainer.world_size == 1:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """The last iterate is the result; nothing is selected on a validation split."""
        trainer.save_checkpoint(self.path)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save where training stood, unless the weights are what broke or a step was cut."""
        if isinstance(trainer.strategy, GradientAveraging):
            trainer.strategy.alone = True  # the others may be dead, or anywhere else
        at_once = not isinstance(exception, Exception) and not self._between_steps
        cut = self._stepping or at_once
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
