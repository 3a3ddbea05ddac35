"""GETAM's equations against numbers by hand, and routes of its gradients (getam.md 2 and 3)."""

from math import exp, log

import pytest
import torch
from small_getam import SIDE, losses_at, make_batch, tiny

from wsss.methods.getam.labels import (
    complete_labels,
    saliency_loss,
    split_cross_entropy,
    threshold_labels,
)
from wsss.methods.getam.maps import (
    attention_and_slope,
    attention_term,
    by_class,
    class_slots,
    enlarged,
)
from wsss.models.vit import AttentionParts

# ---- maps ----------------------------------------------------------------------------------------


def test_attention_and_slope_of_one_head_by_hand() -> None:
    """The slope in A of <c, A V> is c V^T; A is a softmax over the keys."""
    queries = torch.tensor([[1.0, 0], [0, 2], [1, 1]])[None, None]
    keys = torch.tensor([[0.0, 1], [1, 0], [2, 0]])[None, None]
    values = torch.tensor([[1.0, 2], [3, 4], [-5, 6]])[None, None]
    gradient = torch.tensor([[1.0, 0], [0, 1], [1, -1]])[None, None]
    parts = AttentionParts(queries, keys, values, torch.zeros_like(values))
    attention, slope = attention_and_slope(parts, gradient, rows=2)
    total = 1 + exp(1) + exp(2)
    assert attention[0, 0, 0].tolist() == pytest.approx([1 / total, exp(1) / total, exp(2) / total])
    total = exp(2) + 2
    assert attention[0, 0, 1].tolist() == pytest.approx([exp(2) / total, 1 / total, 1 / total])
    assert slope[0, 0].tolist() == [[1, 3, -5], [2, 4, 6]]
    learned = AttentionParts(*(part.requires_grad_() for part in (queries, keys, values)), values)
    assert not any(one.requires_grad for one in attention_and_slope(learned, gradient))


def test_maps_and_saliency_keep_float32_under_autocast() -> None:
    torch.manual_seed(0)
    parts, gradient = AttentionParts(*torch.randn(4, 1, 2, 5, 8)), torch.randn(1, 2, 5, 8)
    logits = torch.randn(1, 3, 4, 4).bfloat16()  # as the decoder gives them there
    completed = torch.tensor([0, 1, 255, 0], dtype=torch.uint8).expand(1, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = *attention_and_slope(parts, gradient), saliency_loss(logits, completed)
    expected = *attention_and_slope(parts, gradient), saliency_loss(logits.float(), completed)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_negative_slopes_are_cut_before_the_mean_over_heads() -> None:
    """Heads of slope 2, -4 and attention 0.5, 0.25: means of (1, 0) and of (2, 0)."""
    attention = torch.tensor([0.5, 0.25]).view(1, 2, 1, 1)
    slope = torch.tensor([2.0, -4.0]).view(1, 2, 1, 1)
    assert attention_term(attention, slope).item() == pytest.approx(0.5 * 1.0)
    assert attention_term(attention, slope, "product").item() == pytest.approx(0.5)
    assert attention_term(attention, slope, "gradient").item() == pytest.approx(1.0)
    assert attention_term(attention, slope, "attention").item() == pytest.approx(0.375)


def test_maps_are_enlarged_corner_to_corner() -> None:
    maps = torch.tensor([[[[0.0, 1], [2, 3]]]])
    assert enlarged(maps, (3, 5))[0, 0].tolist() == [
        [0, 0.25, 0.5, 0.75, 1],
        [1, 1.25, 1.5, 1.75, 2],
        [2, 2.25, 2.5, 2.75, 3],
    ]
    slots = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    assert by_class(slots, torch.tensor([[3, 0]]), 5).flatten().tolist() == [2, 0, 0, 1, 0]


# ---- labels --------------------------------------------------------------------------------------


def test_foreground_wins_from_0_077_on() -> None:
    maps = torch.tensor([0.0769, 0.0770, 0.5, 0.0768]).view(1, 1, 1, 4)
    assert (1 - 0.0769) ** 32 > 0.0769
    assert (1 - 0.0770) ** 32 < 0.0770
    salient = torch.ones(1, 1, 4, dtype=torch.bool)
    made = complete_labels(maps, torch.tensor([[2]]), salient, quantile=None, opening=1)
    assert made.label[0, 0].tolist() == [255, 3, 3, 255]


def test_a_claim_is_above_the_quantile_outside_the_saliency() -> None:
    maps = (torch.arange(1.0, 11) / 10).view(1, 1, 1, 10)  # positives 0.1 to 1; entry 5 is 0.6
    salient = torch.zeros(1, 1, 10, dtype=torch.bool)
    salient[..., -1] = True
    made = complete_labels(maps, torch.tensor([[0]]), salient, quantile=0.5, opening=1)
    assert made.label[0, 0].tolist() == [0] * 6 + [1] * 4
    assert made.saliency is not None
    assert made.saliency[0, 0].tolist() == [0] * 6 + [255] * 3 + [1]


def test_any_saliency_above_zero_is_salient() -> None:
    module = tiny(quantile=None, opening=1)
    refined, ids = torch.full((1, 1, 1, 3), 0.9), torch.tensor([[1]])
    grey = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)
    box, present = torch.tensor([[0, 1, 0, 3]]), torch.tensor([[0.0, 1, 0, 0]])
    made = module.make_labels(refined, ids, present, box, grey)
    assert made.label[0, 0].tolist() == [0, 2, 2]


