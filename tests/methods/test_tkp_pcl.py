"""TKP-PCL: the ten properties of tkp_pcl.md section 8, in its order, then what is left."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.data.views.tkp_pcl import SquareViews
from wsss.maps.pseudo_labels import cam_probabilities, cam_to_label
from wsss.methods.base import Batch
from wsss.methods.tkp_pcl.equivariance import apply_symmetry, label_merge, mosaic, tiles_of
from wsss.methods.tkp_pcl.method import TKPPCL
from wsss.methods.tkp_pcl.patches import (
    ConfidentSets,
    HVBiLSTM,
    across_images,
    confident_sets,
    pce_loss,
    pce_terms,
    top_k_pool,
)
from wsss.models.backbone import Backbone
from wsss.models.vit import resize_positions

SIDE, CLASSES = 32, 4


def tiny(*, depth: int = 7, proj_drop: float = 0.1, **changes: Any) -> TKPPCL:
    """A TKP-PCL on 16 tokens of width 24; epsilon suits a random network's flat scores."""
    torch.manual_seed(0)
    overrides = {"embed_dim": 24, "depth": depth, "num_heads": 3, "img_size": SIDE, "patch_size": 8}
    backbone = Backbone(
        name="vit_tiny_patch16_224",
        weights="random",
        overrides={**overrides, "proj_drop_rate": proj_drop},
    )
    settings = {"num_classes": CLASSES, "max_steps": 20, "warmup_steps": 2, "lstm_hidden": 6}
    return TKPPCL(backbone=backbone, **{**settings, "epsilon": 0.5, **changes}).train()


def without_dropout(**changes: Any) -> TKPPCL:
    return tiny(proj_drop=0.0, dropout=0.0, **changes)


def make_batch(size: int = 4, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(size, CLASSES)
    for index in range(size):
        labels[index, [index % CLASSES, (index * 2 + 1) % CLASSES]] = 1
    return {
        "image": torch.randn(size, 3, SIDE, SIDE, generator=generator),
        "labels": labels,
        "name": [f"image{index}" for index in range(size)],
    }


def random_scores(*shape: int, seed: int = 0, sharp: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)


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


def test_more_patches_than_there_are_is_an_error_and_a_fraction_follows_the_grid() -> None:
    with pytest.raises(WSSSError, match="top_k=17"):
        tiny(top_k=17)(torch.zeros(1, 3, SIDE, SIDE))
    module = tiny(top_k_fraction=0.25)
    scores = random_scores(1, 16, 5)
    assert torch.equal(module._pool(scores), top_k_pool(scores, 4))


# ---- 3: the background column --------------------------------------------------------------------


def test_3_background_is_a_category_of_a_classifier_without_bias() -> None:
    module = tiny().eval()
    scores = module.score(make_batch()["image"])
    probabilities = scores.probabilities
    assert probabilities.shape == (4, 16, CLASSES + 1)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(4, 16))
    moved = scores._replace(logits=scores.logits + 3.5).probabilities
    torch.testing.assert_close(moved, probabilities)
    assert sum(p.numel() for p in module.classifier.parameters()) == 24 * (CLASSES + 1)


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


def test_5_scale_and_rotation_change_nothing_and_others_feel_nothing() -> None:
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


def test_7_absent_categories_and_a_background_only_image_count_nothing() -> None:
    scores = random_scores(2, 9, 3, sharp=8)
    present = torch.tensor([[True, True, False], [True, False, False]])
    sets = confident_sets(scores, present, 0.6)
    assert not sets.high[0, 2].any()
    assert not sets.low[1, 1].any()
    module = without_dropout()
    batch = make_batch()
    batch["labels"] = torch.zeros(4, CLASSES)
    module.compute_losses(batch, 5).total.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def updated(**changes: Any) -> dict[str, Tensor]:
    """Parameters after two steps, dropout included, drawn from one seed."""
    module = tiny(**changes)
    module.classifier.weight.data *= 20  # scores sharp enough for pairs
    optimizer = module.optimizer(module.param_groups())
    torch.manual_seed(7)
    for step in (1, 5):
        optimizer.zero_grad()
        module.compute_losses(make_batch(), step).total.backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def test_7_epsilon_of_one_is_mce_alone() -> None:
    full, plain = updated(epsilon=1.0, pce_weight=0.5), updated(pce_weight=0.0)
    assert all(torch.equal(full[name], plain[name]) for name in plain)
    felt = updated(epsilon=0.5, pce_weight=0.5)
    name = "bilstm.horizontal.weight_ih_l0"
    assert not torch.equal(felt[name], plain[name])


# ---- 8: batches and shards -----------------------------------------------------------------------


