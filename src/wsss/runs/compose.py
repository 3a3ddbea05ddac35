"""Compose configurations with Hydra; report its errors in one line."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wsss.core.errors import WSSSError
from wsss.core.failures import one_line
from wsss.core.places import config_root
from wsss.core.schema import nearest, nearest_key
from wsss.runs.choice import choice_of
from wsss.runs.config import check_config, plain
from wsss.runs.trainer_settings import check_budget_decides, with_trainer_keys

#: chooses an overlay beside the one that holds a sweep over overlays
OVERLAY = "+experiments@_global_"
# choices of Hydra's own groups that further packages bring -> the extra that installs them
HYDRA_PLUGINS = {"submitit_slurm": "slurm", "submitit_local": "slurm"}


def compose_config(overrides: Sequence[str], config_name: str = "train") -> DictConfig:
    """Compose and check a configuration.

    Raises:
        WSSSError: unknown group or key, missing value, wrong type, with the nearest valid key; an
            overlay that only sweeps over others.
    """
    _refuse_bare_sweeps(overrides)
    config = _compose(overrides, config_name)
    config.choice = choice_of(config.choice, overrides)
    check_config(config)
    check_budget_decides(config)
    return config


def _refuse_bare_sweeps(overrides: Sequence[str]) -> None:
    """Refuse an overlay that only sweeps over other overlays, unless one of them is chosen."""
    if any(override.startswith(f"{OVERLAY}=") for override in overrides):
        return
    for override in overrides:
        key, _, name = override.partition("=")
        file = config_root() / "experiments" / f"{name}.yaml"
        if key != "+experiments" or not file.is_file():  # composing reports it
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
                config_name,
                with_search_path(with_trainer_keys(overrides)),
                return_hydra_config=return_hydra_config,
            )
    except (HydraException, OmegaConfBaseException, TypeError, ValueError) as error:
        path = root / "conf" / f"{config_name}.yaml"
        raise WSSSError(_one_line(error, path, overrides)) from error


def choice_in_group(overrides: Sequence[str], group: str) -> str:
    """Say which file of a group of ``conf/`` a composed configuration has, such as ``method``."""
    composed = _compose(overrides, "train", return_hydra_config=True)
    name: str = composed.hydra.runtime.choices[group]
    return name


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
    """List the jobs that ``-m`` makes of comma-separated values and of ``hydra.sweeper.params``.

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
    """List what one override of a sweep stands for; of an interval, its ends."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        return [f"{key}={value.start}", f"{key}={value.end}"]
    return [f"{key}={choice}" for choice in override.sweep_string_iterator()]


def quoted(value: str) -> str:
    """Quote a text so that Hydra reads it back from an override, whatever it holds."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def with_search_path(overrides: Sequence[str]) -> list[str]:
    """Add where ``+experiments=toco/voc`` is looked for: the folder beside ``conf/``."""
    if any(override.startswith("hydra.searchpath=") for override in overrides):
        return list(overrides)
    return [*overrides, f"hydra.searchpath=[file://{config_root()}]"]


def _unquoted(overrides: Sequence[str]) -> str:
    """Say how to quote a value that Hydra reads as several, or cannot read; empty where none."""
    for override in overrides:
        key, equals, value = override.partition("=")
        try:
            (parsed,) = OverridesParser.create().parse_overrides([override])
            if not parsed.is_sweep_override():
                continue
        except HydraException:
            if not equals:
                continue
        line = one_line(f"{key}={quoted(value)}", 300)
        return (
            f"{one_line(override, 300)}: several values are swept with -m; a text with , = or "
            f'brackets is quoted twice, "{line}" (lists: [a,b])'
        )
    return ""


def _one_line(error: Exception, path: Path, overrides: Sequence[str]) -> str:
    """Put a Hydra error into one line, with the nearest valid key where a key was mistyped."""
    if text := _unquoted(overrides):
        return text
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
        return f"{group}={choice}: no such choice{nearest(choice, options)}"
    return " ".join(text.split())[:300] or f"{path} does not compose"


def compose_run(overrides: list[str]) -> dict[str, Any]:
    """Compose the resolved configuration of ``wsss train`` with these overrides."""
    return plain(compose_config(overrides))


def compose_walk(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose the settings of a random walk.

    Args:
        overrides: ``random_walk=NAME`` and ``random_walk.KEY=VALUE``.

    Raises:
        WSSSError: no such choice or key.
    """
    walk: dict[str, Any] = plain(_compose(overrides, "pseudo"))["random_walk"]
    return walk
