"""The Lightning Trainer of a run, and fitting with it."""

import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from wsss.core.errors import WSSSError
from wsss.core.files import first_line
from wsss.core.ranks import is_first_process
from wsss.evaluation.evaluator import Evaluator
from wsss.methods.base import WSSSModule
from wsss.models.weights import save_atomically
from wsss.runs.checkpoint_paths import LAST_CHECKPOINT, checkpoint_of
from wsss.runs.costs import CostMeter, training_cost
from wsss.runs.folder import Run, build, why_unfinished
from wsss.runs.trainer_settings import ACCELERATION, ends, limits
from wsss.training.callbacks import (
    AtomicCheckpointIO,
    EndsLogged,
    MetricsFile,
    NamedLosses,
    SaveOnStop,
)
from wsss.training.forecast import forecast_of
from wsss.training.parallel import choose_strategy
from wsss.training.stopping import StoppingRule

C = TypeVar("C", bound=Callback)


def build_trainer(run: Run, *, evaluated: bool = True) -> lightning.Trainer:
    """Make the Trainer of a run with the callbacks that every run has.

    Args:
        run: to train.
        evaluated: False for a network that only serves another run's maps.

    Raises:
        WSSSError: a GPU is required where torch sees none, or settings that do not go together.
    """
    config, folder = run.config, run.folder
    accelerator = config["trainer"].get("accelerator")
    if accelerator in ("gpu", "cuda") and not torch.accelerator.is_available():
        raise WSSSError(
            f"trainer.accelerator={accelerator}: torch sees no GPU here; give trainer=cpu, or look "
            "at the driver, CUDA_VISIBLE_DEVICES and the build of torch"
        )
    settings = {k: v for k, v in config["trainer"].items() if k not in ACCELERATION}
    if not evaluated:
        settings["limit_val_batches"] = 0
    every = config["budget"]["eval_every"]
    trainer: lightning.Trainer = build(
        # what Lightning takes as its default otherwise
        {"num_sanity_val_steps": 0, "enable_model_summary": False, **settings},
        strategy=choose_strategy(settings),
        callbacks=_callbacks(run),
        # a resumed run gets a folder of its own: CSVLogger would delete the first one's file
        logger=[MetricsFile(folder, name="logs")],
        default_root_dir=str(folder),
        val_check_interval=every * config["trainer"]["accumulate_grad_batches"],
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,  # the data module's own samplers share images out
        plugins=[AtomicCheckpointIO()],
    )
    if settings.get("profiler"):
        profiler = trainer.profiler  # type: ignore[attr-defined]
        # without a file it would report through a logger that is silent here
        profiler.dirpath, profiler.filename = folder / "profile", "profile"
    run.data.trainer = trainer  # whose accumulation has its share in a batch
    run.data.per_device_batch_size()
    return trainer


def _callbacks(run: Run) -> list[Callback]:
    """Make the callbacks of a run: custom ones between what they may change and what saves it."""
    config, folder = run.config, run.folder
    chosen: list[Callback] = [build(node) for node in (config.get("callbacks") or {}).values()]
    rules = [callback for callback in chosen if isinstance(callback, EarlyStopping)]
    bar = config["trainer"].get("enable_progress_bar") is not False
    return [
        # before weights that were averaged for a validation are put back
        Evaluator(
            protocol=run.protocol,
            class_names=run.data.class_names,
            split=run.data.val_split,
            ledger=folder,
        ),
        *([StoppingRule(run, rules, folder)] if rules else []),
        *chosen,
        # after what changes weights when training ends
        SaveOnStop(folder / LAST_CHECKPOINT, after_validation=bool(rules)),
        ModelCheckpoint(
            dirpath=folder / LAST_CHECKPOINT.parent,
            filename=LAST_CHECKPOINT.stem,
            every_n_train_steps=config["budget"]["eval_every"],
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        ),
        CostMeter(),
        EndsLogged(),
        forecast_of(run),
        *([NamedLosses()] if bar else []),
    ]