def loss_of(module: TKPPCL, batch: Batch, indices: list[int]) -> float:
    part = {key: value[indices] for key, value in batch.items() if isinstance(value, Tensor)}
    return module.compute_losses(part, 5).total.item()


def test_8_a_batch_is_the_mean_of_its_images_and_shards() -> None:
    module = without_dropout(pce_weight=1.0, epsilon=0.5)
    module.classifier.weight.data *= 20  # scores sharp enough for pairs
    batch = make_batch()
    assert module.compute_losses(batch, 5).losses["pce_loss"].item() > 0
    whole = loss_of(module, batch, [0, 1, 2, 3])
    singles = [loss_of(module, batch, [index]) for index in range(4)]
    assert whole == pytest.approx(sum(singles) / 4, rel=1e-5)
    shards = [loss_of(module, batch, part) for part in ([0, 1], [2, 3])]
    assert whole == pytest.approx(sum(shards) / 2, rel=1e-5)
    assert whole == pytest.approx(loss_of(module, batch, [2, 0, 3, 1]), rel=1e-5)


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
    module._run(module.horizontal, lines)
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


# ---- 10: the pipeline ----------------------------------------------------------------------------


def test_10a_merge_keeps_to_the_labels() -> None:
    scores = random_scores(2, 4, 4, 5).permute(0, 3, 1, 2)
    targets = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 1, 0]])
    merged = label_merge(scores, targets)
    assert merged[0, 2:4].abs().max() == 0
    torch.testing.assert_close(merged.sum(1), torch.ones(2, 4, 4, dtype=torch.float64))
    # the odds of two present categories are those of maps with maximum 1
    peaked = scores / scores.amax((2, 3), keepdim=True)
    torch.testing.assert_close(merged[0, 4] / merged[0, 0], peaked[0, 4] / peaked[0, 0])
    other = scores.clone()
    other[:, 2] = 0.3
    torch.testing.assert_close(label_merge(other, targets), merged)
    assert set(merged[1].argmax(0).unique().tolist()) <= {0, 3}
    assert label_merge(torch.zeros_like(scores), targets).abs().max() == 0


def test_10a_maps_of_the_evaluator_are_the_merged_map() -> None:
    module = tiny().eval()
    module.classifier.weight.data *= 20
    images, labels = make_batch()["image"], make_batch()["labels"]
    maps = module.cams(images, labels)
    assert maps.shape == (4, CLASSES, SIDE, SIDE)
    assert maps[labels == 0].abs().max() == 0
    assert torch.equal(module.cams(images, torch.ones(4, CLASSES))[labels > 0], maps[labels > 0])

    scores = module.score(images)
    merged = label_merge(scores.as_map(scores.probabilities), F.pad(labels, (1, 0), value=1))
    peaked = merged[:, 1:] / (merged[:, 1:] + merged[:, :1]).clamp_min(1e-12)
    larger = F.interpolate(peaked, (SIDE, SIDE), mode="bilinear")
    torch.testing.assert_close(maps, larger, atol=1e-5, rtol=1e-4)
    probabilities = cam_probabilities(peaked, labels, bg_threshold=0.5)
    torch.testing.assert_close(probabilities, merged, atol=1e-5, rtol=1e-4)
    assert torch.equal(cam_to_label(peaked, labels, bg_threshold=0.5), merged.argmax(1))


def trained_names(module: TKPPCL, step: int) -> set[str]:
    """Encoder tensors that a step at a given time changes."""
    optimizer = module.optimizer(module.param_groups())
    before = {n: p.detach().clone() for n, p in module.backbone.named_parameters()}
    module.compute_losses(make_batch(), step).total.backward()
    optimizer.step()
    after = dict(module.backbone.named_parameters())
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_10b_heads_learn_first_then_the_last_five_blocks() -> None:
    assert trained_names(tiny(), 1) == set()
    changed = trained_names(tiny(), 2)
    expected = {
        name
        for name, _ in tiny().backbone.named_parameters()
        if name.startswith((*(f"vit.blocks.{i}." for i in range(2, 7)), "vit.norm."))
    }
    # the key's bias moves no softmax, so only whole tensors are compared
    assert changed == expected


def test_10b_frozen_blocks_keep_their_dropout() -> None:
    module = tiny(depth=4, trained_blocks=1, dropout=0.0)
    first = module.backbone.vit.blocks[0]
    tokens = torch.randn(1, 17, 24)
    assert not next(first.parameters()).requires_grad
    assert not torch.equal(first(tokens), first(tokens))
    assert first.mlp.drop1.p == first.mlp.drop2.p == first.attn.proj_drop.p == 0.1
    assert first.attn.attn_drop.p == 0


