"""The random walk against a dense transition matrix, written out pair by pair."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from wsss.core.errors import WSSSError
from wsss.maps.pseudo_labels import alpha_background, confident_labels
from wsss.maps.refine.random_walk import (
    WalkSettings,
    affinity,
    half_plane,
    pad_to_multiple,
    pairs,
    walk,
    walked_maps,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(features: torch.Tensor, radius: int, beta: float) -> torch.Tensor:
    """The transition matrix (N, N) of features (C, h, w): its columns add up to one."""
    _, height, width = features.shape
    places = list(itertools.product(range(height), range(width)))
    matrix = torch.eye(len(places), dtype=features.dtype)
    for i, (r, c) in enumerate(places):
        for j, (row, column) in enumerate(places):
            if i != j and math.hypot(r - row, c - column) < radius:
                distance = (features[:, r, c] - features[:, row, column]).abs().mean()
                matrix[i, j] = torch.exp(-distance) ** beta
    return matrix / matrix.sum(0, keepdim=True)


@pytest.mark.parametrize(("radius", "count"), [(2, 4), (3, 12), (5, 34)])
def test_offsets_are_half_of_the_disc(radius: int, count: int) -> None:
    """A radius of 5 has the page's 34."""
    found = half_plane(radius)
    assert len(found) == len(set(found)) == count
    assert all(math.hypot(*offset) < radius for offset in found)
    assert not {(-dy, -dx) for dy, dx in found} & {*found}


@pytest.mark.parametrize("size", [(6, 7), (3, 9), (1, 4)])
def test_every_pair_is_met_once_in_reading_order(size: tuple[int, int]) -> None:
    numbers = torch.arange(size[0] * size[1]).view(size)
    met = []
    for here, there in pairs(size, 5):
        met += list(
            zip(numbers[here].flatten().tolist(), numbers[there].flatten().tolist(), strict=True)
        )
    expected = [
        (i, j)
        for i, j in itertools.combinations(range(numbers.numel()), 2)
        if math.hypot(i // size[1] - j // size[1], i % size[1] - j % size[1]) < 5
    ]
    assert sorted(met) == expected


@pytest.mark.parametrize("size", [(6, 7), (2, 8)])
def test_walk_is_the_power_of_the_dense_matrix(size: tuple[int, int]) -> None:
    features, scores = 2 * noise(2, 5, *size), noise(2, 3, *size, seed=1)
    walked = walk(features, scores, radius=5, beta=8.0, steps=64)
    for one, start, end in zip(features, scores, walked, strict=True):
        matrix = dense(one, 5, 8.0)
        for _ in range(6):  # 2 ** 6 steps
            matrix = matrix @ matrix
        torch.testing.assert_close(end.flatten(1), start.flatten(1) @ matrix)


def test_constants_stay_and_no_score_leaves_the_range() -> None:
    """Columns add up to one: a place takes a mean of what its neighbours have."""
    features = noise(1, 4, 9, 8)
    flat = torch.full((1, 1, 9, 8), 0.39, dtype=torch.float64)
    torch.testing.assert_close(walk(features, flat, radius=4, beta=3.0, steps=20), flat)
    scores = noise(1, 2, 9, 8, seed=2)
    walked = walk(features, scores, radius=4, beta=3.0, steps=20)
    assert walked.min() > scores.min()
    assert walked.max() < scores.max()


def test_walk_of_a_mirrored_image_is_mirrored() -> None:
    features, scores = noise(1, 4, 7, 9), noise(1, 2, 7, 9, seed=3)
    for axis in (-1, -2):
        walked = walk(features.flip(axis), scores.flip(axis), radius=5, beta=8.0, steps=8)
        expected = walk(features, scores, radius=5, beta=8.0, steps=8).flip(axis)
        torch.testing.assert_close(walked, expected)


def test_walk_does_not_cross_an_edge() -> None:
    """Two halves that look unlike keep their own scores, whatever the number of steps."""
    features = torch.zeros(1, 1, 6, 10)
    features[..., 5:] = 10.0
    scores = torch.zeros(1, 1, 6, 10)
    scores[..., 2, 1] = 1.0
    walked = walk(features, scores, radius=5, beta=8.0, steps=64)
    assert walked[..., 5:].max() < 1e-20
    torch.testing.assert_close(walked[..., :5].mean(), torch.tensor(1 / 30), rtol=0.2, atol=0)


def test_maps_are_padded_averaged_and_resized_back() -> None:
    maps = noise(1, 2, 13, 18).float()
    settings = WalkSettings(beta=4.0, steps=3, background=0.4)
    features = noise(1, 3, 4, 5, seed=4).float()
    made = walked_maps(features, maps, stride=4, radius=3, settings=settings)
    assert made.shape == (1, 3, 13, 18)

    planes = torch.zeros(1, 3, 16, 20)  # background first; zeros where there is no pixel
    planes[:, 0, :13, :18] = 0.4
    planes[:, 1:, :13, :18] = maps
    blocks = planes.view(1, 3, 4, 4, 5, 4).mean((3, 5))
    walked = walk(features, blocks, radius=3, beta=4.0, steps=3)
    full = F.interpolate(walked, (16, 20), mode="bilinear", align_corners=False)
    torch.testing.assert_close(made, full[..., :13, :18])


def test_confident_labels_need_both_levels() -> None:
    against_high = torch.tensor([[0, 0, 2, 2, 1]])
    against_low = torch.tensor([[0, 2, 2, 0, 1]])
    found = confident_labels(against_high, against_low)
    assert found.tolist() == [[0, 255, 2, 0, 1]]


def test_background_is_the_power_of_what_no_map_claims() -> None:
    maps = torch.tensor([[[[0.2, 0.5]], [[0.4, 0.1]]]])
    found = alpha_background(maps, 3.0)
    torch.testing.assert_close(found, torch.tensor([[[[0.6**3, 0.5**3]]]]))


def test_padding_lies_at_the_right_and_at_the_bottom() -> None:
    padded = pad_to_multiple(torch.ones(2, 5, 8), 4)
    assert padded.shape == (2, 8, 8)
    assert padded[:, :5].min() == 1
    assert padded[:, 5:].max() == 0


def test_affinity_is_one_for_equal_features() -> None:
    features = torch.tensor([[[[0.0, 0.0, 3.0]], [[1.0, 1.0, 2.0]]]])
    (here, there), *_ = pairs((1, 3), 2)
    found = affinity(features, here, there)
    torch.testing.assert_close(found, torch.tensor([[[1.0, math.exp(-2.0)]]]))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"beta": 0.0}, "random_walk.beta"),
        ({"steps": 0}, "random_walk.steps"),
        ({"background": 1.5}, "random_walk.background"),
        ({"alphas": (12.0, 1.0)}, "random_walk.alphas"),
        ({"alphas": (1.0, 1.0)}, "random_walk.alphas"),
        ({"crf": "none"}, "random_walk.crf"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, object], key: str) -> None:
    with pytest.raises(WSSSError, match=rf"^{key.replace('.', '[.]')}=.*expected"):
        WalkSettings(**settings)  # type: ignore[arg-type]
