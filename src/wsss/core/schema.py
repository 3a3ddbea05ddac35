"""Check the keys and values of a configuration against the constructor that takes them."""

import difflib
import functools
import inspect
import logging
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from wsss.core.errors import WSSSError
from wsss.core.failures import one_line

# arguments that the training code passes itself, so a configuration need not
SUPPLIED = {"backbone", "num_classes"}
# get_class also logs what it raises, which would be a second line beside ours
logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)
LONGEST_VALUE = 300  # characters of a value in an error
# kinds of pydantic's errors that say a number is out of its range
RANGES = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


class MissingKeyError(WSSSError):
    """A configuration lacks a key."""

    @property
    def key(self) -> str:
        """The dotted key."""
        return str(self).partition(" ")[0]


def plain(config: DictConfig) -> dict[str, Any]:
    """Give the resolved configuration as plain dictionaries, lists and numbers.

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


def targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Find every dictionary with a ``_target_``, with its dotted path."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, f"{path}.{index}")


def check_finite(node: Any, path: str = "") -> None:
    """Raise WSSSError where a setting is infinite or NaN, which a comparison lets pass."""
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list):
        children = enumerate(node)
    elif isinstance(node, float) and not math.isfinite(node):
        raise WSSSError(f"{path}={node}: expected a finite number")
    for key, value in children:
        check_finite(value, f"{path}.{key}" if path else str(key))


def target_class(name: str, path: str) -> type:
    """Import the class that a node names.

    Raises:
        WSSSError: there is no such class.
    """
    if not isinstance(name, str):
        raise WSSSError(f"{path}._target_={name!r}: expected the dotted name of a class")
    try:
        return get_class(name)
    except (ImportError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise WSSSError(f"{path}._target_={one_line(name)}: no such class ({reason})") from error


def parameters_of(target: type) -> dict[str, inspect.Parameter]:
    """Give the parameters of a constructor with resolved annotations, ranges kept.

    A method takes its settings as one dataclass and its quirks as another. In a configuration the
    fields of ``settings`` stand beside the other keys, and quirks are ``official_compat`` (all of
    them) and ``quirks`` (single ones by name).
    """
    constructor: Any = target.__init__  # type: ignore[misc]  # the class itself, not a subclass
    # of a dataclass the fields, also where it has a __new__ that takes whatever is given
    signature = inspect.signature(constructor if is_dataclass(target) else target)
    hints = typing.get_type_hints(constructor, include_extras=True)
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in signature.parameters.items():
        if name == "self":
            continue
        annotation = hints.get(name, Any)
        if name == "settings" and is_dataclass(annotation):
            parameters |= parameters_of(annotation)  # type: ignore[arg-type]
        elif name == "quirks" and is_dataclass(annotation):
            parameters["official_compat"] = _optional("official_compat", bool, False)
            parameters["quirks"] = _optional("quirks", annotation, None)
        else:
            parameters[name] = parameter.replace(annotation=annotation)
    return parameters


def _optional(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def arguments_of(target: type, node: Mapping[str, Any]) -> dict[str, Any]:
    """Make the arguments of a constructor from the keys of a node; see :func:`parameters_of`.

    Raises:
        WSSSError: settings that contradict each other.
    """
    hints = typing.get_type_hints(target.__init__)  # type: ignore[misc]
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    settings, quirks = hints.get("settings"), hints.get("quirks")
    if is_dataclass(settings):
        names = {field.name for field in fields(settings)} & arguments.keys()
        arguments["settings"] = settings(**{key: arguments.pop(key) for key in names})  # type: ignore[operator]
    if is_dataclass(quirks):
        every = arguments.pop("official_compat", False)
        single = arguments.pop("quirks", None) or {}
        switches = {field.name: every for field in fields(quirks)} | single
        arguments["quirks"] = quirks(**switches)  # type: ignore[operator]
    return arguments


def check_node(
    node: Any, parameters: Mapping[str, inspect.Parameter], path: str, supplied: set[str]
) -> None:
    """Raise WSSSError unless a node has the keys and types of a constructor's parameters.

    Args:
        node: a group of the configuration.
        parameters: of the constructor that takes it.
        path: its dotted key, for the error.
        supplied: parameters that the code passes itself.
    """
    prefix = f"{path}." if path else ""
    if not isinstance(node, dict):
        said = one_line(repr(node), LONGEST_VALUE)
        raise WSSSError(f"{path}={said}: expected a group of keys ({', '.join(parameters)})")
    known = {name: one for name, one in parameters.items() if name not in supplied}
    for key, value in node.items():
        if key == "_target_":
            continue
        if key not in known:
            raise WSSSError(f"{prefix}{key}: unknown key{nearest(key, known, prefix)}")
        annotation = parameters[key].annotation
        nested = isinstance(value, dict) and ("_target_" in value or is_dataclass(annotation))
        if is_dataclass(annotation) and path:
            inner = parameters_of(annotation)  # type: ignore[arg-type]
            check_node({} if value is None else value, inner, f"{prefix}{key}", supplied=set())
        elif not nested:
            check_value(f"{prefix}{key}", value, annotation)
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in {*node, *supplied}:
            raise MissingKeyError(
                f"{prefix}{key} is missing; give it on the command line: {prefix}{key}=..."
            )


def check_value(path: str, value: Any, annotation: Any) -> Any:
    """Give a value as its annotation has it: a list as a tuple, 1 as 1.0.

    Args:
        path: dotted key, for the error.
        value: to check.
        annotation: a type; ``typing.Annotated`` ones have a range.

    Raises:
        WSSSError: the value is of another type, or out of range.
    """
    if annotation in (Any, inspect.Parameter.empty):
        return value
    kinds, said = _kinds(annotation), one_line(repr(value), LONGEST_VALUE)
    # pydantic would read "1" as a number, true as 1 and 1 as true
    if (
        (isinstance(value, str) and kinds <= {int, float, bool, type(None)})
        or (isinstance(value, bool) and not kinds & {bool, str} and kinds & {int, float})
        or (kinds == {bool} and not isinstance(value, bool))
    ):
        names = sorted(kind.__name__ for kind in kinds if kind is not type(None))
        raise WSSSError(f"{path}={said}: expected {' or '.join(names)}")
    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError as error:
        raise WSSSError(f"{path}={said}: expected {_expected(annotation, error)}") from error


def check_fields(instance: Any, path: str) -> None:
    """Check every field of a dataclass, and store it as its type has it: a list as a tuple.

    Args:
        instance: of a dataclass, frozen or not, that is being made.
        path: dotted key of the group that describes it, for the error.

    Raises:
        WSSSError: a value is of another type than its field, or out of range.
    """
    hints = typing.get_type_hints(type(instance), include_extras=True)
    for field in fields(instance):
        key = f"{path}.{field.name}"
        value = check_value(key, getattr(instance, field.name), hints[field.name])
        object.__setattr__(instance, field.name, value)


def _kinds(annotation: Any) -> set[Any]:
    """Give the types of a union, without their ranges."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_kinds(one) for one in typing.get_args(annotation)))
    return {annotation}


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(annotation, config={"arbitrary_types_allowed": True})
    except Exception:  # a class with its own config, or an annotation pydantic cannot model
        return TypeAdapter(annotation)


