"""WeCLIP's equations, each against a second way of writing it (weclip.md sections 3 to 8, 12)."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_weclip import DEPTH, DIM, WIDTH, batch_of, tiny, tower
from torch import Tensor

from wsss.maps.refine.par import PAR
from wsss.methods.weclip import affinity as aff
from wsss.methods.weclip.decoder import WeCLIPDecoder, affinity
from wsss.methods.weclip.gradcam import (
    LastBlock,
    Texts,
    class_slots,
    grad_cam,
    score_gradients,
    unit_range,
)
from wsss.methods.weclip.maps import by_class, class_scores, label_maps, propagated, refined_maps
from wsss.methods.weclip.method import WeCLIP
from wsss.methods.weclip.official import first_rfm_iteration
from wsss.methods.weclip.tower import encode
from wsss.models.backbone import Backbone

LABELS = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 1]])


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(3)
    return tower()


@pytest.fixture(scope="module")
def double(backbone: Backbone) -> Backbone:
    return copy.deepcopy(backbone).double()


def texts(classes: int = 3, backgrounds: int = 4, scale: float = 20.0) -> Texts:
    rows = torch.randn(classes + backgrounds, WIDTH, generator=torch.Generator().manual_seed(1))
    rows = F.normalize(rows.double(), dim=1)
    return Texts(rows[:classes], rows[classes:], torch.tensor(scale).double())


def last_of(double: Backbone, tokens: Tensor) -> LastBlock:
    vit = double.vit
    return LastBlock.run(vit.blocks[-1], vit.norm, double.projection, tokens, 1)


def tokens_of(batch: int = 3, patches: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return 2 * torch.randn(batch, patches + 1, DIM, generator=generator).double()


# ---- tower ---------------------------------------------------------------------------------------


def test_the_tower_is_timms_where_positions_are_the_stored_ones(backbone: Backbone) -> None:
    images = torch.randn(2, 3, 32, 32)
    encoded = encode(backbone, images, layers=DEPTH)
    blocks = [backbone.vit.patch_embed(images)]
    blocks[0] = backbone.vit.norm_pre(backbone.vit._pos_embed(blocks[0]))
    for block in backbone.vit.blocks:
        blocks.append(block(blocks[-1]))
    for own, theirs in zip(encoded.tokens, blocks[1:-1], strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=2e-5)
    assert len(encoded.attentions) == DEPTH - 1
    assert encoded.last is not None
    for attention in (*encoded.attentions, encoded.last.attention.mean(1)):
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 17))


def test_patch_attention_is_that_of_the_last_blocks(backbone: Backbone) -> None:
    encoded = encode(backbone, torch.randn(1, 3, 32, 24), layers=3)
    assert encoded.last is not None
    assert (encoded.grid, len(encoded.attentions)) == ((4, 3), 2)
    every = [*encoded.attentions, encoded.last.attention.mean(1)]
    found = encoded.patch_attention(2)
    assert found.shape == (1, 2, 12, 12)
    assert torch.equal(found[:, 0], every[1][:, 1:, 1:])
    assert torch.equal(found[:, 1], every[2][:, 1:, 1:])


def test_positions_are_resized_bilinearly() -> None:
    model = tiny()
    images = torch.zeros(1, 3, 48, 40)
    found = model.encode(images).tokens
    model.backbone.position_mode = "bicubic"
    assert not torch.equal(found[0], model.encode(images).tokens[0])


# ---- Grad-CAM ------------------------------------------------------------------------------------


def test_the_embedding_averages_normed_patches_alone(double: Backbone) -> None:
    tokens, vit = tokens_of(), double.vit
    whole = vit.norm(vit.blocks[-1](tokens))
    assert double.projection is not None
    expected = whole[:, 1:].mean(1) @ double.projection
    torch.testing.assert_close(last_of(double, tokens).embedding, expected)


def probability(double: Backbone, x: Tensor, a: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """Probabilities (m,) of one image's texts, from x and a = LN1(x) (weclip.md section 3)."""
    block, vit = double.vit.blocks[-1], double.vit
    qkv = block.attn.qkv(a).unflatten(-1, (3, block.attn.num_heads, -1)).permute(1, 2, 0, 3)
    q, k, v = qkv
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
    y = x + block.attn.proj((weights @ v).transpose(0, 1).flatten(1))
    z = y + block.mlp(block.norm2(y))
    assert double.projection is not None
    e = vit.norm(z)[1:].mean(0) @ double.projection
    return (scale * rows @ (e / e.norm())).softmax(0)


