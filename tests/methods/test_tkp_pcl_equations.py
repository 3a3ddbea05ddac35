"""TKP-PCL's equations against numbers by hand (tkp_pcl.md sections 1 to 3)."""

from math import log

import pytest
import torch
from small_tkp_pcl import CLASSES, SIDE, make_batch, tiny, without_dropout
from torch import Tensor

from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD
from wsss.methods.tkp_pcl.equivariance import label_merge, over_maximum, seen_as_views
from wsss.methods.tkp_pcl.patches import (
    ConfidentSets,
    HVBiLSTM,
    confident_sets,
    mce_loss,
    pce_coverage,
    pce_loss,
    pce_terms,
    top_k_pool,
)

ABSENT = ([], [])


def sets_of(*categories: tuple[list[int], list[int]], patches: int = 5) -> ConfidentSets:
    """Build H and L of one image from lists of patches."""
    high, low = torch.zeros(2, 1, len(categories), patches, dtype=torch.bool)
    for index, (surely, surely_not) in enumerate(categories):
        high[0, index, surely] = True
        low[0, index, surely_not] = True
    return ConfidentSets(high, low)


# unit vectors of the plane; cosines 0->1: 0, 0->2: -1, 0->3: 0.6, 1->3: 0.8
PLANE = torch.tensor([[[1.0, 0], [0, 1], [-1, 0], [0.6, 0.8], [0, -1]]], dtype=torch.float64)


# ---- prediction ----------------------------------------------------------------------------------


def test_mce_of_two_images_by_hand() -> None:
    pooled, targets = torch.tensor([[0.9, 0.2], [0.6, 0.3]]), torch.tensor([[1.0, 0], [0, 1]])
    terms = [log(0.9), log(0.8), log(0.4), log(0.3)]
    assert mce_loss(pooled, targets).item() == pytest.approx(-sum(terms) / 4, rel=1e-6)


