"""GETAM's view against the page's order of operations, and saliency maps from a folder."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from wsss.core.errors import WSSSError
from wsss.data.builtin import minivoc_root
from wsss.data.dataset import saliency_guide
from wsss.data.images import read_saliency
from wsss.data.views.getam import GETAMViews
from wsss.data.views.toco import ToCoViews
from wsss.data.voc import VOCDataset
from wsss.data.voc_module import VOCDataModule
from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD, denormalise, squash_pixels

CLASSES = ["bottle", "car", "chair", "diningtable", "person", "pottedplant", "sofa", "tvmonitor"]


def photo(height: int = 120, width: int = 160) -> np.ndarray:
    low = np.random.default_rng(0).integers(20, 256, (8, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(low).resize((width, height), Image.Resampling.BILINEAR))


def test_view_equals_the_steps_of_the_page() -> None:
    views, rgb = GETAMViews(crop_size=128), photo()
    saliency = (rgb[..., 0] > 120).astype(np.uint8)
    for seed in range(10):
        sample = views(rgb, np.random.default_rng(seed), saliency)
        place = views.place(rgb.shape[:2], np.random.default_rng(seed))
        assert 115 <= max(place.height, place.width) <= 146
        size = (place.width, place.height)
        normal = (rgb.astype(np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD
        scaled = cv2.resize(normal, size, interpolation=cv2.INTER_LINEAR)  # linear: same order
        grey = cv2.resize(saliency, size, interpolation=cv2.INTER_NEAREST)
        if place.flip:
            scaled, grey = scaled[:, ::-1], grey[:, ::-1]
        r0, r1, c0, c1 = sample["box"].tolist()
        shown = sample["image"][:, r0:r1, c0:c1].permute(1, 2, 0).numpy()
        row, column = place.rows[2], place.columns[2]
        part = (slice(row, row + r1 - r0), slice(column, column + c1 - c0))
        np.testing.assert_allclose(shown, scaled[part], atol=1e-5)
        np.testing.assert_array_equal(sample["saliency"][r0:r1, c0:c1], grey[part])
        padding = torch.ones(128, 128, dtype=torch.bool)
        padding[r0:r1, c0:c1] = False
        assert not sample["image"][:, padding].any()
        assert not sample["saliency"][padding].any()


def test_draws_cover_flips_and_places() -> None:
    views, rgb = GETAMViews(crop_size=128), photo()
    places = [views.place(rgb.shape[:2], np.random.default_rng(seed)) for seed in range(200)]
    assert 70 < sum(place.flip for place in places) < 130
    assert {max(place.height, place.width) for place in places} >= {115, 146}
    assert len({place.rows[:2] for place in places}) > 20
    assert "saliency" not in views(rgb, np.random.default_rng(0))


def test_bounds_of_the_long_side() -> None:
    assert GETAMViews(crop_size=256).long_side == (230, 292)
    assert GETAMViews(crop_size=56).long_side == (50, 64)
    with pytest.raises(WSSSError, match="long_side"):
        GETAMViews(crop_size=64, long_side=(1.2, 0.9))


def test_squashed_pixels_are_those_of_opencv() -> None:
    rgb = photo()
    normal = (rgb.astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    images = torch.from_numpy(normal.astype(np.float32)).permute(2, 0, 1)[None]
    squashed = squash_pixels(images, 96)
    expected = cv2.resize(rgb, (96, 96), interpolation=cv2.INTER_LINEAR)
    pixels = denormalise(squashed)[0].round().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(pixels, expected)


# ---- saliency from a folder ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Saliency maps of the first four training images: grey 100 left, 200 in the middle."""
    for name in names():
        grey = np.zeros((160, 160), np.uint8)
        grey[:, :50], grey[:, 50:100] = 100, 200
        Image.fromarray(grey).save(tmp_path / f"{name}.png")
    return tmp_path


def names() -> list[str]:
    path = minivoc_root() / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt"
    return path.read_text().split()[:4]


def dataset(folder: Path, threshold: int) -> VOCDataset:
    data = VOCDataset(
        root=minivoc_root(),
        split="train",
        class_names=CLASSES,
        transform=GETAMViews(crop_size=160, long_side=(1.0, 1.0)),
        limit=4,
    )
    data.guided_by(saliency_guide(data.samples, folder, threshold))
    return data


@pytest.mark.parametrize(("threshold", "share"), [(127, 50 / 160), (0, 100 / 160)])
def test_pixels_above_the_threshold_are_salient(folder: Path, threshold: int, share: float) -> None:
    saliency = dataset(folder, threshold)[0]["saliency"]
    assert saliency.shape == (160, 160)
    assert saliency.float().mean().item() == pytest.approx(share)


def test_bad_saliency_maps_are_named(folder: Path) -> None:
    victim = folder / f"{names()[2]}.png"
    Image.new("RGB", (160, 160)).save(victim)
    with pytest.raises(WSSSError, match=rf"{victim.name} has mode RGB; expected 8-bit grey"):
        dataset(folder, 127).check_contents()
    Image.new("L", (80, 160)).save(victim)
    with pytest.raises(WSSSError, match=rf"{victim.name} is 80x160"):
        dataset(folder, 127).check_contents()
    victim.unlink()
    with pytest.raises(WSSSError, match=rf"saliency map .*{victim.name} is missing"):
        dataset(folder, 127)
    with pytest.raises(WSSSError, match="is missing"):
        read_saliency(victim, threshold=127, size=(160, 160))


def module(**settings: object) -> VOCDataModule:
    return VOCDataModule(
        name="minivoc",
        root="builtin",
        class_names=CLASSES,
        train_split="train",
        val_split="val",
        global_batch_size=2,
        limit=4,
        **settings,  # type: ignore[arg-type]
    )


def test_supervision_is_stated_and_evaluation_sees_no_saliency(folder: Path) -> None:
    views = GETAMViews(crop_size=96)
    with_maps = module(train_transform=views, saliency_folder=str(folder))
    assert with_maps.supervision == "image labels and saliency maps (above 127)"
    assert module(train_transform=views).supervision == "image labels"
    with_maps.setup("fit")
    assert "saliency" in next(iter(with_maps.train_dataloader()))
    assert "saliency" not in with_maps.eval_dataset("val")[0]


def test_saliency_is_refused_where_nothing_uses_it(folder: Path) -> None:
    with pytest.raises(WSSSError, match="ToCoViews takes no saliency maps"):
        module(train_transform=ToCoViews(crop_size=96), saliency_folder=str(folder))
    with pytest.raises(WSSSError, match="saliency_threshold=255: expected a number less than"):
        module(train_transform=GETAMViews(), saliency_threshold=255)
