"""Crops with masks, and which masks a training run may see."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from voc_tree import CLASSES, make_voc

from wsss.core.errors import WSSSError
from wsss.core.supervision import PIXEL_MASKS
from wsss.data.images import read_mask, write_mask
from wsss.data.train_masks import CARD_FILE, GROUND_TRUTH, supervision_of
from wsss.data.views.segmenter import LabelledCrops
from wsss.data.views.toco import ToCoViews
from wsss.data.voc_module import VOCDataModule
from wsss.maps.pixels import denormalise


def test_image_and_mask_are_cut_alike() -> None:
    """Each class has a colour of its own, so the mask can be read off the image."""
    mask = np.zeros((40, 50), np.uint8)
    mask[10:30, 10:40] = 1
    mask[0:10, 30:50] = 2
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)
    close: list[np.ndarray] = []
    for side, seeds in ((24, range(20)), (90, range(5))):
        for seed in seeds:
            views = LabelledCrops(crop_size=side, scale_range=(0.7, 1.5))
            sample = views(colours[mask], np.random.default_rng(seed), mask)
            assert sample["image"].shape == (3, side, side)
            target = sample["target"]
            pixels = denormalise(sample["image"]).round().permute(1, 2, 0).numpy()
            real = (target != 255).numpy()
            wanted = colours[target.numpy()[real]]
            close.append((np.abs(pixels[real] - wanted) <= 128).all(-1))
            r0, r1, c0, c1 = sample["box"].tolist()
            inside = np.zeros_like(real)
            inside[r0:r1, c0:c1] = True
            assert np.array_equal(inside, real), "the box holds the real pixels"
            padded = (target == 255).numpy()
            assert padded.any() == (side == 90)
            assert np.abs(sample["image"].numpy()[:, padded]).sum() == 0
    assert np.concatenate(close).mean() > 0.99  # at borders the image is a blend of two


def test_flips_happen() -> None:
    mask = np.tile(np.arange(20, dtype=np.uint8) // 10, (20, 1))
    views = LabelledCrops(crop_size=20, scale_range=(1.0, 1.0))
    rgb = np.zeros((20, 20, 3), np.uint8)
    left = [
        views(rgb, np.random.default_rng(seed), mask)["target"][0, 0].item() for seed in range(20)
    ]
    assert set(left) == {0, 1}


def module(root: Path, train_masks: str | None, **changes: Any) -> VOCDataModule:
    settings: dict[str, Any] = {
        "name": "tree",
        "root": root,
        "class_names": CLASSES,
        "train_split": "train",
        "val_split": "val",
        "train_transform": LabelledCrops(crop_size=16),
        "global_batch_size": 2,
    }
    return VOCDataModule(**{**settings, "train_masks": train_masks, **changes})


def test_training_reads_the_folder_it_is_given(tmp_path: Path) -> None:
    root, folder = make_voc(tmp_path), tmp_path / "labels"
    folder.mkdir()
    for path in (root / "SegmentationClass").glob("*.png"):
        ones = read_mask(path, num_classes=3)
        write_mask(np.full_like(ones, 3), folder / path.name)
    pseudo = next(iter(module(root, str(folder)).train_dataloader()))
    assert set(pseudo["target"].unique().tolist()) <= {3, 255}
    truth = next(iter(module(root, GROUND_TRUTH).train_dataloader()))
    assert 0 in truth["target"].unique().tolist()
    # evaluation of the training list is on the ground truth all the same
    scored = module(root, str(folder)).eval_dataset("train")[0]["mask"]
    assert 0 in scored.unique().tolist()


@pytest.mark.parametrize(
    ("train_masks", "transform", "expected"),
    [
        (None, LabelledCrops(crop_size=16), "train_masks is null"),
        (GROUND_TRUTH, ToCoViews(crop_size=16), "takes no masks"),
        ("no/such/folder", LabelledCrops(crop_size=16), "no/such/folder"),
    ],
)
def test_masks_and_methods_must_fit(
    train_masks: str | None, transform: Any, expected: str, tmp_path: Path
) -> None:
    data = module(make_voc(tmp_path), train_masks, train_transform=transform)
    with pytest.raises(WSSSError, match=expected):
        data.setup("fit")


def test_missing_and_wrong_pseudo_labels_are_named(tmp_path: Path) -> None:
    root, folder = make_voc(tmp_path), tmp_path / "labels"
    folder.mkdir()
    data = module(root, str(folder))
    with pytest.raises(WSSSError, match=r"img000\.png is missing"):
        data.setup("fit")
    for path in (root / "SegmentationClass").glob("*.png"):
        write_mask(np.zeros((3, 3), np.uint8), folder / path.name)
    data = module(root, str(folder))
    data.setup("fit")
    with pytest.raises(WSSSError, match="3x3"):
        data.check_contents()


def test_the_supervision_is_said(tmp_path: Path) -> None:
    assert supervision_of(None) == "image labels"
    assert supervision_of(GROUND_TRUTH) == PIXEL_MASKS
    assert supervision_of(str(tmp_path)) == "unstated masks"
    (tmp_path / CARD_FILE).write_text(json.dumps({"supervision": "image labels"}))
    assert supervision_of(str(tmp_path)) == "image labels"
    (tmp_path / CARD_FILE).write_text("{")
    with pytest.raises(WSSSError, match=CARD_FILE):
        supervision_of(str(tmp_path))
