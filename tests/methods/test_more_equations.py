"""MoRe's equations against the formulas of more.md, term by term, and their properties (9)."""

from math import exp, log, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_more import MAX_STEPS, TERMS, losses_at, make_batch, tiny
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.maps.pseudo_labels import token_labels
from wsss.methods.losses import (
    balanced_segmentation_loss,
    imagenet_energy_loss,
    pair_masks,
    ptc_loss,
)
from wsss.methods.more import MoReSettings
from wsss.methods.more.contrast import (
    cle_loss,
    distinct_loss,
    distinctness,
    image_generators,
    select_tokens,
    uncertainty_map,
    une_loss,
)
from wsss.methods.more.graph import CategoryGraph

GOLDEN = Path(__file__).parents[1] / "golden" / "more"


def draws(count: int, seed: int = 0) -> list[torch.Generator]:
    return image_generators(seed, 3, torch.arange(count))


# ---- graph module --------------------------------------------------------------------------------


def graph_of(dim: int = 6, **settings: object) -> CategoryGraph:
    torch.manual_seed(1)
    graph = CategoryGraph(dim, **{"neighbours": 2} | settings).double()
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.normal_()
    return graph


def naive_graph(graph: CategoryGraph, tokens: Tensor, patches: Tensor) -> Tensor:
    """The five steps of more.md section 1, one class at a time."""
    dim, joined = tokens.shape[2], torch.empty_like(tokens)
    for b in range(len(tokens)):
        nodes = [*tokens[b], *patches[b]]
        tails = [graph.tail_proj.weight @ node + graph.tail_proj.bias for node in nodes]
        for c, own in enumerate(tokens[b]):
            head = graph.head_proj.weight @ own + graph.head_proj.bias
            scores = [(head @ tail).item() / sqrt(dim) for tail in tails]
            order = sorted(range(len(scores)), key=lambda i: -scores[i])[: graph.neighbours]
            weights = [exp(scores[i]) for i in order]
            gates, message = [], torch.zeros_like(head)
            for i, weight in zip(order, weights, strict=True):
                share = weight / sum(weights)
                mixed = torch.tanh((2 - share) * head + share * tails[i])
                product = (tails[i].sum() * mixed.sum()).item()
                dot = (tails[i] @ mixed).item() / sqrt(dim)
                gates.append(product if graph.gate == "sums" else dot)
            for i, gate in zip(order, gates, strict=True):
                message = message + exp(gate - max(gates)) * tails[i]
            message = message / max(1e-300, sum(exp(gate - max(gates)) for gate in gates))
            parts = []
            for layer, inner in (
                (graph.linear1, 0.1 * (head + message) + own),
                (graph.linear2, 0.1 * head * message + own),
            ):
                value = layer.weight @ inner + layer.bias
                parts.append(torch.where(value > 0, value, 0.01 * value))
            total = parts[0] + parts[1]
            normed = (total - total.mean()) / (total.var(unbiased=False) + 1e-5).sqrt()
            joined[b, c] = normed * graph.norm.weight + graph.norm.bias
    return joined


@pytest.mark.parametrize(("neighbours", "gate"), [(1, "sums"), (3, "sums"), (3, "dot")])
def test_the_graph_equals_its_formula(neighbours: int, gate: str) -> None:
    graph = graph_of(neighbours=neighbours, gate=gate)
    tokens, patches = torch.randn(2, 4, 6).double(), torch.randn(2, 9, 6).double()
    torch.testing.assert_close(graph(tokens, patches), naive_graph(graph, tokens, patches))


@pytest.mark.parametrize("gate", ["sums", "dot"])
def test_the_graph_has_the_gradient_of_its_values(gate: str) -> None:
    graph = graph_of(neighbours=3, gate=gate)
    tokens, patches = torch.randn(1, 3, 6).double(), torch.randn(1, 4, 6).double()
    learnt = tokens.requires_grad_(), graph.head_proj.weight, graph.tail_proj.weight
    assert torch.autograd.gradcheck(lambda *_: graph(tokens, patches), learnt, fast_mode=True)


