"""Maps that somebody else made: folders of class maps or label maps in the field's layouts.

Class maps (``wsss eval cams=FOLDER``), one ``NAME.npy`` or ``NAME.npz`` an image:

* IRN, CLIP-ES: a dictionary with ``keys`` (foreground classes, from 0) and ``high_res``,
  ``attn_highres`` or ``cam`` (n, h, w), as a pickled ``.npy`` or as arrays of an ``.npz``;
* PSA, SEAM, MCTformer: a pickled dictionary class -> (h, w);
* a plain array (K, h, w) of all foreground classes, or (K + 1, h, w) with the background first.

Values are in [0, 1], or uint8 in 0..255; another size than the mask's is resized bilinearly.

Label maps (``wsss eval masks=FOLDER``), one ``NAME.png`` (palette or grey class ids) or
``NAME.npy`` (H, W) an image, at the mask's own size; 255 means undecided.

Names of COCO and of own data hold folders (``val2014/COCO_val2014_000000000042``); files may lie
in the same folders, or all in one where their names are unique.

Pickles of strangers can run code when they are read. These are read by an unpickler that knows
NumPy arrays, torch tensors and containers, and refuses everything else. A header can declare
terabytes: maps may be four times as long and wide as their image, and what a file declares is
compared with that before memory is touched.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss.core.arrays import Declared, names_in, read_header, read_npy, read_npz, unreadable
from wsss.core.errors import WSSSError
from wsss.data.images import read_mask
from wsss.maps.pixels import IGNORE_INDEX

MAP_KEYS = ("high_res", "attn_highres", "cam", "cams", "maps")
TOLERANCE = 1e-3  # rounding of maps that were normalised to [0, 1]

MOST_PIXELS = 16  # of a map, times those of its image
FEW_PIXELS = 2**20  # a map may have so many whatever its image's size


class _ArraysOnly(pickle.Unpickler):
    """Read arrays, tensors and containers; any other name in the pickle is an error."""

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module.replace("numpy.core", "numpy._core"), name))
        if known is None:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}")
        return known


def _empty_array(kind: Any, shape: Any, dtype: Any) -> NDArray[Any]:
    """Begin an array, whose shape and values follow; none is made of memory as it lies there."""
    return np.empty(0, np.uint8)


def _storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """Make a tensor on a storage that holds all of it; torch would make room without values."""
    steps = [(count - 1) * step for count, step in zip(size, stride, strict=True)]
    ends = offset + sum(steps) + 1 if all(count > 0 for count in size) else 0
    there = storage._untyped_storage.nbytes() // storage._element_size()
    if min([offset, *size, *stride], default=0) < 0 or ends > there:
        raise pickle.UnpicklingError("a tensor is larger than its values")
    made: Tensor = torch._utils._rebuild_tensor(storage, offset, size, stride)
    return made


#: what a pickle may name -> what stands for it
_KNOWN: dict[tuple[str, str], Callable[..., Any] | str] = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): "numpy.ndarray",  # is only handed on, never called
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "scalar"): np._core.multiarray.scalar,  # type: ignore[attr-defined]
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
}


def find_files(
    folder: Path, names: list[str], suffixes: tuple[str, ...], key: str
) -> dict[str, Path]:
    """Find the file of every name.

    Raises:
        WSSSError: the folder is missing or files are, with their number and the first name.
    """
    if not folder.is_dir():
        raise WSSSError(f"{key}={folder}: no such folder")
    plain = Counter(PurePosixPath(name).name for name in names)
    parents = {PurePosixPath(name).parent for name in names} | {PurePosixPath()}
    have = {
        str(parent / file)
        for parent in parents
        if (folder / parent).is_dir()
        for file in os.listdir(folder / parent)
    }
    found, missing = {}, []
    for name in names:
        last = PurePosixPath(name).name
        stems = [name, last] if plain[last] == 1 else [name]
        files = [stem + suffix for stem in stems for suffix in suffixes if stem + suffix in have]
        if files:
            found[name] = folder / files[0]
        else:
            missing.append(name)
    if missing:
        raise WSSSError(
            f"{key}={folder}: {len(missing)} of the split's {len(names)} images have no file, the "
            f"first is {missing[0]}{'|'.join(suffixes)}; every image must be scored, complete the "
            "folder or name its split with splits=[...]"
        )
    return found


def read_class_maps(
    path: Path, *, num_classes: int, first_class: int = 0, size: tuple[int, int] | None = None
) -> NDArray[np.float32]:
    """Read the class maps of one image.

    Args:
        path: ``.npy`` or ``.npz`` in one of the layouts above.
        num_classes: K, foreground classes.
        first_class: what the file calls the first foreground class (0, or 1 where 0 is background).
        size: (height, width) of the image, by which the maps' size is bounded; None: a map has
            ``FEW_PIXELS`` at most.

    Returns:
        (K, h, w) in [0, 1]; zero for the classes that the file does not hold.

    Raises:
        WSSSError: the file is unreadable, or its layout, classes or values are not as above.
    """
    pixels = max(MOST_PIXELS * math.prod(size or (0, 0)), FEW_PIXELS)
    content = _load(path, values=(num_classes + 1) * pixels)
    if isinstance(content, Mapping):
        classes, maps = _from_mapping(content, path, pixels)
    else:
        maps = _floats(content, path, (num_classes + 1) * pixels)
        if maps.ndim != 3 or len(maps) not in (num_classes, num_classes + 1):
            raise WSSSError(
                f"{path}: array {maps.shape}; expected ({num_classes}, h, w), or one more with the "
                "background first"
            )
        maps = maps[-num_classes:]
        classes = [first_class + k for k in range(num_classes)]
    for class_id in classes:
        if not first_class <= class_id < first_class + num_classes:
            raise WSSSError(
                f"{path}: class {class_id}; expected {first_class}.."
                f"{first_class + num_classes - 1}. If the file counts from another number, give "
                "first_class="
            )
    result = np.zeros((num_classes, *maps.shape[1:]), np.float32)
    for class_id, single in zip(classes, maps, strict=True):
        result[class_id - first_class] = single
    if len(classes) and not result.size:
        raise WSSSError(f"{path}: maps of shape {maps.shape} have no pixel")
    low, high = float(result.min(initial=0)), float(result.max(initial=0))
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also NaN
        raise WSSSError(
            f"{path}: values from {low:.3g} to {high:.3g}; expected class maps normalised to 0..1"
        )
    return result.clip(0, 1)


def _load(path: Path, *, values: int) -> Any:
    """Load an array, or a mapping; nothing in the file is executed.

    Args:
        path: ``.npy`` or ``.npz``.
        values: at most so many of one array are read.
    """

    def check(name: str, declared: Declared) -> None:
        if math.prod(declared.shape) > values or declared.dtype.itemsize > 16:
            raise ValueError(f"{name} declares {declared}, more than its image can have")

    if path.suffix == ".npz":
        names = names_in(path)
        maps = next((key for key in MAP_KEYS if key in names), None)
        used = {"keys", maps} if "keys" in names and maps else set(names)
        return read_npz(path, check, used.__contains__)
    try:
        with path.open("rb") as stream:
            first = stream.read(6)
            stream.seek(0)
            if first == np.lib.format.MAGIC_PREFIX and not read_header(stream).dtype.hasobject:
                return read_npy(path, check)
            content = _ArraysOnly(stream).load()
        return content.item() if isinstance(content, np.ndarray) and content.ndim == 0 else content
    except WSSSError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise unreadable(path, error) from error


def _from_mapping(
    content: Mapping[Any, Any], path: Path, pixels: int
) -> tuple[list[int], NDArray[np.float32]]:
    """Give class numbers as the file has them, and their maps (n, h, w)."""
    if "keys" in content:
        key = next((key for key in MAP_KEYS if key in content), None)
        if key is None:
            raise WSSSError(f"{path}: holds keys but none of {', '.join(MAP_KEYS)}")
        classes = _class_numbers(content["keys"], path)
        maps = _floats(content[key], path, len(classes) * pixels)
    else:
        classes = [_class_number(key, content, path) for key in content]
        stacked = [_floats(value, path, pixels) for value in content.values()]
        if len({single.shape for single in stacked}) > 1:
            raise WSSSError(f"{path}: its maps differ in size")
        maps = np.stack(stacked) if stacked else np.zeros((0, 1, 1), np.float32)
    if maps.ndim != 3 or len(maps) != len(classes):
        raise WSSSError(f"{path}: {len(classes)} classes but maps of shape {maps.shape}")
    if len(set(classes)) < len(classes):
        raise WSSSError(f"{path}: has maps of a class twice, in {str(classes)[:100]}")
    return classes, maps


def _class_numbers(keys: Any, path: Path) -> list[int]:
    """Read the classes that a file lists."""
    listed = keys if isinstance(keys, list | tuple) else _array(keys, path, FEW_PIXELS).ravel()
    return [_class_number(key, listed, path) for key in listed]


def _class_number(key: Any, others: Iterable[Any], path: Path) -> int:
    """Read one of the numbers by which a file names its classes."""
    try:
        number = int(key)
        if isinstance(key, str) or number == key:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise WSSSError(
        f"{path}: holds {', '.join(map(str, others))[:200]}; expected keys and one of "
        f"{', '.join(MAP_KEYS)}, or class numbers"
    )


def _array(values: Any, path: Path, most: int) -> NDArray[Any]:
    """Take an array or tensor of at most so many values as it lies there."""
    if not isinstance(values, np.ndarray | np.generic | Tensor):
        raise WSSSError(f"{path}: values of type {type(values).__name__}; expected numbers")
    if math.prod(values.shape) > most:
        raise WSSSError(
            f"{path}: array {tuple(values.shape)} is larger than its image's maps can be"
        )
    if isinstance(values, Tensor):
        values = values.detach()
        return (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _floats(values: Any, path: Path, most: int) -> NDArray[np.float32]:
    """Convert values to float32; uint8 is scaled to [0, 1]."""
    array = _array(values, path, most)
    if array.dtype == np.uint8:
        return np.divide(array, 255, dtype=np.float32)
    if array.dtype.kind not in "fiu":
        raise WSSSError(f"{path}: values of type {array.dtype}; expected numbers")
    return array.astype(np.float32)


def read_label_map(path: Path, *, num_classes: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Read one label map.

    Args:
        path: ``.png`` or ``.npy``.
        num_classes: K, foreground classes.
        size: (height, width) of the ground truth.

    Raises:
        WSSSError: the file is unreadable, of another size, or holds other ids.
    """
    if path.suffix == ".png":
        return read_mask(path, num_classes=num_classes, size=size)
    most = MOST_PIXELS * math.prod(size)
    labels = _array(_load(path, values=most), path, most)
    if labels.shape != size or labels.dtype.kind not in "iu":
        raise WSSSError(
            f"{path}: {labels.dtype} array {labels.shape}; expected integer class ids {size}"
        )
    wrong = labels[((labels < 0) | (labels > num_classes)) & (labels != IGNORE_INDEX)]
    if wrong.size:
        raise WSSSError(
            f"{path}: class id {int(wrong[0])}; expected 0..{num_classes} or {IGNORE_INDEX}"
        )
    return labels.astype(np.uint8)
