"""``results.json``: written whole or not at all, and read back with a check.

Schema 1::

    {"schema": 1, "method", "data", "seed", "config_hash", "status": "finished" | ...,
     "config": {...}, "cost": {...},
     "splits": {split: {<metrics>, "maps": {kind: {...}}, "per_class": {...}, "confusion": {...},
                        "protocol": {...}, "cost": {...}}}}

``images.npz`` beside it holds the confusion cells of every image.

Metrics are numbers, or null where a number does not exist (a model without a segmentation head, a
class that the split never shows).
"""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wsss.core.arrays import at_most, names_in, read_npz
from wsss.core.errors import WSSSError
from wsss.core.files import read_json, write_atomically
from wsss.core.records import check_record
from wsss.results.schema import SCHEMA, Results

CONFIG_FILE = "config.yaml"
RESULTS_FILE = "results.json"
CELLS_FILE = "images.npz"
#: methods that older runs wrote by the names of their classes
RENAMED = {"TKPPCL": "TKP-PCL"}

#: (heading, key, whether it is a percentage), in the order of the table.
ROWS = (
    ("CAM seed mIoU, image labels given", "seed_miou", True),
    ("CAM seed mIoU, predicted labels", "seed_miou_predicted_labels", True),
    ("CAM seed mIoU, given, holdout's threshold", "seed_miou_holdout", True),
    ("  holdout's threshold", "seed_threshold_holdout", False),
    ("CAM seed mIoU, given, oracle threshold", "seed_miou_oracle", True),
    ("  oracle threshold", "seed_threshold_oracle", False),
    ("CAM pixel mAP, image labels given", "seed_pixel_map", True),
    ("LAM seed mIoU, image labels given", "lam_miou", True),
    ("LAM seed mIoU, given, oracle threshold", "lam_miou_oracle", True),
    ("  oracle threshold", "lam_threshold_oracle", False),
    ("pseudo label mIoU, 255 as background", "pseudo_label_miou_ignored_as_background", True),
    ("pseudo label mIoU, 255 excluded", "pseudo_label_miou_excluded", True),
    ("  pseudo label coverage", "pseudo_label_coverage", True),
    ("segmentation mIoU, single scale", "seg_miou", True),
    ("segmentation mIoU, single scale + CRF", "seg_miou_crf", True),
    ("segmentation mIoU, multi-scale", "seg_miou_ms", True),
    ("segmentation mIoU, multi-scale + CRF", "seg_miou_ms_crf", True),
    ("image mAP", "image_map", True),
    ("image F1", "image_f1", True),
)

#: what a sweeper may work on
NUMBERS = (*(key for _, key, _ in ROWS), "seed_precision", "seed_recall")

#: kind of label map -> its name in tables
MAP_NAMES = {
    "seed": "CAM seed",
    "pseudo_label": "pseudo label (255 as background)",
    "seg": "segmentation",
    "seg_crf": "segmentation + CRF",
    "seg_ms": "segmentation, multi-scale",
    "seg_ms_crf": "segmentation, multi-scale + CRF",
}

#: the same where there is little room
SHORT_NAMES = {
    "seed": "seed",
    "pseudo_label": "pseudo",
    "seg": "seg",
    "seg_crf": "seg+CRF",
    "seg_ms": "MS",
    "seg_ms_crf": "MS+CRF",
}

#: (heading, path in an entry of ``maps``) of the table of label maps
MAP_ROWS = (
    ("mIoU", ("miou",)),
    ("precision", ("precision",)),
    ("recall", ("recall",)),
    ("over-activation, FP / truth", ("over",)),
    ("under-activation, FN / truth", ("under",)),
    ("mean of the images' mIoU", ("image_miou",)),
    ("Boundary IoU", ("boundary_iou",)),
    ("mIoU within 3 px of an edge", ("trimap_iou", "3")),
    ("mIoU within 5 px of an edge", ("trimap_iou", "5")),
    ("mIoU within 10 px of an edge", ("trimap_iou", "10")),
    ("IoU of small objects", ("size_iou", "small")),
    ("IoU of medium objects", ("size_iou", "medium")),
    ("IoU of large objects", ("size_iou", "large")),
    ("predicted where the class is absent", ("hallucinated",)),
)

