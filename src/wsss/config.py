"""Configurations: found from any directory, composed by Hydra, checked before anything runs.

Hydra refuses a mistyped key, but not one behind ``+`` and not a value of the wrong type. Both are
caught here against the constructors that the configuration names: a typed, keyword-only signature
is its own schema.
"""

import difflib
import hashlib
import inspect
import itertools
import json
import math
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from wsss.errors import WSSSError
from wsss.evaluation.protocol import Protocol
from wsss.places import config_root

# arguments that the training code passes itself, so a configuration need not
SUPPLIED = {"backbone", "num_classes"}
#: chooses an overlay beside the one that holds a sweep over overlays
OVERLAY = "+experiments@_global_"
# choices of Hydra's own groups that further packages bring -> the extra that installs them
HYDRA_PLUGINS = {"submitit_slurm": "slurm", "submitit_local": "slurm", "optuna": "optuna"}


@dataclass(frozen=True)
class Budget:
    """What a data set prescribes to every method trained on it.

    Attributes:
        max_steps: optimiser steps.
        warmup_steps: steps of learning-rate warm-up.
        global_batch_size: images a step over all devices.
        crop_size: side of a training crop in pixels.
        scale_range: bounds of the random scale before the crop.
        blur_radius: bounds of the radius of blurred views in pixels.
        local_size: side of a local crop in pixels.
        cam_size: side of the square to which images are squashed for CAM and single-scale scores;
            None: native.
        eval_every: steps between validations.
    """

    max_steps: int
    warmup_steps: int
    global_batch_size: int
    crop_size: int
    scale_range: tuple[float, float]
    blur_radius: tuple[float, float]
    local_size: int
    cam_size: int | None
    eval_every: int

    def __post_init__(self) -> None:
        for name in ("max_steps", "global_batch_size", "crop_size", "local_size", "eval_every"):
            if getattr(self, name) < 1:
                raise WSSSError(f"budget.{name}={getattr(self, name)}: must be at least 1")
        if self.warmup_steps < 0:
            raise WSSSError(f"budget.warmup_steps={self.warmup_steps}: must not be negative")
        if self.local_size >= self.crop_size:
            raise WSSSError(
                f"budget.local_size={self.local_size}: must be smaller than "
                f"budget.crop_size={self.crop_size}"
            )
        low, high = self.scale_range
        if not 0 < low <= high:
            raise WSSSError(f"budget.scale_range=[{low}, {high}]: expected 0 < low <= high")
        low, high = self.blur_radius
        if not 0 < low <= high:
            raise WSSSError(f"budget.blur_radius=[{low}, {high}]: expected 0 < low <= high")


@dataclass(frozen=True)
class LoggerConfig:
    """Where metrics go beside the CSV that is always written.

    Attributes:
        wandb: also log to Weights & Biases (offline without a key).
        project: the W&B project.
        entity: the account or team that it belongs to; None: the key's own.
        name: of the run; None: that of its folder.
        group: of runs; None: the study.
        job_type: kind of run; None: ``train`` or ``second-stage``.
        tags: beside method, data set and encoder, which are always tags; 1 to 64 characters each.
        checkpoints: also store the last checkpoint, as an artifact.
    """

    wandb: bool = False
    project: str = "wsss"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: Sequence[str] = ()
    checkpoints: bool = False

    def __post_init__(self) -> None:
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                raise WSSSError(f"logger.tags: {tag!r} has {len(tag)} characters, expected 1 to 64")


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


@dataclass(frozen=True)
class TrainConfig:
    """Top level of ``conf/train.yaml``; groups are checked against their own targets."""

    method: Mapping[str, Any]
    backbone: Mapping[str, Any]
    data: Mapping[str, Any]
    trainer: Mapping[str, Any]
    eval: Protocol
    logger: LoggerConfig
    budget: Budget
    study: str
    seed: int
    runs_dir: Path
    gallery: int
    objective: str = "seed_miou"
    second_stage: Mapping[str, Any] | None = None


