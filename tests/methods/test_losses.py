import numpy as np
import pytest
import torch
import torch.nn.functional as F
from series import refine_inputs, series
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD
from wsss.methods.losses import (
    balanced_segmentation_loss,
    dense_energy_loss,
    gaussian_filter,
    pair_masks,
    ptc_loss,
)
from wsss.methods.toco.contrast import ctc_loss

STATS = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def test_patch_token_contrast_of_the_specification() -> None:
    tokens = series((2, 8, 4, 4), 0.7).requires_grad_()
    label = torch.full((2, 4, 4), 255)
    label[0] = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [255, 0, 1, 255], [0, 0, 0, 0]])
    same, different = pair_masks(label)
    assert (int(same.sum()), int(different.sum())) == (92, 90)
    loss = ptc_loss(tokens, same, different)
    loss.backward()
    assert loss.item() == pytest.approx(0.424032, abs=1e-6)
    assert tokens.grad is not None
    assert tokens.grad.abs().sum().item() == pytest.approx(0.759189, abs=1e-5)


def test_class_token_contrast_of_the_specification() -> None:
    student = (0.5 * series((20, 16), 0.3)).requires_grad_()
    teacher = 0.5 * series((4, 16), 0.17, np.cos)
    flags = torch.tensor([[1.0, 1, 1, 0, 1, 0, 1, 1, 0, 1], [1.0] * 10])
    loss = ctc_loss(student, teacher, flags, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(1.064383, abs=2e-6)
    assert student.grad is not None
    assert student.grad.abs().sum().item() == pytest.approx(5.226347, abs=2e-5)
    assert ctc_loss(student, teacher, flags, 1.0).item() == pytest.approx(0.741124, abs=2e-6)


def test_segmentation_loss_of_the_specification() -> None:
    label = torch.zeros(2, 8, 8, dtype=torch.long)
    label[0, 2:5, 2:5] = 15
    label[1, :4] = 255
    label[1, 5, 5] = 7
    loss = balanced_segmentation_loss(series((2, 21, 8, 8), 0.31), label)
    assert loss.item() == pytest.approx(3.189194, abs=2e-6)


@pytest.mark.parametrize("content", [0, 3, 255])
def test_empty_half_counts_zero_when_guarded(content: int) -> None:
    logits = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    label = torch.full((2, 6, 7), content, dtype=torch.uint8)
    gradients = []
    for guard in (True, False):
        x = logits.clone().requires_grad_()
        loss = balanced_segmentation_loss(x, label, guard=guard)
        loss.backward()
        gradients.append(x.grad)
        assert loss.isnan() == (not guard)
    assert torch.equal(gradients[0], gradients[1])
    guarded = balanced_segmentation_loss(logits, label)
    if content == 255:
        assert guarded == 0
    else:
        torch.testing.assert_close(guarded, 0.5 * F.cross_entropy(logits, label.long()))


def test_segmentation_gradient_in_float64() -> None:
    logits = torch.randn(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([[[0, 1, 2, 255], [0, 0, 1, 1], [255, 0, 2, 2]]])
    assert torch.autograd.gradcheck(lambda x: balanced_segmentation_loss(x, label), logits)


def energy_inputs_of_check_11() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    unit, _, _, boxes = refine_inputs()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    label = torch.zeros(2, 64, 64, dtype=torch.long)
    label[0, :20] = 255
    label[1, 30:50, 10:40] = 7
    return (unit - mean) / std, 4 * series((2, 21, 64, 64), 0.0043), label, boxes


def test_energy_of_the_specification() -> None:
    images, logits, label, boxes = energy_inputs_of_check_11()
    logits.requires_grad_()
    loss = dense_energy_loss(images, logits, label, boxes, **STATS)
    loss.backward()
    assert loss.item() == pytest.approx(-6.594674e-5, rel=2e-6)
    assert logits.grad is not None
    assert logits.grad.abs().sum().item() == pytest.approx(1.137960e-5, rel=2e-6)


def test_gaussian_is_about_twice_the_lattice_until_scaled() -> None:
    images, logits, label, boxes = energy_inputs_of_check_11()
    args = images, logits, label, boxes
    lattice = dense_energy_loss(*args, **STATS)
    exact = dense_energy_loss(*args, kernel="gaussian", **STATS)
    assert 0.4 < lattice / exact < 0.65
    half = dense_energy_loss(*args, kernel="gaussian", gaussian_scale=0.5, **STATS)
    torch.testing.assert_close(half, 0.5 * exact)


def test_gaussian_filter_in_chunks_is_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    features, values = 3 * torch.rand(50, 5), torch.rand(50, 2)
    distance = (features[:, None] - features[None]).square().sum(-1)
    expected = (-0.5 * distance).exp() @ values
    torch.testing.assert_close(gaussian_filter(features, values), expected)
    monkeypatch.setattr("wsss.methods.losses._CHUNK_ENTRIES", 350)
    torch.testing.assert_close(gaussian_filter(features, values), expected)


@pytest.mark.parametrize("kernel", ["lattice", "gaussian"])
def test_energy_on_rectangles_and_a_single_class(kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, 30, 52, generator=generator)
    logits = torch.randn(1, 2, 30, 52, generator=generator).requires_grad_()
    label = torch.zeros(1, 30, 52, dtype=torch.long)
    label[:, :10] = 255
    boxes = torch.tensor([[0, 30, 0, 40]])
    loss = dense_energy_loss(images, logits, label, boxes, kernel=kernel, **STATS)  # type: ignore[arg-type]
    loss.backward()
    assert loss < 0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[..., 42:].any()  # outside the box
    assert logits.grad[..., :40].any()


def test_upstream_factor_reaches_the_gradient() -> None:
    images, logits, label, boxes = energy_inputs_of_check_11()
    gradients = []
    for factor in (1.0, 0.05):
        x = logits.clone().requires_grad_()
        (factor * dense_energy_loss(images, x, label, boxes, **STATS)).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], 0.05 * gradients[0])  # type: ignore[operator]


def test_unknown_kernel_is_refused() -> None:
    images, logits, label, boxes = energy_inputs_of_check_11()
    with pytest.raises(WSSSError, match="'lattice' or 'gaussian'"):
        dense_energy_loss(images, logits, label, boxes, kernel="exact", **STATS)  # type: ignore[arg-type]