def test_the_graph_follows_orders_and_gives_patches_nothing() -> None:
    graph, order, classes = graph_of(), torch.randperm(9), torch.tensor([2, 0, 3, 1])
    tokens, patches = torch.randn(2, 4, 6).double(), torch.randn(2, 9, 6).double()
    tokens, patches = tokens.requires_grad_(), patches.requires_grad_()
    joined = graph(tokens, patches)
    torch.testing.assert_close(graph(tokens, patches[:, order]), joined)
    torch.testing.assert_close(graph(tokens[:, classes], patches), joined[:, classes])
    gradient, none = torch.autograd.grad(joined.sum(), [tokens, patches], allow_unused=True)
    assert gradient.any()
    assert none is None


def test_without_neighbours_the_message_is_zero() -> None:
    graph = graph_of(neighbours=0)
    tokens, patches = torch.randn(2, 1, 6).double(), torch.randn(2, 9, 6).double()
    expected = naive_graph(graph, tokens, patches)
    joined = graph(tokens, patches)
    torch.testing.assert_close(joined, expected)
    joined.square().sum().backward()
    assert graph.tail_proj.weight.grad is not None
    assert not graph.tail_proj.weight.grad.any()


def test_more_neighbours_than_nodes_are_refused() -> None:
    expected = r"method\.neighbours=9: a class token has 6 nodes to choose from \(2 classes and 4"
    with pytest.raises(WSSSError, match=expected):
        graph_of(neighbours=9)(torch.randn(1, 2, 6).double(), torch.randn(1, 4, 6).double())


# ---- distinctness --------------------------------------------------------------------------------


def test_distinctness_by_hand() -> None:
    """Tokens of cosines 0.6, 0 and 0.8 among each other, in units of 0.07."""
    tokens = torch.tensor([[[3.0, 0], [1.2, 1.6], [0, 5]]])
    cosines = [[1, 0.6, 0], [0.6, 1, 0.8], [0, 0.8, 1]]
    rows = [log(sum(exp((c - 1) / 0.07) for c in row)) for row in cosines]
    assert distinct_loss(tokens).item() == pytest.approx(sum(rows) / 3, rel=1e-5)


def test_equal_tokens_cannot_be_told_apart() -> None:
    tokens = torch.randn(2, 1, 8).repeat(1, 5, 1).requires_grad_()
    loss = distinct_loss(tokens)
    loss.backward()
    assert loss.item() == pytest.approx(log(5), abs=1e-6)
    assert tokens.grad is not None
    assert tokens.grad.abs().max() < 1e-6


def test_equal_tokens_stay_equal_in_graph() -> None:
    graph = graph_of()
    joined = graph(torch.randn(2, 1, 6).double().repeat(1, 4, 1), torch.randn(2, 9, 6).double())
    torch.testing.assert_close(joined, joined[:, :1].expand(-1, 4, -1))


def test_the_share_of_mean_logits_by_hand() -> None:
    """Two tokens of cosine 0.96; their mean channels are 0.7 and 0.7."""
    tokens, labels = torch.tensor([[[3.0, 4], [4, 3]]]), torch.tensor([[0.0, 1]])
    margin = (log(1 + exp(0.7)) + log(1 + exp(-0.7))) / 2
    expected = 0.75 * log(1 + exp(-0.04 / 0.07)) + 0.25 * margin
    assert distinctness(tokens, labels, 0.25).item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(distinctness(tokens, labels, 0.0), distinct_loss(tokens))


# ---- certain tokens ------------------------------------------------------------------------------


def cle_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels without a token, a token without its label, an image without any label."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(3, 4, 5, generator=generator).double()
    patches = torch.randn(3, 5, 3, 4, generator=generator).double()
    mask = torch.tensor([0, 1, 2, 255, 3, 1, 0, 1, 255, 4, 2, 2]).view(1, 3, 4).repeat(3, 1, 1)
    mask[1] = mask[1].masked_fill(mask[1] == 2, 0)
    labels = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    return tokens, patches, mask, labels