def accelerate(module: WSSSModule, settings: Mapping[str, Any]) -> None:
    """Compile a method's parts and lay out its convolutions as the trainer's configuration says.

    Args:
        module: changed in place; its parameters keep their names.
        settings: the trainer's configuration, see :class:`wsss.runs.trainer_settings.Acceleration`.

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


def fit(run: Run, trainer: lightning.Trainer) -> Run:
    """Train a run from its last checkpoint, if there is one.

    Args:
        run: from :func:`wsss.runs.prepare.prepare`.
        trainer: from :func:`build_trainer`.

    Returns:
        The trained run, with its steps, its cost and the hash of its training list.

    Raises:
        WSSSError: see the method; where a checkpoint is left, it says that the run resumes. A
            callback ended it before its last step, by no declared rule.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, with a checkpoint that resumes.
    """
    if not run.module.trains:
        return _untrained(run)
    smoke = bool(run.config["trainer"].get("fast_dev_run"))  # begins anew each time
    resumed = run.checkpoint.is_file() and not smoke
    start = run.checkpoint if resumed else _continued(run.config)
    if start and is_first_process():
        print(f"resuming from {start}")
    stopped = False
    try:
        trainer.fit(
            run.module,
            datamodule=run.data,
            ckpt_path=str(start) if start else None,
            weights_only=True,
        )
    except SystemExit:  # how Lightning ends after Ctrl-C
        stopped = True
    except WSSSError as error:
        if not run.checkpoint.is_file():
            raise
        raise WSSSError(f"{error}; once mended, the same command resumes") from error
    except Exception as error:  # as Lightning and torch raise while they restore
        if not start or _callback(trainer, SaveOnStop).began:
            raise
        raise WSSSError(
            f"{start}: cannot be resumed from ({first_line(error)}); copy it again, or "
            "remove it to begin anew"
        ) from error
    number = _callback(trainer, SaveOnStop).stop_signal
    # a signal may also have come after the last step; all processes leave then, or none
    if stopped or trainer.strategy.reduce_boolean_decision(bool(number), all=False):
        if is_first_process():
            text = f"stopped at step {trainer.global_step}; the same command resumes"
            print(text, file=sys.stderr)
        if number == signal.SIGUSR2:
            signal.raise_signal(number)  # submitit queues the job again
        raise SystemExit(128 + (number or signal.SIGINT))
    meter = _callback(trainer, CostMeter)
    rules = [c for c in trainer.callbacks if isinstance(c, StoppingRule)]  # type: ignore[attr-defined]
    ended_by = rules[0].stopped if rules else None
    return replace(
        run,
        step=trainer.global_step,
        cost=training_cost(meter.state_dict()) if meter.sessions else None,
        train_list=run.data.list_hash(run.data.train_split),
        unfinished=_why_unfinished(run, trainer.global_step, ended_by),
        stopped=ended_by,
    )


def _continued(config: Mapping[str, Any]) -> Path | None:
    """Give the checkpoint that a new run goes on from, if its configuration names one."""
    start = config.get("ckpt_path")
    if not start:
        return None
    return checkpoint_of(Path(start["path"]))


def _why_unfinished(run: Run, step: int, stopped: dict[str, Any] | None) -> str:
    """Say why a run isn't finished; empty where it is.

    Every score would be that of a network that learned less than its configuration says.

    Raises:
        WSSSError: no setting that was given ended it.
    """
    reason = why_unfinished(run.config, step, stopped)
    given = run.config["trainer"]
    if reason and not (limits(given) or ends(given)):
        raise WSSSError(
            f"trained {reason}, so the run isn't finished and has no scores; a callback ended it: "
            "stop by the declared holdout (callbacks=early_stopping), or set budget.max_steps for "
            "a shorter run"
        )
    return reason


def _untrained(run: Run) -> Run:
    """Write the checkpoint of a method that learns nothing, so that whatever reads one finds it."""
    checkpoint: dict[str, Any] = {"state_dict": run.module.state_dict(), "global_step": 0}
    run.module.on_save_checkpoint(checkpoint)
    if is_first_process():
        save_atomically(checkpoint, run.checkpoint)
    return run


def _callback(trainer: lightning.Trainer, kind: type[C]) -> C:
    """Find one of the callbacks of :func:`build_trainer`."""
    return next(c for c in trainer.callbacks if isinstance(c, kind))  # type: ignore[attr-defined]
