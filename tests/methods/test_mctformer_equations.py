"""MCTformer+'s network, losses and maps, written out as their page states them (mctformer.md)."""

from math import exp, log

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_mctformer import (
    NUM_CLASSES,
    losses_at,
    make_batch,
    make_images,
    make_pictures,
    network_of_the_page,
    tiny,
)
from torch import Tensor

from wsss.maps.pixels import normalise
from wsss.methods.mctformer.contrast import class_token_contrast
from wsss.methods.mctformer.maps import multiscale_maps
from wsss.methods.mctformer.method import MCTformerPlus
from wsss.methods.mctformer.network import Attention, ranking_pooling
from wsss.methods.mctformer.official import CORRECTED, OFFICIAL, Quirks
from wsss.models import class_tokens

EVERY = torch.arange(NUM_CLASSES)
both_ways = pytest.mark.parametrize("quirks", [CORRECTED, OFFICIAL], ids=["default", "official"])


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- network -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(64, 64), (80, 48)])
def test_the_network_is_that_of_the_page(height: int, width: int) -> None:
    module, images = tiny().double(), make_images(height, width).double()
    page, encoded = network_of_the_page(module, images), module.encode(images)
    assert_near(encoded.class_tokens, page.tokens[:, :, :NUM_CLASSES])
    assert_near(encoded.features, page.features)
    assert_near(module.patch_map(encoded.features), page.patch_map)
    assert_near(encoded.class_logits, page.tokens[-1, :, :NUM_CLASSES].mean(-1))
    patch_logits = ranking_pooling(page.patch_map, 0.996)
    assert_near(module(images).class_logits, (encoded.class_logits + patch_logits) / 2)
    assert module(images).seg_logits is None


@torch.no_grad()
def test_training_mode_is_evaluation_mode_at_any_size() -> None:
    for size in ((64, 64), (48, 80)):
        images = make_images(*size)
        assert torch.equal(tiny().train()(images).class_logits, tiny().eval()(images).class_logits)


def test_paths_are_dropped_more_often_in_later_blocks() -> None:
    for index, block in enumerate(tiny(drop_path=0.3, depth=4).backbone.vit.blocks):
        rates = [path.drop_prob for path in (block.drop_path1, block.drop_path2)]
        assert rates == pytest.approx([0.1 * index] * 2)


@torch.no_grad()
@pytest.mark.parametrize("rows", [7, 64])
def test_attention_by_rows_is_that_of_the_page(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_tokens, "QUERY_ROWS", rows)
    module, images = tiny().double(), make_images(80, 64).double()
    page = network_of_the_page(module, images)
    for layers in (1, 2, 12):
        attention = Attention(EVERY, layers, with_affinity=True)
        encoded = module.encode(images, attention)
        assert_near(encoded.features, page.features)
        assert_near(attention.class_maps, page.class_maps(layers).flatten(2))
        assert attention.affinity is not None
        assert_near(attention.affinity, page.affinity)  # of all blocks, whatever the layers


@torch.no_grad()
def test_affinity_rows_lack_what_goes_to_class_tokens() -> None:
    module, images = tiny().double(), make_images().double()
    page, attention = network_of_the_page(module, images), Attention(EVERY, 1, with_affinity=True)
    module.encode(images, attention)
    assert attention.affinity is not None
    sums = attention.affinity.sum(-1)
    to_classes = page.attentions[:, :, NUM_CLASSES:, :NUM_CLASSES].sum((0, -1))
    assert_near(sums, 3 - to_classes)
    assert (sums < 3).all()


# ---- pooling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [1.0, 0.996, 0.5, 0.0])
def test_pooling_weights_ranks(decay: float) -> None:
    maps = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    pooled = ranking_pooling(maps, decay)
    for b in range(2):
        for k in range(3):
            ranked = sorted(maps[b, k].flatten().tolist(), reverse=True)
            weights = [decay**rank for rank in range(20)]  # 0 ** 0 is 1
            expected = sum(w * u for w, u in zip(weights, ranked, strict=True)) / sum(weights)
            assert pooled[b, k].item() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(pooled.sum(), maps)
    assert_near(gradient.sum((2, 3)), torch.ones(2, 3, dtype=torch.float64))
    shuffled = maps.flatten(2)[..., torch.randperm(20)].unflatten(2, (4, 5))
    assert_near(ranking_pooling(shuffled, decay), pooled)
    mean, most = maps.mean((2, 3)), maps.amax((2, 3))
    if decay in (1.0, 0.0):
        assert_near(pooled, mean if decay else most)
    else:
        assert ((mean < pooled) & (pooled < most)).all()


# ---- losses --------------------------------------------------------------------------------------


