"""What a method can be set to: settings that check themselves, and quirks of official codes.

A setting is declared once, as a field of a frozen dataclass: a type with its range, a default, a
line of meaning. YAML, command line and Python are all checked by the same function against the
field's type, so a wrong value is refused with the same words everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from wsss.core.errors import WSSSError
from wsss.core.ranges import (
    BelowOne,
    Count,
    Finite,
    Fraction,
    Layers,
    NotNegative,
    Number,
    Positive,
    Scales,
    Share,
    Side,
    Some,
    Tokens,
    Width,
)
from wsss.core.schema import check_fields, check_names

__all__ = [
    "BelowOne",
    "Count",
    "Finite",
    "Fraction",
    "Layers",
    "NotNegative",
    "Number",
    "Positive",
    "QuirkSwitches",
    "Scales",
    "Settings",
    "Share",
    "Side",
    "Some",
    "ThresholdSettings",
    "Tokens",
    "Width",
    "check_scales",
]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of a method's settings, a frozen dataclass with keyword-only fields.

    Raises:
        WSSSError: a name that is no field, a value that is not of its field's type and range, or
            two that contradict each other (:meth:`check`); it names the key as YAML does,
            ``method.lr``.
    """

    max_steps: Count  # optimiser steps of the whole run, the length of every schedule

    def __new__(cls, **given: Any) -> Self:
        """Refuse names that are no field, before Python does without the nearest one."""
        check_names(cls, given, "method")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_fields(self, "method")
        self.check()

    def check(self) -> None:
        """Raise WSSSError where two fields contradict each other; by default none do."""

    def check_schedule(self) -> None:
        """Raise WSSSError where a warm-up is longer than the run; an old run can still be read."""
        steps = "; set budget.warmup_steps or budget.max_steps"  # which a line has both from
        for part, whole, mend in (
            ("warmup_steps", "max_steps", steps),
            ("warmup_epochs", "epochs", ""),
        ):
            length, most = getattr(self, part, 0), getattr(self, whole, 0)
            if length > most:
                longer = f"method.{part}={length:g}: longer than the run, {whole}={most:g}"
                raise WSSSError(f"{longer}{mend}")

    def check_crop(self, crop_size: int, patch_size: int) -> None:
        """Raise WSSSError where a scale makes a training crop smaller than a patch, in pixels."""
        check_scales("method.scales", getattr(self, "scales", ()), crop_size, patch_size)


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

    def __new__(cls, **given: Any) -> Self:
        """Refuse names that are no field, before Python does without the nearest one."""
        check_names(cls, given, "method.quirks")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_fields(self, "method.quirks")

    @classmethod
    def all_on(cls) -> Self:
        """Give every quirk: the numerics of the official code, bugs included."""
        return cls(**{field.name: True for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class StepQuirks(QuirkSwitches):
    """What every official code does otherwise in a training step."""

    # random numbers of a step are drawn from the process's global generator; here from one of seed,
    # step and place in the global batch
    shared_draws: bool = False
    # a loss that is not finite reaches the weights; here it ends the run
    goes_on_after_nan: bool = False
