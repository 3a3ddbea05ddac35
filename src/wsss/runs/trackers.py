"""The trackers that ``logger=`` offers, and the packages that they need, without importing them."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from wsss.core.errors import WSSSError

#: choice of ``logger=`` -> the package that is installed for it; its module has the choice's name
PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow-skinny"}


def check_trackers(node: Mapping[str, Any]) -> None:
    """Raise WSSSError where a tracker's package is not installed.

    Args:
        node: the group ``logger`` of a configuration.
    """
    for choice, package in PACKAGES.items():
        spec = find_spec(choice) if node.get(choice) else None
        # without an origin it is a folder of that name, such as W&B leaves where it runs
        if node.get(choice) and (spec is None or spec.origin is None):
            raise WSSSError(
                f"logger={choice} needs the package {package} (pip install {package}), or give "
                "logger=csv"
            )
