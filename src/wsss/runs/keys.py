"""Check the keys and values of a composed configuration without importing what it names.

What a class takes is read from its source (:mod:`wsss.core.declarations`), so that a mistyped key
is refused before torch is imported. :func:`wsss.runs.config.check_config` imports the classes and
checks the rest: their kind, and settings that contradict each other.
"""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wsss.core.arguments import read_override
from wsss.core.declarations import absent, declared, meanings
from wsss.core.errors import WSSSError
from wsss.core.failures import one_line
from wsss.core.schema import (
    SUPPLIED,
    check_finite,
    check_node,
    nearest_key,
    parameters_of,
    targets,
    type_in_words,
)
from wsss.runs.callback_settings import check_stopping, is_early_stopping
from wsss.runs.trainer_settings import GIVEN_BY_RUN, check_trainer

#: the composed configuration itself
TOP = "wsss.runs.config.TrainConfig"
#: characters of a line of meaning from which only its first sentence is shown
LONGEST_MEANING = 150
#: group without a target -> the dataclass that takes it
GROUPS = {
    "budget": "wsss.runs.config.Budget",
    "eval": "wsss.evaluation.protocol.Protocol",
    "logger": "wsss.runs.config.LoggerConfig",
    "maps": "wsss.runs.config.MapsConfig",
}
#: place of a class -> where ours of that kind lie
HOMES = {
    "method": ("wsss.methods.",),
    "backbone": ("wsss.Backbone", "wsss.ConvBackbone"),
    "data": ("wsss.VOCDataModule", "wsss.TableDataModule"),
    "data.train_transform": ("wsss.data.views.",),
    "trainer": ("lightning.Trainer",),
}
#: group -> a further dataclass with some of its keys, whose ranges are narrower
FURTHER = {"trainer": "wsss.runs.trainer_settings.TrainerSettings"}


def declarations(path: str, node: Mapping[str, Any]) -> list[type]:
    """Give the dataclasses that say what a group may hold; none where no source can be read.

    Args:
        path: dotted key of the group, empty for the whole configuration.
        node: the group.
    """
    target = node.get("_target_") if isinstance(node, Mapping) else None
    name = target or GROUPS.get(path, TOP if not path else None)
    found = [declared(one) for one in (name, FURTHER.get(path)) if isinstance(one, str)]
    return [] if None in found else [one for one in found if one is not None]


def check_keys(content: Mapping[str, Any]) -> None:
    """Check every key and value of a resolved configuration against the sources.

    Raises:
        WSSSError: one line naming the key, and the nearest valid one or the expected type.
    """
    check_finite(content.get("method"), "method")  # what others refer to, first
    check_finite(content)
    for path, node in targets(content):
        name = node["_target_"]
        if isinstance(name, str) and (reason := absent(name)):
            raise WSSSError(f"{path}._target_={one_line(name)}: no such class ({reason})")
    for path, node in _nodes(content).items():
        if not _at_home(path, node, content):
            continue
        parameters: dict[str, inspect.Parameter] = {}
        for one in declarations(path, node or {}):
            parameters |= parameters_of(one)
        if path == "trainer":  # an argument that a run gives itself is no proposal
            check_trainer(node)
            parameters = {key: one for key, one in parameters.items() if key not in GIVEN_BY_RUN}
        if parameters:
            check_node(node, parameters, path, supplied=SUPPLIED if path else set())
    for name, node in (content.get("callbacks") or {}).items():
        if isinstance(node, dict) and is_early_stopping(node.get("_target_")):
            holdout = content["eval"].get("holdout_per_class", 0)
            check_stopping(node, f"callbacks.{name}", holdout)


def _at_home(path: str, node: Any, content: Mapping[str, Any]) -> bool:
    """Say whether the classes of a group are of their place, as far as their names tell.

    Where they are not, importing them says of which kind they should be.
    """
    inside = [place for place, _ in targets(content) if place.startswith(f"{path}.")]
    if path in ("eval", "logger", "budget") and inside:
        return False
    if not isinstance(node, dict) or "_target_" not in node:
        return True
    if path.startswith("callbacks."):
        return True
    home = HOMES.get(path.removeprefix("second_stage."))
    package = str(node["_target_"]).split(".")[0]
    if package not in ("wsss", "lightning") and package not in sys.stdlib_module_names:
        return home is not None
    return home is not None and str(node["_target_"]).startswith(home)