def test_channel_weights_are_mean_gradients_of_the_probability(double: Backbone) -> None:
    tokens, t, slots = tokens_of(), texts(), class_slots(LABELS)
    found = grad_cam(last_of(double, tokens), t, slots, of_probability=True)
    for b, present in enumerate(LABELS.bool()):
        rows = torch.cat([t.foreground[present], t.background])
        a = double.vit.blocks[-1].norm1(tokens[b]).detach().requires_grad_()
        p = probability(double, tokens[b], a, rows, t.scale)
        torch.testing.assert_close(found.logits[b].softmax(0)[found.logits[b] > -torch.inf], p)
        for slot in range(int(present.sum())):
            (gradient,) = torch.autograd.grad(p[slot], a, retain_graph=True)
            alpha = gradient[1:].mean(0)
            torch.testing.assert_close(found.weights[b, slot], alpha, rtol=1e-9, atol=1e-16)
            raw = (a[1:] @ alpha).relu().detach()
            for _ in range(2):
                raw = (raw - raw.min()) / (1e-7 + (raw - raw.min()).max())
            torch.testing.assert_close(found.cam[b, slot], raw, rtol=1e-7, atol=1e-9)
    assert not found.cam[1, 1:].any()  # empty slots


def test_pairs_in_parts_are_pairs_at_once(
    double: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, slots = tokens_of(), class_slots(LABELS)
    whole = grad_cam(last_of(double, tokens), texts(), slots).cam
    monkeypatch.setattr("wsss.methods.weclip.gradcam.PAIRS", 4)
    torch.testing.assert_close(grad_cam(last_of(double, tokens), texts(), slots).cam, whole)


def test_the_direction_gives_the_probabilitys_map(double: Backbone) -> None:
    """Section 9, item 8: but for the epsilon of the two stretches."""
    tokens, slots = tokens_of(), class_slots(LABELS)
    official = grad_cam(last_of(double, tokens), texts(), slots, of_probability=True)
    ours = grad_cam(last_of(double, tokens), texts(), slots)
    strong = official.weights.abs().amax(2) > 1e-4
    assert strong.sum() >= 3
    torch.testing.assert_close(ours.cam[strong], official.cam[strong], rtol=0, atol=1e-3)
    ratio = official.weights / ours.weights  # one positive factor a slot
    mean = ratio.mean(2, keepdim=True)
    assert (mean[slots[1]] > 0).all()
    torch.testing.assert_close(ratio[slots[1]], mean.expand_as(ratio)[slots[1]])


def test_a_sure_class_keeps_its_map(double: Backbone) -> None:
    t, slots = texts(scale=5000.0), class_slots(LABELS[1:2])
    last = last_of(double, tokens_of(1))
    t.foreground[1] = F.normalize(last.embedding[0], dim=0) + 0.1 * t.foreground[0]
    t.foreground[1] /= t.foreground[1].norm()
    assert grad_cam(last, t, slots).logits.softmax(1)[0, 0] == 1
    assert grad_cam(last, t, slots, of_probability=True).cam.amax() < 0.9
    assert grad_cam(last, t, slots).cam.amax() > 0.99


def test_score_gradients_ignore_a_constant_and_the_order(double: Backbone) -> None:
    embedding = torch.randn(1, WIDTH).double()
    t = texts()
    rows = torch.cat([t.foreground, t.background])[None]
    logits = t.scale * rows[0] @ F.normalize(embedding[0], dim=0)
    pair = torch.tensor([0]), torch.tensor([1])
    for scale in (None, t.scale):
        plain = score_gradients(embedding, logits[None], rows, pair, scale)
        moved = score_gradients(embedding, logits[None] + 7, rows, pair, scale)
        order = torch.tensor([0, 1, 2, 6, 4, 3, 5])
        turned = score_gradients(embedding, logits[None, order], rows[:, order], pair, scale)
        torch.testing.assert_close(moved, plain)
        torch.testing.assert_close(turned, plain)
        assert abs(float((plain * embedding).sum())) < 1e-9  # (I - u u^T)


def test_classes_in_another_order_have_the_same_maps(double: Backbone) -> None:
    tokens, t, order = tokens_of(), texts(), torch.tensor([2, 0, 1])
    slots, turned = class_slots(LABELS), class_slots(LABELS[:, order])
    plain = grad_cam(last_of(double, tokens), t, slots).cam[..., None]
    other = Texts(t.foreground[order], t.background, t.scale)
    moved = grad_cam(last_of(double, tokens), other, turned).cam[..., None]
    torch.testing.assert_close(by_class(moved, turned, 3), by_class(plain, slots, 3)[:, order])


def test_ranges_are_stretched() -> None:
    maps = torch.tensor([[[1.0, 3.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    found = unit_range(maps)
    torch.testing.assert_close(found[0], torch.tensor([[0, 1.0], [0.5, 0]]))
    assert not found[1].any()
    assert unit_range(1e-7 * maps[0]).max() == pytest.approx(2 / 3, rel=1e-5)  # epsilon


# ---- boxes ---------------------------------------------------------------------------------------


def boxes_by_hand(cam: np.ndarray, threshold: float, *, official: bool) -> np.ndarray:
    """Flood fill, one pixel after the other."""
    height, width = cam.shape
    bright = cam > np.float32(threshold)
    if official:
        grey = np.floor(cam * np.float32(255))
        bright = grey > math.floor(float(grey.max()) * threshold)
    mask, seen = np.zeros(cam.shape, bool), np.zeros(cam.shape, bool)
    for start in zip(*np.nonzero(bright), strict=True):
        if seen[start]:
            continue
        queue, pixels = [start], []
        seen[start] = True
        while queue:
            row, column = queue.pop()
            pixels.append((row, column))
            for r in range(max(row - 1, 0), min(row + 2, height)):
                for c in range(max(column - 1, 0), min(column + 2, width)):
                    if bright[r, c] and not seen[r, c]:
                        seen[r, c] = True
                        queue.append((r, c))
        (y0, x0), (y1, x1) = np.min(pixels, 0), np.max(pixels, 0) + 1
        if official:
            y1, x1 = min(y1, height - 1), min(x1, width - 1)
        mask[y0:y1, x0:x1] = True
    return mask


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("threshold", [0.4, 0.7])
def test_boxes_are_those_of_a_flood_fill(threshold: float, official: bool) -> None:
    maps = torch.rand(40, 7, 9, generator=torch.Generator().manual_seed(0)) ** 2
    maps[3] = 0
    maps[4, 0, 0], maps[4, 6, 8] = 1, 1
    found = aff.box_mask(maps, threshold, eight_bit=official, open_edge=official)
    for own, cam in zip(found, maps.numpy(), strict=True):
        assert np.array_equal(own, boxes_by_hand(cam, threshold, official=official))
    assert not found[3].any()


def test_a_spiral_is_one_region() -> None:
    """Long ways inside a region need many rounds."""
    spiral = torch.zeros(1, 9, 9)
    spiral[0, 0, :], spiral[0, :, 8], spiral[0, 8, :], spiral[0, 2:, 0] = 1, 1, 1, 1
    spiral[0, 2, :7], spiral[0, 2:7, 6], spiral[0, 6, 2:7] = 1, 1, 1
    label = aff.connected(spiral > 0.5)
    assert label.unique().tolist() == [-1, 80]
    assert aff.box_mask(spiral, 0.5).all()


def test_the_threshold_itself_is_outside() -> None:
    cam = torch.full((1, 3, 3), 0.5)
    assert not aff.box_mask(cam, 0.5).any()
    cam[0, 1, 1] = 0.50001
    assert aff.box_mask(cam, 0.5).sum() == 1


# ---- refinement ----------------------------------------------------------------------------------


def attention_of(layers: int = 4, patches: int = 12) -> Tensor:
    """Maps of unequal mass."""
    maps = torch.randn(2, layers, patches, patches, generator=torch.Generator().manual_seed(5))
    return maps.softmax(-1) * torch.linspace(0.9, 1.1, layers)[:, None, None]


def test_kept_maps_are_those_of_mean_mass() -> None:
    attention = attention_of()
    for related in (torch.rand(2, 12, 12), torch.ones(2, 12, 12)):
        kept = aff.kept_maps(attention, related, "signed")
        difference = (related[:, None] - attention).double().sum((2, 3))
        assert torch.equal(kept, difference <= difference.mean(1, keepdim=True) + 1e-9)
    assert kept.tolist() == [[False, False, True, True]] * 2


def test_absolute_distances_depend_on_the_affinity() -> None:
    attention = attention_of(3)
    related = attention[:, 0].clone()
    assert aff.kept_maps(attention, related, "absolute")[:, 0].all()
    assert not aff.kept_maps(attention, related, "signed")[:, 0].any()
    distance = (related[:, None] - attention).abs().sum((2, 3))
    kept = aff.kept_maps(attention, related, "absolute")
    assert torch.equal(kept, distance <= distance.mean(1, keepdim=True))


def test_equal_maps_are_all_kept() -> None:
    same = attention_of(1).expand(-1, 3, -1, -1)
    for how in ("signed", "absolute"):
        assert aff.kept_maps(same, torch.rand(2, 12, 12), how).all()


def test_the_learned_base_is_the_kept_mean_times_the_affinity() -> None:
    attention, related = attention_of(), torch.rand(2, 12, 12)
    found = aff.learned_base(attention, related, "signed")
    expected = attention[:, 2:].sum(1) / (2 + 1e-5) * related
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def transition_by_hand(base: np.ndarray) -> np.ndarray:
    for _ in range(3):
        base = base / base.sum(0, keepdims=True)
        base = base / base.sum(1, keepdims=True)
    half = (base + base.T) / 2
    return half @ half


def test_the_transition_is_that_of_the_page() -> None:
    base = attention_of(1)[:, 0].double()
    step = aff.transition(base)
    for own, one in zip(step, base.numpy(), strict=True):
        np.testing.assert_allclose(own @ own, transition_by_hand(one), rtol=1e-12)
    assert torch.equal(step, step.transpose(1, 2))
    assert ((step @ step).sum(2) - 1).abs().max() < 1e-2
    torch.testing.assert_close(aff.transition(3 * base), step, rtol=0, atol=1e-12)


def test_refinement_spreads_by_the_squared_transition() -> None:
    base, maps = attention_of(1)[:, 0].double(), torch.rand(2, 3, 12).double()
    found = aff.refine(maps, base)
    for b in range(2):
        expected = maps[b].numpy() @ transition_by_hand(base[b].numpy()).T
        np.testing.assert_allclose(found[b], expected, rtol=1e-12)
    assert not aff.refine(torch.zeros(2, 1, 12).double(), base).any()


def test_uniform_or_empty_affinity_gives_no_nan() -> None:
    maps = torch.rand(1, 2, 12)
    spread = aff.refine(maps, torch.ones(1, 12, 12))
    torch.testing.assert_close(spread, maps.mean(2, keepdim=True).expand(-1, -1, 12))
    assert unit_range(spread.unflatten(2, (3, 4))).isfinite().all()
    assert aff.refine(maps, torch.zeros(1, 12, 12)).isfinite().all()


@pytest.mark.parametrize("learned", [False, True])
def test_maps_are_masked_and_then_spread(learned: bool) -> None:
    model, slots = tiny(), class_slots(LABELS)
    encoded = model.encode(torch.randn(3, 3, 40, 40), layers=3)
    related = affinity(model.decoder.fused(encoded.taps, encoded.grid)) if learned else None
    assert encoded.last is not None
    cam = grad_cam(encoded.last, model.texts(), slots).cam.unflatten(2, (5, 5))
    masked = cam * aff.box_mask(cam, 0.3)
    base = encoded.patch_attention(2).mean(1)
    if related is not None:
        base = aff.learned_base(encoded.patch_attention(2), related, "signed")
    found = refined_maps(
        encoded, model.texts(), slots, box_threshold=0.3, layers=2, related=related
    )
    expected = aff.refine(masked.flatten(2), base).unflatten(2, (5, 5))
    assert torch.equal(found, expected)
    assert not torch.equal(masked, cam)


@torch.no_grad()
def test_every_phase_reads_its_own_last_blocks() -> None:
    """Three before RFM; then the two among which it chooses."""
    model, batch, slots = tiny(rfm_layers=2), batch_of(LABELS), class_slots(LABELS)
    for step, layers, other in ((9, 3, 2), (10, 2, 3)):
        seen = model.losses(batch, step).seen
        related = seen["affinity"] if step == 10 else None
        expected, wrong = (
            refined_maps(
                model.encode(batch["image"], layers=count), model.texts(), slots,
                box_threshold=0.4, layers=count, related=related,
            )
            for count in (layers, other)
        )  # fmt: skip
        assert torch.equal(seen["refined"], expected)
        assert not torch.allclose(unit_range(wrong), unit_range(expected), atol=0.05)


@torch.no_grad()
def test_settings_reach_boxes_filter_and_labels() -> None:
    images, slots, found = torch.randn(3, 3, 48, 48), class_slots(LABELS), []
    for how in ("signed", "absolute"):
        model = tiny(rfm_filter=how, box_threshold=0.6)
        encoded = model.encode(images, layers=3)
        related = encoded.patch_attention(3)[:, 0]  # that block is nearest
        found.append(model.refined_maps(encoded, slots, related))
        expected = refined_maps(
            encoded, model.texts(), slots, box_threshold=0.6, layers=3, related=related,
            rfm_filter=how,  # type: ignore[arg-type]
        )  # fmt: skip
        assert torch.equal(found[-1], expected)
    assert not torch.allclose(*found)
    boxes = batch_of(LABELS)["box"]
    plain, wide = (
        tiny(margin=margin).pseudo_labels(images, found[0], slots, boxes) for margin in (0.0, 0.2)
    )
    undecided = wide == 255
    assert 0 < undecided.sum() < undecided.numel()
    assert torch.equal(wide[~undecided], plain[~undecided])
    assert not (plain == 255).any()


# ---- labels --------------------------------------------------------------------------------------


def test_what_maps_leave_is_background() -> None:
    refined = torch.rand(2, 2, 3, 4)
    scores = class_scores(refined, (6, 8))
    lowest, highest = refined.amin((2, 3), keepdim=True), refined.amax((2, 3), keepdim=True)
    maps = (refined - lowest) / (1e-7 + highest - lowest)
    maps = F.interpolate(maps, (6, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(scores[:, 1:], maps)
    torch.testing.assert_close(scores[:, 0], 1 - maps.amax(1))


def test_images_of_another_size_are_resized_corner_to_corner() -> None:
    images, scores, par = torch.randn(1, 3, 10, 12), torch.rand(1, 2, 20, 16), PAR(num_iter=2)
    small = F.interpolate(images, (20, 16), mode="bilinear", align_corners=True)
    assert torch.equal(propagated(par, images, scores), par(small, scores))


def test_scores_are_propagated_twenty_times() -> None:
    given = torch.randn(1, 3, 12, 12), torch.rand(1, 2, 12, 12)
    propagated_by_it = tiny().par(*given)
    assert torch.equal(propagated_by_it, PAR(num_iter=20)(*given))
    assert not torch.allclose(propagated_by_it, PAR()(*given))


def test_the_best_class_of_the_image_wins() -> None:
    scores = torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.1, 0.9]])[..., None, None]
    slots = torch.tensor([[1, 4], [2, 0]]), torch.tensor([[True, True], [True, False]])
    assert label_maps(scores, slots).flatten().tolist() == [2, 0]  # class 0 is not there
    assert label_maps(scores, slots, margin=0.15).flatten().tolist() == [2, 255]
    assert label_maps(scores, slots, margin=0.3).flatten().tolist() == [255, 255]
    even = torch.tensor([[0.25, 0.5, 0.125]])[..., None, None]  # exactly the margin apart
    first = slots[0][:1], slots[1][:1]
    assert label_maps(even, first, margin=0.25).flatten().tolist() == [2]


def test_images_without_a_class_are_background() -> None:
    labels = torch.zeros(2, 3)
    step = tiny().losses(batch_of(labels), 0)
    assert not step.seen["pseudo_label"].any()
    assert step.total.isfinite()
    labels[1, 2] = 1  # beside one with a class
    step = tiny().losses(batch_of(labels), 20)
    assert not step.seen["pseudo_label"][0].any()
    assert {*step.seen["pseudo_label"][1].unique().tolist()} == {0, 3}


def test_padded_slots_change_no_label() -> None:
    torch.manual_seed(1)
    model, batch = tiny(), batch_of(LABELS)
    whole = model.losses(batch, 0).seen["pseudo_label"]
    for b in range(3):
        alone = {name: value[b : b + 1] for name, value in batch.items()}
        own = model.losses(alone, 0).seen["pseudo_label"][0]
        assert (own == whole[b]).float().mean() > 0.998  # sums of another order


# ---- affinity loss -------------------------------------------------------------------------------


def test_pairs_are_those_of_a_double_loop() -> None:
    label = torch.randint(0, 3, (2, 12, 16), generator=torch.Generator().manual_seed(0))
    label[0, :6, :8] = 255
    same, different = aff.near_pairs(label, (3, 4), 1)
    for b in range(2):
        for i in range(12):
            for j in range(12):
                (r, c), (s, d) = divmod(i, 4), divmod(j, 4)
                own, its = label[b, 4 * r, 4 * c], label[b, 4 * s, 4 * d]
                near = max(abs(r - s), abs(c - d)) <= 1 and 255 not in (own, its)
                assert same[b, i, j] == (near and own == its)
                assert different[b, i, j] == (near and own != its)


def test_the_affinity_loss_counts_one_more() -> None:
    related = torch.tensor([[[0.9, 0.3], [0.4, 0.8]]])
    same = torch.tensor([[[True, False], [False, True]]])
    expected = 0.5 * (0.1 + 0.2) / 3 + 0.5 * (0.3 + 0.4) / 3
    assert float(aff.affinity_loss(related, same, ~same)) == pytest.approx(expected)
    alone = aff.affinity_loss(related, torch.ones_like(same), torch.zeros_like(same))
    assert float(alone) == pytest.approx(0.5 * (0.1 + 0.7 + 0.6 + 0.2) / 5)


# ---- decoder -------------------------------------------------------------------------------------


def test_the_decoder_has_the_papers_parameters() -> None:
    sizes = {"dim": 768, "num_taps": 11, "num_outputs": 21, "width": 256}
    decoder = WeCLIPDecoder(**sizes, depth=3, num_heads=8, dropout=0.1)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 5_985_045
    attention = decoder.blocks[0].attn
    bound = math.sqrt(6 / (256 + 768))  # Xavier's
    assert 0.99 * bound < attention.qkv.weight.abs().max() <= bound
    assert not attention.qkv.bias.any()
    assert not attention.proj.bias.any()


def test_the_decoder_is_that_of_the_page() -> None:
    decoder = tiny().decoder
    taps = [torch.randn(2, 6, DIM) for _ in range(DEPTH - 1)]
    parts = [
        F.linear(F.linear(t, m.fc1.weight, m.fc1.bias).relu(), m.fc2.weight, m.fc2.bias)
        for t, m in zip(taps, decoder.mlps, strict=True)
    ]
    tokens = F.linear(torch.cat(parts, 2), decoder.fuse.weight.flatten(1), decoder.fuse.bias)
    fused = decoder.fused(taps, (2, 3))
    torch.testing.assert_close(fused.flatten(2).transpose(1, 2), tokens)
    torch.testing.assert_close(affinity(fused), torch.sigmoid(tokens @ tokens.transpose(1, 2)))
    (block,) = decoder.blocks
    inner = block.mlp.fc1(block.norm2(tokens + block.attn(block.norm1(tokens))))
    tokens = tokens + block.attn(block.norm1(tokens))
    tokens = tokens + block.mlp.fc2(inner * torch.sigmoid(1.702 * inner))
    head = decoder.predict
    logits = (
        F.linear(tokens, head.weight.flatten(1), head.bias).transpose(1, 2).unflatten(2, (2, 3))
    )
    torch.testing.assert_close(decoder.segment(fused), logits)
    assert block.norm1.eps == 1e-5


def test_dropout_takes_whole_channels() -> None:
    decoder = tiny(dropout=0.5).decoder.train()
    fused = decoder.fused([torch.randn(2, 6, DIM) for _ in range(DEPTH - 1)], (2, 3))
    dropped = (fused == 0).flatten(2)
    assert torch.equal(dropped.all(2), dropped.any(2))
    assert 0 < dropped.all(2).sum() < 32


# ---- losses and schedule -------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum() -> None:
    model, batch = tiny(aff_weight=0.25), batch_of(LABELS)
    step = model.losses(batch, 0)
    expected = step.losses["seg_loss"] + 0.25 * step.losses["aff_loss"]
    torch.testing.assert_close(step.total, expected)
    assert step.outputs.seg_logits is not None
    odds = step.outputs.seg_logits[:, 1:] - step.outputs.seg_logits[:, :1]
    assert torch.equal(step.outputs.class_logits, odds.amax((2, 3)))
    full = F.interpolate(step.outputs.seg_logits, (48, 48), mode="bilinear")
    every = F.cross_entropy(full, step.seen["pseudo_label"], reduction="none")
    shown = step.seen["pseudo_label"] > 0
    halves = 0.5 * every[shown].mean() + 0.5 * every[~shown].mean()
    torch.testing.assert_close(step.losses["seg_loss"], halves)
    pairs = aff.near_pairs(step.seen["pseudo_label"], (6, 6), 8)
    loss = aff.affinity_loss(step.seen["affinity"], *pairs)
    torch.testing.assert_close(step.losses["aff_loss"], loss)
    (gradient,) = torch.autograd.grad(loss, model.decoder.fuse.weight)
    assert gradient.any()  # what affinity learns
    assert list(tiny(aff_weight=0.0).losses(batch, 0).losses) == ["seg_loss"]


@torch.no_grad()
def test_crops_of_odd_sides_are_whole_patches_with_a_box() -> None:
    model, batch = tiny(), batch_of(LABELS)
    batch["image"], batch["box"] = batch["image"][..., :45, :41], torch.tensor([[0, 45, 0, 41]] * 3)
    whole = {**batch, "image": F.pad(batch["image"], (0, 7, 0, 3), mode="replicate")}
    own, expected = model.losses(batch, 10), model.losses(whole, 10)
    assert torch.equal(own.total, expected.total)
    label = own.seen["pseudo_label"]
    assert torch.equal(label, expected.seen["pseudo_label"])
    assert not (label[:, :45, :41] == 255).any()


def refinement_of(model: WeCLIP, step: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a step refines by the decoder's affinity."""
    seen: list[bool] = []
    plain = model.refined_maps

    def spy(encoded: object, slots: object, related: Tensor | None) -> Tensor:
        seen.append(related is not None)
        assert related is None or not related.requires_grad
        return plain(encoded, slots, related)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "refined_maps", spy)
    model.losses(batch_of(LABELS), step)
    return seen[0]


def test_rfm_begins_with_its_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    model, never = tiny(rfm_start=11), tiny(rfm_start=None)
    assert not refinement_of(model, 9, monkeypatch)
    assert refinement_of(model, 10, monkeypatch)  # the eleventh
    assert not refinement_of(never, 99, monkeypatch)


def test_the_official_counter_counts_validation() -> None:
    voc = {"validate_every": 2000, "validation_images": 1464, "max_steps": 30_000}
    coco = {"validate_every": 0, "validation_images": 0, "max_steps": 80_000}
    assert first_rfm_iteration(15_000, **voc) == 9_145 == tiny().settings.__class__.rfm_start
    assert first_rfm_iteration(40_000, **coco) == 40_001
    assert first_rfm_iteration(90_000, **coco) is None


def test_rates_are_those_of_the_page() -> None:
    model = tiny(max_steps=30_000)
    (group,) = model.param_groups()
    rates = [group["lr"] * model.lr_multiplier(step) for step in (0, 49, 50, 15_000)]
    assert rates == pytest.approx([2e-9, 1.96000004e-3, 1.99666667e-3, 1e-3], rel=1e-8)
    optimizer = model.optimizer([group])
    assert optimizer.defaults["weight_decay"] == 0.01
    assert {id(p) for p in group["params"]} == {id(p) for p in model.decoder.parameters()}