def test_10c_larger_images_give_larger_maps_and_the_own_size_the_own_positions() -> None:
    backbone = Backbone(
        name="vit_tiny_patch16_384",
        weights="random",
        overrides={"embed_dim": 12, "depth": 1, "num_heads": 3},
    )
    module = TKPPCL(backbone=backbone, num_classes=3, max_steps=1, lstm_hidden=3).eval()
    for side, grid in ((384, 24), (960, 60)):
        with torch.no_grad():
            outputs = module(torch.zeros(1, 3, side, side))
        assert outputs.seg_logits is not None
        assert outputs.seg_logits.shape == (1, 4, grid, grid)
    positions = backbone.vit.pos_embed
    assert resize_positions(positions, (24, 24), 1) is positions


def test_10d_the_main_view_is_turned_and_never_cropped() -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8)
    views = SquareViews(size=16, patch_size=4)
    views.steps.transforms = []  # geometry alone
    plain = views(rgb, Fixed([0.9, 0.9, 0.9]))["image"]
    seen = set()
    for seed in range(60):
        sample = views(rgb, np.random.default_rng(seed))
        assert set(sample) == {"image", "symmetry"}  # labels are the data set's, untouched
        upright = apply_symmetry(sample["image"][None], sample["symmetry"][None], inverse=True)
        assert torch.equal(upright[0], plain)
        seen.add(tuple(sample["symmetry"].tolist()))
    assert len(seen) == 8


class Fixed:
    """A generator whose coins always fall as told."""

    def __init__(self, coins: list[float]) -> None:
        self.coins = coins

    def random(self, size: int) -> np.ndarray:
        return np.array(self.coins[:size])

    def integers(self, *_: Any) -> int:
        return 0


# ---- equivariance --------------------------------------------------------------------------------


def test_symmetries_and_mosaics_have_inverses() -> None:
    maps = torch.randn(8, 2, 3, 3)
    symmetry = torch.tensor([[bool(i & 1), bool(i & 2), bool(i & 4)] for i in range(8)])
    turned = apply_symmetry(maps, symmetry)
    assert torch.equal(apply_symmetry(turned, symmetry, inverse=True), maps)
    assert (
        len({tuple(apply_symmetry(maps[:1], row[None]).flatten().tolist()) for row in symmetry})
        == 8
    )
    views = torch.randn(8, 3, 4, 4)
    assert torch.equal(tiles_of(mosaic(views)), views)
    assert torch.equal(mosaic(views)[1, :, :4, 4:], views[5])  # row by row
    with pytest.raises(WSSSError, match="multiple"):
        mosaic(views[:6])


def equivariance_batch(rng: np.random.Generator) -> Batch:
    views = SquareViews(size=SIDE, view=True, patch_size=8)
    rgb = np.random.default_rng(5).integers(0, 255, (4, 40, 44, 3), np.uint8)
    samples = [views(image, rng) for image in rgb]
    stacked = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    return stacked | {"labels": make_batch()["labels"]}


def test_target_of_a_view_is_what_the_view_shows() -> None:
    """A module whose scores are its input's: the target must be the view's own merged scores."""
    module = without_dropout(equivariance_weight=1.0)
    batch = equivariance_batch(np.random.default_rng(0))
    targets = F.pad(batch["labels"], (1, 0), value=1.0)
    target = module.equivariance_target(batch, targets, (2, 2))
    assert target.shape == (4, CLASSES + 1, 2, 2)
    assert not target.requires_grad
    assert target[targets == 0].abs().max() == 0
    with torch.no_grad():
        scores = module.eval().score(batch["image"])
    maps = apply_symmetry(
        scores.as_map(scores.probabilities), batch["symmetry"], inverse=True
    )  # upright, 4 x 4 patches
    whole = batch["view_box"][:, 1] - batch["view_box"][:, 0] == SIDE
    assert whole.any()
    for index in whole.nonzero().flatten().tolist():
        small = F.interpolate(maps[index : index + 1], (2, 2), mode="bilinear")
        small = apply_symmetry(small, batch["view_symmetry"][index : index + 1])
        torch.testing.assert_close(
            target[index : index + 1], label_merge(small, targets[index : index + 1])
        )


def test_boxes_of_views_mean_the_same_for_any_size_of_patches() -> None:
    """Views drawn on a coarser grid than the encoder's show the same part of its map."""
    module = without_dropout(equivariance_weight=1.0)
    batch = equivariance_batch(np.random.default_rng(0))
    batch["view_box"] = torch.tensor([[16, 32, 0, 16]]).expand(4, 4)
    batch["view_symmetry"] = batch["symmetry"] = torch.zeros(4, 3, dtype=torch.bool)
    targets = F.pad(batch["labels"], (1, 0), value=1.0)
    with torch.no_grad():
        scores = module.eval().score(batch["image"])
    shown = scores.as_map(scores.probabilities)[..., 2:4, 0:2]  # of 4 x 4 patches of 8 px
    target = module.equivariance_target(batch, targets, (2, 2))
    torch.testing.assert_close(target, label_merge(shown, targets))


