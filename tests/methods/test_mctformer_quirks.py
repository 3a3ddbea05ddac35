"""MCTformer+'s quirks: each alone, all others without it, none, and all (mctformer.md 7)."""

from dataclasses import fields
from math import cos, pi
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quirk_ways import ways_of
from small_mctformer import (
    NUM_CLASSES,
    backbone_of,
    built,
    fit,
    make_images,
    make_pictures,
    tiny,
)
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.evaluation.confusion import ThresholdConfusion
from wsss.methods.mctformer import MCTformerPlus, MCTformerPlusSettings
from wsss.methods.mctformer.contrast import class_token_contrast
from wsss.methods.mctformer.official import CORRECTED, OFFICIAL, Quirks
from wsss.models.backbone import Backbone
from wsss.models.vit import resize_positions
from wsss.parity.mctformer import official_miou, stop_of

NAMES = [field.name for field in fields(Quirks)]
each_way = ways_of(Quirks)
EVERY = torch.arange(NUM_CLASSES)
LR, FIRST, LAST = 3.125e-5, 1e-6, 1e-5  # of VOC: base, start and end
both_ways = pytest.mark.parametrize("quirks", [CORRECTED, OFFICIAL], ids=["default", "official"])


def test_official_is_every_quirk_and_corrected_none() -> None:
    assert all(getattr(OFFICIAL, name) is True for name in NAMES)
    assert all(getattr(CORRECTED, name) is False for name in NAMES)
    assert tiny().quirks == CORRECTED


def test_every_quirk_is_tested_here() -> None:
    text = Path(__file__).read_text()
    untested = [name for name in NAMES if f'each_way("{name}")' not in text]
    assert not untested


# ---- optimiser -----------------------------------------------------------------------------------


@each_way("decayed_positions")
def test_q1_positions_are_decayed(quirks: Quirks, on: bool) -> None:
    module = tiny(quirks)
    groups = module.param_groups()
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in module.named_parameters() if id(parameter) in decayed}
    weights = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"backbone.vit.blocks.{i}.{part}.weight" for i in range(3) for part in weights}
    expected |= {"backbone.vit.patch_embed.proj.weight", "patch_head.weight"}
    assert names == expected | ({"backbone.vit.pos_embed"} if on else set())


def rate_at(epoch: float, epochs: int = 45) -> float:
    """Section 4, f(t)."""
    if epoch < 5:
        return FIRST + epoch * (LR - FIRST) / 5
    return LAST + 0.5 * (LR - LAST) * (1 + cos(pi * epoch / epochs))


