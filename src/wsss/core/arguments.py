"""``KEY=VALUE`` arguments of the verbs that are not composed by Hydra."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from wsss.core.errors import WSSSError
from wsss.core.failures import one_line
from wsss.core.files import first_line
from wsss.core.schema import check_value, nearest

T = TypeVar("T")


def parse_arguments(
    schema: type[T], arguments: Sequence[str], *, passed_on: Sequence[str] = ()
) -> tuple[T, list[str]]:
    """Read arguments into a dataclass; missing ones are those without a default.

    Args:
        schema: a dataclass of plain types, numbers with a range among them; its defaults are the
            arguments' defaults.
        arguments: ``KEY=VALUE`` strings.
        passed_on: groups (``eval``, ``data``) whose keys belong to a stored configuration.

    Returns:
        The dataclass, and the arguments that are passed on.

    Raises:
        WSSSError: not ``KEY=VALUE``, unknown key, wrong type, out of range, missing key.
    """
    settings: list[str] = []
    others: list[str] = []
    for argument in [argument.removeprefix("+") for argument in arguments]:  # Hydra's habit
        key, equals, _ = argument.partition("=")
        if not equals:
            raise WSSSError(f"{one_line(argument, 200)!r}: expected KEY=VALUE")
        (others if key.split(".")[0] in passed_on else settings).append(argument)
    merged: Any = OmegaConf.structured(schema)
    kinds, texts = get_type_hints(schema), {}
    for argument in settings:
        key, _, value = argument.partition("=")
        if key not in kinds:
            raise WSSSError(_unknown(key, list(kinds), passed_on))
        if kinds[key] is str or (kinds[key] == str | None and value != "null"):
            texts[key] = value  # as it stands: YAML would read 007 as 7 and #x as nothing
            merged[key] = ""
            continue
        texts.pop(key, None)
        try:
            merged = OmegaConf.merge(merged, read_override(argument))
        except OmegaConfBaseException as error:
            expected = getattr(kinds[key], "__name__", str(kinds[key]))
            raise WSSSError(
                f"{one_line(argument, 200)}: expected {expected}, lists as {key}=[a,b]"
            ) from error
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise WSSSError(f"{missing[0]} is missing; give it on the command line: {missing[0]}=...")
    chosen: Any = OmegaConf.to_object(merged)
    for name, text in texts.items():
        setattr(chosen, name, text)
    for name, kind in get_type_hints(schema, include_extras=True).items():
        check_value(name, getattr(chosen, name), kind)
    return chosen, others


def read_override(override: str) -> DictConfig:
    """Read ``KEY=VALUE``, whose value is YAML.

    Raises:
        WSSSError: the value is none.
    """
    try:
        return OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise WSSSError(
            f"{one_line(override, 200)}: cannot be read as a value ({first_line(error)}); quote a "
            "text twice: KEY=\"'TEXT'\""
        ) from error


def _unknown(key: str, names: Sequence[str], passed_on: Sequence[str]) -> str:
    """Say of a key that there is none, and what may be given: arguments, and groups of a run's."""
    said = one_line(key, 200)
    if "." in key and passed_on:
        return (
            f"{said}: cannot be changed here; give {', '.join(names)}, or a key of the run's "
            f"configuration that begins with {' or '.join(passed_on)}"
        )
    return f"{said}: unknown key{nearest(key, names)}"


def split_arguments(schema: type[T], arguments: Sequence[str]) -> tuple[list[Path], T]:
    """Split run folders from ``KEY=VALUE``, which may also be written ``--key value``.

    A bare ``--key`` sets what is true or false to true.

    Raises:
        WSSSError: no run, or an unknown key.
    """
    paths, settings = [], []
    switches = {name for name, kind in get_type_hints(schema).items() if kind is bool}
    pending: str | None = None
    for argument in arguments:
        if pending in switches and argument not in ("true", "false"):
            settings.append(f"{pending}=true")
            pending = None
        if pending is not None:
            settings.append(f"{pending}={argument}")
            pending = None
        elif argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            if equals:
                settings.append(f"{key}={value}")
            else:
                pending = key
        elif "=" in argument and not Path(argument).exists():
            settings.append(argument)
        else:
            paths.append(Path(argument))
    if pending in switches:
        settings.append(f"{pending}=true")
    elif pending is not None:
        raise WSSSError(f"--{pending}: a value is missing")
    if not paths:
        raise WSSSError("no run is given; expected run folders, or a folder that holds some")
    return paths, parse_arguments(schema, settings)[0]


def check_folders(paths: Sequence[Path]) -> None:
    """Raise WSSSError where a run folder, or a folder of some, is missing."""
    for path in paths:
        if not path.exists():
            raise WSSSError(f"{path}: no such file or folder; expected runs, or a folder of some")
