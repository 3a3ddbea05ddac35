"""Which classes a configuration may name, and what a stored one is checked for before it is used.

A configuration names classes (``_target_``), and a class is code. On the user's own line any class
may stand that is of the kind its place needs. A checkpoint or a run folder may come from a
stranger: what it names is checked before anything is imported, and nothing in it is interpolated.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import lightning

import wsss
from wsss.core.errors import WSSSError
from wsss.core.places import declared_classes
from wsss.core.schema import targets
from wsss.data.datamodule import ImageDataModule
from wsss.methods.base import WSSSModule
from wsss.models.backbone import Backbone
from wsss.models.conv_backbone import ConvBackbone

#: place of a ``_target_`` -> what its class must be; a training transform is called with ``rng``
PLACES: dict[str, tuple[type, ...]] = {
    "method": (WSSSModule,),
    "backbone": (Backbone, ConvBackbone),
    "data": (ImageDataModule,),
    "data.train_transform": (),
    "trainer": (lightning.Trainer,),
    "callbacks": (lightning.Callback,),
}
#: place -> where a stored configuration may take its class from, beside the names of ``wsss``
HOMES = {"method": "wsss.methods.", "data.train_transform": "wsss.data.views."}
#: Lightning's callbacks that a stored configuration may name: those of conf/callbacks
STORED_CALLBACKS = tuple(
    f"lightning.pytorch.callbacks.{name}"
    for name in ("DeviceStatsMonitor", "EarlyStopping", "EMAWeightAveraging", "LearningRateMonitor")
)
DEEPEST = 20  # groups within groups


def check_place(target: type, name: str, path: str) -> None:
    """Raise WSSSError unless a class is of the kind that its place in a configuration needs.

    Args:
        target: the class.
        name: as the configuration has it.
        path: dotted key of the node that names it.
    """
    kinds = PLACES.get(_place(path))
    if kinds is None:
        raise WSSSError(
            f"{path}._target_={name}: no class belongs there, only to {', '.join(PLACES)}"
        )
    if not (issubclass(target, kinds) if kinds else _takes_draws(target)):
        expected = " or ".join(f"a {kind.__name__}" for kind in kinds)
        raise WSSSError(
            f"{path}._target_={name}: expected {expected or 'a transform, called with (rgb, rng)'}"
        )


def _place(path: str) -> str:
    """Give the place of a node; in a second stage's or a random walk's part it is the same."""
    group, _, name = path.partition(".")
    if group == "callbacks" and name and "." not in name:
        return group
    for part in ("second_stage.", "maps.", "random_walk."):
        path = path.removeprefix(part)
    return path


def _takes_draws(target: type) -> bool:
    """Say whether instances are called with a source of random draws."""
    called = next((vars(c)["__call__"] for c in target.__mro__ if "__call__" in vars(c)), None)
    return callable(called) and "rng" in signature(called).parameters


def trusted_packages(config: Mapping[str, Any]) -> list[str]:
    """Give the packages that stored runs may take classes from, as the user's own line says.

    Args:
        config: composed from that line, never one that a file holds.
    """
    named = (node["_target_"].split(".")[0] for _, node in targets(dict(config)))
    return [*config.get("trust", ()), *named]


def check_stored(config: Any, origin: str, trusted: Sequence[str] = ()) -> dict[str, Any]:
    """Give a stored configuration back if it may be used; nothing of it is imported before.

    Args:
        config: what a file holds.
        origin: the file, for the error.
        trusted: packages whose classes the user lets it name.

    Raises:
        WSSSError: it is no configuration, refers to values elsewhere, or names a class that is
            neither of this package, nor declared by an installed one, nor trusted.
    """
    if not isinstance(config, Mapping):
        raise WSSSError(f"{origin}: its configuration is no group of keys")
    for path, value in _leaves(config, origin):
        if isinstance(value, str) and "${" in value:
            raise WSSSError(
                f"{origin}: its {path} refers to a value elsewhere ({value[:60]!r}), which no "
                "resolved configuration does; the file was altered"
            )
    for path, node in targets(config):
        _check_target(node["_target_"], path, origin, trusted)
    return dict(config)


def _leaves(node: Any, origin: str, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Walk to every value; refuse Hydra's own keys but ``_target_``, and groups without end."""
    if depth > DEEPEST:
        raise WSSSError(f"{origin}: its {path[:60]} lies in more than {DEEPEST} groups")
    if isinstance(node, Mapping):
        for key, value in node.items():
            inner = f"{path}.{key}".lstrip(".")
            if not isinstance(key, str) or (key.startswith("_") and key != "_target_"):
                raise WSSSError(f"{origin}: its configuration has the key {inner[:60]!r}")
            yield inner, key
            yield from _leaves(value, origin, inner, depth + 1)
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _leaves(value, origin, f"{path}.{index}", depth + 1)
    elif node is None or isinstance(node, str | int | float):
        yield path, node
    else:  # a tensor, a set: a checkpoint can hold them
        raise WSSSError(
            f"{origin}: its {path[:60]} is a {type(node).__name__}, which is no value of a "
            "configuration; the file was altered"
        )


def _check_target(name: Any, path: str, origin: str, trusted: Sequence[str]) -> None:
    """Refuse a class by its name, or by what our own module holds under it."""
    place = _place(path)
    wrong = f"{origin}: its {path}._target_ is {str(name)[:80]!r}"
    if not isinstance(name, str) or place not in PLACES:
        raise WSSSError(f"{wrong}; no class belongs there")
    module, _, title = name.rpartition(".")
    if place == "trainer" and name == "lightning.Trainer":
        return
    if place == "callbacks" and name in STORED_CALLBACKS:
        return
    if module == "wsss" and title in wsss.__all__:
        return
    if module.startswith(HOMES.get(place, "\0")):
        try:
            found = vars(importlib.import_module(module)).get(title)
        except ImportError:
            found = None
        if isinstance(found, type) and found.__module__.startswith(HOMES[place]):
            return
        raise WSSSError(f"{wrong}; there is no such class")
    declared = {point.value.replace(":", ".") for point in declared_classes()}
    if name in declared or name.split(".")[0] in trusted:
        return
    raise WSSSError(
        f"{wrong}, which is not of wsss; if you trust that package's code, say so: "
        f"trust=[{name.split('.')[0]}]"
    )
