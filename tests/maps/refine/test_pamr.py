import numpy as np
import pytest
import torch
from series import GOLDEN

from wsss.maps.refine.pamr import PAMR


@pytest.mark.parametrize("kind", ["", "_onehot", "_small"])
def test_equals_the_reference(kind: str) -> None:
    with np.load(GOLDEN.parent / "getam" / "d_pamr.npz", allow_pickle=False) as case:
        images = torch.from_numpy(case["in_img"]).permute(0, 3, 1, 2).float()
        refined = PAMR()(images, torch.from_numpy(case[f"in_masks{kind}"]))
        expected = torch.from_numpy(case[f"out_refined{kind}"])
    torch.testing.assert_close(refined, expected, rtol=1e-5, atol=3e-6)


def test_weights_add_up_to_one_also_on_a_flat_image() -> None:
    images = torch.rand(2, 3, 17, 29, generator=torch.Generator().manual_seed(0)) * 255
    images[1] = 80.0
    affinity = PAMR().affinity(images)
    assert affinity.shape == (2, 48, 17, 29)
    torch.testing.assert_close(affinity.sum(1), torch.ones(2, 17, 29))
    torch.testing.assert_close(affinity[1], torch.full((48, 17, 29), 1 / 48))


def weights_by_hand(image: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """The formula at one pixel, dilations 1 and 2: softmax of the mean scaled distance."""
    height, width = image.shape[1:]
    offsets = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    samples, neighbours = [], []
    for d in (1, 2):
        for a, b in offsets:
            r = min(max(row + d * a, 0), height - 1)
            c = min(max(column + d * b, 0), width - 1)
            samples.append(image[:, r, c])
            if (a, b) != (0, 0):
                neighbours.append(image[:, r, c])
    std = torch.stack(samples).std(0)  # 18 samples, the centre twice
    distance = (torch.stack(neighbours) - image[:, row, column]).abs() / (1e-8 + 0.1 * std)
    return (-distance.mean(1)).softmax(0)


def test_weights_follow_their_formula() -> None:
    image = torch.rand(3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    affinity = PAMR(dilations=(1, 2)).affinity(image[None])[0]
    for row, column in ((3, 4), (0, 0), (6, 2)):
        expected = weights_by_hand(image, row, column)
        torch.testing.assert_close(affinity[:, row, column], expected)


def test_constant_masks_stay_and_nothing_is_differentiable() -> None:
    masks = torch.full((1, 2, 9, 9), 0.25, requires_grad=True)
    refined = PAMR(num_iter=3)(torch.rand(1, 3, 9, 9), masks)
    assert not refined.requires_grad
    assert not PAMR().affinity(torch.rand(1, 3, 9, 9, requires_grad=True)).requires_grad
    torch.testing.assert_close(refined, masks.detach())


def test_images_do_not_see_each_other() -> None:
    images = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    masks = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    both = PAMR()(images, masks)
    torch.testing.assert_close(both[1:], PAMR()(images[1:], masks[1:]))
    torch.testing.assert_close(both[:, 1:2], PAMR()(images, masks[:, 1:2]))
