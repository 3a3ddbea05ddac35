"""The dense energy against its definition, written out, at sizes that halving does not divide."""

import numpy as np
import pytest
import torch
from torch import Tensor

from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD
from wsss.methods.losses import (
    balanced_segmentation_loss,
    dense_energy_from_prob,
    dense_energy_loss,
    energy_features,
    energy_inputs,
)

STATS = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
SIZES = [(75, 61, 0.5), (64, 48, 0.5), (75, 61, 0.3), (9, 21, 0.75)]


def bilinear(large: int, small: int) -> np.ndarray:
    """Weights (small, large) of linear sampling at positions that the ratio of sizes gives."""
    weights = np.zeros((small, large))
    for i in range(small):
        position = max((i + 0.5) * large / small - 0.5, 0)
        first = int(position)
        share = position - first
        weights[i, first] += 1 - share
        weights[i, min(first + 1, large - 1)] += share
    return weights


def nearest(large: int, small: int) -> list[int]:
    return [int(i * large / small) for i in range(small)]


def inputs(height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two images with a box, undecided pixels and probabilities, in float64."""
    generator = torch.Generator().manual_seed(height)
    images = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
    prob = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 3, (2, height, width), generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.3] = 255
    boxes = torch.tensor([[0, height, 2, width - 1], [3, height - 2, 0, width]])
    return images, (3 * prob).softmax(1), label, boxes


class Reduced:
    """Everything that the energy reads, reduced by hand (toco.md section 2, "Reg")."""

    def __init__(self, images: Tensor, prob: Tensor, label: Tensor, boxes: Tensor, factor: float):
        height, width = images.shape[-2:]
        small = int(factor * height), int(factor * width)
        self.rows, self.columns = bilinear(height, small[0]), bilinear(width, small[1])
        at = np.ix_(nearest(height, small[0]), nearest(width, small[1]))
        mean, std = (np.array(v).reshape(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = 255 * (images.numpy() * std + mean)
        inside = np.zeros(label.shape)
        for one, (r0, r1, c0, c1) in zip(inside, boxes.tolist(), strict=True):
            one[r0:r1, c0:c1] = 1
        self.colours = np.stack([[plane[at] for plane in one] for one in pixels])
        self.prob = self.rows @ prob.numpy() @ self.columns.T
        self.roi = np.stack([one[at] for one in inside])[:, None]
        ignored = np.stack([one[at] for one in label.numpy() == 255])[:, None]
        gate = np.maximum(self.roi - self.prob.max(1, keepdims=True), 0)
        self.gate = np.where(ignored, 1.0, gate)


@pytest.mark.parametrize(("height", "width", "factor"), SIZES)
def test_what_the_energy_reads(height: int, width: int, factor: float) -> None:
    given = inputs(height, width)
    expected = Reduced(*given, factor)
    colours, reduced, roi, gate = energy_inputs(*given, scale_factor=factor, **STATS)
    assert reduced.shape[-2:] == (int(factor * height), int(factor * width))
    np.testing.assert_allclose(reduced, expected.prob, atol=1e-12)
    np.testing.assert_allclose(colours, expected.colours, atol=1e-10)
    np.testing.assert_array_equal(roi, expected.roi)
    np.testing.assert_allclose(gate, expected.gate, atol=1e-12)


def test_value_and_gradient_are_those_of_the_definition() -> None:
    """-w / B sum S g A S with A over all pairs; its gradient holds the gate and halves nothing."""
    images, prob, label, boxes = inputs(15, 11)
    expected = Reduced(images, prob, label, boxes, 0.5)
    weight, rgb, xy = 0.01, 40.0, 6.0
    energy, slope = 0.0, np.zeros(prob.shape)
    for b in range(2):
        height, width = expected.roi.shape[-2:]
        place = np.mgrid[:height, :width].reshape(2, -1) / (xy * 0.5)
        points = np.concatenate([place, expected.colours[b].reshape(3, -1) / rgb])
        kernel = np.exp(-0.5 * ((points[:, :, None] - points[:, None]) ** 2).sum(0))
        masked = (expected.prob[b] * expected.roi[b]).reshape(3, -1)
        heard = masked @ kernel
        gate, inside = expected.gate[b].reshape(1, -1), expected.roi[b].reshape(1, -1)
        energy -= weight / 2 * (masked * gate * heard).sum()
        small = (-2 * weight / 2 * gate * heard * inside).reshape(3, height, width)
        slope[b] = expected.rows.T @ small @ expected.columns
    given = prob.clone().requires_grad_()
    settings = {"weight": weight, "sigma_rgb": rgb, "sigma_xy": xy, "kernel": "gaussian"}
    loss = dense_energy_from_prob(images, given, label, boxes, **settings, **STATS)
    (gradient,) = torch.autograd.grad(loss, given)
    assert loss.item() == pytest.approx(energy, rel=1e-12)
    np.testing.assert_allclose(gradient, slope, atol=1e-15, rtol=1e-10)
    again = dense_energy_from_prob(images, given, label, boxes, **settings, **STATS)
    (threefold,) = torch.autograd.grad(3 * again, given)
    np.testing.assert_allclose(threefold, 3 * slope, atol=1e-15, rtol=1e-10)


def test_logits_enter_as_softmax() -> None:
    images, prob, label, boxes = inputs(15, 11)
    settings = {"weight": 1.0, "kernel": "gaussian", **STATS}
    from_prob = dense_energy_from_prob(images, prob, label, boxes, **settings)
    from_logits = dense_energy_loss(images, prob.log() + 2, label, boxes, **settings)
    torch.testing.assert_close(from_logits, from_prob)


def test_columns_lead_in_the_features() -> None:
    features = energy_features(torch.full((1, 3, 2, 3), 30.0), sigma_rgb=15.0, sigma_xy=0.5)
    assert features[0, :, :2].tolist() == [[0, 0], [2, 0], [4, 0], [0, 2], [2, 2], [4, 2]]
    assert (features[0, :, 2:] == 2).all()


def test_halves_of_the_segmentation_loss_by_hand() -> None:
    """Three background pixels, one of a class, one ignored; each half has its own mean."""
    prob = torch.tensor([[0.5, 0.25, 0.8, 0.3, 0.9], [0.5, 0.75, 0.2, 0.7, 0.1]])
    label = torch.tensor([[[0, 0, 0, 1, 255]]])
    loss = balanced_segmentation_loss(prob.log()[None, :, None], label)
    background = -torch.tensor([0.5, 0.25, 0.8]).log().mean()
    assert loss.item() == pytest.approx(0.5 * (background - np.log(0.7)).item(), rel=1e-6)
    one_of_each = balanced_segmentation_loss(prob.log()[None, :, None], label, guard=False)
    assert one_of_each.item() == pytest.approx(loss.item())
