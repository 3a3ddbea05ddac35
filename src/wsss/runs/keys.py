"""Check the keys and values of a composed configuration without importing what it names.

What a class takes is read from its source (:mod:`wsss.core.declarations`), so that a mistyped key
is refused before torch is imported. :func:`wsss.runs.config.check_config` imports the classes and
checks the rest: their kind, and settings that contradict each other.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wsss.core.arguments import read_override
from wsss.core.declarations import declared
from wsss.core.errors import WSSSError
from wsss.core.failures import one_line
from wsss.core.schema import (
    SUPPLIED,
    check_finite,
    check_node,
    nearest_key,
    parameters_of,
    targets,
)

#: the composed configuration itself
TOP = "wsss.runs.config.TrainConfig"
#: group without a target -> the dataclass that takes it
GROUPS = {
    "budget": "wsss.runs.config.Budget",
    "eval": "wsss.evaluation.protocol.Protocol",
    "logger": "wsss.runs.config.LoggerConfig",
}
#: group -> a further dataclass with some of its keys, whose ranges are narrower
FURTHER = {"trainer": "wsss.runs.config.TrainerSettings"}


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
    nodes = {"": content, "budget": content.get("budget")}
    # the method first: data and eval refer to its settings
    nodes |= dict(sorted(targets(content), key=lambda item: item[0] != "method"))
    nodes |= {path: content.get(path) for path in ("eval", "logger")}
    for path, node in nodes.items():
        parameters: dict[str, inspect.Parameter] = {}
        for one in declarations(path, node or {}):
            parameters |= parameters_of(one)
        if parameters:
            check_node(node, parameters, path, supplied=SUPPLIED if path else set())


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