def _expected(annotation: Any, error: ValidationError) -> str:
    """Say what a value should have been."""
    first = error.errors()[0]
    reason = first["msg"][:1].lower() + first["msg"][1:]
    null = ", or null" if type(None) in _kinds(annotation) else ""
    if first["type"] == "one_of":
        return f"{reason}{null}"
    if first["type"] in RANGES:
        return f"{reason.replace('input should be', 'a number').replace('a number a', 'a')}{null}"
    if first["type"] == "too_short":
        return f"{_named(annotation)}, at least {first['ctx']['min_length']} of them"
    if first["type"] == "too_long":
        return f"{_named(annotation)}, at most {first['ctx']['max_length']} of them"
    return f"{_named(annotation)} ({reason})"


def _named(annotation: Any) -> str:
    """Name a type in words: ``a list of float``, ``'lattice' or 'gaussian'``, ``int or null``."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _named(inner[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_named(one) for one in inner)
    if origin is typing.Literal:
        return " or ".join(map(repr, inner))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        same = len({one for one in inner if one is not Ellipsis}) == 1
        count = f"{len(inner)} " if origin is tuple and Ellipsis not in inner else ""
        return f"a list of {count}{_named(inner[0]) if same else 'values'}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a group of keys"
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def type_in_words(annotation: Any) -> str:
    """Name a type with its range: ``float > 0``, ``int >= 1 and <= 1000 or null``."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_in_words(one) for one in inner)
    if origin is typing.Annotated:
        limits = [
            f"{sign} {getattr(one, name)}"
            for one in annotation.__metadata__
            for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
            if hasattr(one, name)
        ]
        return f"{type_in_words(inner[0])} {' and '.join(limits)}".strip()
    if annotation is Any:
        return "any"
    return _named(annotation)


def check_names(cls: type, given: Iterable[str], path: str) -> None:
    """Raise WSSSError where an argument is no field of a dataclass, with the nearest one.

    Args:
        cls: the dataclass.
        given: names of arguments.
        path: dotted key of the group that describes it, for the error.
    """
    names = [field.name for field in fields(cls)]
    for name in given:
        if name not in names:
            raise WSSSError(f"{path}.{name}: unknown key{nearest(name, names, f'{path}.')}")


def nearest(key: str, valid: Mapping[str, Any] | Sequence[str], prefix: str = "") -> str:
    """Hint at the valid key that is nearest to a wrong one."""
    near = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    return f"; valid: {', '.join(f'{prefix}{name}' for name in valid)}"


def nearest_key(key: str, config: DictConfig) -> str:
    """Hint at the key of a configuration that is nearest at the same depth."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig):
        return f"; there is no group {one_line(parent)}"
    names = [str(other) for other in node if other != "_target_"]
    return nearest(name, names, f"{parent}." if parent else "")
