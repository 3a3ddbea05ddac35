"""Text features in a file, so that training needs no text encoder (weclip.md section 2).

``.npz`` holds arrays alone; ``.safetensors`` holds the numbers as tensors, and the strings in its
metadata, lists as JSON. ``docs/clip.md`` describes the format, ``wsss text`` writes it.
"""

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from wsss.core.arrays import at_most, read_npz
from wsss.core.errors import WSSSError
from wsss.core.failures import one_line
from wsss.core.files import first_line, write_atomically

FORMAT = "wsss-clip-text-1"
LARGEST = 2**26  # bytes of one array, and of a whole .safetensors file
MEND = "make it anew with `wsss text`"
ROUNDING = 1e-3  # by which the length of a row may differ from 1
NUMBERS = ("foreground", "background", "logit_scale")
NAMES = ("foreground_names", "foreground_prompts", "background_prompts")
WORDS = ("format", "model", "weights_sha256")


@dataclass(frozen=True)
class TextFeatures:
    """Features of the texts that a CLIP compares images with.

    Attributes:
        foreground: of the classes, unit rows, (K, E) float32.
        background: of what surrounds them, unit rows, (G, E) float32.
        foreground_names: the data set's K class names, in its order.
        foreground_prompts: what was said of each class.
        background_prompts: what was said of each background.
        logit_scale: factor on cosines before the softmax, exponentiated already.
        model: the CLIP that made them.
        weights_sha256: ``WeightsInfo.state_sha256`` of its image tower.
        format: name and version of this format.
    """

    foreground: NDArray[np.float32]
    background: NDArray[np.float32]
    foreground_names: tuple[str, ...]
    foreground_prompts: tuple[str, ...]
    background_prompts: tuple[str, ...]
    logit_scale: float
    model: str
    weights_sha256: str
    format: str = FORMAT

    @property
    def width(self) -> int:
        """E, the width of the space that texts and images share."""
        return int(self.foreground.shape[1])

    def faults(self) -> str:
        """Say what is wrong with the numbers and the names; empty where nothing is."""
        if self.format != FORMAT:
            return f"its format is {one_line(self.format, 60)!r}, expected {FORMAT!r}"
        for kind in ("foreground", "background"):
            rows = getattr(self, kind)
            if rows.ndim != 2 or rows.dtype != np.float32 or not rows.size:
                return f"{kind} is {rows.dtype} {rows.shape}, expected float32 rows of features"
        if self.background.shape[1] != self.width:
            return f"foreground is {self.width} wide and background {self.background.shape[1]}"
        for kind, rows in (("foreground", self.foreground), ("background", self.background)):
            prompts = getattr(self, f"{kind}_prompts")
            if len(prompts) != len(rows):
                return f"{kind} has {len(rows)} rows and {len(prompts)} prompts"
            lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
            wrong = np.flatnonzero(~(np.abs(lengths - 1) <= ROUNDING))  # NaN too
            if len(wrong):
                said = one_line(prompts[wrong[0]], 60)
                return f"the {kind} row of {said!r} has length {lengths[wrong[0]]:.4g}, expected 1"
        if len(self.foreground_names) != len(self.foreground):
            number = len(self.foreground_names)
            return f"foreground has {len(self.foreground)} rows and {number} names"
        if not (math.isfinite(self.logit_scale) and self.logit_scale > 0):
            return f"logit_scale is {self.logit_scale}, expected a positive number"
        if not re.fullmatch("[0-9a-f]{64}", self.weights_sha256):
            return f"weights_sha256 is {one_line(self.weights_sha256, 80)!r}, expected a SHA-256"
        return ""

    def check_classes(self, class_names: Sequence[str], origin: str) -> None:
        """Raise WSSSError unless the classes are a data set's, in its order.

        Args:
            class_names: the data set's.
            origin: the file, for the error.
        """
        ours = self.foreground_names
        if len(ours) != len(class_names):
            raise WSSSError(
                f"{origin}: has texts of {len(ours)} classes, and the data {len(class_names)}; "
                f"{MEND}"
            )
        for index, (its, wanted) in enumerate(zip(ours, class_names, strict=True)):
            if its != wanted:
                raise WSSSError(
                    f"{origin}: class {index + 1} is {one_line(its, 60)!r}, and in the data "
                    f"{wanted!r}; names and order must be equal: {MEND}"
                )

    def check_tower(self, width: int, weights_sha256: str, origin: str) -> None:
        """Raise WSSSError where an image tower has another width; warn where it has other weights.

        Args:
            width: E of the tower's projection.
            weights_sha256: ``WeightsInfo.state_sha256`` of the tower.
            origin: the file, for the error.
        """
        if self.width != width:
            raise WSSSError(
                f"{origin}: its features are {self.width} wide, and backbone.projection {width}; "
                f"{MEND} from the CLIP of the backbone"
            )
        if self.weights_sha256 != weights_sha256:
            print(
                f"warning: {origin}: was made with other weights ({self.model}, "
                f"{self.weights_sha256[:8]}) than the backbone's ({weights_sha256[:8]}); texts and "
                "images are then compared in different spaces",
                file=sys.stderr,
            )