#: (heading, key in ``per_class``) of the per-class table; results.json holds more columns.
CLASS_COLUMNS = (
    ("seed", "seed_iou"),
    ("oracle", "seed_iou_oracle"),
    *((short, f"{kind}_iou") for kind, short in SHORT_NAMES.items() if kind != "seed"),
    ("AP", "image_ap"),
)


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write results so that a reader sees the old file or the new one, never a part.

    Args:
        path: target, usually ``run folder / RESULTS_FILE``; its folder is created.
        results: content of the schema above. ``schema`` is added; NaN becomes null; tensors,
            NumPy values, tuples and paths become plain values.
    """
    text = _compact_lists(
        json.dumps(_plain({"schema": SCHEMA, **results}), indent=2, allow_nan=False)
    )
    write_atomically(path, f"{text}\n".encode())


def write_cells(path: Path, cells: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the confusion cells of every image (`wsss.evaluation.per_image`), compressed.

    Args:
        path: target, usually ``run folder / CELLS_FILE``.
        cells: split -> ``names`` (list of all image names) and kind of label map -> (n, 3) cells.
    """
    arrays: dict[str, Any] = {}
    for split, kinds in cells.items():
        for kind, values in kinds.items():
            arrays[f"{split}/{kind}"] = (
                np.array(values) if kind == "names" else values.astype(np.int32)
            )
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def read_cells(path: Path, split: str) -> dict[str, Any]:
    """Read what :func:`write_cells` wrote for one split: ``names`` and kind -> int64 cells.

    Raises:
        WSSSError: the file is missing or damaged, or holds something else.
    """
    if not path.is_file():
        raise WSSSError(f"{path}: there is no such file; run `wsss eval`")
    try:
        prefix = f"{split}/"
        if f"{prefix}names" not in names_in(path):
            raise WSSSError(f"{path}: holds no names of {split}'s images")
        found = read_npz(path, at_most(), lambda name: name.startswith(prefix))
        names = found.pop(f"{prefix}names")
        if names.ndim != 1 or names.dtype.kind != "U":
            raise WSSSError(f"{path}: {prefix}names are no list of names")
        cells = {
            key.removeprefix(prefix): _cells(path, key, values, len(names))
            for key, values in found.items()
        }
    except WSSSError as error:
        raise WSSSError(
            f"{error}; the counts of single images are needed, run `wsss eval` again"
        ) from error
    return {"names": names.tolist(), **cells}


def _cells(path: Path, key: str, values: NDArray[Any], images: int) -> NDArray[np.int64]:
    """Give one kind's cells.

    Raises:
        WSSSError: they are no counts of these images.
    """
    if values.ndim != 2 or values.shape[1] != 3 or values.dtype.kind not in "iu":
        raise WSSSError(f"{path}: {key} is {values.dtype} {values.shape}, expected integers (n, 3)")
    cells = values.astype(np.int64)
    if (cells < 0).any() or (cells[:, 0] >= images).any():
        raise WSSSError(f"{path}: {key} counts below zero, or of more than its {images} images")
    return cells


def read_results(path: Path) -> dict[str, Any]:
    """Read what :func:`write_results` wrote.

    Raises:
        WSSSError: the file is missing, is no JSON, has another schema or a key of another type.
    """
    results = read_json(path, "run `wsss eval` again")
    found = results.get("schema") if isinstance(results, dict) else None
    if found != SCHEMA:
        raise WSSSError(
            f"{path}: schema {str(found)[:20]}, expected {SCHEMA}; run `wsss eval` again"
        )
    if not isinstance(results.get("splits"), dict):
        raise WSSSError(f"{path}: holds no splits; run `wsss eval` again")
    check_record(Results, results, str(path), "run `wsss eval` again")
    if (method := results.get("method")) in RENAMED:
        results["method"] = RENAMED[method]
    return dict(results)