def naive_cle(tokens: Tensor, patches: Tensor, mask: Tensor, labels: Tensor, tau: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b, c in labels.nonzero().tolist():
        unit = tokens[b, c] / tokens[b, c].norm()
        weights = [(unit @ patch / tau).exp() for patch in patches[b].flatten(1).T]
        own = [w for w, label in zip(weights, mask[b].flatten(), strict=True) if label == c + 1]
        pulls = [-(w / (sum(weights) + 1e-4)).log() for w in own]
        total = total + sum(pulls, torch.zeros(())) / (len(own) + 1e-4)
    return total / len(tokens)


@pytest.mark.parametrize("tau", [0.5, 0.1])
@pytest.mark.parametrize("overflowing", [False, True])
def test_cle_equals_its_formula(tau: float, overflowing: bool) -> None:
    tokens, patches, mask, labels = cle_inputs()
    tokens, patches = tokens.requires_grad_(), patches.requires_grad_()
    loss = cle_loss(tokens, patches, mask, labels, tau, overflowing=overflowing)
    expected = naive_cle(tokens, patches.detach(), mask, labels, tau)
    torch.testing.assert_close(loss, expected)
    gradient, none = torch.autograd.grad(loss, [tokens, patches], allow_unused=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, tokens)[0])
    assert none is None, "patches are pulled by nothing"


def test_cle_where_all_tokens_are_far_has_its_floor() -> None:
    """Weights of e-20 each are small beside the 1e-4 of the denominator."""
    tokens = torch.tensor([[[2.0, 0]]]).double()
    patches = torch.full((1, 2, 1, 3), -10.0).double()
    mask = torch.tensor([[[1, 0, 255]]])
    value = cle_loss(tokens, patches, mask, torch.ones(1, 1), 0.5)
    expected = log(1e-4 + 3 * exp(-20)) + 20
    assert value.item() == pytest.approx(expected / (1 + 1e-4), rel=1e-9)


def test_cle_has_no_length_and_counts_all_tokens() -> None:
    tokens, patches, mask, labels = cle_inputs()
    plain = cle_loss(tokens, patches, mask, labels, 0.5)
    scale = torch.rand(3, 4, 1).double() + 0.5
    torch.testing.assert_close(cle_loss(tokens * scale, patches, mask, labels, 0.5), plain)
    even = cle_loss(tokens, torch.zeros_like(patches), mask, labels, 0.5)
    pulls = [log(12 + 1e-4) * n / (n + 1e-4) for n in (3, 1, 3)]
    assert even.item() == pytest.approx(sum(pulls) / 3, rel=1e-9)


def test_cle_is_exact_where_exponentials_overflow() -> None:
    """The golden hot case: value and gradient in float64; and products of 300 in both signs."""
    with np.load(GOLDEN / "f_cle.npz") as case:
        inputs = [case[f"in_{n}"] for n in ("tokens", "patches_hot", "mask", "cls_label")]
        exact, slope = case["info_loss_hot_exact"], case["info_grad_tokens_hot_exact"]
    tokens, patches, mask, labels = map(torch.from_numpy, inputs)
    tokens.requires_grad_()
    loss = cle_loss(tokens, patches, mask, labels, 0.1)
    (gradient,) = torch.autograd.grad(loss, tokens)
    assert loss.item() == pytest.approx(float(exact), rel=1e-5)
    np.testing.assert_allclose(gradient.numpy(), slope, rtol=0, atol=1e-4 * np.abs(slope).max())
    assert cle_loss(tokens, patches, mask, labels, 0.1, overflowing=True).isnan()
    assert cle_loss(tokens, 300 * patches.sign(), mask, labels, 0.1).isfinite()


