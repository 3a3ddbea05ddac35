import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.maps.cams import class_activation, multiscale_cam, normalise_cam


class Heads:
    """Two small convolutions as raw CAM heads that remember the batches they saw."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(4, 3, 3, 3, generator=generator) for _ in range(2)]
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, images: Tensor) -> list[Tensor]:
        self.seen.append(tuple(images.shape))
        return [F.conv2d(images, w, stride=4, padding=1) for w in self.weights]


def images(height: int = 24, width: int = 36) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_class_activation_is_the_classifier_at_every_position() -> None:
    features, weight = torch.randn(2, 8, 3, 5), torch.randn(4, 8)
    expected = torch.einsum("bdhw,kd->bkhw", features, weight)
    torch.testing.assert_close(class_activation(features, weight), expected)
    torch.testing.assert_close(class_activation(features, weight[:, :, None, None]), expected)


def test_normalised_maps_span_zero_to_one_each() -> None:
    cam = torch.randn(2, 3, 8, 9) * torch.tensor([0.1, 1, 100])[None, :, None, None] - 3
    normal = normalise_cam(cam)
    assert torch.equal(normal.amin((2, 3)), torch.zeros(2, 3))
    assert ((normal.amax((2, 3)) > 0.999) & (normal.amax((2, 3)) <= 1)).all()


def test_constant_map_becomes_zero_not_nan() -> None:
    assert torch.equal(normalise_cam(torch.full((1, 2, 4, 4), 7.0)), torch.zeros(1, 2, 4, 4))


def test_multiscale_equals_the_definition() -> None:
    heads, x = Heads(), images()
    total: list[Tensor] = [torch.zeros(2, 4, 24, 36)] * 2
    for size in ((24, 36), (12, 18), (36, 54)):
        scaled = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        for i, (cam, flip) in enumerate(zip(heads(scaled), heads(scaled.flip(-1)), strict=True)):
            up = F.interpolate(cam, size=(24, 36), mode="bilinear", align_corners=False)
            up_flip = F.interpolate(flip, size=(24, 36), mode="bilinear", align_corners=False)
            total[i] = total[i] + torch.maximum(up, up_flip.flip(-1)).relu()
    for actual, t in zip(multiscale_cam(heads, x, scales=(1, 0.5, 1.5)), total, strict=True):
        torch.testing.assert_close(actual, normalise_cam(t))


def test_scale_one_is_always_first_and_never_twice() -> None:
    heads = Heads()
    multiscale_cam(heads, images(), scales=(0.5, 1.0))
    assert heads.seen == [(4, 3, 24, 36), (4, 3, 12, 18)]
    without = multiscale_cam(Heads(), images(), scales=(0.5,))
    repeated = multiscale_cam(Heads(), images(), scales=(1.0, 0.5, 1.0))
    for a, b in zip(without, repeated, strict=True):
        assert torch.equal(a, b)


def test_given_scale_one_maps_save_half_of_that_scale() -> None:
    heads, x = Heads(), images()
    own = multiscale_cam(heads, x, scales=(1.0, 0.5))
    given = heads(x)
    heads.seen.clear()
    shared = multiscale_cam(heads, x, scales=(1.0, 0.5), scale_one=given)
    assert heads.seen == [(2, 3, 24, 36), (4, 3, 12, 18)]
    for a, b in zip(own, shared, strict=True):
        torch.testing.assert_close(a, b)


def test_mirrored_image_gives_mirrored_cam() -> None:
    for a, b in zip(
        multiscale_cam(Heads(), images(), scales=(1.0, 0.5)),
        multiscale_cam(Heads(), images().flip(-1), scales=(1.0, 0.5)),
        strict=True,
    ):
        torch.testing.assert_close(a, b.flip(-1))


def test_no_gradient_and_at_least_float32() -> None:
    x = images().requires_grad_()
    (cam,) = multiscale_cam(lambda i: [i[:, :2].bfloat16()], x, scales=(1.0,))
    assert not cam.requires_grad
    assert cam.dtype == torch.float32


def test_negative_values_are_kept_where_asked() -> None:
    x = images()

    def below(scaled: Tensor) -> list[Tensor]:
        return [-F.avg_pool2d(scaled, 4).abs()[:, :2]]

    (cut,) = multiscale_cam(below, x, scales=(1.0, 0.5))
    (kept,) = multiscale_cam(below, x, scales=(1.0, 0.5), cut_negative=False)
    assert not cut.any()
    assert kept.amax() > 0.99


def test_vanishing_scale_is_refused() -> None:
    with pytest.raises(WSSSError, match=r"scale 0\.01"):
        multiscale_cam(Heads(), images(), scales=(0.01,))
