"""What a method can be set to: settings that check themselves, and quirks of official codes.

A setting is declared once, as a field of a frozen dataclass: a type with its range, a default, a
line of meaning. YAML, command line and Python are all checked by the same function against the
field's type, so a wrong value is refused with the same words everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

from wsss.core.errors import WSSSError
from wsss.core.ranges import (
    BelowOne,
    Count,
    Finite,
    Fraction,
    NotNegative,
    Number,
    Positive,
    Share,
    Some,
)
from wsss.core.schema import check_fields

__all__ = [
    "BelowOne",
    "Count",
    "Finite",
    "Fraction",
    "NotNegative",
    "Number",
    "Positive",
    "QuirkSwitches",
    "Settings",
    "Share",
    "Some",
    "ThresholdSettings",
    "check_not_longer",
    "check_scales",
]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of a method's settings, a frozen dataclass with keyword-only fields.

    Raises:
        WSSSError: a value that is not of its field's type and range, or two that contradict each
            other (:meth:`check`); it names the key as YAML does, ``method.lr``.
    """

    max_steps: Count  # optimiser steps of the whole run, the length of every schedule

    def __post_init__(self) -> None:
        check_fields(self, "method")
        self.check()

    def check(self) -> None:
        """Raise WSSSError where two fields contradict each other; by default none do."""

    def check_training(self, crop_size: int, patch_size: int) -> None:
        """Raise WSSSError where no run should be trained so, though an old one can be read.

        Args:
            crop_size: side of a training crop in pixels.
            patch_size: side of the encoder's patches, the least that it sees.
        """


def check_not_longer(key: str, length: float, whole_key: str, whole: float) -> None:
    """Raise WSSSError unless a part of a run, such as its warm-up, is as long as the run at most.

    Args:
        key: of the setting that gives the part.
        length: its value.
        whole_key: of the setting that gives the run's length.
        whole: its value.
    """
    if length > whole:
        raise WSSSError(f"{key}={length:g}: longer than the run, {whole_key}={whole:g}")


def check_scales(key: str, scales: Sequence[float], crop_size: int, least: int) -> None:
    """Raise WSSSError where a scale makes a crop smaller than so many pixels."""
    for scale in scales:
        if int(scale * crop_size) < least:
            raise WSSSError(
                f"{key}: scale {scale:g} of a {crop_size} px crop leaves {int(scale * crop_size)} "
                f"px, expected {least} or more"
            )


@dataclass(frozen=True, kw_only=True)
class ThresholdSettings(Settings):
    """Settings of a method whose pseudo labels have an undecided range between two thresholds."""

    high_threshold: Fraction  # a score above it is foreground
    low_threshold: Fraction  # a score up to it is background

    def check(self) -> None:
        """Raise WSSSError unless background ends where foreground begins, or before."""
        low, high = self.low_threshold, self.high_threshold
        if low > high:
            raise WSSSError(f"method: expected low_threshold <= high_threshold, got {low} > {high}")


@dataclass(frozen=True, kw_only=True)
class QuirkSwitches:
    """Base of what an official code does otherwise: one boolean a quirk, all off by default."""

    def __post_init__(self) -> None:
        check_fields(self, "method.quirks")

    @classmethod
    def all_on(cls) -> Self:
        """Every quirk: the numerics of the official code, bugs included."""
        return cls(**{field.name: True for field in fields(cls)})