def with_overrides(config: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    """Lay ``key=value`` changes over a stored configuration.

    Raises:
        WSSSError: a key that it does not have, a value that cannot be read.
    """
    node: Any = OmegaConf.create(dict(config))
    OmegaConf.set_struct(node, True)
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise WSSSError(f"{one_line(override, 200)!r}: expected KEY=VALUE")
        if OmegaConf.select(node, key, default=_ABSENT) is _ABSENT:
            raise WSSSError(f"{one_line(key, 200)}: unknown key{nearest_key(key, node)}")
        try:
            node = OmegaConf.merge(node, read_override(override))
        except OmegaConfBaseException as error:
            raise WSSSError(
                f"{one_line(override, 200)}: expected what is there now, a list or a group of keys"
            ) from error
    changed: DictConfig = node
    return changed


_ABSENT = object()


@dataclass(frozen=True)
class Key:
    """One key that may stand on a line.

    Attributes:
        name: dotted; with a ``+`` where the line needs it, since the composed configuration does
            not have the key yet.
        type: in words, with its range.
        value: what it is unless the line says otherwise.
        meaning: one line.
    """

    name: str
    type: str
    value: str
    meaning: str


#: what the keys stand for that a method has beside its settings
OF_METHODS = {
    "official_compat": "do as the official code does in every point, bugs included",
    "quirks": "single points in which to do as the official code does",
}


def keys_of_run(content: Mapping[str, Any]) -> list[Key]:
    """List the keys of a composed configuration, group by group; missing values are ``???``."""
    keys: list[Key] = []
    for path, node in _nodes(content).items():
        found: dict[str, Key] = {}
        for cls in declarations(path, node):
            found |= {key.name: key for key in keys_of_class(cls, path, node)}
        keys += found.values()
    return keys


def keys_of_class(cls: type, path: str = "", node: Mapping[str, Any] | None = None) -> list[Key]:
    """List what a class that :func:`wsss.core.declarations.declared` has read takes.

    Args:
        cls: it.
        path: dotted key of the group that it takes; empty for the whole configuration.
        node: that group as it is composed; None: every key has its default.
    """
    fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
    said = meanings(cls)
    for name in ("settings", "quirks"):
        if name in fields and is_dataclass(fields[name].type):
            said |= meanings(fields[name].type)
    if "quirks" in fields:
        said |= OF_METHODS
    keys: list[Key] = []
    for name, parameter in parameters_of(cls).items():
        composed = node is None or name in node
        dotted = f"{path}.{name}" if path else name
        value = parameter.default if node is None or name not in node else node[name]
        if name in SUPPLIED or (path == "trainer" and name in GIVEN_BY_RUN):
            continue  # given by the run
        if _has_rows(dotted, value, parameter.annotation):
            continue
        if name == "quirks":
            keys += [
                Key(f"+{dotted}.{one}", "bool", "as official_compat", _without_markup(meaning))
                for one, meaning in meanings(parameter.annotation).items()
            ]
            continue
        keys.append(
            Key(
                dotted if composed or path == "trainer" else f"+{dotted}",
                type_in_words(parameter.annotation),
                _shown(value),
                _brief(_without_markup(said.get(name, ""))),
            )
        )
    return keys


def _has_rows(path: str, value: Any, annotation: Any) -> bool:
    """Say whether a value is a group whose keys are listed themselves."""
    if not isinstance(value, Mapping):
        return False
    return path in GROUPS or any(targets(value)) or not _is_leaf(annotation)


def _is_leaf(annotation: Any) -> bool:
    """Say whether a group is one value, such as the overrides of an encoder."""
    return "Mapping[str, typing.Any] | None" in str(annotation) and "second" not in str(annotation)


def _nodes(content: Mapping[str, Any]) -> dict[str, Any]:
    """Give every group of a configuration by its dotted key, in the order to check them."""
    nodes = {"": content, "budget": content.get("budget")}
    # the method first: data and eval refer to its settings
    nodes |= dict(sorted(targets(content), key=lambda item: item[0] != "method"))
    maps = ("maps",) if content.get("maps") else ()
    return nodes | {path: content.get(path) for path in ("eval", "logger", *maps)}


def _without_markup(text: str) -> str:
    """Give a docstring's text as a terminal shows it."""
    return re.sub(r"(:\w+:)?`+([^`]*)`+", r"\2", text).rstrip(".")


def _brief(text: str) -> str:
    """Shorten a text that takes several lines of a terminal to its first sentence."""
    first = re.match(r".*?\w{2,}[)\"']*(?=\.\s+[A-Z])", text)
    return first[0] if first and len(text) > LONGEST_MEANING else text


def _shown(value: Any) -> str:
    """Write a default as the command line takes it."""
    if value is inspect.Parameter.empty or value == "???":
        return "(to be given)"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_shown, value))}]"
    if type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return "[]"
    return str(value)