def test_mce_is_clipped_at_1e_minus_7() -> None:
    pooled = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    loss = mce_loss(pooled, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    assert loss.item() == pytest.approx(-log(1e-7), rel=1e-6)
    unclipped = torch.tensor([[1e-5]], dtype=torch.float64)
    assert mce_loss(unclipped, torch.ones(1, 1)).item() == pytest.approx(-log(1e-5), rel=1e-9)


def test_pooling_is_the_mean_of_the_largest() -> None:
    scores = torch.tensor([[[0.1], [0.7], [0.4], [0.9]]])
    assert top_k_pool(scores, 2).item() == pytest.approx(0.8)
    assert top_k_pool(scores, 3).item() == pytest.approx(2 / 3)


def test_a_fraction_of_the_patches_is_rounded_up() -> None:
    scores = torch.arange(16.0).view(1, 16, 1) / 16
    assert tiny(top_k_fraction=0.2).pool(scores).item() == pytest.approx((12 + 13 + 14 + 15) / 64)
    assert 0.07 * 100 > 7, "rounded up it would be 8"
    few = tiny(top_k_fraction=0.07)
    assert [few.num_pooled(patches) for patches in (100, 101, 400)] == [7, 8, 28]
    assert tiny(top_k_fraction=1e-9).num_pooled(100) == 1


# ---- contrast ------------------------------------------------------------------------------------


def test_sets_lie_beyond_epsilon_and_its_complement() -> None:
    """H is above 3/4 and L below 1/4, strictly; an absent category has neither."""
    scores = torch.tensor([[[0.75, 0.8], [0.76, 0.1], [0.25, 0.1], [0.24, 0.9], [0.5, 0.5]]])
    high, low = confident_sets(scores, torch.tensor([[True, False]]), 0.75)
    assert high[0, 0].tolist() == [False, True, False, False, False]
    assert low[0, 0].tolist() == [False, False, False, True, False]
    assert not (high | low)[0, 1].any()


def test_terms_of_one_category_by_hand() -> None:
    """H = {0, 1, 3}: cosines 0, 0.6, 0.8. L = {2, 4}: cosines -1, 0, 0, -1, -0.6, -0.8."""
    terms = pce_terms(PLANE, sets_of(([0, 1, 3], [2, 4])))
    assert terms.positive.item() == pytest.approx((1 - 1.4 / 3) / 2, abs=1e-9)
    assert terms.negative.item() == pytest.approx((1 - 3.4 / 6) / 2, abs=1e-9)


def test_one_sure_patch_has_the_negative_term_alone() -> None:
    terms = pce_terms(PLANE, sets_of(([0], [3, 1]), ([0, 3], []), ([0], []), ([], [1, 2])))
    assert terms.positive[0].tolist() == pytest.approx([0, 0.2, 0, 0], abs=1e-9)
    assert terms.negative[0].tolist() == pytest.approx([0.65, 0, 0, 0], abs=1e-9)
    assert terms.valid[0].tolist() == [True, True, False, False]


def test_pce_divides_by_the_categories_that_have_pairs() -> None:
    """Of four categories two have pairs: 0.65 and 0.2. The second image has none and counts."""
    one = sets_of(([0], [3, 1]), ([0, 3], []), ([0], []), ABSENT)
    assert pce_loss(PLANE, one).item() == pytest.approx((0.65 + 0.2) / 2, abs=1e-9)
    two = ConfidentSets(*(torch.cat([part, torch.zeros_like(part)]) for part in one))
    value = pce_loss(PLANE.expand(2, -1, -1), two)
    assert value.item() == pytest.approx((0.65 + 0.2) / 4, abs=1e-9)


def test_an_embedding_of_zeros_gives_finite_gradients() -> None:
    rows = torch.zeros(1, 5, 2, dtype=torch.float64, requires_grad=True)
    loss = pce_loss(rows, sets_of(([0, 1], [2])))
    (gradient,) = torch.autograd.grad(loss, rows)
    assert loss.item() == pytest.approx(1.0)  # cosines count as 0
    assert gradient.isfinite().all()


def test_coverage_counts_categories_with_two_sure_patches() -> None:
    sets = sets_of(([0, 1], []), ([0], [1, 2]), ([0, 1, 2], [4]), ABSENT)
    present = torch.tensor([[True, True, True, True]])
    assert pce_coverage(sets, present).item() == pytest.approx(2 / 4)
    assert pce_coverage(sets_of(([0, 1], [])), torch.ones(1, 1, dtype=torch.bool)).item() == 1
    assert pce_coverage(sets_of(ABSENT), torch.zeros(1, 1, dtype=torch.bool)).item() == 0


def test_background_can_be_left_out_of_the_contrast() -> None:
    targets = torch.tensor([[1.0, 0, 1, 0, 0]])
    assert tiny().contrasted(targets)[0].tolist() == [True, False, True, False, False]
    without = tiny(pce_background=False).contrasted(targets)
    assert without[0].tolist() == [False, False, True, False, False]


# ---- the total -----------------------------------------------------------------------------------


def test_total_is_the_weighted_sum_of_its_terms() -> None:
    module = without_dropout(pce_weight=0.3, l2_weight=0.02)
    module.classifier.weight.data *= 20  # scores sharp enough for pairs
    step = module.losses(make_batch(), 5)
    parts = {name: loss.item() for name, loss in step.losses.items()}
    assert parts["pce_loss"] > 0.01
    assert parts["l2_loss"] == pytest.approx((module.classifier.weight**2).sum().item(), rel=1e-6)
    total = parts["mce_loss"] + 0.3 * parts["pce_loss"] + 0.02 * parts["l2_loss"]
    assert step.total.item() == pytest.approx(total, rel=1e-6)


def test_contrast_moves_the_lstms_and_not_the_classifier() -> None:
    module = without_dropout(pce_weight=1.0)
    module.classifier.weight.data *= 20
    module.losses(make_batch(), 5).losses["pce_loss"].backward()
    assert module.bilstm.horizontal.weight_ih_l0.grad is not None
    assert module.bilstm.horizontal.weight_ih_l0.grad.any()
    assert module.classifier.weight.grad is None


@pytest.mark.parametrize("mixed", [False, True])
def test_equivariance_is_cross_entropy_over_the_categories(
    mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of float32 probabilities where the patches' logits are bfloat16, too."""
    module = without_dropout(equivariance_weight=1.0)
    batch = make_batch() | {"view": torch.randn(4, 3, SIDE // 2, SIDE // 2)}
    target = torch.rand(4, CLASSES + 1, 2, 2)
    monkeypatch.setattr(module, "equivariance_target", lambda *_: target)
    seen: list[Tensor] = []
    module.classifier.register_forward_hook(lambda _, __, logits: seen.append(logits))
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        loss = module.equivariance(batch, torch.ones(4, CLASSES + 1), frozen=True)
    assert seen[0].dtype == (torch.bfloat16 if mixed else torch.float32)
    # one mosaic of 4 x 4 patches: view v lies at row 2 (v // 2) and column 2 (v % 2)
    logits = seen[0][0].float().unflatten(0, (4, 4))
    every = []
    for v in range(4):
        for row in range(2):
            for column in range(2):
                one = logits[2 * (v // 2) + row, 2 * (v % 2) + column]
                probabilities = one.exp() / one.exp().sum()
                every.append(-(target[v, :, row, column] * probabilities.log()).sum())
    assert loss.item() == pytest.approx(torch.stack(every).mean().item(), rel=1e-5)


# ---- network and maps ----------------------------------------------------------------------------


def test_pixels_reach_the_encoder_between_minus_one_and_one() -> None:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    grey = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)
    images = ((grey - mean) / std).expand(-1, -1, SIDE, SIDE)
    for scaling, expected in (("symmetric", 2 * grey - 1), ("imagenet", (grey - mean) / std)):
        module, seen = tiny(input_scaling=scaling).eval(), []
        module.backbone.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0])
        )
        module.score(images)
        torch.testing.assert_close(seen[0], expected.expand_as(seen[0]), atol=1e-5, rtol=0)


def test_rows_lead_in_the_output_of_the_lstms() -> None:
    module = HVBiLSTM(6, 4, 0.0)
    tokens = torch.randn(1, 15, 6)
    out = module(tokens, (3, 5)).unflatten(1, (3, 5))
    line = tokens.unflatten(1, (3, 5))
    torch.testing.assert_close(out[:, 1, :, :8], module.horizontal(line[:, 1])[0])
    torch.testing.assert_close(out[:, :, 2, 8:], module.vertical(line[:, :, 2])[0])


def test_dropout_lies_between_embeddings_and_classifier() -> None:
    module, images = tiny(), make_batch()["image"]
    scores = module.score(images)
    assert not torch.allclose(scores.logits, module.classifier(scores.embeddings))
    scores = module.eval().score(images)
    torch.testing.assert_close(scores.logits, module.classifier(scores.embeddings))


def test_label_merge_by_hand() -> None:
    scores = torch.tensor([[[[0.5, 0.25]], [[0.1, 0.2]], [[0.4, 0.55]]]])
    merged = label_merge(scores, torch.tensor([[1, 1, 0]]))
    assert merged[0, :, 0].T.tolist() == [
        pytest.approx([2 / 3, 1 / 3, 0]),
        pytest.approx([1 / 3, 2 / 3, 0]),
    ]
    assert over_maximum(torch.zeros(1, 1, 2, 2)).tolist() == [[[[0, 0], [0, 0]]]]


def test_a_part_of_the_map_is_cut_by_rows_then_columns() -> None:
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    upright = torch.zeros(1, 3, dtype=torch.bool)
    boxes = torch.tensor([[0, 2, 1, 3]])
    shown = seen_as_views(maps, upright, upright, boxes, (2, 2))
    assert shown[0, 0].tolist() == [[1, 2], [5, 6]]
    flipped = torch.tensor([[True, False, False]])  # columns
    assert seen_as_views(maps, upright, flipped, boxes, (2, 2))[0, 0].tolist() == [[2, 1], [6, 5]]
    turned = torch.tensor([[True, False, True]])  # columns, then transposed
    assert seen_as_views(maps, upright, turned, boxes, (2, 2))[0, 0].tolist() == [[2, 6], [1, 5]]
    assert seen_as_views(maps, turned, upright, boxes, (2, 2))[0, 0].tolist() == [[8, 4], [9, 5]]