def read_text_features(path: Path) -> TextFeatures:
    """Read text features; nothing in the file is run, and sizes are checked first.

    Raises:
        WSSSError: a missing, damaged or unfitting file, by name.
    """
    if not path.is_file():
        raise WSSSError(f"{path}: no such file; `wsss text data=... out={path}` makes it")
    read = {".npz": _read_npz, ".safetensors": _read_safetensors}.get(path.suffix)
    if read is None:
        raise WSSSError(f"{path}: expected text features in .npz or .safetensors; {MEND}")
    found = read(path)
    missing = [field.name for field in fields(TextFeatures) if field.name not in found]
    if missing:
        raise WSSSError(f"{path}: has no {', '.join(missing)}; {MEND}")
    features = TextFeatures(**found)
    if faults := features.faults():
        raise WSSSError(f"{path}: {faults}; {MEND}")
    return features


def _read_npz(path: Path) -> dict[str, Any]:
    """Read the fields that are there."""
    arrays = read_npz(path, at_most(LARGEST), {*NUMBERS, *NAMES, *WORDS}.__contains__)
    for name in (*NAMES, *WORDS):
        dimensions = 1 if name in NAMES else 0
        if name in arrays and (arrays[name].dtype.kind, arrays[name].ndim) != ("U", dimensions):
            said = f"{arrays[name].dtype} {arrays[name].shape}"
            raise WSSSError(f"{path}: {name} is {said}, expected text; {MEND}")
    found: dict[str, Any] = {name: arrays[name] for name in NUMBERS if name in arrays}
    found |= {name: tuple(arrays[name].tolist()) for name in NAMES if name in arrays}
    found |= {name: str(arrays[name]) for name in WORDS if name in arrays}
    return _with_scale(found, path)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Read the fields that are there."""
    if path.stat().st_size > LARGEST:
        raise WSSSError(f"{path}: has more than {LARGEST:,} bytes; {MEND}")
    try:
        with safe_open(path, "np") as file:
            words = file.metadata() or {}
            present = set(file.keys()) & set(NUMBERS)
            found: dict[str, Any] = {name: file.get_tensor(name) for name in sorted(present)}
    except Exception as error:  # safetensors and OS errors share no base class
        raise WSSSError(
            f"{path}: not a readable .safetensors file ({first_line(error)})"
        ) from error
    for name in NAMES:
        if name not in words:
            continue
        try:
            names = json.loads(words[name])
        except (ValueError, RecursionError):
            names = None
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
            raise WSSSError(f"{path}: {name} is no JSON list of texts; {MEND}")
        found[name] = tuple(names)
    return _with_scale(found | {k: words[k] for k in WORDS if k in words}, path)


def _with_scale(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """Make the scale a number, and leave rows to :meth:`TextFeatures.faults`."""
    scale = found.get("logit_scale")
    if scale is None:
        return found
    if scale.size != 1 or scale.dtype.kind != "f":
        said = f"{scale.dtype} {scale.shape}"
        raise WSSSError(f"{path}: logit_scale is {said}, expected one number; {MEND}")
    return found | {"logit_scale": float(scale.reshape(()))}


def write_text_features(features: TextFeatures, path: Path) -> None:
    """Write text features as ``.npz`` or ``.safetensors``, whole or not at all.

    Raises:
        WSSSError: another ending, or the file cannot be written.
    """
    check_ending(path)
    content = asdict(features)
    numbers = {name: np.asarray(content[name], np.float32) for name in NUMBERS}
    if path.suffix == ".safetensors":
        metadata = {name: json.dumps(content[name]) for name in NAMES}
        metadata |= {name: content[name] for name in WORDS}
        write_atomically(path, save(numbers, metadata))
        return
    stream = BytesIO()
    texts = {name: np.array(content[name], dtype=np.str_) for name in (*NAMES, *WORDS)}
    np.savez(stream, **numbers, **texts)  # type: ignore[arg-type]  # a name could be allow_pickle
    write_atomically(path, stream.getvalue())


def check_ending(path: Path) -> None:
    """Raise WSSSError unless a file of text features may be called so."""
    if path.suffix not in (".npz", ".safetensors"):
        raise WSSSError(f"out={path}: expected a file that ends in .npz or .safetensors")
