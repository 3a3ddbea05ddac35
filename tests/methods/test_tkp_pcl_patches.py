"""TKP-PCL's pooling, contrast and LSTMs: properties 1, 2, 4 to 7 and 9 of tkp_pcl.md section 8."""

import pytest
import torch
import torch.nn.functional as F
from small_tkp_pcl import random_scores
from torch import Tensor

from wsss.methods.tkp_pcl.patches import (
    ConfidentSets,
    HVBiLSTM,
    across_images,
    confident_sets,
    pce_loss,
    pce_terms,
    top_k_pool,
)


def random_sets(batch: int, categories: int, patches: int, seed: int = 0) -> ConfidentSets:
    """Disjoint sets in which h and l vary, h = 2 with l = 1 among them."""
    draws = torch.rand(batch, categories, patches, generator=torch.Generator().manual_seed(seed))
    high, low = draws > 0.6, draws < 0.3
    high[0, 0], low[0, 0] = False, False
    high[0, 0, :2], low[0, 0, 2] = True, True
    return ConfidentSets(high, low)


def embeddings(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


# ---- 1 and 2: pooling ----------------------------------------------------------------------------


def test_1_one_patch_is_the_maximum_and_all_patches_are_the_mean() -> None:
    scores = random_scores(2, 9, 5).requires_grad_()
    weights = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (top,) = torch.autograd.grad((top_k_pool(scores, 1) * weights).sum(), scores)
    (peak,) = torch.autograd.grad((scores.amax(1) * weights).sum(), scores)
    assert torch.equal(top_k_pool(scores, 1), scores.amax(1))
    assert torch.equal(top, peak)
    everything = top_k_pool(scores, 9)
    torch.testing.assert_close(everything, scores.mean(1))
    torch.testing.assert_close(everything.sum(1), torch.ones(2, dtype=torch.float64))


def test_2_pooling_is_monotone_symmetric_and_independent() -> None:
    scores = random_scores(2, 9, 5)
    pooled = torch.stack([top_k_pool(scores, k) for k in range(1, 10)])
    assert (pooled[1:] <= pooled[:-1] + 1e-12).all()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(top_k_pool(scores[:, order], 3), top_k_pool(scores, 3))

    # patches 0 and 1 are best for category 0, patches 2 and 3 for category 1
    apart = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7]]], requires_grad=True)
    top_k_pool(apart, 2).sum().backward()
    assert apart.grad is not None
    assert apart.grad[0].tolist() == [[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]]


# ---- 4 to 7: patch contrastive error -------------------------------------------------------------


def pce_by_pairs(rows: Tensor, sets: ConfidentSets) -> Tensor:
    """PCE as its definition reads: two loops over the patches of every image and category."""
    images = []
    for b in range(len(rows)):
        per_category = []
        for c in range(sets.high.shape[1]):
            high, low = (part[b, c].nonzero().flatten().tolist() for part in sets)

            def similarity(i: int, j: int, b: int = b) -> Tensor:
                return (1 + F.cosine_similarity(rows[b, i], rows[b, j], dim=0)) / 2

            alike = [1 - similarity(i, j) for i in high for j in high if i != j]
            unlike = [similarity(m, n) for m in high for n in low]
            terms = [torch.stack(each).mean() for each in (alike, unlike) if each]
            if terms:
                per_category.append(torch.stack(terms).sum())
        zero = rows.sum() * 0
        images.append(torch.stack(per_category).mean() if per_category else zero)
    return torch.stack(images).mean()


