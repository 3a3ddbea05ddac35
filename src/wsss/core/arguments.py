"""``KEY=VALUE`` arguments of the verbs that are not composed by Hydra."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wsss.core.errors import WSSSError
from wsss.core.failures import one_line
from wsss.core.schema import check_value, nearest_key

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
    for argument in settings:
        key = argument.partition("=")[0]
        if key not in {field.name for field in fields(schema)}:  # type: ignore[arg-type]
            raise WSSSError(f"{one_line(key, 200)}: unknown key{nearest_key(key, merged)}")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([argument]))
        except OmegaConfBaseException as error:
            kind = get_type_hints(schema)[key]
            expected = getattr(kind, "__name__", str(kind))
            raise WSSSError(
                f"{one_line(argument, 200)}: expected {expected}, lists as {key}=[a,b]"
            ) from error
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise WSSSError(f"{missing[0]} is missing; give it on the command line: {missing[0]}=...")
    chosen: Any = OmegaConf.to_object(merged)
    for name, kind in get_type_hints(schema, include_extras=True).items():
        check_value(name, getattr(chosen, name), kind)
    return chosen, others


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
