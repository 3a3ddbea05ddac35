"""ClusterCAM's view: crops, timm's random operations, erasing."""

import pickle
import random

import numpy as np
import pytest
import torch
from pictures import photo, pixels, rng
from PIL import Image

from wsss.core.errors import WSSSError
from wsss.data.views.clustercam import ClusterCAMView
from wsss.data.views.drawing import random_resized_crop
from wsss.data.views.imagenet import ERASED_AREA, erase_box


def test_cluster_view_is_one_normalised_square() -> None:
    view = ClusterCAMView(crop_size=64)
    for seed, shape in enumerate([(1, 1), (3, 200), (120, 160)]):
        sample = view(photo(*shape), rng(seed))
        assert set(sample) == {"image"}
        assert sample["image"].shape == (3, 64, 64)
        assert sample["image"].dtype == torch.float32
        assert torch.isfinite(sample["image"]).all()


def test_the_shown_share_of_the_image_can_be_chosen() -> None:
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[:] = np.arange(0, 256, 4, dtype=np.uint8)[None, :, None]  # grey level = 4 x column

    def narrowest(area: tuple[float, float]) -> float:
        view = ClusterCAMView(crop_size=32, area=area)
        view.rand_augment.num_layers = 0
        spans = []
        for seed in range(20):
            row = pixels(view(ramp, rng(seed))["image"])[0, :, 0].astype(int)
            spans.append(abs(int(row[-1]) - int(row[0])) / 252)
        return min(spans)

    assert narrowest((0.08, 0.1)) < 0.4
    assert narrowest((0.9, 1.0)) > 0.8


@pytest.mark.parametrize("area", [(0.0, 1.0), (0.5, 0.4), (0.5, 1.5)])
def test_a_share_that_is_no_share_is_refused(area: tuple[float, float]) -> None:
    with pytest.raises(WSSSError, match="area"):
        ClusterCAMView(area=area)


def test_cluster_view_depends_on_its_generator_alone() -> None:
    view, rgb = ClusterCAMView(crop_size=48), photo()
    random.seed(0)
    before = random.getstate()
    first = [view(rgb, rng(seed))["image"] for seed in range(8)]
    assert random.getstate() == before
    random.seed(1)
    again = [pickle.loads(pickle.dumps(view))(rgb, rng(seed))["image"] for seed in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({image.sum().item() for image in first}) == 8


def test_rand_augment_is_the_increasing_recipe() -> None:
    """Two of 15 operations, each with p = 0.5: a quarter of the images keep their colours."""
    view, rgb = ClusterCAMView(crop_size=32), photo(32, 32)
    operations = view.rand_augment.ops
    assert (len(operations), view.rand_augment.num_layers) == (15, 2)
    assert {op.name for op in operations} >= {"PosterizeIncreasing", "SolarizeAdd", "ShearX"}
    assert {(op.prob, op.magnitude, op.magnitude_std) for op in operations} == {(0.5, 9, 0.5)}
    assert all(op.kwargs["fillcolor"] == (124, 116, 104) for op in operations)
    untouched = 0
    for seed in range(200):
        draws = rng(seed)
        plain_view = random_resized_crop(Image.fromarray(rgb), 32, (0.08, 1.0), draws)
        shown = pixels(view(rgb, rng(seed))["image"])
        untouched += np.array_equal(shown, plain_view)
    # a quarter fires no operation; of those a quarter is erased; a few operations change nothing
    assert 0.13 < untouched / 200 < 0.33


def test_the_strongest_draws_of_every_operation_work() -> None:
    """One draw in fifty is cut off at level 10, where posterising keeps no bit: a black image."""
    picture = Image.fromarray(photo(32, 32))
    for operation in ClusterCAMView(crop_size=32).rand_augment.ops:
        operation.prob, operation.magnitude, operation.magnitude_std = 1.0, 10, 0
        strongest = operation(picture)
        assert strongest.size == picture.size
        if operation.name == "PosterizeIncreasing":
            assert not np.array(strongest).any()


def test_erasing_fills_one_box_with_unit_noise() -> None:
    erased, shares, values = 0, [], []
    for seed in range(400):
        image = erase_box(torch.full((3, 40, 60), 9.0), rng(seed))
        changed = (image != 9).all(dim=0)
        if not changed.any():
            continue
        erased += 1
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        box = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all(), "one box"
        shares.append(changed.float().mean().item())
        values.append(image[:, changed].flatten())
    noise = torch.cat(values)
    assert 0.18 < erased / 400 < 0.32
    assert ERASED_AREA[0] * 0.7 < min(shares) < max(shares) < ERASED_AREA[1] * 1.1
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
