"""ToCo's views against Pillow and torchvision, in which the official pipeline is written."""

import pickle
import random

import albumentations as A
import numpy as np
import pytest
import torch
from pictures import photo, pixels, rng
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from wsss.data.views.colours import augment
from wsss.data.views.drawing import draw_area, random_resized_crop, scaled_crop
from wsss.data.views.toco import GLOBAL2_AREA, PillowBlur, ToCoViews, photometric


def plain(views: ToCoViews) -> ToCoViews:
    """Switches the photometric steps off, so that geometry can be compared pixel by pixel."""
    views.input_steps = views.local_steps = views.view2_steps = A.Compose([])
    return views


def whole_crop(
    rgb: np.ndarray, size: int, draws: np.random.Generator
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Steps 1-3 as the page describes them: resize all, flip, pad, crop."""
    scale = draws.uniform(0.5, 2.0)
    width, height = int(scale * rgb.shape[1]), int(scale * rgb.shape[0])
    image = np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR))
    corner, box = [], []
    for length in (height, width):
        padded = max(length, size)
        first = int(draws.integers(abs(length - size) + 1))
        corner.append((first, 0) if length < size else (0, first))
        box += [corner[-1][0], min(corner[-1][0] + length, padded, size)]
    if draws.random() < 0.5:
        image = image[:, ::-1]
    canvas = np.zeros((max(height, size), max(width, size), 3), np.uint8)
    (pad_row, row), (pad_column, column) = corner
    canvas[pad_row : pad_row + height, pad_column : pad_column + width] = image
    return canvas[row : row + size, column : column + size], tuple(box)


@pytest.mark.parametrize("size", [64, 150, 300])
def test_crop_equals_resizing_the_whole_picture(size: int) -> None:
    rgb = photo()
    for seed in range(40):
        crop, box = scaled_crop(Image.fromarray(rgb), size, (0.5, 2.0), rng(seed))
        expected, expected_box = whole_crop(rgb, size, rng(seed))
        assert box == expected_box
        error = abs(crop.astype(int) - expected)
        assert error.max() <= 2  # Pillow takes the box as 32-bit floats
        assert error.mean() < 0.12


def real_pixels(image: torch.Tensor) -> tuple[int, ...]:
    rows, columns = np.nonzero(pixels(image).sum(axis=2))
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


def test_box_is_where_the_real_pixels_are() -> None:
    views = plain(ToCoViews(crop_size=150))
    padded = 0
    for seed in range(60):
        sample = views(photo(), rng(seed))
        assert tuple(sample["box"].tolist()) == real_pixels(sample["image"])
        assert tuple(sample["box"].tolist()) == real_pixels(sample["local_view"])
        padded += sample["box"].tolist() != [0, 150, 0, 150]
    assert 10 < padded < 60


def test_local_view_shows_the_pixels_of_the_input() -> None:
    views = plain(ToCoViews(crop_size=100))
    for seed in range(20):
        sample = views(photo(), rng(seed))
        torch.testing.assert_close(sample["image"], sample["local_view"])


def test_official_compat_flips_views_alone_and_leaves_the_box() -> None:
    """toco.md Q2 and Q3: half of the views disagree, half of the asymmetric boxes are wrong."""
    views = plain(ToCoViews(crop_size=150, official_compat=True))
    disagree = asymmetric = wrong = 0
    for seed in range(300):
        sample = views(photo(), rng(seed))
        image, local = pixels(sample["image"]), pixels(sample["local_view"])
        if not np.array_equal(image, local):
            np.testing.assert_array_equal(image[:, ::-1], local)
            disagree += 1
        _, _, c0, c1 = sample["box"].tolist()
        if c0 != 150 - c1:
            asymmetric += 1
            wrong += tuple(sample["box"].tolist()) != real_pixels(sample["image"])
    assert 110 < disagree < 190
    assert asymmetric > 50
    assert 0.35 < wrong / asymmetric < 0.65


def test_the_two_modes_differ_in_nothing_else() -> None:
    official, ours = ToCoViews(crop_size=96, official_compat=True), ToCoViews(crop_size=96)
    same_local = 0
    for seed in range(20):
        a, b = official(photo(), rng(seed)), ours(photo(), rng(seed))
        torch.testing.assert_close(a["image"], b["image"], rtol=0, atol=0)
        torch.testing.assert_close(a["view2"], b["view2"], rtol=0, atol=0)
        same_local += torch.equal(a["local_view"], b["local_view"])
    assert 3 < same_local < 17


def test_view2_is_a_bicubic_crop_of_the_original() -> None:
    rgb, flipped = photo(), 0
    for seed in range(20):
        view = random_resized_crop(Image.fromarray(rgb), 50, GLOBAL2_AREA, rng(seed))
        draws = rng(seed)
        left, top, width, height = draw_area(160, 120, GLOBAL2_AREA, draws)
        part = Image.fromarray(rgb[top : top + height, left : left + width])
        expected = np.array(part.resize((50, 50), Image.Resampling.BICUBIC))
        flip = draws.random() < 0.5
        flipped += flip
        np.testing.assert_array_equal(view, expected[:, ::-1] if flip else expected)
    assert 4 < flipped < 16


@pytest.mark.parametrize(("width", "height"), [(160, 120), (100, 300), (1000, 20), (1, 1)])
def test_area_is_drawn_as_torchvision_does(width: int, height: int) -> None:
    draws = rng(0)
    ours = np.array([draw_area(width, height, GLOBAL2_AREA, draws) for _ in range(1500)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.4, 1.0], [3 / 4, 4 / 3]) for _ in range(1500)]
    )[:, [1, 0, 3, 2]]
    assert (ours[:, 0] + ours[:, 2] <= width).all()
    assert (ours[:, 1] + ours[:, 3] <= height).all()
    spread = theirs.std(axis=0)
    np.testing.assert_array_less(
        abs(ours.mean(axis=0) - theirs.mean(axis=0)), 5 * spread / np.sqrt(1500) + 1e-9
    )
    np.testing.assert_allclose(ours.std(axis=0), spread, rtol=0.15, atol=0.2)


@pytest.mark.parametrize("radius", [0.1, 0.3, 0.5, 1.0, 1.4, 1.7, 2.0])
def test_blur_is_pillows(radius: float) -> None:
    """On white noise, the hardest case; the border differs as Pillow repeats it at each pass."""
    noise = rng(0).integers(0, 256, (100, 120, 3), dtype=np.uint8)
    blurred = PillowBlur().apply(noise, radius).astype(int)
    expected = np.array(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(radius))).astype(int)
    error = abs(blurred - expected)
    assert error[8:-8, 8:-8].max() <= 3
    assert error.mean() < 1.1
    if radius >= 0.3:
        assert error.mean() < 0.1 * abs(expected - noise).mean()


def test_blur_radius_is_drawn_uniformly() -> None:
    blur = PillowBlur(p=1)
    blur.set_random_state(rng(0), random.Random(0))
    radii = np.array([blur.get_params()["radius"] for _ in range(500)])
    assert 0.1 <= radii.min() < 0.12
    assert 1.98 < radii.max() <= 2.0
    assert abs(radii.mean() - 1.05) < 0.08


def test_solarisation_and_grey_are_pillows() -> None:
    rgb = photo()
    rgb[:8, :32] = np.arange(256, dtype=np.uint8).reshape(8, 32)[..., None]
    solarise = photometric(blur=0, radius=(0.1, 2.0), solarise=1.0).transforms[3]
    np.testing.assert_array_equal(
        solarise(image=rgb)["image"], np.array(ImageOps.solarize(Image.fromarray(rgb), 128))
    )
    grey = A.ToGray(p=1)(image=rgb)["image"]
    expected = np.array(Image.fromarray(rgb).convert("L"))[..., None]
    assert abs(grey.astype(int) - expected).max() <= 1


def test_colour_jitter_is_torchvisions() -> None:
    """Same factors, same random order of the four operations, same result but for rounding."""
    jitter = photometric(blur=0, radius=(0.1, 2.0)).transforms[0]
    operations = [
        TF.adjust_brightness,
        TF.adjust_contrast,
        TF.adjust_saturation,
        TF.adjust_hue,
    ]
    rgb, orders, factors = photo(), set(), []
    jitter.set_random_state(rng(0), random.Random(0))
    for _ in range(60):
        drawn = jitter.get_params()
        factors.append([drawn[k] for k in ("brightness", "contrast", "saturation", "hue")])
        orders.add(tuple(drawn["order"]))
        expected = Image.fromarray(rgb)
        for i in drawn["order"]:
            expected = operations[i](expected, factors[-1][i])
        error = abs(jitter.apply(rgb.copy(), **drawn).astype(int) - np.array(expected))
        assert error.mean() < 3  # hue has 180 steps in OpenCV, 256 in Pillow
    low, high = np.min(factors, axis=0), np.max(factors, axis=0)
    bounds = np.array([[0.6, 1.4], [0.6, 1.4], [0.8, 1.2], [-0.1, 0.1]])
    assert (low >= bounds[:, 0]).all()
    assert (high <= bounds[:, 1]).all()
    assert ((high - low) > 0.85 * (bounds[:, 1] - bounds[:, 0])).all()
    assert len(orders) > 15  # of 24


def test_photometric_steps_are_drawn_independently() -> None:
    """Untouched 0.2 x 0.8, greyed alone 0.2 x 0.2 (albumentations' own seeding gives 0.2 and 0)."""
    views = ToCoViews(crop_size=8)
    steps, rgb = photometric(blur=0, radius=(0.1, 2.0)), photo(8, 8)
    grey = A.ToGray(p=1)(image=rgb)["image"]
    untouched = greyed = 0
    for seed in range(2000):
        out = pixels(augment(steps, rgb, rng(seed)))
        untouched += np.array_equal(out, rgb)
        greyed += np.array_equal(out, grey)
    assert 0.13 < untouched / 2000 < 0.19
    assert 0.025 < greyed / 2000 < 0.055
    assert views.input_steps.transforms[2].p == 1.0
    assert views.local_steps.transforms[2].p == 0.5
    assert views.view2_steps.transforms[2].p == 0.1
    assert views.view2_steps.transforms[3].p == 0.2
    assert views.input_steps.transforms[3].p == views.local_steps.transforms[3].p == 0


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (20, 30), (120, 160)])
def test_any_image_size_works(shape: tuple[int, int]) -> None:
    views = ToCoViews(crop_size=64)
    for seed in range(10):
        sample = views(photo(*shape), rng(seed))
        for key in ("image", "local_view", "view2"):
            assert sample[key].shape == (3, 64, 64)
            assert sample[key].dtype == torch.float32
            assert torch.isfinite(sample[key]).all()
        r0, r1, c0, c1 = sample["box"].tolist()
        assert 0 <= r0 < r1 <= 64
        assert 0 <= c0 < c1 <= 64
        assert sample["box"].dtype == torch.int64


def test_sample_depends_on_its_generator_alone() -> None:
    views, rgb = ToCoViews(crop_size=48), photo()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    first = views(rgb, rng(5))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert before == after
    views(rgb, rng(6))
    again = pickle.loads(pickle.dumps(views))(rgb, rng(5))
    for key, value in first.items():
        torch.testing.assert_close(value, again[key], rtol=0, atol=0)
    other = views(rgb, rng(6))
    assert not torch.equal(first["image"], other["image"])


def test_padding_is_black_before_the_jitter() -> None:
    sample = plain(ToCoViews(crop_size=400))(photo(), rng(0))
    r0, r1, c0, c1 = sample["box"].tolist()
    image = pixels(sample["image"])
    outside = np.ones(image.shape[:2], bool)
    outside[r0:r1, c0:c1] = False
    assert (image[outside] == 0).all()
    assert (image[~outside].sum(axis=1) > 0).all()
