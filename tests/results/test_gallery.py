from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from wsss.data.images import voc_palette
from wsss.evaluation.protocol import Protocol
from wsss.methods.base import Outputs
from wsss.results.gallery import (
    PANEL,
    ROWS_PER_SHEET,
    choose_images,
    heat,
    overlay,
    sheet_size,
    write_gallery,
)

NAMES = ("cat", "dog")
PROTOCOL = Protocol(cam_high=0.6, cam_low=0.4, refine="par")


class Colours(nn.Module):
    """Red is cat, green is dog: a real localiser of the scenes below."""

    def __init__(self, *, segments: bool = True, further: bool = False) -> None:
        super().__init__()
        self.segments, self.further = segments, further
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Outputs:
        maps = F.avg_pool2d(images, 4) * self.scale
        return Outputs(maps[:, :2].amax((2, 3)), maps.roll(1, 1) if self.segments else None)

    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        return images[:, :2].clamp(0, 1) * labels[:, :, None, None]

    def gallery_maps(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"red": images[:, 0], "green": images[:, 1, ::2, ::2]} if self.further else {}


class Squares:
    """Images with one square each, alternately a cat and a dog; one is portrait."""

    def __init__(self, count: int, *, shift: int = 0) -> None:
        self.shift = shift
        self.labels = np.eye(2, dtype=np.float32)[np.arange(count) % 2]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        height, width = (48, 32) if index == 1 else (32, 48)
        rgb = np.full((height, width, 3), 90, np.uint8)
        mask = torch.zeros(height, width, dtype=torch.int64)
        k, square = index % 2, (slice(8, 24), slice(8 + self.shift, 24 + self.shift))
        rgb[square] = np.eye(3)[k] * 200
        mask[square] = k + 1
        mask[0] = 255
        return {
            "image": torch.from_numpy(rgb).permute(2, 0, 1).float() / 255,
            "rgb": rgb,
            "mask": mask,
            "labels": torch.from_numpy(self.labels[index]),
            "name": f"square_{index}",
            "index": index,
        }


def draw(
    folder: Path, dataset: Squares, *, n: int = 4, segments: bool = True, further: bool = False
) -> list[Path]:
    module = Colours(segments=segments, further=further)
    return write_gallery(module, dataset, folder, NAMES, n=n, protocol=PROTOCOL).sheets  # type: ignore[arg-type]


def test_sheets_have_the_size_their_content_needs(tmp_path: Path) -> None:
    sheets = draw(tmp_path, Squares(12), n=ROWS_PER_SHEET + 2)
    assert [sheet.name for sheet in sheets] == ["sheet_00.png", "sheet_01.png"]
    assert Image.open(sheets[0]).size == sheet_size(ROWS_PER_SHEET, 5, 1)
    assert Image.open(sheets[1]).size == sheet_size(2, 5, 1)


def test_without_segmentation_the_column_is_left_out(tmp_path: Path) -> None:
    (sheet,) = draw(tmp_path, Squares(4), segments=False)
    assert Image.open(sheet).width == sheet_size(4, 4, 1)[0]


def test_further_maps_of_a_method_get_sheets_of_their_own(tmp_path: Path) -> None:
    sheets = draw(tmp_path, Squares(12), n=ROWS_PER_SHEET + 2, further=True)
    names = [sheet.name for sheet in sheets]
    assert names == ["sheet_00.png", "sheet_00_maps.png", "sheet_01.png", "sheet_01_maps.png"]
    assert Image.open(sheets[1]).size == sheet_size(ROWS_PER_SHEET, 3, 1)
    pixels = np.asarray(Image.open(sheets[1])).astype(int)
    middle = pixels[:, 16 + PANEL + 8 : 16 + 2 * PANEL + 8]
    hot = (middle[..., 0] > 150) & (middle[..., 2] < 80)
    assert hot.sum() > 1000, "the red map is hot where a cat is"
    (again, *_) = draw(tmp_path, Squares(2), n=2)
    assert sorted(tmp_path.iterdir()) == [again]