def compose_config(overrides: Sequence[str], config_name: str = "train") -> DictConfig:
    """Compose and check a configuration.

    Raises:
        WSSSError: unknown group or key, missing value, wrong type, with the nearest valid key; an
            overlay that only sweeps over others.
    """
    _refuse_bare_sweeps(overrides)
    config = _compose(overrides, config_name)
    check_config(config)
    return config


def _refuse_bare_sweeps(overrides: Sequence[str]) -> None:
    """Refuse an overlay that is nothing but a sweep over overlays, where none of them is chosen."""
    if any(override.startswith(f"{OVERLAY}=") for override in overrides):
        return
    for override in overrides:
        key, _, name = override.partition("=")
        file = config_root() / "experiments" / f"{name}.yaml"
        if key != "+experiments" or not file.is_file():  # which composing tells
            continue
        swept = OmegaConf.select(OmegaConf.load(file), "hydra.sweeper.params")
        if OVERLAY in (swept or {}):
            raise WSSSError(f"{override} sweeps over other overlays; begin it with -m")


def _compose(
    overrides: Sequence[str], config_name: str, *, return_hydra_config: bool = False
) -> DictConfig:
    GlobalHydra.instance().clear()
    root = config_root()
    try:
        with initialize_config_dir(str(root / "conf"), version_base="1.3"):
            return compose(
                config_name, with_search_path(overrides), return_hydra_config=return_hydra_config
            )
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        path = root / "conf" / f"{config_name}.yaml"
        raise WSSSError(_one_line(error, path, overrides)) from error


@dataclass(frozen=True)
class SweepJobs:
    """What ``-m`` will run, as far as that is known before.

    Attributes:
        samples: overrides of all jobs; where a sweeper chooses, of enough to meet every value.
        count: number of jobs.
    """

    samples: list[list[str]]
    count: int


def sweep_jobs(overrides: Sequence[str]) -> SweepJobs:
    """The jobs that ``-m`` makes of comma-separated values and of ``hydra.sweeper.params``.

    Raises:
        WSSSError: an override that does not parse, or no such sweeper.
    """
    fixed = [str(o.input_line) for o in _parse(overrides) if not o.is_sweep_override()]
    sweeper = _compose(fixed, "train", return_hydra_config=True).hydra.sweeper
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    # what the line says takes the place of what a file says
    choices = {o.get_key_element(): _choices(o) for o in _parse([*params, *overrides])}
    if sweeper["_target_"].endswith(".BasicSweeper"):
        every = [list(job) for job in itertools.product(*choices.values())]
        return SweepJobs(every, len(every))
    first = {key: values[0] for key, values in choices.items()}
    others = [first | {key: value} for key, values in choices.items() for value in values[1:]]
    return SweepJobs([list(job.values()) for job in (first, *others)], sweeper.n_trials)


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise WSSSError(" ".join(str(error).split())) from error
    return parsed


