import torch
from series import series

from wsss.maps.refine.par import PAR


def test_values_of_the_specification() -> None:
    image = 0.5 * series((1, 3, 32, 32), 0.05) + 0.5
    first, third = series((32, 32), 0.013), series((32, 32), 0.11)
    masks = torch.stack([first, -first, third]).softmax(0)[None]
    refined = PAR()(image, masks)
    expected = torch.tensor([414.596, 362.009, 354.528])
    torch.testing.assert_close(refined.sum((0, 2, 3)), expected, rtol=0, atol=1e-3)
    assert refined.argmax(1).flatten().bincount().tolist() == [718, 214, 92]


def test_weights_add_up_to_one_hundred_and_one_percent() -> None:
    images = torch.rand(2, 3, 17, 29, generator=torch.Generator().manual_seed(0))
    affinity = PAR().affinity(images)
    assert affinity.shape == (2, 48, 17, 29)
    torch.testing.assert_close(affinity.sum(1), torch.full((2, 17, 29), 1.01))
    constant = PAR(num_iter=3)(images, torch.full((2, 1, 17, 29), 0.5))
    torch.testing.assert_close(constant, torch.full_like(constant, 0.5 * 1.01**3))


def test_flat_image_has_no_nan() -> None:
    refined = PAR()(torch.full((1, 3, 9, 9), 0.3), torch.rand(1, 2, 9, 9))
    assert refined.isfinite().all()


def test_epsilon_rules_where_neighbours_are_nearly_alike() -> None:
    image = 1e-4 * series((1, 3, 32, 32), 0.021) + 0.5
    toco, clustercam = PAR().affinity(image), PAR(eps=1e-5).affinity(image)
    assert (toco - clustercam).abs().max() > 1e-3
    plain = 0.5 * series((1, 3, 32, 32), 0.021) + 0.5
    torch.testing.assert_close(
        PAR().affinity(plain), PAR(eps=1e-5).affinity(plain), atol=1e-3, rtol=0
    )


def test_weights_follow_their_formula_where_epsilon_counts() -> None:
    """Loops over pixels and neighbours: both standard deviations are unbiased and plus epsilon."""
    images = torch.rand(1, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    eps, steps = 0.5, [(d * r, d * c) for d in (1, 2) for r in (-1, 0, 1) for c in (-1, 0, 1)]
    steps = [step for step in steps if step != (0, 0)]
    far = torch.tensor([(r * r + c * c) ** 0.5 for r, c in steps], dtype=torch.float64)
    place = (-((far / (far.std() + eps) / 0.3) ** 2)).softmax(0)
    found = PAR(dilations=(1, 2), eps=eps).affinity(images)
    for row in range(4):
        for column in range(5):
            around = torch.stack(
                [
                    images[0, :, min(max(row + r, 0), 3), min(max(column + c, 0), 4)]
                    for r, c in steps
                ]
            )
            difference = (around - images[0, :, row, column]) / (around.std(0) + eps) / 0.3
            colour = (-difference.square().mean(1)).softmax(0)
            expected = colour + 0.01 * place
            torch.testing.assert_close(found[0, :, row, column], expected, atol=1e-7, rtol=1e-5)


def test_small_masks_are_resized_with_aligned_corners() -> None:
    images = torch.rand(1, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    masks = torch.rand(1, 2, 5, 7, generator=torch.Generator().manual_seed(1))
    par = PAR(num_iter=2)
    full = torch.nn.functional.interpolate(
        masks, size=(16, 20), mode="bilinear", align_corners=True
    )
    assert torch.equal(par(images, masks), par(images, full))


def test_image_smaller_than_a_dilation() -> None:
    assert PAR()(torch.rand(1, 3, 6, 5), torch.rand(1, 2, 6, 5)).shape == (1, 2, 6, 5)


def test_a_mask_is_kept_inside_an_edge() -> None:
    images = torch.zeros(1, 3, 32, 32)
    images[..., 16:] = 1
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 12:] = 1  # four columns over the edge
    refined = PAR()(images, mask) / 1.01**10
    assert refined[0, 0, :, 18:].min() > 0.9
    assert refined[0, 0, :, 12:15].max() < mask[0, 0, :, 12:15].min() * 0.6


def test_buffers_follow_the_device_but_are_not_saved() -> None:
    assert not PAR().state_dict()