def test_same_input_same_pixels_and_another_mask_differs(tmp_path: Path) -> None:
    first, again, other = (
        Image.open(draw(tmp_path / name, dataset)[0]).tobytes()
        for name, dataset in (
            ("a", Squares(4)),
            ("b", Squares(4)),
            ("c", Squares(4, shift=4)),
        )
    )
    assert first == again
    assert first != other


def test_truth_column_shows_class_colours_where_the_mask_is(tmp_path: Path) -> None:
    (sheet,) = draw(tmp_path, Squares(1), n=1)
    pixels = np.asarray(Image.open(sheet)).astype(int)
    truth = pixels[:, -16 - PANEL : -16]
    cat = voc_palette()[3]  # dark red of class 1
    red = (truth[..., 0] > truth[..., 1] + 40) & (truth[..., 0] > truth[..., 2] + 40)
    assert cat == 128
    scale = PANEL / 48
    assert red[80:].sum() == pytest.approx((16 * scale) ** 2, rel=0.1)


def test_older_sheets_go(tmp_path: Path) -> None:
    draw(tmp_path, Squares(12), n=12)
    (only,) = draw(tmp_path, Squares(12), n=2)
    assert sorted(tmp_path.iterdir()) == [only]


def test_choice_is_even_and_shows_every_class() -> None:
    labels = np.zeros((100, 3), np.float32)
    labels[:, 0] = 1
    labels[7, 1] = labels[93, 2] = 1
    chosen = choose_images(labels, 5)
    assert len(chosen) == 5
    assert chosen == sorted(chosen)
    assert {7, 93} <= set(chosen)
    assert choose_images(labels, 5) == chosen
    assert choose_images(np.ones((10, 1), np.float32), 3) == [0, 4, 9]
    assert choose_images(np.ones((2, 1), np.float32), 16) == [0, 1]


def test_overlay_marks_classes_void_and_outline() -> None:
    rgb = np.full((20, 20, 3), 100, np.uint8)
    mask = np.zeros((20, 20), np.uint8)
    mask[4:12, 4:12] = 1
    mask[16:] = 255
    out = overlay(rgb, mask, voc_palette()).astype(int)
    assert out[8, 8, 0] > out[8, 8, 1] + 50, "class 1 is red"
    assert out[4, 4].tolist() == [255, 255, 255], "outline"
    assert np.ptp(out[1, 1]) == 0, "background keeps the image's hue"
    assert set(out[17, :, 0].tolist()) == {150, 255}, "void is hatched"
    assert rgb.max() == 100
    assert mask.max() == 255, "inputs are left alone"


def test_a_grey_class_is_seen_on_any_grey_picture() -> None:
    ids = np.zeros((40, 40), np.uint8)
    ids[8:32, 8:32] = 1
    palette = [0, 0, 0, 128, 128, 128]
    for grey in range(0, 256, 8):
        rgb = np.full((40, 40, 3), grey, np.uint8)
        inside = overlay(rgb, ids, palette)[10:30, 10:30].astype(int)
        plain = overlay(rgb, np.zeros_like(ids), palette)[10:30, 10:30].astype(int)
        differs = np.abs(inside - plain).max(axis=2) > 30
        assert differs.mean() >= 0.3, grey
    coloured = overlay(rgb, ids, [0, 0, 0, 128, 0, 0])[10:30, 10:30]
    assert len(np.unique(coloured.reshape(-1, 3), axis=0)) == 1, "others are plain"


def test_heat_is_blue_when_low_and_red_when_high() -> None:
    rgb = np.full((1, 2, 3), 100, np.uint8)
    low, high = heat(rgb, np.array([[0.0, 1.0]], np.float32))[0].astype(int)
    assert low[2] > low[0]
    assert high[0] > high[2]
