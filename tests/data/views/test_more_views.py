"""MoRe's view by the rules of VOC and of COCO, against the steps of the page."""

import pickle
import random

import albumentations as A
import numpy as np
import pytest
import torch
from pictures import photo, pixels, rng
from PIL import Image

from wsss.core.errors import WSSSError
from wsss.data.views.colours import applied, colour_jitter
from wsss.data.views.drawing import random_resized_crop, scaled_crop
from wsss.data.views.more import MoReCrops

COCO = {"area": None, "scale_range": (0.32, 1.0), "jitter": 0.8}


def test_vocs_rule_crops_then_jitters() -> None:
    views, jitter, rgb = MoReCrops(crop_size=50), A.Compose([colour_jitter(0.5)]), photo()
    for seed in range(20):
        draws = rng(seed)
        crop = random_resized_crop(Image.fromarray(rgb), 50, (0.32, 1.0), draws)
        sample = views(rgb, rng(seed))
        np.testing.assert_array_equal(pixels(sample["image"]), applied(jitter, crop, draws))
        assert sample["box"].tolist() == [0, 50, 0, 50]


def test_cocos_rule_jitters_the_picture_then_places_it() -> None:
    views, jitter, rgb = MoReCrops(crop_size=90, **COCO), A.Compose([colour_jitter(0.8)]), photo()
    padded = 0
    for seed in range(40):
        draws = rng(seed)
        jittered = applied(jitter, rgb, draws)
        crop, box = scaled_crop(Image.fromarray(jittered), 90, (0.32, 1.0), draws)
        sample = views(rgb, rng(seed))
        np.testing.assert_array_equal(pixels(sample["image"]), crop)
        assert tuple(sample["box"].tolist()) == box
        r0, r1, c0, c1 = box
        outside = np.ones((90, 90), bool)
        outside[r0:r1, c0:c1] = False
        assert not pixels(sample["image"])[outside].any(), "black, not jittered"
        padded += bool(outside.any())
    assert padded > 10


def test_shares_and_scales_span_what_the_page_says() -> None:
    """A ramp of columns shows how much of the picture a crop has, and how it is scaled."""
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[:] = np.arange(0, 256, 4, dtype=np.uint8)[None, :, None]  # grey level = 4 x column
    spans, heights, mirrored = [], [], 0
    voc = MoReCrops(crop_size=64, jitter=0)
    coco = MoReCrops(crop_size=64, area=None, scale_range=(0.32, 1.0), jitter=0)
    for seed in range(300):
        shown = pixels(voc(ramp, rng(seed))["image"])[0, :, 0]
        spans.append((int(shown[-1]) - int(shown[0])) / 252)
        r0, r1, c0, c1 = coco(ramp, rng(seed))["box"].tolist()
        assert r1 - r0 == c1 - c0
        heights.append(r1 - r0)
        shown = pixels(coco(ramp, rng(seed))["image"])[r0, c0:c1, 0]
        mirrored += shown[0] > shown[-1]
    widths = np.abs(spans)
    assert 0.48 < widths.min() < 0.6  # sqrt(0.32 x 3/4)
    assert widths.max() > 0.95
    assert 120 < (np.array(spans) < 0).sum() < 180
    assert (min(heights), max(heights)) == (20, 63)  # int(0.32 x 64), below 1 x 64
    assert abs(np.mean(heights) - 0.66 * 64) < 2
    assert 120 < mirrored < 180


@pytest.mark.parametrize(("settings", "probability"), [({}, 0.5), (COCO, 0.8)])
def test_the_jitter_has_its_probability(settings: dict[str, object], probability: float) -> None:
    steps, rgb = MoReCrops(**settings).jitter, photo(8, 8)  # type: ignore[arg-type]
    changed = sum(not np.array_equal(applied(steps, rgb, rng(seed)), rgb) for seed in range(600))
    assert abs(changed / 600 - probability) < 0.08


def test_a_sample_depends_on_its_generator_alone() -> None:
    rgb = photo()
    for views in (MoReCrops(crop_size=40), MoReCrops(crop_size=40, **COCO)):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        first = [views(rgb, rng(seed)) for seed in range(8)]
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        again = [pickle.loads(pickle.dumps(views))(rgb, rng(seed)) for seed in range(8)]
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["box"], b["box"])
        assert len({sample["image"].sum().item() for sample in first}) == 8


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (120, 160)])
def test_any_image_size_works(shape: tuple[int, int]) -> None:
    for views in (MoReCrops(crop_size=64), MoReCrops(crop_size=64, **COCO)):
        for seed in range(5):
            sample = views(photo(*shape), rng(seed))
            assert set(sample) == {"image", "box"}
            assert sample["image"].shape == (3, 64, 64)
            assert torch.isfinite(sample["image"]).all()
            assert sample["box"].dtype == torch.int64
            r0, r1, c0, c1 = sample["box"].tolist()
            assert 0 <= r0 < r1 <= 64
            assert 0 <= c0 < c1 <= 64


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"scale_range": (0.32, 1.0)}, "either area"),
        ({"area": None}, "either area"),
        ({"area": (0.0, 1.0)}, r"area=\[0.0, 1.0\]"),
        ({"area": None, "scale_range": (1.0, 0.5)}, r"scale_range=\[1.0, 0.5\]"),
        ({"area": None, "scale_range": (0.0, 0.5)}, r"scale_range=\[0.0, 0.5\]"),
    ],
)
def test_bad_rules_are_refused(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(WSSSError, match=expected):
        MoReCrops(**settings)  # type: ignore[arg-type]
