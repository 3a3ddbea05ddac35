import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from wsss.core.errors import WSSSError
from wsss.core.files import write_atomically
from wsss.data.image_files import find_images
from wsss.data.images import (
    image_size,
    mask_png,
    read_mask,
    read_rgb,
    voc_palette,
)
from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD, denormalise, normalise


def ramp(height: int = 12, width: int = 16) -> np.ndarray:
    """A picture whose three channels differ at every pixel."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 20, columns * 15, 255 - rows * 10], axis=2).astype(np.uint8)


def one_line(error: pytest.ExceptionInfo[WSSSError], path: Path) -> str:
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_rgb_png_is_read_exactly(tmp_path: Path) -> None:
    Image.fromarray(ramp()).save(tmp_path / "a.png")
    rgb = read_rgb(tmp_path / "a.png")
    np.testing.assert_array_equal(rgb, ramp())
    assert rgb.dtype == np.uint8
    assert rgb.flags.writeable


def test_grey_is_repeated(tmp_path: Path) -> None:
    Image.fromarray(ramp()[..., 1]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), ramp()[..., [1, 1, 1]])


def test_grey_jpeg_has_three_equal_channels(tmp_path: Path) -> None:
    Image.fromarray(ramp()[..., 0]).save(tmp_path / "a.jpg", quality=95)
    rgb = read_rgb(tmp_path / "a.jpg")
    assert rgb.shape == (12, 16, 3)
    assert (rgb == rgb[..., :1]).all()
    assert abs(rgb[..., 0].astype(int) - ramp()[..., 0]).max() < 6


def test_cmyk_jpeg_has_the_colours_of_the_original(tmp_path: Path) -> None:
    flat = np.broadcast_to(np.array([200, 100, 30], np.uint8), (16, 16, 3))
    Image.fromarray(np.ascontiguousarray(flat)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert abs(read_rgb(tmp_path / "a.jpg").astype(int) - flat).max() < 6


def test_palette_gives_its_colours_and_transparency_no_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), mode="P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "a.png", transparency=bytes([0, 255]))
    expected = np.array([[10, 20, 30], [200, 100, 50]], np.uint8)[np.array([[0, 1], [1, 0]])]
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), expected)
    assert not [w for w in recwarn if "ransparency" in str(w.message)]


def test_alpha_is_dropped(tmp_path: Path) -> None:
    alpha = np.full((12, 16, 1), 7, np.uint8)
    Image.fromarray(np.concatenate([ramp(), alpha], axis=2)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), ramp())


def test_sixteen_bits_keep_the_high_byte(tmp_path: Path) -> None:
    grey = (ramp()[..., 0].astype(np.uint16) << 8) + 99
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode.startswith("I;16")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), ramp()[..., [0, 0, 0]])


def test_floating_point_and_32_bit_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(WSSSError, match="floating-point") as error:
        read_rgb(tmp_path / "f.tif")
    one_line(error, tmp_path / "f.tif")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "i.tif")
    with pytest.raises(WSSSError, match=r"outside 0\.\.65535") as error:
        read_rgb(tmp_path / "i.tif")
    one_line(error, tmp_path / "i.tif")


def test_orientation_tag_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.fromarray(ramp()).save(tmp_path / "a.jpg", exif=exif)
    assert Image.open(tmp_path / "a.jpg").getexif()[0x0112] == 6
    assert read_rgb(tmp_path / "a.jpg").shape == (16, 12, 3)


@pytest.mark.parametrize("read", [read_rgb, image_size])
def test_a_huge_image_is_to_be_scaled_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any
) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (15, 14)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(WSSSError, match=r"has 210 pixels, at most 200 are read; scale it") as error:
        read(path)
    assert "copy" not in one_line(error, path)


def test_a_large_image_is_read_without_a_warning_of_attacks(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (15, 14)).save(path)
    limit = "from PIL import Image; Image.MAX_IMAGE_PIXELS = 110"
    read = "import sys, pathlib, wsss.data.images as i; i.read_rgb(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", f"{limit}; {read}", str(path)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("read", [read_rgb, image_size])
def test_an_unknown_format_is_to_be_converted(tmp_path: Path, read: Any) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    with pytest.raises(WSSSError, match="convert it") as error:
        read(path)
    one_line(error, path)
    path.unlink()
    path.mkdir()
    with pytest.raises(WSSSError, match="Is a directory"):
        read(path)


def test_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(WSSSError, match="is missing") as error:
        read_rgb(tmp_path / "none.jpg")
    one_line(error, tmp_path / "none.jpg")


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "broken png"])
def test_corrupt_image_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.png" if kind == "broken png" else "a.jpg")
    Image.fromarray(ramp(200, 300)).save(path)
    whole = path.read_bytes()
    content = {
        "empty": b"",
        "text": b"<html>not found</html>",
        "truncated": whole[: len(whole) // 2],
        "broken png": whole[:60] + bytes(40) + whole[100:],
    }
    path.write_bytes(content[kind])
    with pytest.raises(WSSSError, match="cannot be decoded") as error:
        read_rgb(path)
    one_line(error, path)


def with_thumbnail(path: Path) -> bytes:
    """A JPEG whose EXIF block holds a whole small JPEG, as cameras write it."""
    small = io.BytesIO()
    Image.fromarray(ramp()).save(small, format="JPEG")
    Image.fromarray(ramp(200, 300)).save(path, exif=b"Exif\0\0" + small.getvalue())
    return path.read_bytes()


def test_size_comes_from_the_header(tmp_path: Path) -> None:
    with_thumbnail(tmp_path / "a.jpg")
    assert image_size(tmp_path / "a.jpg") == (200, 300)


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.999])
def test_truncated_jpeg_with_thumbnail_is_found_undecoded(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "a.jpg"
    whole = with_thumbnail(path)
    assert len(whole) < 65536
    cut = whole[: int(keep * len(whole))]
    assert b"\xff\xd9" in cut  # the thumbnail's
    path.write_bytes(cut)
    with pytest.raises(WSSSError, match="no complete image") as error:
        image_size(path)
    one_line(error, path)


def test_jpeg_cut_inside_its_header_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(ramp(200, 300)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\xff\xda")])
    with pytest.raises(WSSSError, match="no complete image") as error:
        image_size(path)
    one_line(error, path)


def test_written_mask_is_read_back_and_has_the_palette(tmp_path: Path) -> None:
    ids = np.array([[0, 1], [20, 255]], np.uint8)
    write_atomically(tmp_path / "new" / "m.png", mask_png(ids))
    with Image.open(tmp_path / "new" / "m.png") as image:
        assert image.mode == "P"
        assert image.getpalette() == voc_palette()
        np.testing.assert_array_equal(np.asarray(image), ids)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.png"]


def save_mask(path: Path, ids: np.ndarray, mode: str) -> None:
    image = Image.fromarray(ids.astype(np.uint8), mode=mode)
    if mode == "P":
        image.putpalette(voc_palette())
    image.save(path)


IDS = np.array([[0, 1, 2], [255, 3, 0]])


@pytest.mark.parametrize("mode", ["P", "L"])
def test_mask_gives_its_ids(tmp_path: Path, mode: str) -> None:
    save_mask(tmp_path / "m.png", IDS, mode)
    mask = read_mask(tmp_path / "m.png", num_classes=3, size=(2, 3))
    np.testing.assert_array_equal(mask, IDS)
    assert mask.dtype == np.uint8


def test_mask_with_few_bits_per_pixel_gives_its_ids(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8), mode="P")
    image.putpalette(voc_palette(4))
    image.save(tmp_path / "m.png", bits=2)
    np.testing.assert_array_equal(
        read_mask(tmp_path / "m.png", num_classes=3), np.array([[0, 1], [2, 3]])
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_coloured_mask_is_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (3, 2)).save(tmp_path / "m.png")
    with pytest.raises(WSSSError, match=f"has mode {mode}; expected class ids") as error:
        read_mask(tmp_path / "m.png", num_classes=3)
    one_line(error, tmp_path / "m.png")


def test_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    save_mask(tmp_path / "m.png", IDS, "P")
    with pytest.raises(WSSSError, match=r"is 3x2 \(width x height\) but its image is 2x3") as error:
        read_mask(tmp_path / "m.png", num_classes=3, size=(3, 2))
    one_line(error, tmp_path / "m.png")


def test_class_id_out_of_range_is_refused(tmp_path: Path) -> None:
    save_mask(tmp_path / "m.png", IDS, "P")
    with pytest.raises(WSSSError, match=r"holds class id 3; expected 0\.\.2 or 255") as error:
        read_mask(tmp_path / "m.png", num_classes=2)
    one_line(error, tmp_path / "m.png")


def test_normalise_and_back() -> None:
    images = normalise(ramp())
    assert images.shape == (3, 12, 16)
    assert images.is_contiguous()
    expected = (ramp() / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(images.numpy(), expected.transpose(2, 0, 1), atol=1e-6)
    back = denormalise(images[None])[0].permute(1, 2, 0)
    torch.testing.assert_close(back, torch.from_numpy(ramp()).float(), atol=1e-3, rtol=0)


def test_palette_is_the_devkits() -> None:
    palette = np.array(voc_palette()).reshape(256, 3).tolist()
    assert palette[:3] == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    assert palette[15] == [192, 128, 128]  # person
    assert palette[20] == [0, 64, 128]  # tvmonitor
    assert palette[255] == [224, 224, 192]  # the void borders
    assert len({tuple(colour) for colour in palette}) == 256


def test_folder_of_images_is_sorted_and_ignores_the_rest(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.PNG", "a.jpg", "c.webp", "d.bmp", "sub/e.png", "._a.jpg"):
        Image.fromarray(ramp()).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    found = find_images(tmp_path)
    assert {name: path.name for name, path in found.items()} == {
        "a": "a.jpg",
        "b": "b.PNG",
        "c": "c.webp",
        "d": "d.bmp",
    }
    np.testing.assert_array_equal(read_rgb(found["b"]), ramp())


def test_one_image_and_patterns_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of several folders keep their folders, so that equal names stay apart."""
    monkeypatch.chdir(tmp_path)
    for name in ("x/a.png", "x/b.png", "y/a.png", "y/[1].png", "y/deep/c.png", "._d.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramp()).save(name)
    Path("y/notes.txt").write_text("x")
    assert find_images("x/a.png") == {"a": Path("x/a.png")}
    assert list(find_images("x/*")) == ["a", "b"]
    assert list(find_images("*/a.png")) == ["x/a", "y/a"]
    assert list(find_images("y/[1].png")) == ["[1]"], "a file's own name comes before a pattern"
    everything = ["x/a", "x/b", "y/[1]", "y/a", "y/deep/c"]
    assert list(find_images(f"{tmp_path}/**/*")) == everything
    Path("y/a.jpg").write_bytes(Path("y/a.png").read_bytes())
    with pytest.raises(WSSSError, match=r"y/a\.jpg and y/a\.png share the name 'y/a'"):
        find_images("*/a.*")
    with pytest.raises(WSSSError, match="matches no image"):
        find_images("*/*.gif")


def test_bad_folders_of_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(WSSSError, match="is missing") as error:
        find_images(tmp_path / "none")
    one_line(error, tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(WSSSError, match="holds no image") as error:
        find_images(tmp_path)
    one_line(error, tmp_path)
    for name in ("a.jpg", "a.png"):
        Image.fromarray(ramp()).save(tmp_path / name)
    with pytest.raises(WSSSError, match="share the name 'a'") as error:
        find_images(tmp_path)
    one_line(error, tmp_path / "a.png")


def test_a_black_and_white_mask_says_what_to_write(tmp_path: Path) -> None:
    Image.new("1", (4, 4), 1).save(tmp_path / "m.png")
    with pytest.raises(WSSSError, match=r"mode 1.*with 1 \(the class\) where it is white"):
        read_mask(tmp_path / "m.png", num_classes=1)