def test_the_official_cle_of_an_underflowed_row_is_a_constant() -> None:
    tokens = torch.tensor([[[1.0, 0]]], requires_grad=True)
    patches = torch.full((1, 2, 1, 2), -100.0)
    mask, labels = torch.ones(1, 1, 2, dtype=torch.long), torch.ones(1, 1)
    loss = cle_loss(tokens, patches, mask, labels, 0.5, overflowing=True)
    assert loss.item() == pytest.approx(2 * log(1 + 1e-4) / (2 + 1e-4), rel=1e-3)


# ---- uncertain tokens ----------------------------------------------------------------------------


def naive_selection(
    uncertainty: Tensor, generator: torch.Generator, wanted: int, window: int, ratio: float
) -> list[tuple[int, int]]:
    """The rule of more.md section 2, a cell at a time; centres."""
    height, width = uncertainty.shape
    half, found, inner = window // 2, [], []
    for r in range(height - window):
        for c in range(width - window):
            area = uncertainty[r : r + window, c : c + window].double()
            centre = (r + half, c + half)
            inner.append(centre)
            if uncertainty[centre] == 1 and area.mean() >= ratio:
                found.append(centre)
    if len(found) > wanted:
        return [found[i] for i in torch.randperm(len(found), generator=generator)[:wanted]]
    extra = (wanted - len(found)) // 4
    pool = [cell for cell in inner if uncertainty[cell] == 2]
    pool = inner if len(pool) < extra else pool
    return found + [pool[i] for i in torch.randperm(len(pool), generator=generator)[:extra]]


def maps_of_all_kinds() -> Tensor:
    """Masks with many candidates, some, none, none with few inner tokens of a class."""
    torch.manual_seed(4)
    mask = torch.randint(0, 3, (5, 12, 14))
    mask[0, 2:10, 2:11] = 1
    mask[0, 4:8, 4:9] = 255
    mask[1, 3:6, 3:9] = 255
    mask[2] = 0
    mask[3] = 255
    mask[4] = 0
    mask[4, 5, 5:7] = 1
    return mask


