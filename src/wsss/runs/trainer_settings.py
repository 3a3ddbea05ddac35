"""The keys of ``trainer:``: arguments of ``lightning.Trainer``, and which of them limit a run.

Every argument is a key without ``+``, typed by Lightning's own signature; ranges that it lacks are
fields of :class:`TrainerSettings`. An argument that a run decides itself is refused with the key
that decides it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from omegaconf import OmegaConf

from wsss.core.declarations import declared
from wsss.core.errors import WSSSError
from wsss.core.places import config_root
from wsss.core.ranges import Count, Devices, Duration, Fraction, Number, Positive
from wsss.core.schema import parameters_of


@dataclass(frozen=True)
class Acceleration:
    """What the trainer's configuration says beside the arguments of ``lightning.Trainer``.

    Attributes:
        compile: backend of ``torch.compile`` (``inductor``) for the parts of a method that keep
            their structure; None: nothing is compiled.
        channels_last: keep the weights of convolutions channels-last, as tensor cores read them.
    """

    compile: str | None = None
    channels_last: bool = False


ACCELERATION = tuple(field.name for field in fields(Acceleration))


#: a number of batches, or a share of them
Batches = Annotated[int, Ge(0), Le(10**9)] | Fraction


@dataclass(frozen=True)
class TrainerSettings(Acceleration):
    """Ranges of what ``lightning.Trainer`` takes as any number, so that no run has no end.

    Attributes:
        accelerator: kind of device, of which ``gpu`` is any.
        max_steps: optimiser steps; Lightning's -1 would never stop.
        devices: processes on one machine, -1 or ``auto`` for all devices, or their numbers.
        num_nodes: machines.
        accumulate_grad_batches: forward passes a step.
        log_every_n_steps: steps between logged values, beside the first one.
        gradient_clip_val: largest norm of a gradient; None: any.
        gradient_clip_algorithm: what is clipped: the ``norm`` or each ``value``.
        fast_dev_run: a smoke test of so many batches; true: of one.
        limit_train_batches: batches an epoch, or a share of them; None: all.
        limit_val_batches: batches of a validation, or a share of them; 0: no validation.
        overfit_batches: train and validate on these batches alone; 0: on all.
        max_time: a run's longest duration.
        profiler: what measures the parts of a step.
        min_steps: steps before which nothing stops a run early.
        num_sanity_val_steps: validation batches before training; -1: all.
    """

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = "auto"
    max_steps: Count = 1
    devices: Devices = 1
    num_nodes: Count = 1
    accumulate_grad_batches: Count = 1
    log_every_n_steps: Count | None = 50
    gradient_clip_val: Positive | None = None
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    fast_dev_run: bool | Annotated[int, Ge(0), Le(10**9)] = False
    limit_train_batches: Batches | None = None
    limit_val_batches: Batches | None = None
    overfit_batches: Batches = 0.0
    max_time: Duration | None = None
    profiler: Literal["simple", "advanced", "pytorch", "xla"] | None = None
    min_steps: Number | None = None
    num_sanity_val_steps: Annotated[int, Ge(-1), Le(10**9)] | None = None


#: arguments that change nothing but what one sees of a run
WATCHED = ("profiler", "enable_progress_bar", "enable_model_summary")
SHARES = ("limit_train_batches", "limit_val_batches")
#: arguments of ``lightning.Trainer`` that a run gives itself -> what decides them
GIVEN_BY_RUN = {
    "default_root_dir": "every run has its own; what sets it is runs_dir=",
    "logger": "every run has its own; what adds to it is the group logger=",
    "callbacks": "every run has its own; what adds to them is the group callbacks=",
    "enable_checkpointing": "every run has its own; what sets it is budget.eval_every=, the steps "
    "between checkpoints",
    "val_check_interval": "the steps between validations are budget.eval_every=",
    "check_val_every_n_epoch": "the steps between validations are budget.eval_every=",
    "use_distributed_sampler": "the data module shares images out; what sets a batch is "
    "budget.global_batch_size=",
    "reload_dataloaders_every_n_epochs": "the data module keeps the order of images, which "
    "seed= decides",
    "limit_test_batches": "every list is scored whole; a smaller one is data.limit=",
    "limit_predict_batches": "`wsss predict` takes the images that images= names",
    "plugins": "every run has its own; a precision is trainer.precision=",
    "barebones": "a run needs its log and its checkpoints; what measures speed is `wsss benchmark`",
    "model_registry": "checkpoints stay in the run folder; what uploads them is logger=wandb "
    "logger.checkpoints=true",
}  # fmt: skip


def trainer_keys() -> list[str]:
    """List the arguments of the trainer that a line may set."""
    cls = declared("lightning.Trainer")
    names = [] if cls is None else list(parameters_of(cls))
    given = {*GIVEN_BY_RUN, "max_steps"}  # the steps are the budget's
    return [name for name in dict.fromkeys([*names, *ACCELERATION]) if name not in given]


def check_trainer(node: Mapping[str, Any]) -> None:
    """Refuse an argument that would take the place of a part that every run needs.

    Args:
        node: the group ``trainer`` of a configuration.

    Raises:
        WSSSError: it names the argument and the key that decides it.
    """
    for key, instead in GIVEN_BY_RUN.items():
        if key in node:
            raise WSSSError(f"trainer.{key}: {instead}")


def check_budget_decides(config: Mapping[str, Any]) -> None:
    """Refuse a number of steps beside the budget's, by which a schedule would not end.

    Stored runs of earlier versions may have one, so that only a new configuration is checked.

    Raises:
        WSSSError: ``trainer.max_steps`` is another number than ``budget.max_steps``.
    """
    steps, decided = config["trainer"].get("max_steps"), config["budget"]["max_steps"]
    if steps != decided:
        raise WSSSError(
            f"trainer.max_steps={steps}: the steps of a run are budget.max_steps={decided}, which "
            "schedules follow; give budget.max_steps="
        )


def with_trainer_keys(overrides: Sequence[str]) -> list[str]:
    """Let Hydra take every ``trainer.KEY=``: it knows only the keys that a file in conf/ has.

    What is no argument of ``lightning.Trainer`` is refused when the configuration is checked.

    Args:
        overrides: ``KEY=VALUE`` of a command line.
    """
    known = OmegaConf.load(config_root() / "conf" / "trainer" / "auto.yaml")
    keys = [re.match(r"trainer\.(\w+)=", override) for override in overrides]
    return [
        f"++{override}" if key and key[1] not in known else override
        for key, override in zip(keys, overrides, strict=True)
    ]


def limits(trainer: Mapping[str, Any]) -> list[str]:
    """Name the settings by which a run sees less than its configuration's lists, as ``KEY=VALUE``.

    Such a run tries something out: it never counts as finished. No validation at all
    (``limit_val_batches=0``) is no limit, since it leaves the weights and their scores alone.

    Args:
        trainer: the group ``trainer`` of a configuration.
    """
    whole = {
        "fast_dev_run": (None, False, 0),
        "overfit_batches": (None, 0),
        "limit_train_batches": (None,),
        "limit_val_batches": (None, 0),
    }
    given = {key: trainer.get(key) for key in whole}
    return [
        f"trainer.{key}={_yaml(value)}"
        for key, value in given.items()
        if value not in whole[key] and not (key in SHARES and _is_all(value))
    ]


def ends(trainer: Mapping[str, Any]) -> list[str]:
    """Name the settings that may end a run before its last step, as ``KEY=VALUE``.

    Args:
        trainer: the group ``trainer`` of a configuration.
    """
    given = {"max_epochs": trainer.get("max_epochs"), "max_time": trainer.get("max_time")}
    # max_epochs is -1 in every choice of conf/trainer: no end
    return [f"trainer.{key}={_yaml(v)}" for key, v in given.items() if v is not None and v != -1]


def _is_all(value: Any) -> bool:
    """Tell a share of 1.0, all batches, from 1, a single one."""
    return isinstance(value, float) and value == 1.0


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
