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
NumPy arrays, torch tensors and containers, and refuses everything else.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wsss.core.errors import WSSSError
from wsss.data.images import read_mask
from wsss.maps.pixels import IGNORE_INDEX

MAP_KEYS = ("high_res", "attn_highres", "cam", "cams", "maps")
TOLERANCE = 1e-3  # rounding of maps that were normalised to [0, 1]

_ALLOWED = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
}


class _ArraysOnly(pickle.Unpickler):
    """Read arrays, tensors and containers; any other name in the pickle is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _safe_storage
        if (module, name) in _ALLOWED:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")


def _safe_storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


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


def read_class_maps(path: Path, *, num_classes: int, first_class: int = 0) -> NDArray[np.float32]:
    """Read the class maps of one image.

    Args:
        path: ``.npy`` or ``.npz`` in one of the layouts above.
        num_classes: K, foreground classes.
        first_class: what the file calls the first foreground class (0, or 1 where 0 is background).

    Returns:
        (K, h, w) in [0, 1]; zero for the classes that the file does not hold.

    Raises:
        WSSSError: the file is unreadable, or its layout, classes or values are not as above.
    """
    content = _load(path)
    if isinstance(content, Mapping):
        classes, maps = _from_mapping(content, path)
    else:
        maps = _floats(content, path)
        if maps.ndim != 3 or len(maps) not in (num_classes, num_classes + 1):
            raise WSSSError(
                f"{path}: array {maps.shape}; expected ({num_classes}, h, w), or one more with the "
                "background first"
            )
        maps = maps[-num_classes:]
        classes = [first_class + k for k in range(num_classes)]
    result = np.zeros((num_classes, *maps.shape[1:]), np.float32)
    for class_id, single in zip(classes, maps, strict=True):
        if not first_class <= class_id < first_class + num_classes:
            raise WSSSError(
                f"{path}: class {class_id}; expected {first_class}.."
                f"{first_class + num_classes - 1}. If the file counts from another number, give "
                "first_class="
            )
        result[class_id - first_class] = single
    low, high = float(result.min(initial=0)), float(result.max(initial=0))
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also NaN
        raise WSSSError(
            f"{path}: values from {low:.3g} to {high:.3g}; expected class maps normalised to 0..1"
        )
    return result.clip(0, 1)


def _load(path: Path) -> Any:
    """Load an array, or a mapping; nothing in the file is executed."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as content:
                return {key: content[key] for key in content.files}
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read is None or not read(stream)[2].hasobject:
                stream.seek(0)
                return np.load(stream, allow_pickle=False)
            content = _ArraysOnly(stream).load()
        return content.item() if isinstance(content, np.ndarray) and content.ndim == 0 else content
    except (OSError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise WSSSError(
            f"{path}: cannot be read as arrays ({' '.join(str(error).split())[:200]})"
        ) from error


def _from_mapping(content: Mapping[Any, Any], path: Path) -> tuple[list[int], NDArray[np.float32]]:
    """Give class numbers as the file has them, and their maps (n, h, w)."""
    if "keys" in content:
        key = next((key for key in MAP_KEYS if key in content), None)
        if key is None:
            raise WSSSError(f"{path}: holds keys but none of {', '.join(MAP_KEYS)}")
        classes = [int(value) for value in np.asarray(content["keys"]).ravel()]
        maps = _floats(content[key], path)
    else:
        try:
            classes = [int(key) for key in content]
        except (TypeError, ValueError) as error:
            raise WSSSError(
                f"{path}: holds {', '.join(map(str, content))}; expected keys and one of "
                f"{', '.join(MAP_KEYS)}, or class numbers"
            ) from error
        stacked = [_floats(value, path) for value in content.values()]
        if len({single.shape for single in stacked}) > 1:
            raise WSSSError(f"{path}: its maps differ in size")
        maps = np.stack(stacked) if stacked else np.zeros((0, 1, 1), np.float32)
    if maps.ndim != 3 or len(maps) != len(classes):
        raise WSSSError(f"{path}: {len(classes)} classes but maps of shape {maps.shape}")
    return classes, maps


def _floats(values: Any, path: Path) -> NDArray[np.float32]:
    """Convert values to float32; uint8 is scaled to [0, 1]."""
    array = np.asarray(values)
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
    labels = np.asarray(_load(path))
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
