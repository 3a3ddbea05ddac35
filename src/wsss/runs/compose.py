"""Compose the configuration of a run and check it against the classes that it names."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from wsss.core.schema import plain
from wsss.runs.config import check_config
from wsss.runs.line import compose_line


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose and check a configuration.

    Raises:
        WSSSError: unknown group or key, missing value, wrong type, with the nearest valid key; an
            experiment that only sweeps over others.
    """
    config = compose_line(overrides)
    check_config(config)
    return config


def compose_run(overrides: list[str]) -> dict[str, Any]:
    """Compose the resolved configuration of ``wsss train`` with these overrides."""
    return plain(compose_config(overrides))
