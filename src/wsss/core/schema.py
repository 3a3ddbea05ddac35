"""Check the keys and values of a configuration against the constructor that takes them."""

import difflib
import inspect
import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError

from wsss.core.errors import WSSSError

# arguments that the training code passes itself, so a configuration need not
SUPPLIED = {"backbone", "num_classes"}


def targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dictionary with a ``_target_``, with its dotted path."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, f"{path}.{index}")


def check_finite(node: Any, path: str = "") -> None:
    """No setting is infinite or NaN, which every comparison with a bound lets pass."""
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
    try:
        return get_class(name)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise WSSSError(f"{path}._target_={name}: no such class ({reason})") from error


def parameters_of(target: type) -> dict[str, inspect.Parameter]:
    """Parameters of a constructor with resolved annotations."""
    signature = inspect.signature(target)
    constructor: Any = target.__init__  # type: ignore[misc]  # the class itself, not a subclass
    hints = typing.get_type_hints(constructor)
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in signature.parameters.items()
        if name != "self"
    }


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
        raise WSSSError(f"{path}={node!r}: expected a group of keys ({', '.join(parameters)})")
    for key, value in node.items():
        if key in ("_target_", "_partial_", "_convert_", "_recursive_"):
            continue
        if key not in parameters:
            raise WSSSError(f"{prefix}{key}: unknown key{nearest(key, parameters, prefix)}")
        nested = isinstance(value, dict) and ("_target_" in value or not path)
        if not nested:
            check_value(f"{prefix}{key}", value, parameters[key].annotation)
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in {*node, *supplied}:
            raise WSSSError(
                f"{prefix}{key} is missing; give it on the command line: {prefix}{key}=..."
            )


def check_value(path: str, value: Any, annotation: Any) -> None:
    """Raise WSSSError unless a value fits the annotation of its parameter."""
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


def nearest(key: str, valid: Mapping[str, Any] | Sequence[str], prefix: str = "") -> str:
    """Hint at the valid key that is nearest to a wrong one."""
    near = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    return f"; valid: {', '.join(f'{prefix}{name}' for name in valid)}"


def nearest_key(key: str, config: DictConfig) -> str:
    """A hint naming the nearest key at the same depth of a configuration."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig):
        return f"; there is no group {parent}"
    names = [str(other) for other in node if other != "_target_"]
    return nearest(name, names, f"{parent}." if parent else "")
