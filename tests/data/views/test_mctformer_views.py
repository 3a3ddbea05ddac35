"""MCTformer+'s view: timm's ImageNet recipe, step by step and as a whole."""

import math
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from pictures import photo, pixels, rng
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing

from wsss.core.errors import WSSSError
from wsss.data.views.clustercam import ClusterCAMView
from wsss.data.views.drawing import random_resized_crop
from wsss.data.views.imagenet import erase_box, rand_augment, randomly_augmented
from wsss.data.views.mctformer import MCTformerCrops


def test_the_defaults_are_the_papers_and_clustercams() -> None:
    view, shared, rgb = MCTformerCrops(), ClusterCAMView(), photo()
    assert (view.crop_size, view.area, view.erasing) == (448, (0.08, 1.0), 0.25)
    for seed in range(12):
        sample = view(rgb, rng(seed))
        assert set(sample) == {"image"}
        assert sample["image"].dtype == torch.float32
        assert torch.equal(sample["image"], shared(rgb, rng(seed))["image"])


def test_steps_come_in_the_order_of_the_page() -> None:
    """Crop and flip, then operations on bytes, then erasing of what is normalised."""
    view, rgb = MCTformerCrops(crop_size=48, erasing=1.0), photo()
    operations, touched = rand_augment(), 0
    for seed in range(30):
        draws = rng(seed)
        crop = random_resized_crop(Image.fromarray(rgb), 48, (0.08, 1.0), draws)
        augmented = randomly_augmented(operations, crop, draws)
        image = view(rgb, rng(seed))["image"]
        shown = pixels(image)
        erased = (shown != augmented).any(axis=2)
        rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert 0.015 < erased[box].size / 48**2 < 0.37  # 2-33 %, sides rounded
        noise = image[:, *box]
        assert abs(noise.mean()) < 1
        assert noise.std() > 0.5
        touched += not np.array_equal(augmented, crop)
    assert 15 < touched < 29  # a quarter fires no operation


def test_operations_and_erasing_can_be_left_out() -> None:
    view, rgb = MCTformerCrops(crop_size=40, area=(0.5, 0.9), auto_augment=None, erasing=0), photo()
    for seed in range(20):
        crop = random_resized_crop(Image.fromarray(rgb), 40, (0.5, 0.9), rng(seed))
        np.testing.assert_array_equal(pixels(view(rgb, rng(seed))["image"]), crop)


@pytest.mark.parametrize("probability", [0.25, 0.7])
def test_erasing_has_its_probability(probability: float) -> None:
    view = MCTformerCrops(crop_size=16, auto_augment=None, erasing=probability)
    plain = MCTformerCrops(crop_size=16, auto_augment=None, erasing=0)
    rgb = photo(20, 20)
    erased = sum(
        not torch.equal(view(rgb, rng(seed))["image"], plain(rgb, rng(seed))["image"])
        for seed in range(400)
    )
    assert abs(erased / 400 - probability) < 4 * math.sqrt(probability * (1 - probability) / 400)


def test_erased_boxes_are_distributed_as_timms() -> None:
    """Share of the area and ratio of the sides, of 600 boxes each."""

    def boxes(erased: list[torch.Tensor]) -> np.ndarray:
        found = []
        for image in erased:
            changed = (image != 9).all(dim=0)
            h, w = (int(changed.any(side).sum()) for side in (1, 0))
            top, left = (int(changed.any(side).nonzero()[0]) for side in (1, 0))
            found.append((h * w / 2400, math.log(h / w), top / (40 - h), left / (60 - w)))
        return np.array(found)

    random.seed(0)
    torch.manual_seed(0)
    timms = RandomErasing(probability=1.0, mode="pixel", max_count=1, device="cpu")
    theirs = boxes([timms(torch.full((3, 40, 60), 9.0)) for _ in range(600)])
    ours = boxes([erase_box(torch.full((3, 40, 60), 9.0), rng(n), 1.0) for n in range(600)])
    spread = theirs.std(axis=0)
    np.testing.assert_array_less(
        abs(ours.mean(axis=0) - theirs.mean(axis=0)), 5 * spread / math.sqrt(600)
    )
    np.testing.assert_allclose(ours.std(axis=0), spread, rtol=0.15)


