"""The group ``callbacks:``: what is checked of each, and which of them change a run.

A callback is Lightning's, or a custom class that the user's own line names by ``_target_``.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from wsss.core.errors import WSSSError
from wsss.core.schema import check_node, parameters_of, target_class
from wsss.evaluation.watched import MONITORED

#: callbacks that only look: with and without them a run is the same
WATCHING = (
    "lightning.pytorch.callbacks.DeviceStatsMonitor",
    "lightning.pytorch.callbacks.LearningRateMonitor",
)
#: kinds of parameters that are no single key
COLLECTING = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def check_callbacks(callbacks: Mapping[str, Any], holdout_per_class: int) -> None:
    """Check keys and values of every callback against its constructor.

    Args:
        callbacks: name -> arguments with ``_target_``.
        holdout_per_class: images a class of the declared holdout.

    Raises:
        WSSSError: an unknown key, a wrong type, or early stopping on anything but the holdout.
    """
    for name, node in callbacks.items():
        path = f"callbacks.{name}"
        if not isinstance(node, Mapping) or "_target_" not in node:
            raise WSSSError(
                f"{path}: expected a class, as callbacks.{name}._target_=package.Class, or a "
                "choice of conf/callbacks, as callbacks=[lr_monitor]"
            )
        target = target_class(node["_target_"], path)
        parameters = parameters_of(target)
        named = {key: one for key, one in parameters.items() if one.kind not in COLLECTING}
        further = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
        if further and not node["_target_"].startswith("lightning."):  # it takes any key
            node = {key: value for key, value in node.items() if key in named}
        check_node(node, named, path, supplied=set())
        if any(is_early_stopping(f"{cls.__module__}.{cls.__name__}") for cls in target.__mro__):
            check_stopping(node, path, holdout_per_class)


def is_early_stopping(name: Any) -> bool:
    """Say whether the dotted name of a class is that of Lightning's early stopping."""
    return str(name).startswith("lightning.") and str(name).endswith(".EarlyStopping")


def check_stopping(node: Mapping[str, Any], path: str, holdout_per_class: int) -> None:
    """Refuse to stop by anything but the declared holdout: other masks are what is reported.

    Args:
        node: the arguments of early stopping.
        path: its dotted key.
        holdout_per_class: images a class of the declared holdout.

    Raises:
        WSSSError: another number, no holdout, or settings under which its numbers mislead.
    """
    monitor = node.get("monitor")
    if monitor not in MONITORED:
        raise WSSSError(
            f"{path}.monitor={monitor}: training is stopped by a number of the declared holdout "
            f"alone, one of {', '.join(MONITORED)}"
        )
    if not holdout_per_class:
        raise WSSSError(
            f"{path}: no holdout is declared that could stop a run; give eval.holdout_per_class=5 "
            "(and eval.holdout_split where the training list has no masks)"
        )
    if node.get("mode") != "max":
        raise WSSSError(f"{path}.mode={node.get('mode')}: these numbers grow; expected max")
    if node.get("check_on_train_epoch_end"):
        raise WSSSError(
            f"{path}.check_on_train_epoch_end=true: the holdout is measured at each validation "
            "(budget.eval_every=); expected false"
        )


def changing(callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """Give those callbacks that make a run another run."""
    return {
        name: node
        for name, node in callbacks.items()
        if not isinstance(node, Mapping) or node.get("_target_") not in WATCHING
    }


def selection(callbacks: Mapping[str, Any]) -> str:
    """Say how a run's weights were chosen, for the card beside its numbers.

    Args:
        callbacks: of its configuration.
    """
    parts = ["last checkpoint"]
    for node in callbacks.values():
        if node.get("monitor") in MONITORED:
            patience = node.get("patience", 3)
            parts.append(f"stopped early on {node['monitor']} (patience {patience})")
        if str(node.get("_target_")).endswith("WeightAveraging"):
            parts.append(f"weights averaged ({node['_target_'].rpartition('.')[2]})")
    return ", ".join(parts)
