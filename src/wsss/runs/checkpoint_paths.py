"""Whether the checkpoints are there that a line names, which no import is needed to see."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsss.core.errors import WSSSError

#: keys of a configuration that name what a run starts from, beside its encoder's weights
STARTS = ("init_from", "ckpt_path")
#: of a run, inside its folder
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"


def checkpoint_of(path: Path) -> Path:
    """Give the last checkpoint of a run folder, or the path itself where it is no folder."""
    return path / LAST_CHECKPOINT if path.is_dir() else path


def check_path(run: str | Path, key: str) -> None:
    """Raise WSSSError unless a run folder has a checkpoint, or is one.

    Args:
        run: the folder or the file.
        key: of the line that names it.
    """
    file = checkpoint_of(Path(run))
    if not file.is_file():
        raise WSSSError(f"{file}: no such checkpoint; {key}= takes a run folder or a .ckpt file")


def start_key(config: Mapping[str, Any]) -> str | None:
    """Give the key that names what a run starts from; None where there is none.

    Args:
        config: resolved configuration.

    Raises:
        WSSSError: both are given, or there is no such checkpoint.
    """
    given = [key for key in STARTS if config.get(key)]
    if len(given) > 1:
        raise WSSSError("init_from and ckpt_path exclude each other: weights alone, or all")
    for key in given:
        check_path(start_path(config, key), key)
    return given[0] if given else None


def start_path(config: Mapping[str, Any], key: str) -> str:
    """Give the path that a configuration names, or that a stored one names with its content."""
    start = config[key]
    return str(start.get("path", "") if isinstance(start, Mapping) else start)