def noted(drawn: list[int], number: int, image: Image.Image, *_: object, **__: object) -> object:
    """An operation that does nothing but note its number."""
    drawn.append(number)
    return image


def test_operations_are_drawn_as_timm_draws_them() -> None:
    """With equal weights any operation twice, with weights never one twice."""
    crop = photo(16, 16)
    for recipe in ("rand-m9-mstd0.5-inc1", "rand-m9-n3-tweights"):
        augment, drawn = rand_augment(recipe), list[int]()
        for number, operation in enumerate(augment.ops):
            operation.prob, operation.aug_fn = 1.0, partial(noted, drawn, number)
        for seed in range(400):
            randomly_augmented(augment, crop, rng(seed))
        assert len(drawn) == 400 * augment.num_layers
        share = np.bincount(drawn, minlength=len(augment.ops)) / len(drawn)
        repeated = np.diff(np.reshape(drawn, (400, -1))) == 0
        if augment.choice_weights is None:
            np.testing.assert_allclose(share, 1 / 15, atol=0.04)
            assert 10 < repeated.sum() < 50  # one pair in 15
        else:
            assert not repeated.any()
            assert share[np.argmax(augment.choice_weights)] > 2 * share.min()


def test_an_operation_does_what_timms_does() -> None:
    """The same strengths, interpolation and fill, from the same draws of Python's generator."""
    fill = (124, 116, 104)  # ImageNet's mean
    settings = {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", settings).ops
    ours = MCTformerCrops().rand_augment
    assert ours is not None
    picture = Image.fromarray(photo(40, 40))
    for operation, expected in zip(ours.ops, theirs, strict=True):
        assert (operation.name, operation.prob) == (expected.name, 0.5)
        operation.prob = expected.prob = 1.0
        if operation.name == "PosterizeIncreasing":  # Pillow refuses timm's strongest
            expected.aug_fn = operation.aug_fn
        for seed in range(5):
            random.seed(seed)
            image = operation(picture)
            random.seed(seed)
            np.testing.assert_array_equal(np.array(image), np.array(expected(picture)))


def test_the_view_depends_on_its_generator_alone() -> None:
    view, rgb = MCTformerCrops(crop_size=32), photo()

    def states() -> tuple[object, ...]:
        drawn = np.random.get_state()[1].tolist()  # noqa: NPY002
        return random.getstate(), drawn, torch.get_rng_state().tolist()

    before = states()
    first = [view(rgb, rng(seed))["image"] for seed in range(12)]
    assert states() == before
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    again = [pickle.loads(pickle.dumps(view))(rgb, rng(seed))["image"] for seed in range(12)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({image.sum().item() for image in first}) == 12


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (20, 30)])
def test_any_image_size_works(shape: tuple[int, int]) -> None:
    image = MCTformerCrops(crop_size=64)(photo(*shape), rng(0))["image"]
    assert image.shape == (3, 64, 64)
    assert torch.isfinite(image).all()


@pytest.mark.parametrize(
    "recipe", ["augmix-m3", "rand-m9-x3", "rand-mnine", "rand-tother", "rand-m11", "rand-n0"]
)
def test_an_unknown_recipe_is_refused(recipe: str) -> None:
    with pytest.raises(WSSSError, match=rf"auto_augment={recipe}: expected a recipe"):
        MCTformerCrops(auto_augment=recipe)


def test_a_share_that_is_no_share_is_refused() -> None:
    with pytest.raises(WSSSError, match="area"):
        MCTformerCrops(area=(0.5, 1.5))
