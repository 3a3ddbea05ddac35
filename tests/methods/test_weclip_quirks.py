"""Every quirk of WeCLIP's official code, alone (methods/weclip/official.py)."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from small_weclip import PATCH, batch_of, tiny

from wsss.methods.weclip import maps
from wsss.methods.weclip.affinity import box_mask
from wsss.methods.weclip.gradcam import class_slots
from wsss.methods.weclip.method import WeCLIP
from wsss.methods.weclip.official import CORRECTED, OFFICIAL, Quirks

LABELS = torch.tensor([[1.0, 0, 1], [0, 1, 0]])


def pair(name: str) -> tuple[WeCLIP, WeCLIP]:
    """Without the quirk and with it, on the same weights."""
    return tiny(), tiny(quirks=Quirks(**{name: True}))


def test_every_switch_is_off_or_on() -> None:
    names = [field.name for field in fields(Quirks)]
    assert not any(getattr(CORRECTED, name) for name in names)
    assert all(getattr(OFFICIAL, name) for name in names)


def test_q2_padding_is_labelled() -> None:
    ours, theirs = pair("labelled_padding")
    batch = batch_of(LABELS)
    batch["box"] = torch.tensor([[8, 40, 0, 30], [0, 48, 0, 48]])
    own, official = (model.losses(batch, 0).seen["pseudo_label"] for model in (ours, theirs))
    assert not (official == 255).any()
    inside = torch.zeros(2, 48, 48, dtype=torch.bool)
    inside[0, 8:40, :30], inside[1] = True, True
    assert torch.equal(own != 255, inside)
    assert torch.equal(own[inside], official[inside])


def test_q5_boxes_lose_the_last_row_and_column() -> None:
    cam = torch.zeros(1, 4, 5)
    cam[0, 3, 4] = 1
    assert box_mask(cam, 0.4).sum() == 1
    assert not box_mask(cam, 0.4, open_edge=True).any()
    cam = torch.rand(8, 4, 5)
    mask = box_mask(cam, 0.4, open_edge=True)
    assert mask.any()
    assert not mask[:, -1].any()
    assert not mask[:, :, -1].any()


def test_q6_boxes_come_from_eight_bits() -> None:
    cam = torch.zeros(1, 3, 3)
    cam[0, 0, 0], cam[0, 2, 2] = 0.9999, 0.4005  # 254 and 102; the level is 101
    assert box_mask(cam, 0.4, eight_bit=True).sum() == 2
    cam[0, 2, 2] = 0.399  # 101
    assert box_mask(cam, 0.4, eight_bit=True).sum() == 1
    cam[0, 0, 0], cam[0, 2, 2] = 0.5, 0.25  # relative to the maximum
    assert box_mask(cam, 0.4, eight_bit=True).sum() == 2
    assert box_mask(cam, 0.4).sum() == 1


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("open_boxes", "open_edge"),
        ("eight_bit_boxes", "eight_bit"),
        ("vanishing_gradient", "of_probability"),
    ],
)
def test_switches_reach_the_maps(name: str, argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, bool] = {}

    def spy(function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any, **named: Any) -> Any:
            seen.update(named)
            return function(*given, **named)

        return watched

    for function in (maps.box_mask, maps.grad_cam):
        monkeypatch.setattr(maps, function.__name__, spy(function))
    for model, expected in zip(pair(name), (set(), {argument}), strict=True):
        encoded = model.encode(torch.randn(2, 3, 32, 32), layers=3)
        model.refined_maps(encoded, class_slots(LABELS), None)
        assert {key for key, on in seen.items() if on} == expected


def test_q12_a_label_without_foreground_is_nan() -> None:
    ours, theirs = pair("nan_without_pixels")
    batch = batch_of(torch.zeros(2, 3))
    assert ours.losses(batch, 0).total.isfinite()
    assert theirs.losses(batch, 0).losses["seg_loss"].isnan()


def test_q18_the_remainder_is_dropped() -> None:
    ours, theirs = pair("dropped_remainder")
    whole, odd = torch.randn(1, 3, 6 * PATCH, 5 * PATCH), torch.randn(1, 3, 45, 37)
    first, second = ours(whole).seg_logits, theirs(whole).seg_logits
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    own, official = ours(odd).seg_logits, theirs(odd).seg_logits
    assert own is not None
    assert official is not None
    assert own.shape == (1, 4, 45, 37)
    assert official.shape == (1, 4, 5, 4)
    cut = theirs(odd[..., :40, :32]).seg_logits
    assert cut is not None
    assert torch.equal(official, cut)
    # the edge is repeated, and what it gives is cut off again
    padded = torch.nn.functional.pad(odd, (0, 3, 0, 3), mode="replicate")
    grid = ours(padded).seg_logits
    assert grid is not None
    full = torch.nn.functional.interpolate(grid, (48, 40), mode="bilinear", align_corners=False)
    assert torch.equal(own, full[..., :45, :37])
    labels = torch.ones(1, 3)
    ours.settings.__dict__["rfm_start"] = theirs.settings.__dict__["rfm_start"] = None
    cams = ours.cams(padded, labels)[..., :45, :37]
    assert torch.equal(ours.cams(odd, labels), cams)
    assert theirs.cams(odd, labels).shape == (1, 3, 45, 37)


def test_draws_and_nan_are_the_bases() -> None:
    assert (tiny().draws_apart, tiny().stops_unless_finite) == (True, True)
    assert not pair("shared_draws")[1].draws_apart
    assert not pair("goes_on_after_nan")[1].stops_unless_finite