def test_view_shows_the_box_that_it_names() -> None:
    views = SquareViews(size=24, view=True, patch_size=4)
    views.steps.transforms = []
    smooth = np.linspace(0, 250, 24, dtype=np.uint8)
    rgb = np.stack([*np.meshgrid(smooth, smooth), np.zeros((24, 24), np.uint8)], axis=-1)
    rgb = rgb.astype(np.uint8)
    parts = 0
    for seed in range(30):
        sample = views(rgb, np.random.default_rng(seed))
        r0, r1, c0, c1 = sample["view_box"].tolist()
        upright = apply_symmetry(sample["image"][None], sample["symmetry"][None], inverse=True)
        shown = apply_symmetry(sample["view"][None], sample["view_symmetry"][None], inverse=True)
        expected = F.interpolate(upright[..., r0:r1, c0:c1], (12, 12), mode="bilinear")
        assert (shown - expected).abs().mean() < 0.05
        parts += r1 - r0 == 8  # two of six patches
    assert 3 <= parts <= 20


def test_equivariance_trains_and_says_what_it_misses() -> None:
    module = tiny(equivariance_weight=1.0)
    result = module.compute_losses(equivariance_batch(np.random.default_rng(0)), 5)
    result.total.backward()
    assert result.losses["equivariance_loss"] > 0
    with pytest.raises(WSSSError, match=r"train_transform\.view=true"):
        module.compute_losses(make_batch(), 5)
    batch = equivariance_batch(np.random.default_rng(0))
    batch["view_box"] = torch.tensor([[4, 20, 0, 16]]).expand(4, 4)
    with pytest.raises(WSSSError, match=r"patch_size: .* patches of 8 px; set it to 8"):
        module.compute_losses(batch, 5)
    with pytest.raises(WSSSError, match="patch_size=16"):
        SquareViews(size=96 + 16, view=True)


# ---- the rest ------------------------------------------------------------------------------------


def test_terms_of_zero_weight_are_not_computed() -> None:
    result = tiny(pce_weight=0.0, l2_weight=0.0).compute_losses(make_batch(), 5)
    assert set(result.losses) == {"mce_loss"}
    assert result.coverage is None


@pytest.mark.parametrize(
    "options",
    [
        {"pce_embedding": "encoder"},
        {"pce_background": False},
        {"pce_scope": "batch"},
        {"pce_sets": "no_dropout"},
    ],
)
def test_every_option_changes_the_contrast(options: dict[str, Any]) -> None:
    def contrast(**changes: Any) -> float:
        module = tiny(pce_weight=1.0, **changes)
        module.classifier.weight.data *= 20
        torch.manual_seed(3)
        return module.compute_losses(make_batch(), 5).losses["pce_loss"].item()

    assert contrast() != contrast(**options)


def test_coverage_is_the_share_of_present_pairs_with_two_anchors() -> None:
    module = without_dropout()
    scores = module.score(make_batch()["image"])
    logits = torch.full_like(scores.logits, -9.0)
    logits[..., 0] = 9  # all background, except one patch of class 1 in image 0
    logits[0, 0, :2] = torch.tensor([-9.0, 9.0])
    targets = F.pad(make_batch()["labels"], (1, 0), value=1.0)
    _, coverage = module._contrast(make_batch()["image"], scores._replace(logits=logits), targets)
    assert float(coverage) == pytest.approx(4 / targets.sum().item())


def test_schedule_has_two_steps() -> None:
    module = tiny(warmup_steps=3, warmup_lr=1e-3, lr=1e-4)
    assert [module.lr_multiplier(step) for step in (0, 2, 3, 19)] == pytest.approx([1, 1, 0.1, 0.1])
    optimizer = module.optimizer(module.param_groups())
    assert optimizer.defaults["eps"] == 1e-7
    assert all(
        group["lr"] == 1e-3 and group["weight_decay"] == 0 for group in optimizer.param_groups
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epsilon": 0.4}, "epsilon=0.4"),
        ({"top_k": 0}, "top_k"),
        ({"top_k_fraction": 1.5}, "top_k_fraction=1.5"),
        ({"warmup_lr": 0.0}, "warmup_lr=0.0"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(WSSSError, match=expected):
        tiny(**changes)