@each_way("rate_by_epoch")
def test_q2_the_rate_stays_for_an_epoch_and_lags_one(quirks: Quirks, on: bool) -> None:
    module = tiny(quirks, max_steps=450)
    found = [LR * module.lr_multiplier(step) for step in range(450)]
    times = [max(step // 10 - 1, 0) if on else step / 10 for step in range(450)]
    assert found == pytest.approx([rate_at(time) for time in times], abs=1e-15)
    assert len(set(found)) == (44 if on else 450)
    assert module.epoch(449) == 44


def test_q2_the_official_rates_are_those_of_the_page() -> None:
    module = tiny(OFFICIAL, max_steps=45)
    expected = {0: 1.0, 1: 1.0, 2: 7.05, 5: 25.2, 6: 30.61, 25: 19.51, 44: 10.103}
    for epoch, rate in expected.items():
        assert 1e6 * LR * module.lr_multiplier(epoch) == pytest.approx(rate, abs=0.005)


def test_q2_epochs_need_not_be_whole_steps() -> None:
    module = tiny(OFFICIAL, max_steps=100)  # 0.45 of an epoch a step
    epochs = {0: 0, 2: 0, 3: 1, 50: 22, 97: 43, 98: 44, 99: 44}
    assert {step: module.epoch(step) for step in epochs} == epochs
    assert LR * module.lr_multiplier(99) == pytest.approx(rate_at(43), abs=1e-15)
    few = tiny(OFFICIAL, max_steps=9)
    assert [few.epoch(step) for step in range(9)] == list(range(0, 45, 5))


def test_q2_without_warm_up_the_rate_starts_at_its_base() -> None:
    for quirks in (CORRECTED, OFFICIAL):
        assert tiny(quirks, warmup_epochs=0.0).lr_multiplier(0) == 1


# ---- start ---------------------------------------------------------------------------------------


@both_ways
def test_q3_classes_start_equal_and_contrast_moves_nothing(quirks: Quirks) -> None:
    torch.manual_seed(0)
    module = built(backbone_of(), quirks)
    encoded = module.encode(make_images())
    logits = encoded.class_logits
    assert torch.equal(logits, logits[:, :1].expand_as(logits))
    cct = class_token_contrast(encoded.class_tokens, torch.ones(2, NUM_CLASSES))
    assert cct.item() == pytest.approx(np.log(NUM_CLASSES), rel=1e-6)
    (gradient,) = torch.autograd.grad(cct, module.backbone.vit.cls_token)
    assert gradient.norm() < 1e-7
    parted = built(backbone_of(), quirks, token_noise=1.0).encode(make_images()).class_logits
    assert parted.std(dim=1).min() > 1e-3


@each_way("repeated_positions")
def test_q4_positions_are_repeated_on_cells(quirks: Quirks, on: bool) -> None:
    torch.manual_seed(0)
    backbone = backbone_of()
    stored = backbone.vit.pos_embed.detach().clone()  # 4 x 4
    module = built(backbone, quirks, input_size=128)
    found = module.backbone.vit.pos_embed.detach()
    assert torch.equal(found[:, :NUM_CLASSES], stored[:, :1].expand(1, NUM_CLASSES, 48))
    patches = found[0, NUM_CLASSES:].unflatten(0, (8, 8))
    cells = stored[0, 1:].unflatten(0, (4, 4)).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(patches, cells) is on
    bicubic = resize_positions(stored, (8, 8), 1)[0, 1:].unflatten(0, (8, 8))
    assert torch.equal(patches, bicubic) is not on
    same = built(backbone_of(), quirks).backbone.vit.pos_embed
    assert same.shape[1] == NUM_CLASSES + 16, "crops of the stored size keep the positions"


@both_ways
def test_q5_crops_of_other_sizes_are_learned_from(quirks: Quirks) -> None:
    module = tiny(quirks).train()
    batch = {"image": make_images(48, 80), "labels": torch.eye(4)[:2]}
    module.losses(batch, 0).total.backward()
    assert module.backbone.vit.pos_embed.grad is not None
    assert module.backbone.vit.pos_embed.grad.isfinite().all()


@both_ways
def test_q6_a_grid_is_not_mistaken_for_the_stored_one(quirks: Quirks) -> None:
    """Of 13 classes and 7 x 7 patches on 6 x 6 positions, where officially 49 - 13 is 36."""
    module = tiny(quirks, num_classes=13, input_size=96, depth=1)
    assert module(make_images(112, 112)).class_logits.shape == (2, 13)


@both_ways
@pytest.mark.parametrize("rows", [61, 115, 122])
def test_q7_every_number_of_rows_is_encoded(quirks: Quirks, rows: int) -> None:
    """Officially a factor rows / 28 rounds to fewer."""
    module = tiny(quirks, input_size=448, depth=1)
    assert module.encode(make_images(16 * rows, 16)).features.shape[-2:] == (rows, 1)


# ---- maps ----------------------------------------------------------------------------------------


@each_way("dropped_remainder")
@torch.no_grad()
def test_q8_the_remainder_of_a_patch_is_dropped(
    quirks: Quirks, on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, images = tiny(quirks, scales=(1.0, 0.5)), make_images(90, 100)
    resized = F.interpolate(images, (96, 112), mode="bilinear", align_corners=False)
    seen = images[..., :80, :96] if on else resized
    assert torch.equal(module(images).class_logits, module(seen).class_logits)
    sizes = sizes_of_views(module, images, monkeypatch)
    assert sizes == ([(90, 100), (45, 50)] if on else [(96, 112), (48, 64)])


def sizes_of_views(
    module: MCTformerPlus, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, ...]]:
    """Height and width of what goes through the network for the images' maps."""
    sizes, raw_maps = [], module.raw_maps

    def watched(views: Tensor, classes: Tensor) -> Tensor:
        sizes.append(tuple(views.shape[-2:]))
        return raw_maps(views, classes)

    monkeypatch.setattr(module, "raw_maps", watched)
    module.cams(images, torch.ones(len(images), NUM_CLASSES))
    return sizes


def test_q8_views_are_whole_patches_of_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 56}
    backbone = Backbone(name="vit_small_patch14_dinov2", weights="random", overrides=overrides)
    module = built(backbone, scales=(1.0, 0.75)).eval()
    assert sizes_of_views(module, make_images(60, 90), monkeypatch) == [(70, 98), (56, 70)]


@each_way("size_of_first_scale")
def test_q9_scales_are_merged_at_the_size_of_the_first(quirks: Quirks, on: bool) -> None:
    module, pictures = tiny(quirks, scales=(0.5, 1.0)), make_pictures(64, 96)
    exported = module.export(pictures, EVERY, like=torch.zeros(1))
    assert exported.shape[-2:] == ((32, 48) if on else (64, 96))
    cam = module.cams(make_images(64, 96, count=1), torch.ones(1, NUM_CLASSES))
    expected = F.interpolate(exported, (64, 96), mode="bilinear") if on else exported
    torch.testing.assert_close(cam, expected)


def test_q10_class_maps_are_of_twelve_blocks() -> None:
    assert MCTformerPlusSettings(max_steps=1).cam_layers == 12


@both_ways
@torch.no_grad()
def test_q11_maps_are_refined_in_float32_under_autocast(
    quirks: Quirks, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, kinds = tiny(quirks), []
    product = Tensor.__matmul__

    def spy(one: Tensor, other: Tensor) -> Tensor:
        result = product(one, other)
        if other.shape[-1] == other.shape[-2] == 16:  # maps and Omega
            kinds.append((one.dtype, other.dtype, result.dtype))
        return result

    monkeypatch.setattr(Tensor, "__matmul__", spy)
    with torch.autocast("cpu", torch.bfloat16):
        maps = module.raw_maps(make_images(), EVERY)
    assert maps.dtype == torch.float32
    assert kinds[-1] == (torch.float32,) * 3


# ---- scores --------------------------------------------------------------------------------------


def test_q12_the_whole_curve_is_scanned() -> None:
    """The official scan ends at the first threshold that does not improve, our oracle does not."""
    assert stop_of(np.array([1.0, 2.0, 2.0, 9.0])) == 3
    assert stop_of(np.array([1.0, 2.0, 3.0])) == 3
    assert stop_of(np.array([2.0, 1.0, 3.0])) == 2
    thresholds = (0.0, 0.25, 0.5)
    counts = ThresholdConfusion(num_classes=3, thresholds=thresholds)
    cam = torch.tensor([[0.25, 0.6, 0.1, 0.0], [0.0, 0.0, 0.3, 0.0]])[None, :, None]
    counts.update(cam, torch.tensor([[[1, 1, 0, 0]]]))
    matrices = counts.compute()
    # 0.25 is not above 0.25: a tie is background
    assert matrices[:, 1].tolist() == [[0, 2, 0], [1, 1, 0], [1, 1, 0]]
    # officially a class that no pixel is of counts as 0
    iou = [[1 / 2, 1.0, 0.0], [1 / 3, 1 / 2, 0.0], [2 / 3, 1 / 2, 0.0]]
    assert official_miou(matrices) == pytest.approx([100 * np.mean(row) for row in iou])


@both_ways
def test_q13_images_without_labels_are_negatives(quirks: Quirks) -> None:
    module = tiny(quirks)
    images, labels = make_images(), torch.zeros(2, NUM_CLASSES)
    result = module.losses({"image": images, "labels": labels}, 0)
    assert result.losses["cct_loss"].item() == 0
    assert result.total.isfinite()
    assert not module.cams(images, labels).any()


# ---- the step around the losses ------------------------------------------------------------------


@each_way("shared_draws")
def test_drop_paths_come_from_the_global_generator(
    quirks: Quirks, on: bool, tmp_path: Path
) -> None:
    """Only then does it matter what was drawn before the run."""
    losses = []
    for drawn_before in (0, 5):
        module = tiny(quirks, drop_path=0.5)
        torch.manual_seed(0)
        torch.rand(drawn_before)
        trainer = fit(module, tmp_path / str(drawn_before), 1)
        losses.append(trainer.callback_metrics["train/loss"].item())
    assert (losses[0] != losses[1]) is on
    assert module.draws_apart is not on


@each_way("goes_on_after_nan")
def test_a_loss_that_is_not_finite_reaches_the_weights(
    quirks: Quirks, on: bool, tmp_path: Path
) -> None:
    module = tiny(quirks)
    with torch.no_grad():
        module.patch_head.bias.fill_(torch.nan)
    if on:
        fit(module, tmp_path, 1)
    else:
        with pytest.raises(WSSSError, match=r"step 0: the loss is not finite \(.*patch_loss nan"):
            fit(module, tmp_path, 1)
    assert bool(module.backbone.vit.patch_embed.proj.weight.isnan().any()) is on