def test_two_thresholds_of_present_classes_then_the_opening() -> None:
    maps = torch.zeros(1, 2, 6, 6)
    maps[0, 0, :4, :4], maps[0, 1, 4, 4] = 0.6, 0.9  # the second one alone has no square of 2
    maps[0, 0, 0, 0], maps[0, 0, 1, 1] = 0.5, 0.4  # at the thresholds
    ids, present = torch.tensor([[0, 2]]), torch.tensor([[1.0, 0, 1]])
    made = threshold_labels(maps, ids, present, low=0.4, high=0.5, opening=1)
    assert made.label[0, 0].tolist() == [255, 1, 1, 1, 0, 0]
    assert made.label[0, 1, 1] == 0
    assert made.label[0, 4, 4] == 3
    opened = threshold_labels(maps, ids, present, low=0.1, high=0.3, opening=2)
    assert opened.label[0, 4, 4] == 0
    assert (opened.label[0, :4, :4] == 1).all()
    absent = threshold_labels(maps, ids, torch.tensor([[1.0, 0, 0]]), low=0.4, high=0.5, opening=1)
    assert absent.label[0, 4, 4] == 0


# ---- losses --------------------------------------------------------------------------------------


def test_cross_entropies_are_two_means_that_are_added() -> None:
    prob = torch.tensor([[0.5, 0.8, 0.3, 0.6], [0.2, 0.1, 0.6, 0.1], [0.3, 0.1, 0.1, 0.3]])
    label = torch.tensor([[[0, 0, 1, 2]]])
    loss = split_cross_entropy(prob.log()[None, :, None], label)
    background, foreground = -(log(0.5) + log(0.8)) / 2, -(log(0.6) + log(0.3)) / 2
    assert loss.item() == pytest.approx(background + foreground, rel=1e-6)


def test_saliency_loss_by_hand() -> None:
    """Given and added saliency are foreground; the last pixel does not count."""
    prob = torch.tensor([[0.5, 0.8, 0.3, 0.9], [0.3, 0.1, 0.3, 0.05], [0.2, 0.1, 0.4, 0.05]])
    logits = prob.log()[None, :, None]
    completed = torch.tensor([[[0, 1, 255, 0]]], dtype=torch.uint8)
    inside = torch.tensor([[[True, True, True, False]]])
    counted = -(log(0.5) + log(0.2) + log(0.7))
    loss = saliency_loss(logits, completed, inside)
    assert loss.item() == pytest.approx(counted / 3, rel=1e-5)
    one = saliency_loss(logits, completed, torch.tensor([[[False, True, False, False]]]))
    assert one.item() == pytest.approx(-log(0.2), rel=1e-5)
    whole = saliency_loss(logits, completed)
    assert whole.item() == pytest.approx((counted - log(0.9)) / 4, rel=1e-5)
    coded = saliency_loss(logits, completed, inside, inverted=True)
    assert coded.item() == pytest.approx(-(log(0.5) + log(0.8) + log(0.7)) / 3, rel=1e-5)