def contrast_of_the_page(tokens: Tensor, labels: Tensor) -> Tensor:
    """Section 2, "CCT", image by image, block by block, class by class."""
    blocks, images, classes, _ = tokens.shape
    total = torch.zeros((), dtype=tokens.dtype)
    for b in range(images):
        own = torch.zeros((), dtype=tokens.dtype)
        for block in range(blocks):
            unit = tokens[block, b] / tokens[block, b].norm(dim=-1, keepdim=True)
            similarity = unit @ unit.T
            for k in range(classes):
                loss = similarity[k].exp().sum().log() - similarity[k, k]
                own = own + labels[b, k] * loss / blocks
        total = total + own / (labels[b].sum() + 1e-8)
    return total / images


LABELS = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)


def test_contrast_is_that_of_the_page() -> None:
    tokens = torch.randn(3, 3, 4, 8, dtype=torch.float64)
    found = class_token_contrast(tokens, LABELS)
    assert_near(found, contrast_of_the_page(tokens, LABELS))
    # an image without labels adds nothing, and counts
    assert_near(found, class_token_contrast(tokens[:, :2], LABELS[:2]) * 2 / 3)
    lengths = torch.rand(3, 3, 4, 1, dtype=torch.float64) + 0.5
    assert_near(class_token_contrast(lengths * tokens, LABELS), found)
    order = torch.tensor([2, 0, 3, 1])
    assert_near(class_token_contrast(tokens[:, :, order], LABELS[:, order]), found)


@pytest.mark.parametrize("count", [20, 80])
def test_equal_class_tokens_have_a_contrast_of_log_k(count: int) -> None:
    tokens = torch.randn(2, 3, 1, 16).repeat(1, 1, count, 1).requires_grad_()
    labels = torch.zeros(3, count)
    labels[:, :2] = 1
    loss = class_token_contrast(tokens, labels)
    assert loss.item() == pytest.approx(log(count), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, tokens)
    assert gradient.abs().max() < 1e-7


