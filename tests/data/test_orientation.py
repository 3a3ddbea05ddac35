"""EXIF orientation: one rule for all that read images, and for the masks that belong to them."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.data.image_files import find_images
from wsss.data.images import (
    image_size,
    orientation,
    read_mask,
    read_rgb,
    read_saliency,
)
from wsss.data.table_module import TableDataModule

TAG = 0x0112
SIZE = (40, 60)  # stored height and width
RED = (200, 30, 30)


def exif(tag: int) -> Image.Exif:
    tags = Image.Exif()
    tags[TAG] = tag
    return tags


def picture() -> np.ndarray:
    """A picture that no turn or mirror leaves as it is, whose red part is large."""
    pixels = np.full((*SIZE, 3), 90, np.uint8)
    pixels[8:16, 8:32] = RED
    return pixels


def turned(array: np.ndarray, tag: int) -> np.ndarray:
    """The array as a viewer shows it."""
    image = Image.fromarray(array)
    image.getexif()[TAG] = tag
    return np.asarray(ImageOps.exif_transpose(image))


def write(path: Path, tag: int, number: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True)
    pixels = picture()
    pixels[-1] += np.uint8(8 * number)  # no two photographs are the same
    Image.fromarray(pixels).save(path, exif=exif(tag), quality=95)
    return path


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_every_tag_is_applied_as_viewers_do(tmp_path: Path, tag: int, suffix: str) -> None:
    path = write(tmp_path / f"a.{suffix}", tag)
    rgb, expected = read_rgb(path), turned(picture(), tag)
    assert rgb.shape == expected.shape
    assert abs(rgb.astype(int) - expected).max() < (1 if suffix in ("png", "tif") else 90)
    assert abs(rgb.astype(int) - expected).mean() < 5
    assert image_size(path) == rgb.shape[:2]
    if suffix != "tif":  # that Pillow turns itself
        assert orientation(path) == tag


def test_a_png_may_have_its_tag_behind_the_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture()).save(path)
    whole = path.read_bytes()
    body = b"eXIf" + exif(6).tobytes().removeprefix(b"Exif\0\0")
    chunk = (len(body) - 4).to_bytes(4) + body + zlib.crc32(body).to_bytes(4)
    path.write_bytes(whole[:-12] + chunk + whole[-12:])
    assert read_rgb(path).shape[:2] == image_size(path) == SIZE[::-1]


@pytest.mark.parametrize("tag", [0, 9, 65535])
def test_a_value_that_is_no_orientation_is_left_alone(tmp_path: Path, tag: int) -> None:
    path = write(tmp_path / "a.jpg", tag)
    assert read_rgb(path).shape[:2] == image_size(path) == SIZE


def test_broken_metadata_does_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", 6)
    path.write_bytes(path.read_bytes().replace(b"MM\0*", b"XX\0*").replace(b"II*\0", b"XX*\0"))
    assert read_rgb(path).shape[:2] == image_size(path) == SIZE


def ids() -> np.ndarray:
    return (picture()[..., 0] == RED[0]).astype(np.uint8)


@pytest.mark.parametrize("tag", range(2, 9))
@pytest.mark.parametrize("reader", ["mask", "saliency"])
def test_a_mask_of_the_upright_picture_is_read_as_it_is(
    tmp_path: Path, tag: int, reader: str
) -> None:
    image = write(tmp_path / "a.jpg", tag)
    expected = turned(ids(), tag)
    np.testing.assert_array_equal(read(tmp_path, image, expected, reader), expected)


@pytest.mark.parametrize("tag", range(5, 9))
@pytest.mark.parametrize("reader", ["mask", "saliency"])
def test_a_mask_of_the_stored_pixels_is_turned_along(tmp_path: Path, tag: int, reader: str) -> None:
    image = write(tmp_path / "a.jpg", tag)
    np.testing.assert_array_equal(read(tmp_path, image, ids(), reader), turned(ids(), tag))


def read(folder: Path, image: Path, drawn: np.ndarray, reader: str) -> np.ndarray:
    path = folder / "m.png"
    scale = 1 if reader == "mask" else 255
    Image.fromarray(drawn * scale).save(path)
    if reader == "mask":
        return read_mask(path, num_classes=1, size=image_size(image), image=image)
    return read_saliency(path, threshold=127, size=image_size(image), image=image)


def test_other_sizes_name_the_tag(tmp_path: Path) -> None:
    image = write(tmp_path / "a.jpg", 6)
    with pytest.raises(WSSSError, match=r"is 30x30.* is 40x60 as its EXIF orientation tag 6 turns"):
        read(tmp_path, image, np.zeros((30, 30), np.uint8), "mask")
    image = write(tmp_path / "b.jpg", 1)
    with pytest.raises(WSSSError, match=r"is 40x60.* is 60x40, as if one of them were turned"):
        read(tmp_path, image, np.zeros((60, 40), np.uint8), "mask")


def table(root: Path, tag: int, *, masks: bool = True) -> list[str]:
    """Two photographs for each split, with masks of the upright picture."""
    lines = ["image,labels,mask,split"] if masks else ["image,labels,split"]
    (root / "m").mkdir(parents=True)
    for number, split in enumerate(("train", "train", "val", "val")):
        write(root / "i" / f"{number}.jpg", tag, number)
        Image.fromarray(turned(ids(), tag)).save(root / "m" / f"{number}.png")
        mask = f"m/{number}.png," if masks else ""
        lines.append(f"i/{number}.jpg,cat,{mask}{split}")
    (root / "labels.csv").write_text("\n".join(lines))
    return ["data=table", f"root={root}"]


def red(rgb: Any) -> np.ndarray:
    pixels = np.asarray(rgb)
    return (pixels[..., 0] > 150) & (pixels[..., 1] < 60)


@pytest.mark.parametrize("tag", range(2, 9))
def test_training_evaluation_and_prediction_see_the_same(tmp_path: Path, tag: int) -> None:
    table(tmp_path, tag)
    seen = []

    def whole(rgb: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        seen.append(rgb.copy())
        return {"image": torch.from_numpy(rgb)}

    data = TableDataModule(
        name="table", root=tmp_path, csv="labels.csv", train_transform=whole, global_batch_size=2
    )
    data.setup("fit")
    data.check_contents()
    next(iter(data.train_dataloader()))
    batch = next(iter(data.val_dataloader()))
    mask = turned(ids(), tag) > 0
    np.testing.assert_array_equal(batch["mask"][0].numpy() > 0, mask)
    for rgb in (batch["rgb"][0], seen[0], read_rgb(min(find_images(tmp_path / "i").values()))):
        assert (red(rgb) & mask).sum() > 0.9 * mask.sum()
        assert (red(rgb) & ~mask).sum() < 0.1 * mask.sum()
    assert data.eval_dataset("val").sizes() == [mask.shape] * 2


@pytest.mark.parametrize("masks", [True, False])
def test_the_check_warns_of_tagged_images(
    tmp_path: Path, masks: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = table(tmp_path, 3, masks=masks)
    write(tmp_path / "i" / "0.jpg", 1)
    assert main(["data", "check", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("warning: orientation [train]")]
    assert "1 of 2 images" in line
    assert "i/1.jpg first (3: turned by 180 degrees)" in line
    assert ("1 masks be drawn" in line) == masks
    assert any("orientation [val]: 2 of 2 images" in line for line in lines)
