"""``search.json``: the whole record of a search for settings, checked when it is read back."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Le, MaxLen
from pydantic import Field, model_validator

from wsss.core.errors import WSSSError
from wsss.core.files import read_json, write_atomically
from wsss.core.records import Record, check_record

SEARCH_FILE = "search.json"
OVERLAY_FILE = "chosen.yaml"  # beside it, once the search is finished
SEARCHES = "searches"  # folder below runs_dir that holds searches
VERSION = 1

Text = Annotated[str, MaxLen(2000)]
Size = Annotated[int, Ge(0), Le(2**53)]
Figure = Annotated[float, Ge(-1e18), Le(1e18)]
Setting = bool | int | float | Text | None


class Range(Record):
    """A key's values: a range, whole numbers of it, or a choice among some."""

    low: Figure | None = None
    high: Figure | None = None
    log: bool = False
    whole: bool = False
    choices: Annotated[list[Setting], MaxLen(100)] | None = None

    def contains(self, value: object) -> bool:
        """Say whether a value is one of these; of a range that it is a number between its ends.

        Of whole numbers it is one.
        """
        if self.choices is not None:
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        assert self.low is not None
        assert self.high is not None
        return self.low <= value <= self.high and not (self.whole and value % 1)

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        ranged = self.low is not None and self.high is not None
        if ranged == (self.choices is not None) or (self.choices is not None and not self.choices):
            raise ValueError("expected low and high, or choices")
        given = self.choices or []
        if len({*given}) < len(given):  # to Optuna 1, 1.0 and true are one
            raise ValueError("a choice is given twice")
        if any(isinstance(choice, float) and not math.isfinite(choice) for choice in given):
            raise ValueError("a choice is not finite")
        if self.low is not None and self.high is not None:
            if not self.low < self.high:
                raise ValueError(f"low={self.low} is not below high={self.high}")
            if self.log and self.low <= 0:
                raise ValueError(f"low={self.low} on a log scale")
            if self.whole and not (self.low.is_integer() and self.high.is_integer()):
                raise ValueError(f"{self.low} to {self.high} are no ends of whole numbers")
        return self


class Trial(Record):
    """One setting that was tried."""

    number: Size
    state: Literal["finished", "failed"]
    by: Literal["overlay", "random", "TPE"]
    settings: dict[str, Setting]
    value: Annotated[float, Ge(-1e18), Le(1e18)] | None = None
    seconds: Figure | None = None
    commit: Text | None = None
    run: Text | None = None
    error: Text | None = None

    @model_validator(mode="after")
    def _with_its_value(self) -> Self:
        if (self.state == "finished") != (self.value is not None):
            raise ValueError("a finished trial has a value, a failed one none")
        return self


class Search(Record):
    """The whole file."""

    version: Literal[1] = Field(alias="schema")
    status: Literal["running", "finished"]
    method: Text
    data: Text
    study: Text
    objective: Text
    split: Text
    masks: Size
    masks_trained_on: Size | None = None
    list_sha256: Text
    steps: Size
    planned: Size
    startup: Size
    seed: Size
    searcher: Text
    overrides: Annotated[list[Text], MaxLen(1000)]
    space: Annotated[dict[str, Range], MaxLen(100)]
    trials: Annotated[list[Trial], MaxLen(10_000)]  # a bootstrap holds 2000 times as many numbers
    best: Size | None = None
    choice: Text | None = None

    @model_validator(mode="after")
    def _of_one_search(self) -> Self:
        for trial in self.trials:
            if trial.settings.keys() != self.space.keys():
                raise ValueError(f"trial {trial.number} has other keys than the space")
            for key, value in trial.settings.items():
                if not self.space[key].contains(value):
                    said = f"{key}={value} of trial {trial.number}"
                    raise ValueError(f"{said} is outside of its range")
        values = {t.number: t.value for t in self.trials if t.value is not None}
        if len({t.number for t in self.trials}) < len(self.trials):
            raise ValueError("a trial is there twice")
        if self.best != best_of(values):
            raise ValueError(f"best={self.best}, but trial {best_of(values)} has the best value")
        return self

    @property
    def values(self) -> list[float]:
        """Values of the finished trials, in their order."""
        return [trial.value for trial in self.trials if trial.value is not None]

    @property
    def best_trial(self) -> Trial | None:
        """The finished trial of the highest value."""
        return next((trial for trial in self.trials if trial.number == self.best), None)


def best_of(values: Mapping[int, float]) -> int | None:
    """Give the number of the trial with the highest value, of equal ones the first."""
    return min(values, key=lambda number: (-values[number], number), default=None)


def write_search(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the record; a reader sees the old file or the new one."""
    text = json.dumps({"schema": VERSION, **content}, indent=2, allow_nan=False)
    write_atomically(folder / SEARCH_FILE, f"{text}\n".encode())


def read_search(folder: Path) -> Search:
    """Read a record.

    Raises:
        WSSSError: it is missing, damaged, or holds something else.
    """
    path = folder / SEARCH_FILE
    if not path.is_file():
        raise WSSSError(f"{folder}: no {SEARCH_FILE} there; give a folder that `wsss tune` wrote")
    mend = "repeat the `wsss tune` that wrote it, or copy it again"
    content = read_json(path, mend)
    check_record(Search, content, str(path), mend)
    return Search.model_validate(content)