def _choices(override: Override) -> list[str]:
    """What one override of a sweep stands for; of an interval, its ends."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        return [f"{key}={value.start}", f"{key}={value.end}"]
    return [f"{key}={choice}" for choice in override.sweep_string_iterator()]


def quoted(value: str) -> str:
    """A text as Hydra reads it back from an override, whatever it holds."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def with_search_path(overrides: Sequence[str]) -> list[str]:
    """Overrides that also let ``+experiments=toco/voc`` find the folder beside ``conf/``."""
    if any(override.startswith("hydra.searchpath=") for override in overrides):
        return list(overrides)
    return [*overrides, f"hydra.searchpath=[file://{config_root()}]"]


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain dictionaries, lists and numbers.

    Raises:
        WSSSError: a mandatory value (``???``) is missing, or an interpolation does not resolve.
    """
    try:
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a key"
        if type(error).__name__ == "MissingMandatoryValue":
            raise WSSSError(f"{key} is missing; give it on the command line: {key}=...") from error
        raise WSSSError(f"{key}: {str(error).splitlines()[0]}") from error
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def config_hash(config: Mapping[str, Any]) -> str:
    """Eight hex digits over what makes a run another run.

    Left out are where things lie and how they are watched, so that moved data does not orphan an
    interrupted run; a second stage is a run of its own. The evaluation protocol is in: ``wsss
    eval`` takes other ones without training.
    """
    elsewhere = ("runs_dir", "logger", "gallery", "objective", "second_stage")
    relevant = {key: value for key, value in config.items() if key not in elsewhere}
    relevant["data"] = {
        key: value
        for key, value in config["data"].items()
        if key not in ("root", "num_workers", "eval_batch_size")
    }
    if masks := relevant["data"].get("train_masks"):  # a first stage's: named inside runs_dir
        relevant["data"]["train_masks"] = str(masks).removeprefix(str(config["runs_dir"]))
    relevant["trainer"] = {
        key: value
        for key, value in config["trainer"].items()
        if key != "profiler" and (value or key not in ACCELERATION)
    }
    text = json.dumps(relevant, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


#: what a second stage says for itself; all else is the first one's
SECOND_STAGE = ("source", "method", "backbone", "data", "eval", "budget", "trainer")


def second_stage_config(config: Mapping[str, Any], train_masks: str) -> dict[str, Any]:
    """The resolved configuration of the run that follows on a run's pseudo labels.

    Args:
        config: resolved configuration with a ``second_stage``: its method, encoder and protocol
            take the first stage's places, its other keys are laid over the first stage's;
            ``source`` says what `wsss pseudo` makes the labels from.
        train_masks: the folder of pseudo labels.

    Raises:
        WSSSError: ``second_stage`` has unknown keys or lacks one.
    """
    second = config["second_stage"]
    for key in second:
        if key not in SECOND_STAGE:
            raise WSSSError(f"second_stage.{key}: unknown key{_nearest(key, SECOND_STAGE)}")
    for key in ("method", "backbone", "eval"):
        if key not in second:
            raise WSSSError(f"second_stage.{key} is missing; see experiments/tkp_pcl/minivoc.yaml")
    merged = {**config, **{key: second[key] for key in ("method", "backbone", "eval")}}
    for key in ("data", "budget", "trainer"):
        merged[key] = {**config[key], **second.get(key, {})}
    # these were read from the first stage's budget
    merged["data"]["global_batch_size"] = merged["budget"]["global_batch_size"]
    merged["trainer"]["max_steps"] = merged["budget"]["max_steps"]
    merged["data"]["train_masks"] = train_masks
    # what the first stage saw beside image labels is on its pseudo labels' card
    merged["data"].pop("saliency_folder", None)
    return merged | {"second_stage": None}


def check_config(config: DictConfig) -> None:
    """Check every key and value against the constructor that will take it.

    Raises:
        WSSSError: one line naming the key, and the nearest valid one or the expected type.
    """
    content = plain(config)
    _check_finite(content)
    _check_node(content, _parameters(TrainConfig), "", supplied=set())
    for field in fields(TrainConfig):
        schema = {"eval": Protocol, "logger": LoggerConfig, "budget": Budget}.get(field.name)
        if schema is not None:
            _check_node(content[field.name], _parameters(schema), field.name, supplied=set())
            schema(**content[field.name])  # its own checks of values
    for path, node in _targets(content):
        parameters = _parameters(_target(node["_target_"], path))
        if path == "trainer":
            parameters |= _parameters(Acceleration)
        _check_node(node, parameters, path, supplied=SUPPLIED)
    if not 0 <= content["seed"] < 2**32:
        raise WSSSError(f"seed={content['seed']}: expected 0 to 2**32 - 1")
    if content["gallery"] < 0:
        raise WSSSError(f"gallery={content['gallery']}: expected 0 or more images")
    if content.get("second_stage"):
        check_config(OmegaConf.create(second_stage_config(content, "written by the first stage")))


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dictionary with a ``_target_``, with its dotted path."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from _targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _targets(value, f"{path}.{index}")


def _check_finite(node: Any, path: str = "") -> None:
    """No setting is infinite or NaN, which every comparison with a bound lets pass."""
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list):
        children = enumerate(node)
    elif isinstance(node, float) and not math.isfinite(node):
        raise WSSSError(f"{path}={node}: expected a finite number")
    for key, value in children:
        _check_finite(value, f"{path}.{key}" if path else str(key))


def _target(name: str, path: str) -> type:
    try:
        return get_class(name)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise WSSSError(f"{path}._target_={name}: no such class ({reason})") from error


def _parameters(target: type) -> dict[str, inspect.Parameter]:
    """Parameters of a constructor with resolved annotations."""
    signature = inspect.signature(target)
    constructor: Any = target.__init__  # type: ignore[misc]  # the class itself, not a subclass
    hints = typing.get_type_hints(constructor)
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in signature.parameters.items()
        if name != "self"
    }


def _check_node(
    node: Any, parameters: Mapping[str, inspect.Parameter], path: str, supplied: set[str]
) -> None:
    prefix = f"{path}." if path else ""
    if not isinstance(node, dict):
        raise WSSSError(f"{path}={node!r}: expected a group of keys ({', '.join(parameters)})")
    for key, value in node.items():
        if key in ("_target_", "_partial_", "_convert_", "_recursive_"):
            continue
        if key not in parameters:
            raise WSSSError(f"{prefix}{key}: unknown key{_nearest(key, parameters, prefix)}")
        nested = isinstance(value, dict) and ("_target_" in value or not path)
        if not nested:
            _check_value(f"{prefix}{key}", value, parameters[key].annotation)
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in {*node, *supplied}:
            raise WSSSError(
                f"{prefix}{key} is missing; give it on the command line: {prefix}{key}=..."
            )


def _check_value(path: str, value: Any, annotation: Any) -> None:
    if annotation in (Any, inspect.Parameter.empty):
        return
    kinds = {annotation, *typing.get_args(annotation)}
    # pydantic would read "1" as a number and true as 1
    if (isinstance(value, str) and kinds <= {int, float, bool, type(None)}) or (
        isinstance(value, bool) and not kinds & {bool, str} and kinds & {int, float}
    ):
        names = sorted(kind.__name__ for kind in kinds if kind is not type(None))
        raise WSSSError(f"{path}={value!r}: expected {' or '.join(names)}")
    try:
        adapter = TypeAdapter(annotation, config={"arbitrary_types_allowed": True})
    except Exception:  # a class with its own config, or an annotation pydantic cannot model
        adapter = TypeAdapter(annotation)
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        expected = getattr(annotation, "__name__", str(annotation).replace("typing.", ""))
        if typing.get_origin(annotation) is not None:
            expected = str(annotation).replace("typing.", "").replace("collections.abc.", "")
        reason = error.errors()[0]["msg"].lower()
        raise WSSSError(f"{path}={value!r}: expected {expected} ({reason})") from error


def _nearest(key: str, valid: Mapping[str, Any] | Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    return f"; valid: {', '.join(f'{prefix}{name}' for name in valid)}"


def _one_line(error: Exception, path: Path, overrides: Sequence[str]) -> str:
    """A Hydra error as one line, with the nearest valid key where a key was mistyped."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        # what the others give: another method has other keys; the defaults where an overlay errs
        rest = [override for override in overrides if override.split("=")[0] != match[1]]
        config = _compose(rest if len(rest) < len(overrides) else [], path.stem)
        return f"{match[1]}: unknown key{nearest_key(match[1], config)}"
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, choice = match[1].partition("/")
        if group == "hydra":
            group, _, choice = match[1].rpartition("/")
            extra = HYDRA_PLUGINS.get(choice)
            hint = f"; it comes with pip install 'wsss[{extra}]'" if extra else ""
            return f"{group}={choice}: no such choice{hint}"
        folder = path.parent / group
        folder = folder if folder.is_dir() else path.parents[1] / group  # experiments
        options = sorted(
            str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml")
        )
        return f"{group}={choice}: no such choice{_nearest(choice, options)}"
    return " ".join(text.split())[:300] or f"{path} does not compose"


def nearest_key(key: str, config: DictConfig) -> str:
    """A hint naming the nearest key at the same depth of a configuration."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig):
        return f"; there is no group {parent}"
    names = [str(other) for other in node if other != "_target_"]
    return _nearest(name, names, f"{parent}." if parent else "")