def print_table(
    results: Mapping[str, Any], *, console: Console | None = None, per_class: bool = False
) -> None:
    """Print metrics as rows and splits as columns.

    Args:
        results: content of the schema above.
        console: where to print; standard output by default.
        per_class: also print the table of IoUs per class of every split.
    """
    console = console or Console()
    splits: Mapping[str, Mapping[str, Any]] = results["splits"]
    title = " · ".join(str(results[key]) for key in ("method", "data") if key in results)
    table = Table(title=escape(title) or None, title_justify="left")
    table.add_column("metric")
    for split in splits:
        table.add_column(escape(split), justify="right")
    for heading, key, percent in ROWS:
        values = [metrics.get(key) for metrics in splits.values()]
        if any(value is not None for value in values):
            table.add_row(heading, *(_cell(value, percent) for value in values))
    console.print(table)
    for split, metrics in splits.items():
        if metrics.get("maps"):
            console.print(maps_table(metrics["maps"], title=f"{split}: label maps (%)"))
        for note in metrics.get("notes", []):
            console.print(escape(f"{split}: {note}"))
        if per_class:
            console.print(per_class_table(metrics, title=f"{split}, per class (%)"))


def maps_table(maps: Mapping[str, Mapping[str, Any]], *, title: str | None = None) -> Table:
    """Make a table of the label maps' scores beside mIoU, one kind a column.

    Args:
        maps: ``maps`` of one entry of ``splits``.
        title: heading.
    """
    table = Table(title=escape(title or "") or None, title_justify="left")
    table.add_column("")
    for kind in maps:
        table.add_column(SHORT_NAMES[kind], justify="right")
    for heading, path in MAP_ROWS:
        cells = [_cell(look_up(values, path), True) for values in maps.values()]
        table.add_row(heading, *cells)
    return table


def look_up(values: Mapping[str, Any], path: Sequence[str]) -> Any:
    """Give the value at a path of nested mappings, None where a step is missing."""
    found: Any = values
    for step in path:
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Name dotted keys by their last part, or in full where two end alike: ``method.name``."""
    ends = {key: key.rpartition(".")[2] for key in keys}
    times = Counter(ends.values())
    return {key: end if times[end] == 1 else key for key, end in ends.items()}


def per_class_table(metrics: Mapping[str, Any], *, title: str | None = None) -> Table:
    """Make a table of one split's per-class scores, one class a row.

    Args:
        metrics: one entry of ``splits``.
        title: heading.
    """
    columns: Mapping[str, list[Any]] = metrics["per_class"]
    table = Table(title=escape(title or "") or None, title_justify="left")
    table.add_column("class")
    shown = [(heading, columns[key]) for heading, key in CLASS_COLUMNS if key in columns]
    for heading, _ in shown:
        table.add_column(heading, justify="right")
    for row, name in enumerate(columns["class"]):
        table.add_row(escape(name), *(_cell(values[row], True) for _, values in shown))
    return table


def _cell(value: float | None, percent: bool) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{100 * value:.1f}" if percent else f"{value:.2f}"


def _plain(value: Any) -> Any:
    """Make nested values plain; floats that JSON cannot express become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # tensors, NumPy arrays and scalars
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


def _compact_lists(text: str) -> str:
    """Put each innermost list of numbers on one line; a confusion matrix stays readable.

    Only line breaks go, and JSON has none inside strings, so no value can change.
    """
    return re.sub(r"\[[\d\s.,eE+\-nul]*\]", lambda m: re.sub(r"\n\s*", " ", m[0]), text)