@pytest.mark.parametrize(("wanted", "window", "ratio"), [(8, 6, 1.2), (5, 5, 1.2), (12, 4, 1.25)])
def test_tokens_are_those_of_the_loop(wanted: int, window: int, ratio: float) -> None:
    uncertainty = uncertainty_map(maps_of_all_kinds())
    chosen = select_tokens(uncertainty, draws(5), wanted=wanted, window=window, ratio=ratio)
    corners = select_tokens(
        uncertainty, draws(5), wanted=wanted, window=window, ratio=ratio, corner=True
    )
    sizes = []
    for one, corner, values, generator in zip(chosen, corners, uncertainty, draws(5), strict=True):
        expected = naive_selection(values, generator, wanted, window, ratio)
        assert [tuple(cell) for cell in one.tolist()] == expected
        assert torch.equal(corner, one - window // 2)
        assert (corner >= 0).all()
        sizes.append(len(one))
    assert max(sizes) == wanted
    assert min(sizes) == wanted // 4


@pytest.mark.parametrize(("count", "found"), [(7, []), (8, [[3, 3], [3, 4]])])
def test_a_window_needs_eight_tokens_of_a_class(count: int, found: list[list[int]]) -> None:
    """An uncertain window has a sum of 36, and 44 are needed: two windows hold these tokens."""
    mask = torch.full((1, 8, 8), 255)
    mask[0, 0, 2:6] = mask[0, 1, 2 : count - 2] = 1
    (chosen,) = select_tokens(uncertainty_map(mask), draws(1))
    assert chosen[: len(found)].tolist() == found
    assert len(chosen) == len(found) + (8 - len(found)) // 4


def test_as_many_candidates_as_wanted_keep_their_order() -> None:
    """A row of uncertain tokens among those of a class: 8 windows, from left to right."""
    mask = torch.ones(1, 7, 14, dtype=torch.long)
    mask[0, 3] = 255
    centres = [[3, column] for column in range(3, 11)]
    (chosen,) = select_tokens(uncertainty_map(mask), draws(1))
    assert chosen.tolist() == centres
    (fewer,) = select_tokens(uncertainty_map(mask), draws(1), wanted=7)
    assert fewer.tolist() != centres[:7]
    assert all(cell in centres for cell in fewer.tolist())
    assert len(fewer.unique(dim=0)) == 7


def test_an_uncertain_image_gives_two_tokens_and_seeds_repeat() -> None:
    nothing = uncertainty_map(torch.full((1, 9, 9), 255))
    first, again, other = (select_tokens(nothing, draws(1, seed))[0] for seed in (0, 0, 1))
    assert len(first) == 2
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_uncertainty_stops_at_the_box() -> None:
    mask = torch.tensor([[[0, 1, 255, 255]]])
    assert uncertainty_map(mask).tolist() == [[[0, 2, 1, 1]]]
    assert uncertainty_map(mask, torch.tensor([[0, 1, 0, 3]])).tolist() == [[[0, 2, 1, 0]]]


def test_small_grids_are_refused_or_give_no_token() -> None:
    small = torch.ones(2, 6, 9)
    with pytest.raises(WSSSError, match=r"windows of 6 x 6 tokens, and the grid has 6 x 9"):
        select_tokens(small, draws(2))
    chosen = select_tokens(small, draws(2), fails_on_small_grids=False)
    tokens, patches = torch.randn(2, 3, 4), torch.randn(2, 4, 6, 9)
    assert une_loss(tokens, patches, chosen, torch.eye(3)[:2]).item() == 0


def test_une_equals_its_formula() -> None:
    torch.manual_seed(3)
    tokens, patches = torch.randn(2, 4, 5).double(), torch.randn(2, 5, 3, 4).double()
    tokens, patches = tokens.requires_grad_(), patches.requires_grad_()
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]])
    selected = [torch.tensor([[0, 1], [2, 3], [1, 1]]), torch.tensor([[2, 0]])]
    terms = []
    for b, cells in enumerate(selected):
        for r, c in cells.tolist():
            patch = patches[b, :, r, c]
            near = [
                (patch @ token / patch.norm() / token.norm()).abs() for token in tokens[b].detach()
            ]
            own = sum(g * y for g, y in zip(near, labels[b], strict=True))
            away = sum(g * (1 - y) for g, y in zip(near, labels[b], strict=True))
            present = labels[b].sum()
            terms.append(0.5 * (1 - own / (present + 1)) + 0.5 * away / (4 - present + 1))
    expected = torch.stack(terms).mean()
    loss = une_loss(tokens, patches, selected, labels)
    torch.testing.assert_close(loss, expected)
    assert 0 <= loss.item() <= 1
    none, gradient = torch.autograd.grad(loss, [tokens, patches], allow_unused=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, patches)[0])
    assert none is None, "class tokens are not moved"


def test_terms_of_tokens_keep_float32_under_autocast() -> None:
    tokens, patches, mask, labels = (one.float() for one in cle_inputs())
    graph, selected = graph_of(dim=5).float(), [torch.tensor([[0, 1], [2, 3]])] * 3

    def terms() -> list[Tensor]:
        return [
            graph(tokens, patches.flatten(2).mT),
            distinct_loss(tokens),
            cle_loss(tokens, patches, mask, labels, 0.5),
            une_loss(tokens, patches, selected, labels),
        ]

    with torch.autocast("cpu", torch.bfloat16):
        found = terms()
    assert all(torch.equal(*pair) for pair in zip(found, terms(), strict=True))


# ---- segmentation, masks, weights ----------------------------------------------------------------


def test_halves_divide_by_their_pixels_and_a_millionth() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 2, 3).double()
    label = torch.tensor([[[0, 0, 2], [255, 1, 0]]])
    each = F.cross_entropy(logits, label, ignore_index=255, reduction="none")
    expected = each[label == 0].sum() / (3 + 1e-6) / 2
    expected = expected + each[(label > 0) & (label < 255)].sum() / (2 + 1e-6) / 2
    value = balanced_segmentation_loss(logits, label, eps=1e-6)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert value.item() != pytest.approx(balanced_segmentation_loss(logits, label).item(), 1e-9)
    only = balanced_segmentation_loss(logits, torch.full_like(label, 255), eps=1e-6)
    assert only.item() == 0


