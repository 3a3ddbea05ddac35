"""WeCLIP's crop: the scaled picture, mirrored or not, on zeros (weclip.md section 8)."""

import numpy as np
import torch

from wsss.data.views.weclip import WeCLIPCrops
from wsss.maps.pixels import denormalise, normalise


def draw(rgb: np.ndarray, seed: int, **settings: object) -> tuple[torch.Tensor, list[int]]:
    sample = WeCLIPCrops(**settings)(rgb, np.random.default_rng(seed))
    assert set(sample) == {"image", "box"}
    return sample["image"], sample["box"].tolist()


def test_small_pictures_lie_on_black() -> None:
    rgb = np.random.default_rng(0).integers(1, 255, (20, 30, 3), dtype=np.uint8)
    corners, flips = set(), set()
    for seed in range(20):
        image, (r0, r1, c0, c1) = draw(rgb, seed, crop_size=48, scale_range=(1.0, 1.0))
        assert image.shape == (3, 48, 48)
        assert (r1 - r0, c1 - c0) == (20, 30)
        part, whole = image[:, r0:r1, c0:c1], normalise(rgb)
        flips.add(torch.equal(part, whole.flip(-1)))
        assert torch.equal(part, whole) or torch.equal(part, whole.flip(-1))
        outside = denormalise(image)
        outside[:, r0:r1, c0:c1] = 0
        assert outside.abs().max() < 1e-4  # raw zeros, not the mean colour
        corners.add((r0, c0))
    assert len(corners) > 10
    assert flips == {True, False}


def test_large_pictures_are_cropped_and_scaled() -> None:
    rgb = np.full((100, 120, 3), 128, np.uint8)
    sides = set()
    for seed in range(20):
        image, box = draw(rgb, seed, crop_size=64)
        assert image.shape == (3, 64, 64)
        sides.add(box[1] - box[0])
    assert {64} < sides  # scales from a half to two
    assert min(sides) >= 50


def test_a_seed_gives_the_same_view() -> None:
    rgb = np.random.default_rng(1).integers(0, 255, (70, 50, 3), dtype=np.uint8)
    first, second = draw(rgb, 3), draw(rgb, 3)
    assert torch.equal(first[0], second[0])
    assert first[0].shape == (3, 320, 320)
    assert first[1] == second[1]
