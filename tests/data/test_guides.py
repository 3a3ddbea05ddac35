"""Maps beside the images (saliency, masks of a second stage), for every layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trees import CLASSES_OF_PHOTOS, make_photos
from voc_tree import CLASSES, make_voc

from wsss.core.errors import WSSSError
from wsss.core.files import write_atomically
from wsss.data.datamodule import ImageDataModule
from wsss.data.images import mask_png
from wsss.data.table_module import TableDataModule
from wsss.data.voc_module import VOCDataModule


def plain(rgb: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    return {"image": torch.zeros(1)}


def with_saliency(
    rgb: np.ndarray, rng: np.random.Generator, saliency: np.ndarray | None = None
) -> dict[str, torch.Tensor]:
    return {"saliency": torch.tensor(-1.0 if saliency is None else saliency.mean())}


def with_mask(
    rgb: np.ndarray, rng: np.random.Generator, mask: np.ndarray
) -> dict[str, torch.Tensor]:
    return {"seen": torch.tensor(int(mask.max()))}


def voc(parent: Path, **changes: Any) -> VOCDataModule:
    settings: dict[str, Any] = {
        "name": "voc",
        "root": parent / "VOCdevkit",
        "class_names": CLASSES,
        "train_split": "train",
        "val_split": "val",
        "global_batch_size": 1,
    }
    return VOCDataModule(**(settings | changes))


def table(parent: Path, **changes: Any) -> TableDataModule:
    settings: dict[str, Any] = {
        "name": "table",
        "root": parent,
        "csv": "labels.csv",
        "class_names": CLASSES_OF_PHOTOS,
        "global_batch_size": 1,
    }
    return TableDataModule(**(settings | changes))


def build(kind: str, parent: Path) -> Any:
    if kind == "voc":
        make_voc(parent)
        return voc
    labels = make_photos(parent, 9)
    lines = ["image,labels,mask,split"]
    for number, label in enumerate(labels):
        path = f"masks/{number:03}.png"
        write_atomically(parent / path, mask_png(np.full((48, 56), 2, np.uint8)))
        split = "train" if number < 6 else "val"
        lines.append(f"photos/{number:03}.jpg,{label},{path},{split}")
    (parent / "labels.csv").write_text("\n".join(lines))
    return table


def write_maps(data: ImageDataModule, folder: Path, value: int) -> None:
    """Grey maps, or masks, half of whose pixels have a value."""
    for sample in data.samples("train"):
        with Image.open(sample.image) as image:
            grey = np.zeros((image.height, image.width), np.uint8)
        grey[: len(grey) // 2] = value
        write_atomically(folder / f"{sample.name}.png", mask_png(grey))


@pytest.mark.parametrize("kind", ["voc", "table"])
def test_saliency_reaches_training_and_nothing_else(tmp_path: Path, kind: str) -> None:
    make = build(kind, tmp_path)
    data = make(tmp_path, train_transform=with_saliency)
    assert data.supervision == "image labels"
    assert next(iter(data.train_dataloader()))["saliency"] == -1
    for sample in data.samples("train"):
        with Image.open(sample.image) as image:
            grey = Image.new("L", image.size, 200)
        path = tmp_path / "maps" / f"{sample.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey.save(path)
    for threshold, share in ((127, 1.0), (200, 0.0)):
        options = {"saliency_folder": str(tmp_path / "maps"), "saliency_threshold": threshold}
        data = make(tmp_path, train_transform=with_saliency, **options)
        assert next(iter(data.train_dataloader()))["saliency"] == share
        assert f"saliency maps (above {threshold})" in data.supervision
        assert "saliency" not in data.eval_dataset("val")[0]
    with pytest.raises(WSSSError, match="takes no saliency maps"):
        make(tmp_path, train_transform=plain, saliency_folder="maps")
    with pytest.raises(WSSSError, match="expected a number less than or equal to 254"):
        make(tmp_path, train_transform=plain, saliency_threshold=255)


@pytest.mark.parametrize("kind", ["voc", "table"])
def test_a_second_stage_sees_the_masks_it_is_given(tmp_path: Path, kind: str) -> None:
    make = build(kind, tmp_path)
    folder = tmp_path / "pseudo"
    data = make(tmp_path, train_transform=with_mask, train_masks=str(folder))
    folder.mkdir()
    with pytest.raises(WSSSError, match=r"mask .*\.png is missing|mask folder .* cannot be read"):
        data.setup("fit")
    write_maps(data, folder, 3)
    assert next(iter(data.train_dataloader()))["seen"] == 3
    assert data.supervision == "unstated masks"
    own = make(tmp_path, train_transform=with_mask, train_masks="ground_truth")
    assert next(iter(own.train_dataloader()))["seen"] in (2, 255)
    assert own.supervision == "pixel masks"
    write_maps(data, folder, 9)
    data = make(tmp_path, train_transform=with_mask, train_masks=str(folder))
    data.setup("fit")
    with pytest.raises(WSSSError, match="holds class id 9"):
        data.check_contents()


def test_training_pictures_and_maps_are_resized_together(tmp_path: Path) -> None:
    """Where data.long_side says so; evaluation has the pictures' own size."""

    def sizes(rgb: np.ndarray, rng: np.random.Generator, mask: np.ndarray) -> dict[str, Any]:
        return {"rgb": torch.tensor(rgb.shape), "ids": torch.from_numpy(mask.copy())}

    build("table", tmp_path)
    with Image.open(tmp_path / "masks" / "000.png") as mask:
        ids = np.array(mask)  # of 48 x 56 pixels
    ids[:, 28:] = 0
    for number in range(6):
        write_atomically(tmp_path / f"masks/{number:03}.png", mask_png(ids))
    own = {"train_transform": sizes, "train_masks": "ground_truth"}
    for long_side, size in ((None, (48, 56)), (28, (24, 28)), (112, (96, 112))):
        data = table(tmp_path, **own, long_side=long_side)
        item = next(iter(data.train_dataloader()))
        assert item["rgb"][0].tolist() == [*size, 3]
        left, right = item["ids"][0].chunk(2, dim=1)
        assert item["ids"][0].shape == size
        assert (left == 2).all()
        assert (right == 0).all(), "ids are not blended"
        assert data.eval_dataset("val")[0]["rgb"].shape == (48, 56, 3)
    with pytest.raises(WSSSError, match=r"data\.long_side=0"):
        table(tmp_path, long_side=0, train_transform=plain)