def test_early_masks_agree_on_background_and_nest() -> None:
    cam = torch.rand(2, 3, 32, 32)
    labels, whole = torch.tensor([[1.0, 0, 1], [0, 1, 0]]), torch.tensor([[0, 8, 0, 8]] * 2)
    rules = MoReSettings(max_steps=20000).mask_rules(10000)
    masks = {
        name: token_labels(cam, labels, (8, 8), whole, high=rule.high, low=rule.low)
        for name, rule in rules.items()
    }
    cle, une = masks["cle_mask"], masks["une_mask"]
    sure = (une > 0) & (une < 255)
    assert sure.any()
    assert ((cle > 0) & (cle < 255)).sum() > sure.sum()
    assert torch.equal(cle[sure], une[sure])
    assert torch.equal(cle == 0, une == 0)


def test_masks_have_the_sources_and_thresholds_of_the_page() -> None:
    voc = MoReSettings(max_steps=20000)
    early = {
        "ptc_mask": ("cam_aux", 0.7, 0.25),
        "cle_mask": ("cam_aux", 0.5, 0.25),
        "une_mask": ("cam_aux", 0.7, 0.25),
    }
    late = dict.fromkeys(("cle_mask", "une_mask"), ("cam", 0.6, 0.35))
    assert voc.mask_rules(10000) == early
    assert voc.mask_rules(10001) == early | late
    coco = MoReSettings(max_steps=80000, late_masks_after=0.625)
    assert (coco.masks_are_late(50000), coco.masks_are_late(50001)) == (False, True)


def test_weights_change_where_the_tables_say() -> None:
    voc = MoReSettings(max_steps=20000)
    names = [f"{term}_loss" for term in TERMS[2:]]
    assert list(voc.loss_weights(0)) == names
    assert list(voc.loss_weights(2000).values()) == [1, 0.3, 0.2, 0.1, 0, 0]
    assert list(voc.loss_weights(2001).values()) == [1, 0.3, 0.2, 0.1, 0.12, 0.05]
    later = {"ptc_after": 0.1, "tokens_after": 0.15, "seg_after": 0.2}
    coco = MoReSettings(max_steps=80000, cle_weight=0.1, une_weight=0.01, **later)
    for step, expected in (
        (8000, [1, 0, 0, 0, 0, 0]),
        (8001, [1, 0.3, 0, 0, 0, 0]),
        (12000, [1, 0.3, 0, 0, 0, 0]),
        (12001, [1, 0.3, 0.1, 0.01, 0, 0]),
        (16000, [1, 0.3, 0.1, 0.01, 0, 0]),
        (16001, [1, 0.3, 0.1, 0.01, 0.12, 0.05]),
    ):
        assert list(coco.loss_weights(step).values()) == expected, step


def test_shares_of_a_run_are_rounded_to_steps() -> None:
    assert 0.29 * 100 < 29, "cut off it would be 28"
    share = dict.fromkeys(("ptc_after", "tokens_after", "seg_after", "late_masks_after"), 0.29)
    settings = MoReSettings(max_steps=100, **share)
    assert list(settings.loss_weights(29).values()) == [1, 0, 0, 0, 0, 0]
    assert all(settings.loss_weights(30).values())
    assert (settings.masks_are_late(29), settings.masks_are_late(30)) == (False, True)


@pytest.mark.parametrize(("low", "high"), [("low", "cle_high"), ("late_low", "late_high")])
def test_thresholds_that_cross_are_refused(low: str, high: str) -> None:
    crossed = {f"{low}_threshold": 0.65, f"{high}_threshold": 0.6}
    message = f"expected {low}_threshold <= {high}_threshold, got 0.65 > 0.6"
    with pytest.raises(WSSSError, match=message):
        MoReSettings(max_steps=10, **crossed)
    MoReSettings(max_steps=10, **dict.fromkeys(crossed, 0.6))  # nothing is uncertain


