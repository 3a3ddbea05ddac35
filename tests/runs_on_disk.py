"""Small run folders with real counts, made without training anything."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsss.evaluation.label_maps import LabelMapCounts, Regions, label_map_scores
from wsss.results.store import CELLS_FILE, RESULTS_FILE, write_cells, write_results

CLASSES = ["background", "cat", "dog"]
IMAGES = 30

CARD: dict[str, Any] = {
    "split": "val", "list_sha256": "a" * 64, "num_images": IMAGES, "label_source": "xml",
    "metric": "dataset-level", "label_map_definitions": {}, "supervision": "image labels",
    "resize": None, "single_resize": None, "cam_resize": None, "seg_scales": [1.0], "flip": True,
    "flip_merge": "sum", "scale_merge": "sum", "crf": {"name": "toco"}, "crf_prune": False,
    "crf_backend": "pydensecrf", "use_image_labels": True, "refine": "par",
    "cam_threshold_source": "declared in the configuration", "crop_size": 96, "iterations": 400,
    "global_batch_size": 8, "selection": "last checkpoint",
    "backbone": {"name": "vit", "state_sha256": "b" * 64},
}  # fmt: skip


def label_maps(seed: int, quality: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Truth (the same for every seed) and predictions that are right with some probability."""
    truths, noise = np.random.default_rng(0), np.random.default_rng(1000 + seed)
    pairs = []
    for _ in range(IMAGES):
        truth = np.zeros((12, 16), np.uint8)
        top, left = truths.integers(0, 6, 2)
        truth[top : top + 6, left : left + 8] = truths.integers(1, 3)
        wrong = noise.random(truth.shape) > quality
        pairs.append((truth, np.where(wrong, noise.integers(0, 3, truth.shape), truth)))
    return pairs


def make_run(
    folder: Path,
    *,
    method: str = "ToCo",
    seed: int = 0,
    quality: float = 0.7,
    draw: int | None = None,
    data: str = "tiny",
    classes: Sequence[str] = CLASSES,
    config: Mapping[str, Any] | None = None,
    **card: Any,
) -> Path:
    """Writes a run whose seeds and segmentations are the label maps of that quality."""
    number = len(classes)
    counts = LabelMapCounts(num_classes=number)
    for index, maps in enumerate(label_maps(seed if draw is None else draw, quality)):
        truth, guess = (torch.from_numpy(m.clip(0, number - 1).astype(np.uint8)) for m in maps)
        counts.update(guess, Regions.of(truth, number), index)
    totals = counts.compute()
    values, columns = label_map_scores(totals)
    metrics: dict[str, Any] = {
        "num_images": IMAGES,
        "seed_miou": values["miou"],
        "seg_miou": values["miou"],
        "seg_miou_ms_crf": values["miou"],
        "image_map": 0.5,
        "seed_threshold": 0.5,
        "seed_threshold_oracle": 0.4,
        "seed_curve": {"thresholds": [0.4, 0.5, 0.6], "miou": [0.5, values["miou"], 0.3]},
        "readings": 1,
        "maps": {kind: values for kind in ("seed", "seg", "seg_ms_crf")},
        "per_class": {"class": list(classes)}
        | {f"{kind}_{k}": v for kind in ("seed", "seg", "seg_ms_crf") for k, v in columns.items()},
        "protocol": CARD | {"seed": seed} | card,
        "cost": {"seconds_per_image": 0.1 + quality},
    }
    cells = totals.cells.numpy()
    kinds = {"names": [f"i{i}" for i in range(IMAGES)]}
    write_cells(
        folder / CELLS_FILE, {"val": kinds | dict.fromkeys(("seed", "seg", "seg_ms_crf"), cells)}
    )
    write_results(
        folder / RESULTS_FILE,
        {
            "method": method, "data": data, "seed": seed, "study": f"{method}-study".lower(),
            "config": config or {"method": {"weight": 0.2}},
            "cost": {"train_wall_hours": 0.5 * quality},
            "run": str(folder), "splits": {"val": metrics},
        },
    )  # fmt: skip
    return folder
