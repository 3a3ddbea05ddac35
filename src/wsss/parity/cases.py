"""What a golden file holds, and what a method says about a kind of them."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from wsss.parity.tolerances import Array, Tolerance, default_tolerance, rounding_error, widened

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


class AbsentError(Exception):
    """The file has no array or setting of this name."""


class Parts(dict[str, Any]):
    """Arrays or settings of a file; the name of one that it has not is an :class:`AbsentError`.

    Args:
        prefix: what the file puts before the names.
    """

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix

    def __missing__(self, key: str) -> Any:
        """Name the missing one as the file would."""
        raise AbsentError(self.prefix + key)


class Found(dict[str, Any]):
    """What the product gives for a case, and which parts of the file were missing for the rest.

    Attributes:
        absent: names of the missing parts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.absent: list[str] = []

    @contextmanager
    def given(self) -> Iterator[None]:
        """Leave out what this block computes where the file lacks something that it needs."""
        try:
            yield
        except AbsentError as error:
            self.absent.append(str(error))


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

    def suffixes(self, before: str, *results: str) -> list[str]:
        """List what follows the given beginnings in the names of inputs and of outputs.

        An output without its input is then noticed as such.

        Args:
            before: beginning of the inputs' names.
            results: beginnings of the outputs' names, ``out_`` removed; none is the beginning of
                another.
        """
        found = [n.removeprefix(before) for n in self.inputs if n.startswith(before)]
        for name in self.outputs:
            plain = name.removeprefix("out_").removeprefix("out64_")
            found += [plain.removeprefix(stem) for stem in results if plain.startswith(stem)]
        return list(dict.fromkeys(found))


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


def allowed_for(kind: Kind, case: Case, key: str, expected: Array) -> Tolerance:
    """Give the tolerance of :func:`tolerance_of`, widened to the case's own rounding error.

    Args:
        kind: of the case.
        case: may hold the output of a float32 run beside that of a float64 run.
        key: name of the output in the file.
        expected: its values.
    """
    if kind.inputs is None:
        stated = key.partition("_")[2]
        pair = f"out_{stated}", f"out64_{stated}"
    else:
        stated = key
        pair = key.removesuffix("_fp64"), f"{key.removesuffix('_fp64')}_fp64"
    single, double = (case.outputs.get(name) for name in pair)
    error = 0.0 if single is None or double is None else rounding_error(single, double)
    return widened(tolerance_of(kind, stated, expected), expected, error)


def read_case(path: Path, inputs: tuple[str, ...] | None = None) -> Case:
    """Read a file; ``inputs`` as of :class:`Kind`."""
    named = Parts("in_" if inputs is None else "")
    case = Case(path.stem, named, Parts("setting "), Parts(), Parts())
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
