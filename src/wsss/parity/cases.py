"""What a golden file holds, and what a method says about a kind of them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from wsss.parity.tolerances import Array, Tolerance, default_tolerance

# in files with plain names: how weights are made, and how far mistakes and rounding move a result
NOT_OUTPUTS = (
    "param_names",
    "param_shapes",
    "control_*",
    "*fp32_error",
    "*_fp64_diff",
    "*margin_*",
)

Produced = Mapping[str, Array | Tensor | float | bool | list[str]]


@dataclass(frozen=True)
class Case:
    """The contents of one file.

    Attributes:
        name: File name without suffix.
        inputs: The arrays that go in, ``in_`` removed.
        settings: The ``cfg`` or ``config`` dictionary.
        extra: All other arrays that are not outputs (``param_names`` and the like).
        outputs: The arrays that came out, named as in the file.
    """

    name: str
    inputs: dict[str, Array]
    settings: dict[str, Any]
    extra: dict[str, Array]
    outputs: dict[str, Array]


@dataclass(frozen=True)
class Kind:
    """One kind of case.

    Attributes:
        run: Computes the outputs, named as in the file without ``out_``. Masked entries are not
            compared.
        tolerances: Tolerances by output name where the general rule does not fit; the longest key
            with which the name begins counts.
        inputs: For files with plain names: patterns of the arrays that go in. None: the file marks
            them by ``in_``.
    """

    run: Callable[[Case], Produced]
    tolerances: Mapping[str, Tolerance]
    inputs: tuple[str, ...] | None = None


def tolerance_of(kind: Kind, name: str, expected: Array) -> Tolerance:
    """Give the kind's own tolerance for an output where it has one, else the general rule's."""
    own = [key for key in kind.tolerances if name.startswith(key)]
    return kind.tolerances[max(own, key=len)] if own else default_tolerance(name, expected)


def read_case(path: Path, inputs: tuple[str, ...] | None = None) -> Case:
    """Read a file; ``inputs`` as of :class:`Kind`."""
    case = Case(path.stem, {}, {}, {}, {})
    with np.load(path, allow_pickle=False) as content:
        for key in content.files:
            if key in ("cfg", "config"):
                case.settings.update(json.loads(str(content[key])))
            elif inputs is not None:
                place = case.outputs
                if any(fnmatchcase(key, pattern) for pattern in NOT_OUTPUTS):
                    place = case.extra
                elif any(fnmatchcase(key, pattern) for pattern in inputs):
                    place = case.inputs
                place[key] = content[key]
            elif key.startswith("in_"):
                case.inputs[key.removeprefix("in_")] = content[key]
            elif key.startswith(("out_", "out64_")):
                case.outputs[key] = content[key]
            else:
                case.extra[key] = content[key]
    return case
