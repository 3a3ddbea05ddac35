"""Quirks tested one by one: off, on among all, alone, off among all."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from wsss.methods.settings import QuirkSwitches


def ways_of(quirks: type[QuirkSwitches]) -> Callable[[str], Any]:
    """Make ``@each_way(NAME)``: four sets of quirks, and whether the one named shows in them."""

    def each_way(name: str) -> Any:
        others = {field.name: field.name != name for field in fields(quirks)}
        sets = [quirks(), quirks(**others), quirks(**{name: True}), quirks.all_on()]
        values = zip(sets, (False, False, True, True), strict=True)
        ids = ["none", "all_others", "alone", "all"]
        return pytest.mark.parametrize(("quirks", "on"), list(values), ids=ids)

    return each_way