@pytest.mark.parametrize("seed", [0, 1])
def test_4_closed_form_is_the_double_loop(seed: int) -> None:
    rows = embeddings(2, 9, 6, seed=seed)
    sets = random_sets(2, 3, 9, seed)
    closed, loops = pce_loss(rows, sets), pce_by_pairs(rows, sets)
    torch.testing.assert_close(closed, loops, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(value, rows)[0] for value in (closed, loops)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def test_4_holds_in_float32_under_autocast() -> None:
    rows = embeddings(1, 64, 16)
    sets = random_sets(1, 2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        value = pce_loss(rows.float(), sets)
    assert value.item() == pytest.approx(pce_by_pairs(rows, sets).item(), abs=1e-6)


def test_5_scale_and_rotation_change_nothing_others_feel_nothing() -> None:
    rows, sets = embeddings(1, 9, 6), random_sets(1, 2, 9)
    value = pce_loss(rows, sets)
    factors = 0.1 + torch.rand(9, 1, dtype=torch.float64)
    torch.testing.assert_close(pce_loss(rows * factors, sets), value)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    torch.testing.assert_close(pce_loss(rows @ rotation, sets), value)
    (gradient,) = torch.autograd.grad(value, rows)
    assert (gradient * rows).sum(-1).abs().max() < 1e-9
    idle = ~(sets.high | sets.low).any(1)[0]
    assert idle.any()
    assert gradient[0, idle].abs().max() == 0

    scores = random_scores(1, 9, 3, sharp=6).requires_grad_()
    found = confident_sets(scores, torch.ones(1, 3, dtype=torch.bool), 0.6)
    assert not pce_loss(scores.detach(), found).requires_grad


def test_6_each_term_pulls_its_own_way_and_the_anchors_hold() -> None:
    rows = embeddings(1, 8, 5)
    high = torch.arange(8) < 4
    sets = ConfidentSets(high[None, None], ~high[None, None])

    def cosines(values: Tensor) -> tuple[float, float]:
        unit = F.normalize(values[0].detach(), dim=-1)
        between = unit @ unit.T
        inside = between[:4, :4]
        return (inside.sum() - inside.trace()).item() / 12, between[:4, 4:].mean().item()

    before = cosines(rows)
    for index in range(2):
        (gradient,) = torch.autograd.grad(pce_terms(rows, sets)[index].sum(), rows)
        after = cosines(rows - 0.1 * gradient)
        assert (after[0] > before[0]) if index == 0 else (after[1] < before[1])

    direction = torch.randn(5, dtype=torch.float64)
    opposite = torch.where(high[:, None], direction, -direction)[None]
    assert pce_loss(opposite, sets).item() == pytest.approx(0, abs=1e-9)
    assert pce_loss(direction.expand(1, 8, 5), sets).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("h", "low_count"), [(0, 3), (1, 3), (1, 0), (3, 0), (0, 0)])
def test_7_missing_pairs_give_finite_numbers(h: int, low_count: int) -> None:
    rows = embeddings(1, 6, 4)
    place = torch.arange(6)[None, None]
    sets = ConfidentSets(place < h, place >= 6 - low_count)
    value = pce_loss(rows, sets)
    (gradient,) = torch.autograd.grad(value, rows)
    assert value.isfinite()
    assert gradient.isfinite().all()
    if h == 0 or (h == 1 and low_count == 0):
        assert value == 0
        assert gradient.abs().max() == 0


def test_7_absent_categories_count_nothing() -> None:
    scores = random_scores(2, 9, 3, sharp=8)
    present = torch.tensor([[True, True, False], [True, False, False]])
    sets = confident_sets(scores, present, 0.6)
    assert not sets.high[0, 2].any()
    assert not sets.low[1, 1].any()


def test_pairs_across_images_are_those_of_one_long_image() -> None:
    rows, sets = embeddings(2, 9, 6), random_sets(2, 3, 9)
    long = ConfidentSets(*(torch.cat([part[:1], part[1:]], dim=2) for part in sets))
    joined = torch.cat([rows[:1], rows[1:]], dim=1)
    torch.testing.assert_close(pce_loss(*across_images(rows, sets)), pce_by_pairs(joined, long))


# ---- 9: space ------------------------------------------------------------------------------------


def bilstm() -> HVBiLSTM:
    torch.manual_seed(2)
    return HVBiLSTM(6, 4, 0.2).eval()


def test_9_swapping_the_lstms_is_transposing_the_grid() -> None:
    module, swapped = bilstm(), bilstm()
    swapped.horizontal, swapped.vertical = module.vertical, module.horizontal
    tokens = torch.randn(2, 3, 5, 6)
    plain = module(tokens.flatten(1, 2), (3, 5)).unflatten(1, (3, 5))
    turned = swapped(tokens.transpose(1, 2).flatten(1, 2), (5, 3)).unflatten(1, (5, 3))
    halves = torch.cat([turned[..., 8:], turned[..., :8]], dim=-1)
    torch.testing.assert_close(halves.transpose(1, 2), plain)


def test_9_a_patch_is_felt_in_its_row_and_column_alone() -> None:
    module, tokens = bilstm(), torch.randn(1, 15, 6)
    changed = tokens.clone()
    changed[0, 1 * 5 + 3] += 1
    difference = (
        (module(changed, (3, 5)) - module(tokens, (3, 5))).abs().sum(-1).unflatten(1, (3, 5))
    )
    felt = torch.zeros(3, 5, dtype=torch.bool)
    felt[1], felt[:, 3] = True, True
    assert torch.equal(difference[0] > 0, felt)


def test_dropout_of_an_lstm_is_one_mask_a_sequence() -> None:
    module = bilstm().train()
    module.dropout = 0.5
    lines = torch.ones(1, 1, 50, 6)
    seen: list[Tensor] = []
    module.horizontal.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    module.along(module.horizontal, lines)
    assert (seen[0] == seen[0][:, :1]).all()
    assert set(seen[0].unique().tolist()) <= {0.0, 2.0}


def test_lstms_start_as_keras_starts_them() -> None:
    lstm = bilstm().horizontal
    parameters = dict(lstm.named_parameters())
    for suffix in ("", "_reverse"):
        bias = parameters[f"bias_ih_l0{suffix}"]
        assert bias.tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 8
        assert not parameters[f"bias_hh_l0{suffix}"].requires_grad
        recurrent = parameters[f"weight_hh_l0{suffix}"]
        torch.testing.assert_close(recurrent.T @ recurrent, torch.eye(4))