def test_total_has_the_weights_of_the_settings() -> None:
    result = losses_at(tiny(seg_weight=0.3, saliency_weight=2.5, energy_weight=1e-3), 99)
    loss = {name: value.item() for name, value in result.losses.items()}
    assert loss["reg_loss"] < -1e-6
    total = loss["cls_loss"] + 0.3 * loss["seg_loss"] + 2.5 * loss["sal_loss"] + loss["reg_loss"]
    assert result.total.item() == pytest.approx(total, rel=1e-6)
    labels, logits = make_batch()["labels"], result.outputs.class_logits
    each = labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log()
    assert loss["cls_loss"] == pytest.approx(-each.mean().item(), rel=1e-5)


def test_only_the_class_loss_reaches_the_classifier() -> None:
    module = tiny()
    result = losses_at(module, 99)
    parts = [module.classifier.weight, next(iter(module.decoder.parameters()))]
    for name, loss in result.losses.items():
        found = torch.autograd.grad(loss, parts, retain_graph=True, allow_unused=True)
        classifies, segments = (one is not None and bool(one.any()) for one in found)
        assert (classifies, segments) == (name == "cls_loss", name != "cls_loss"), name
    assert not result.seen["maps"].requires_grad
    assert not result.seen["refined"].requires_grad
    assert result.seen["guide"].shape == (2, 3, SIDE, SIDE)


def test_maps_of_a_step_are_sums_over_blocks() -> None:
    """Their absolute scale counts against the 1e-5 of the normalisation."""
    module, batch = tiny().eval(), make_batch()
    seen = module.losses(batch, 99).seen
    encoded = module.encode(batch["image"], levels=(4,))
    ids, valid = class_slots(batch["labels"])
    blocks = module.maps_of_slots(encoded, ids, valid)
    assert blocks.shape[2] == 4
    total = blocks[:, :, 0] + blocks[:, :, 1] + blocks[:, :, 2] + blocks[:, :, 3]
    torch.testing.assert_close(seen["maps"], total, atol=0, rtol=1e-4)
    full = module.pamr(seen["guide"], enlarged(total, (SIDE, SIDE)))
    expected = full / (full.amax((2, 3), keepdim=True) + 1e-5)
    torch.testing.assert_close(seen["refined"], expected, atol=1e-6, rtol=1e-4)


def test_the_class_score_is_that_of_the_mean() -> None:
    module, coarsest = tiny(), torch.randn(2, 48, 2, 3)
    expected = coarsest.mean((2, 3)) @ module.classifier.weight.T + module.classifier.bias
    torch.testing.assert_close(module.classify(coarsest), expected)


def test_phase_two_begins_two_steps_after_its_share() -> None:
    """Phase 1 while t - 1 < T / 2: of 10 steps, 0 to 5 (getam.md section 4)."""
    module = tiny(max_steps=10, phase_one=0.5, phase_two_lr_scale=0.1)
    assert [t for t in range(11) if module.in_phase_two(t)] == [6, 7, 8, 9, 10]
    odd = tiny(max_steps=9, phase_one=0.5)  # while t - 1 < 4.5
    assert [t for t in range(9) if odd.in_phase_two(t)] == [6, 7, 8]
    rates = [module.lr_multiplier(t) for t in (0, 5, 6, 9, 10)]
    expected = [1, 0.5**0.9, 0.1 * 0.4**0.9, 0.1 * 0.1**0.9, 0.1 * 0.1**0.9]
    assert rates == pytest.approx(expected)
    falling = tiny(max_steps=60, phase_one=0.5, phase_two_lr_scale=0.1, step_decay=True)
    assert [falling.lr_scale(t) for t in (30, 31, 39, 40, 49, 50)] == pytest.approx(
        [1, 0.1, 0.1, 0.01, 0.01, 0.001]
    )