def test_contrast_of_other_constellations() -> None:
    labels = torch.ones(1, 20, dtype=torch.float64)
    right = torch.eye(20, dtype=torch.float64)[None, None]
    assert class_token_contrast(right, labels).item() == pytest.approx(log(1 + 19 / exp(1)))
    simplex = right - 1 / 20
    expected = log(1 + 19 * exp(-1 / 19 - 1))
    assert class_token_contrast(simplex, labels).item() == pytest.approx(expected)
    # one class against 19 that are all opposite to it: the least that there is
    opposite = torch.ones(1, 1, 20, 1, dtype=torch.float64)
    opposite[:, :, 0] = -1
    alone = torch.eye(20, dtype=torch.float64)[:1]
    least = class_token_contrast(opposite, alone).item()
    assert least == pytest.approx(log(1 + 19 * exp(-2)))
    # absent classes are negatives with gradient
    tokens = torch.randn(1, 1, 20, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(class_token_contrast(tokens, alone), tokens)
    assert (gradient[0, 0].norm(dim=-1) > 0).all()


def test_contrast_and_pooling_keep_float32_under_autocast() -> None:
    torch.manual_seed(0)
    tokens, labels = torch.randn(3, 3, 4, 48), LABELS.float()
    maps = torch.randn(2, 4, 28, 28).bfloat16()  # as the patch head gives them there
    with torch.autocast("cpu", torch.bfloat16):
        contrast, pooled = class_token_contrast(tokens, labels), ranking_pooling(maps, 0.996)
    assert torch.equal(contrast, class_token_contrast(tokens, labels))
    assert torch.equal(pooled, ranking_pooling(maps.float(), 0.996))


def test_a_single_class_has_no_contrast() -> None:
    assert class_token_contrast(torch.randn(2, 2, 1, 4), torch.ones(2, 1)).item() == 0


def margin_of_the_page(logits: Tensor, labels: Tensor) -> float:
    each = labels * F.logsigmoid(logits) + (1 - labels) * F.logsigmoid(-logits)
    return -each.mean().item()


@pytest.mark.parametrize(("weight", "blocks"), [(1.0, 12), (0.3, 2), (2.0, 1)])
def test_losses_are_those_of_the_page(weight: float, blocks: int) -> None:
    module, batch = tiny(cct_weight=weight, num_cct=blocks), make_batch()
    result = losses_at(module)
    assert list(result.losses) == ["cls_loss", "cct_loss", "patch_loss"], "the paper's order"
    page = network_of_the_page(module, batch["image"])
    labels, tokens = batch["labels"], page.tokens[:, :, :NUM_CLASSES]
    expected = {
        "cls_loss": margin_of_the_page(tokens[-1].mean(-1), labels),
        "cct_loss": contrast_of_the_page(tokens[-blocks:], labels).item(),
        "patch_loss": margin_of_the_page(ranking_pooling(page.patch_map, 0.996), labels),
    }
    for name, value in expected.items():
        assert result.losses[name].item() == pytest.approx(value, rel=1e-5), name
    total = expected["cls_loss"] + weight * expected["cct_loss"] + expected["patch_loss"]
    assert result.total.item() == pytest.approx(total, rel=1e-5)
    assert torch.equal(result.outputs.class_logits, module(batch["image"]).class_logits)


# ---- maps ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2, 12])
def test_maps_of_one_pass_are_those_of_the_page(layers: int) -> None:
    images = make_images(80, 64).double()
    for name in ("mct", "patchcam", "fused"):
        for affinity in (False, True):
            module = tiny(map=name, affinity=affinity, cam_layers=layers).double()
            page = network_of_the_page(module, images)
            expected = {
                "mct": page.class_maps(layers),
                "patchcam": page.patch_map.clamp_min(0),
                "fused": page.fused(layers),
            }[name]
            some = torch.tensor([0, 3])
            found = module.raw_maps(images, some)
            assert_near(found, (page.spread(expected) if affinity else expected)[:, some], 1e-9)


@torch.no_grad()
def test_fused_maps_are_zero_where_patches_have_no_evidence() -> None:
    module, images = tiny(affinity=False).double(), make_images().double()
    fused = module.raw_maps(images, EVERY)
    evident = network_of_the_page(module, images).patch_map > 0
    assert 0.1 < evident.double().mean() < 0.9
    assert torch.equal(fused > 0, evident)
    assert fused.min() == 0
    pictures = make_pictures()
    exported = module.export(pictures, EVERY, like=images)
    for part in (module.patch_head.weight, module.patch_head.bias):
        part.mul_(9.0)
    assert_near(module.raw_maps(images, EVERY), 3 * fused)
    assert_near(module.export(pictures, EVERY, like=images), exported, 1e-7)


@torch.no_grad()
def export_of_the_page(
    module: MCTformerPlus, picture: np.ndarray, scales: tuple[float, ...], multiple: int
) -> Tensor:
    """Section 3: every pass enlarged to the picture on its own, mirrored back, then summed."""
    size = picture.shape[:2]
    total = torch.zeros(NUM_CLASSES, *size, dtype=torch.float64)
    for scale in scales:
        height, width = (-(-round(side * scale) // multiple) * multiple for side in size)
        view = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
        image = normalise(np.array(view)).double()[None]
        cut = [side // 16 * 16 for side in (height, width)]
        for mirrored in (False, True):
            seen = (image.flip(-1) if mirrored else image)[..., : cut[0], : cut[1]]
            page = network_of_the_page(module, seen)
            fused = page.spread(page.fused(12))
            full = F.interpolate(fused, size, mode="bilinear", align_corners=False)[0]
            total += full.flip(-1) if mirrored else full
    total -= total.amin((1, 2), keepdim=True)
    return total / (total.amax((1, 2), keepdim=True) + 1e-8)


@both_ways
def test_exported_maps_are_those_of_the_page(quirks: Quirks) -> None:
    scales = (1.0, 0.5, 1.25)
    module = tiny(quirks, scales=scales).double()
    (picture,) = make_pictures(69, 90)
    assert round(69 * 0.5) == 34, "half to even"
    multiple = 1 if quirks.dropped_remainder else 16
    expected = export_of_the_page(module, picture, scales, multiple)
    images = normalise(picture)[None].double()
    assert_near(module.export(picture[None], EVERY, like=images)[0], expected, 1e-9)
    labels = torch.tensor([[1.0, 0, 1, 0]])
    found = module.cams(images, labels)
    assert_near(found[0, [0, 2]], expected[[0, 2]], 1e-9)
    assert not found[0, [1, 3]].any()
    for one in found[0, [0, 2]]:
        assert one.min() == 0
        assert 1 - 1e-5 < one.max() < 1


@both_ways
def test_the_mirrored_picture_has_mirrored_maps(quirks: Quirks) -> None:
    module = tiny(quirks, scales=(1.0, 0.75)).double()
    pictures = make_pictures(70, 90)
    like = module.patch_head.weight
    plain = module.export(pictures, EVERY, like=like)
    mirrored = module.export(pictures[:, :, ::-1], EVERY, like=like)
    # Pillow rounds to whole grey levels, on both sides alike but for ties
    assert (plain - mirrored.flip(-1)).abs().max() < 0.02
    assert (plain - plain.flip(-1)).abs().max() > 0.2


def test_a_map_without_any_range_is_zero() -> None:
    flat = multiscale_maps(
        lambda images: images.new_ones(len(images), 1, 2, 2),
        make_pictures(),
        scales=(1.0,),
        multiple=1,
        first_size=False,
        like=torch.zeros(1),
    )
    assert not flat.any()


@torch.no_grad()
def test_permuted_classes_have_permuted_logits_and_maps() -> None:
    images, order = make_images(64, 80).double(), torch.tensor([2, 0, 3, 1])
    module, other = tiny().double(), tiny().double()
    vit = other.backbone.vit
    vit.cls_token.copy_(vit.cls_token[:, order])
    vit.pos_embed[:, :NUM_CLASSES] = vit.pos_embed[:, order].clone()
    for part in (other.patch_head.weight, other.patch_head.bias):
        part.copy_(part[order])
    assert_near(other(images).class_logits, module(images).class_logits[:, order])
    assert_near(other.raw_maps(images, EVERY), module.raw_maps(images, order))