# ---- routes of the gradient ----------------------------------------------------------------------

REACHED = {
    "cls": {"backbone", "classifier"},
    "cls_aux": {"backbone", "aux_classifier"},
    "distinct": {"backbone", "graph"},
    "ptc": {"backbone"},
    "cle": {"backbone", "graph"},
    "une": {"backbone"},
    "seg": {"backbone", "decoder"},
    "reg": {"backbone", "decoder"},
}


def test_each_term_reaches_its_own_parameters() -> None:
    module = tiny()
    losses = losses_at(module, MAX_STEPS - 1).losses
    assert list(losses) == [f"{term}_loss" for term in TERMS]
    named = dict(module.named_parameters())
    for term in TERMS:
        found = torch.autograd.grad(
            losses[f"{term}_loss"], list(named.values()), retain_graph=True, allow_unused=True
        )
        moved = {n for n, g in zip(named, found, strict=True) if g is not None and g.any()}
        assert {name.split(".")[0] for name in moved} == REACHED[term], term
        assert "backbone.vit.pos_embed" in moved, term


def test_the_terms_of_a_step_are_of_its_tokens_and_targets() -> None:
    module, batch = tiny(), make_batch()
    step = losses_at(module, MAX_STEPS - 1)
    seen, images, labels = step.seen, batch["image"], batch["labels"]
    tokens, own = seen["features"].patch_map, seen["class_tokens"]
    aux = seen["features"].as_map(seen["features"].intermediates[1])
    full = F.interpolate(module.decoder(tokens), images.shape[-2:], mode="bilinear")
    label = seen["pseudo_label"]
    expected = {
        "cls_loss": tokens.amax((2, 3)) @ module.classifier.weight[:, :, 0, 0].T,
        "cls_aux_loss": aux.amax((2, 3)) @ module.aux_classifier.weight[:, :, 0, 0].T,
        "distinct_loss": distinct_loss(own),
        "ptc_loss": ptc_loss(tokens, *pair_masks(seen["ptc_mask"])),
        "cle_loss": cle_loss(own, tokens, seen["cle_mask"], labels, 0.5),
        "une_loss": une_loss(own, tokens, seen["selected"], labels),
        "seg_loss": balanced_segmentation_loss(full, label, eps=1e-6),
        "reg_loss": imagenet_energy_loss(images, full, label, batch["box"], "lattice"),
    }
    for name in ("cls_loss", "cls_aux_loss"):
        expected[name] = F.multilabel_soft_margin_loss(expected[name], labels)
    assert ((label > 0) & (label < 255)).any()
    for name, value in expected.items():
        torch.testing.assert_close(step.losses[name], value, msg=name)


def test_une_of_a_whole_is_that_of_its_parts_by_their_tokens() -> None:
    """What several processes would have to add up; draws follow the image, not its place."""
    module, batch = tiny(), make_batch()
    whole = losses_at(module, 99).seen["selected"]
    parts = []
    for b in range(2):
        one = {name: values[b : b + 1] for name, values in batch.items()}
        parts.append(module.losses(one, 99).seen["selected"][0])
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))
    tokens, patches = torch.randn(2, 4, 5).double(), torch.randn(2, 5, 8, 8).double()
    uneven = [whole[0], whole[1][:1]]
    single = [
        une_loss(tokens[[b]], patches[[b]], uneven[b : b + 1], batch["labels"][[b]])
        for b in range(2)
    ]
    counts = [len(one) for one in uneven]
    together = une_loss(tokens, patches, uneven, batch["labels"])
    expected = sum(n * loss for n, loss in zip(counts, single, strict=True)) / sum(counts)
    torch.testing.assert_close(together, expected)
