"""What a study's runs differ by, and the names of a run and its group that follow from it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import Field

from wsss.core.errors import WSSSError
from wsss.core.files import first_line
from wsss.core.records import Record, check_record
from wsss.results.store import CONFIG_FILE, short_names
from wsss.runs.folder import method_name

#: order in which one of several settings that vary together gives its name to a grouping
GROUPS = ("method", "backbone", "data", "budget", "trainer", "eval")
#: where and how a run is watched, and what seeds alone change
NOT_VARIED = ("runs_dir", "study", "gallery", "logger", "second_stage", "seed", "data.seed",
              "data.root", "data.num_workers", "data.train_masks", "trust")  # fmt: skip
LONGEST = 128  # characters that W&B takes as a name or group


class _Target(Record):
    """A group that names its class."""

    name: str = Field(alias="_target_")


class _Logger(Record):
    """Where a run was logged."""

    project: str = "wsss"
    entity: str | None = None
    group: str | None = None


class _Config(Record):
    """What is read of a run's ``config.yaml``."""

    method: _Target
    study: str
    gallery: int
    logger: _Logger


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's configuration; nothing in it is interpolated.

    Raises:
        WSSSError: it is damaged.
    """
    mend = "restore it, or move the run out of the study"
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # YAML, text and OmegaConf errors share no base class
        raise WSSSError(f"{path}: cannot be read ({first_line(error)}); {mend}") from error
    check_record(_Config, config, str(path), mend)
    return dict(config)


def varying(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Give the dotted keys of the settings by which runs of one method differ, but for seeds.

    Of settings that change together (one is read from the other, or a pair of thresholds) only the
    first is named: it makes the same groups.
    """
    flat = [dict(_leaves(config)) for config in configs]
    methods = [method_name(config) for config in configs]
    keys = sorted({key for one in flat for key in one}, key=lambda key: (_rank(key), key))
    found: dict[tuple[int, ...], str] = {}
    for key in keys:
        if any(key == name or key.startswith(f"{name}.") for name in NOT_VARIED):
            continue
        values = [one.get(key) for one in flat]
        # another method has other settings anyway
        within = any(
            len({v for v, m in zip(values, methods, strict=True) if m == method}) > 1
            for method in set(methods)
        )
        if within:
            found.setdefault(tuple(values.index(value) for value in values), key)
    return list(found.values())


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Give (dotted key, value as text) of everything in nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def _rank(key: str) -> int:
    group = key.partition(".")[0]
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)


def varied(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Give what varies in a run's study with the run's own values: ``ptc_weight`` -> ``0.4``.

    A sweep says it beforehand (``logger.varied``); without it the study's other folders do.

    Args:
        config: resolved configuration.
        folder: the run folder.
    """
    keys = config["logger"].get("varied") or varying([config, *_others(folder)])
    own = dict(_leaves(config))
    return {
        name: own[key].strip('"')
        for key, name in short_names(keys).items()
        if key in own  # another method's setting is none of this run
    }


def _others(folder: Path) -> Iterable[dict[str, Any]]:
    for path in sorted(folder.parent.glob(f"*/{CONFIG_FILE}")):
        if path.parent.name != folder.name:
            with suppress(WSSSError):  # a damaged neighbour ends no run; what reads it says so
                yield read_config(path)


def run_name(config: Mapping[str, Any], folder: Path) -> str:
    """Name a run as one would in words: ``toco minivoc ptc_weight=0.4 seed=1``.

    Args:
        config: resolved configuration.
        folder: the run folder.
    """
    parts = [method_name(config), config["data"]["name"], *settings_of(config, folder)]
    return " ".join([*parts, f"seed={config['seed']}"])[:LONGEST]


def group_name(config: Mapping[str, Any], folder: Path) -> str:
    """Name the runs that differ in their seed alone: ``STUDY: toco ptc_weight=0.4``.

    Args:
        config: resolved configuration.
        folder: the run folder.
    """
    parts = [method_name(config), *settings_of(config, folder)]
    return f"{config['study']}: {' '.join(parts)}"[:LONGEST]


def settings_of(config: Mapping[str, Any], folder: Path) -> list[str]:
    """Give what varies in a run's study as ``NAME=VALUE``.

    Args:
        config: resolved configuration.
        folder: the run folder.
    """
    return [f"{name}={value}" for name, value in varied(config, folder).items()]