def test_masks_and_methods_must_fit(tmp_path: Path) -> None:
    make_voc(tmp_path)
    for transform, masks, expected in (
        (with_mask, None, "train_masks is null"),
        (plain, "ground_truth", "takes no masks"),
        (with_mask, "no/such/folder", "no/such/folder"),
    ):
        with pytest.raises(WSSSError, match=expected):
            voc(tmp_path, train_transform=transform, train_masks=masks).setup("fit")


def test_ground_truth_needs_a_mask_of_every_image(tmp_path: Path) -> None:
    build("table", tmp_path)
    path = tmp_path / "labels.csv"
    path.write_text(path.read_text().replace("masks/002.png", ""))
    data = table(tmp_path, train_transform=with_mask, train_masks="ground_truth")
    with pytest.raises(WSSSError, match=r"'photos/002' \(1 of 6 images\) has no mask"):
        data.setup("fit")
    assert "mask" not in data.unmasked_dataset("train")[0]


def test_ground_truth_of_255_trains_nothing_and_is_refused(tmp_path: Path) -> None:
    build("table", tmp_path)
    for number in range(6):
        path = tmp_path / "masks" / f"{number:03}.png"
        write_atomically(path, mask_png(np.full((48, 56), 255, np.uint8)))
    data = table(tmp_path, train_transform=with_mask, train_masks="ground_truth")
    with pytest.raises(WSSSError, match=r"none of 6 masks .* only 255 occur"):
        data.check_contents()
    table(tmp_path, train_transform=plain).check_contents()  # image labels need none of them
    folder = tmp_path / "pseudo"  # what a method could not label is no mistake in the data
    for number in range(6):
        write_atomically(folder / f"photos/{number:03}.png", mask_png(np.zeros((48, 56), np.uint8)))
    table(tmp_path, train_transform=with_mask, train_masks=str(folder)).check_contents()
