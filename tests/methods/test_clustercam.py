"""ClusterCAM: its network against plain definitions, its settings, its CAMs, its training."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_clustercam import (
    MAX_STEPS,
    NUM_CLASSES,
    backbone_of,
    built,
    changed,
    fit,
    logits_of,
    losses_at,
    make_images,
    tiny,
)
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.methods.clustercam.method import ClusterCAM, ClusterCAMSettings
from wsss.methods.clustercam.network import (
    BlockOutput,
    assign,
    initial_centres,
    mean_of_convolution,
)
from wsss.methods.clustercam.official import CORRECTED, OFFICIAL, Quirks
from wsss.models import class_tokens
from wsss.models.backbone import Backbone
from wsss.models.class_tokens import attend, sum_of_last
from wsss.models.vit import resize_positions, split_heads
from wsss.parity.cases import read_case
from wsss.parity.clustercam_network import build_clustercam
from wsss.parity.inputs import network_images
from wsss.runs.compose import compose_config

GOLDEN = Path(__file__).parents[1] / "golden" / "clustercam"
both_ways = pytest.mark.parametrize("quirks", [CORRECTED, OFFICIAL], ids=["default", "official"])


# ---- the network against plain definitions -------------------------------------------------------


@torch.no_grad()
def plain_attention(module: ClusterCAM, index: int, tokens: Tensor) -> Tensor:
    """The whole softmax attention of a block's branch A, (B, heads, K+N, K+N)."""
    block: Any = module.backbone.vit.blocks[index]
    queries, keys, _ = split_heads(block.attn.qkv(block.norm1(tokens)), block.attn.num_heads)
    return (queries @ keys.transpose(-2, -1) * block.attn.scale).softmax(dim=-1)


@torch.no_grad()
def plain_cam(module: ClusterCAM, images: Tensor) -> Tensor:
    """The CAM with every attention map kept, stacked, averaged and summed (section 1)."""
    blocks: list[BlockOutput] = []
    encoded = module.encode(images, keep=blocks)
    inputs = [module.backbone.embed(images)[0], *(block.tokens for block in blocks[:-1])]
    count = module.num_classes
    maps = torch.stack(
        [
            plain_attention(module, i, tokens)[:, :, count:, count:]
            for i, tokens in enumerate(inputs)
        ]
    )
    omega = maps.mean(dim=2).sum(dim=0)  # (B, N, N)
    evidence = F.conv2d(encoded.activation, module.patch_head.weight, padding=1).relu()
    attention = sum(block.class_map.mean(dim=1) for block in blocks[-3:])
    value = evidence.flatten(2) * attention
    cam = torch.stack(
        [
            sum(omega[:, :, j] * value[:, k, j, None] for j in range(value.shape[2]))
            for k in range(count)
        ],  # type: ignore[misc]
        dim=1,
    )
    return cam.unflatten(2, evidence.shape[-2:])


@pytest.mark.parametrize(("height", "width"), [(96, 96), (192, 240)])
def test_memory_light_cam_is_the_straightforward_one(height: int, width: int) -> None:
    module = tiny().double().eval()
    images = make_images(height, width).double()
    cam = module.raw_cam(images, torch.arange(NUM_CLASSES))
    expected = plain_cam(module, images)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(cam, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [7, 128])
def test_attention_by_rows_is_fused_attention(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_tokens, "QUERY_ROWS", rows)
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 2, 3, 4 + 30, 8, dtype=torch.float64)
    affinity = torch.zeros(2, 30, 30, dtype=torch.float64)
    by_rows, own = attend(queries, keys, values, 4, affinity)
    fused, other = attend(queries, keys, values, 4, None)
    whole = (queries @ keys.transpose(-2, -1)).softmax(-1)
    for mixed, class_rows in ((by_rows, own), (fused, other)):
        torch.testing.assert_close(mixed, whole @ values)
        torch.testing.assert_close(class_rows, whole[:, :, :4, 4:])
    torch.testing.assert_close(affinity, whole[:, :, 4:, 4:].mean(1))


def test_refinement_keeps_no_map_of_all_patches_and_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    largest = []
    softmax = Tensor.softmax

    def spy(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        largest.append(tensor.shape[-2])
        return softmax(tensor, *args, **kwargs)

    module = tiny().eval()
    monkeypatch.setattr(Tensor, "softmax", spy)
    monkeypatch.setattr(class_tokens, "QUERY_ROWS", 50)
    module.raw_cam(make_images(256, 256), torch.arange(NUM_CLASSES))  # 256 patches, 64 clusters
    rows = [count for count in largest if count not in (256, 64 + NUM_CLASSES)]
    assert set(rows) == {NUM_CLASSES, 50, 6}
    # 256 rows occur in the assignments alone, three a block
    assert largest.count(256) == 3 * 4


def test_clusters_follow_their_definition() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(2, 5 * 7, 16, dtype=torch.float64)
    centres = initial_centres(tokens, (5, 7))
    assert centres.shape == (2, 2 * 3, 16)
    as_map = tokens.transpose(1, 2).reshape(2, 16, 5, 7)
    # uneven halves overlap: rows 0-2 and 2-4, columns 0-2, 2-4, 4-6
    torch.testing.assert_close(centres[:, 4], as_map[:, :, 2:5, 2:5].mean((2, 3)))
    assignment, moved = assign(tokens, centres)
    torch.testing.assert_close(assignment.sum(2), torch.ones(2, 35, dtype=torch.float64))
    expected = (tokens @ centres.transpose(1, 2) / 4).softmax(2)
    torch.testing.assert_close(assignment, expected)
    weighted = (expected[:, :, 1, None] * tokens).sum(1) / (
        expected[:, :, 1].sum(1)[:, None] + 1e-8
    )
    torch.testing.assert_close(moved[:, 1], weighted)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (6, 7)])
def test_patch_logits_are_the_mean_of_the_convolution(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(10, 4, 3, padding=1).double()
    features = torch.randn(2, 10, *grid, dtype=torch.float64)
    expected = convolution(features).mean((2, 3))
    torch.testing.assert_close(mean_of_convolution(features, convolution), expected)


@pytest.mark.parametrize(("depth", "heads", "classes"), [(4, 3, 4), (6, 3, 2), (2, 6, 7)])
def test_any_depth_head_and_class_count(depth: int, heads: int, classes: int) -> None:
    module = tiny(depth=depth, heads=heads, num_classes=classes).eval()
    images = make_images(80, 112)
    encoded = module.encode(images)
    assert encoded.activation.shape == (2, 48 + depth * heads * classes, 5, 7)
    for layer, head, k in ((0, 0, 0), (depth - 1, 1, classes - 1), (1, heads - 1, 1)):
        channel = 48 + (layer * heads + head) * classes + k
        own = encoded.class_maps[layer][:, head, k].unflatten(1, (5, 7))
        assert torch.equal(encoded.activation[:, channel], own), "layer, then head, then class"
    outputs = module(images)
    assert outputs.class_logits.shape == (2, classes)
    assert outputs.seg_logits.shape == (2, classes + 1, 5, 7)
    cam = module.cams(images, torch.ones(2, classes))
    assert cam.shape == (2, classes, 80, 112)


def test_a_hybrid_is_an_encoder_like_others() -> None:
    overrides = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64}
    backbone = Backbone(name="vit_base_r50_s16_384", weights="random", overrides=overrides)
    module = built(backbone, max_steps=1).eval()
    outputs = module(make_images(64, 64))
    assert outputs.seg_logits.shape == (2, NUM_CLASSES + 1, 4, 4)


def test_start_copies_the_encoder() -> None:
    torch.manual_seed(0)
    backbone = backbone_of()
    token = nn.Parameter(torch.randn(1, 1, 48))
    backbone.vit.cls_token = token
    row, grid = backbone.vit.pos_embed[:, :1].clone(), backbone.vit.pos_embed[:, 1:].clone()
    module = built(backbone, num_classes=3, max_steps=1, decoder_channels=8)
    vit: Any = module.backbone.vit
    assert torch.equal(vit.cls_token, token.expand(1, 3, 48))
    assert torch.equal(vit.pos_embed, torch.cat([row.expand(1, 3, 48), grid], 1))
    block, branch = vit.blocks[1], module.branches[1]
    assert torch.equal(branch.qkv.weight, block.attn.qkv.weight)
    assert branch.qkv.weight.data_ptr() != block.attn.qkv.weight.data_ptr()
    assert torch.equal(branch.proj_cls.bias, block.attn.proj.bias)
    assert torch.equal(branch.norm_centres.weight, block.norm1.weight)
    assert not branch.to_space.bias.any()
    assert 0.015 < branch.to_space.weight.std() < 0.025
    logits = module.eval()(make_images()).class_logits
    assert logits.std(dim=1).max() < 1e-6, "classes part through their targets alone"


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "vit_small_patch14_reg4_dinov2"])
def test_backbones_without_one_class_token_are_refused(name: str) -> None:
    overrides = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    backbone = Backbone(name=name, weights="random", overrides=overrides)
    with pytest.raises(WSSSError, match="turns the class token into one a class"):
        built(backbone, max_steps=10)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(WSSSError, match="low_threshold <= high_threshold"):
        tiny(low_threshold=0.8)
    with pytest.raises(WSSSError, match=r"method\.drop_path=1\.0: expected a number less than 1"):
        tiny(drop_path=1.0)
    with pytest.raises(WSSSError, match=r"method\.epochs=0: expected .* greater .* equal to 1"):
        tiny(epochs=0)
    with pytest.raises(WSSSError, match=r"method\.lr=0\.0: expected a number greater than 0"):
        tiny(lr=0.0)
    with pytest.raises(WSSSError, match=r"method\.scales=\[1\.0, 0\.0\]"):
        tiny(scales=[1.0, 0.0])


def test_defaults_are_those_of_the_configuration() -> None:
    method = dict(compose_config(["method=clustercam", "data.root=unset"]).method)
    settings = ClusterCAMSettings(max_steps=method["max_steps"])
    for field in fields(settings):
        value = getattr(settings, field.name)
        assert method[field.name] == (list(value) if isinstance(value, tuple) else value)


# ---- what the golden files say a mistake would do ------------------------------------------------


def relative(actual: Tensor, expected: np.ndarray) -> float:
    return float(np.abs(actual.numpy() - expected).max() / np.abs(expected).max())


def test_usual_mistakes_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of 1e-6 everywhere, positions resized to a size, a fourth iteration."""
    case = read_case(GOLDEN / "network.npz", ("image",))
    images, expected = network_images(case.inputs["image"]), case.outputs["seg_logits"]
    module = build_clustercam(case)
    assert relative(logits_of(module, images), expected) < 5e-6
    with changed(module.backbone, "position_offset", None):
        assert relative(logits_of(module, images), expected) == pytest.approx(
            case.extra["control_size"][2], rel=0.01
        )
    for branch in module.branches:
        monkeypatch.setattr(branch, "iterations", 4)
    assert relative(logits_of(module, images), expected) > 1e-4
    monkeypatch.undo()
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = 1e-6
    found = relative(logits_of(module, images), expected)
    assert found == pytest.approx(case.extra["control_eps"][2], rel=0.01)


def test_positions_are_scaled_by_a_factor() -> None:
    positions = torch.randn(1, 3 + 14 * 14, 8)
    size = resize_positions(positions, (6, 10), 3)
    factor = resize_positions(positions, (6, 10), 3, offset=0.1)
    assert torch.equal(factor[:, :3], positions[:, :3])
    assert factor.shape == size.shape == (1, 3 + 60, 8)
    assert (factor - size).abs().max() > 1e-3
    assert resize_positions(positions, (14, 14), 3, offset=0.1) is positions
    # 14 x 14 patches of an image that is not square, for example 224 x 230
    wide = resize_positions(positions, (14, 14), 3, offset=0.1, square=False)
    assert 1e-4 < (wide - positions).abs().max() < 1


# ---- settings of the ablations -------------------------------------------------------------------


def test_cluster_side_says_how_many_clusters_there_are() -> None:
    images = make_images()
    for side, clusters in ((1, 36), (2, 9), (3, 4), (99, 1)):
        kept: list[BlockOutput] = []
        tiny(cluster_side=side).encode(images, keep=kept)
        assert kept[0].clustered.assignment.shape[-1] == clusters


def test_fixed_mixing_gives_one_branch_maps_and_is_not_learned() -> None:
    for value in (0.0, 1.0):
        module = built(backbone_of(), OFFICIAL, drop_path=0.0, fixed_mixing=value)
        kept: list[BlockOutput] = []
        module.encode(make_images(), keep=kept)
        for output in kept:
            alone = output.clustered.class_map if value else output.class_rows
            assert torch.equal(output.class_map, alone)
        losses_at(module, 0).total.backward()
        assert [mixing.grad for mixing in module.mixing()] == [None] * 4


def test_cam_layers_are_the_last_ones() -> None:
    images, classes = make_images(), torch.tensor([0, 2])
    module = tiny().eval()
    maps = [one.mean(dim=1) for one in module.encode(images).class_maps]
    assert torch.equal(sum_of_last(module.encode(images).class_maps, 1), maps[-1])
    one, all_of_them = (
        tiny(cam_layers=layers).eval().raw_cam(images, classes) for layers in (1, 99)
    )
    assert not torch.allclose(one, all_of_them)


@pytest.mark.parametrize(
    "setting",
    [
        {"cluster_side": 0},
        {"iterations": 0},
        {"cam_layers": 0},
        {"seg_from_epoch": -1},
        {"fixed_mixing": 1.5},
        {"fixed_mixing": -0.5},
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(WSSSError, match=rf"method\.{name}={value}: expected"):
        tiny(**setting)


# ---- CAMs ----------------------------------------------------------------------------------------


def test_cams_are_of_the_wanted_classes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module, wanted = tiny().eval(), []
    evidence = module.evidence

    def spy(activation: Tensor, classes: Tensor) -> Tensor:
        wanted.append(classes.tolist())
        return evidence(activation, classes)

    monkeypatch.setattr(module, "evidence", spy)
    images, labels = make_images(), torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 0]])
    some = module.cams(images, labels)
    assert wanted == [[0, 2]] * 3
    every = module.cams(images, torch.ones(2, NUM_CLASSES))
    torch.testing.assert_close(some, every * labels[..., None, None], rtol=0, atol=1e-5)
    assert not some[1, 0].any()
    assert 0 <= every.min() < every.max() <= 1
    assert not module.cams(images, torch.zeros(2, NUM_CLASSES)).any()
    assert len(wanted) == 6, "without a class nothing is computed"


def test_gallery_maps_are_of_the_strongest_labelled_class() -> None:
    module, images = tiny().eval(), make_images(80, 112)
    labels = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1]])
    maps = module.gallery_maps(images, labels)
    assert set(maps) == {"class attention", "cluster attention", "mixed", "clusters"}
    for values in maps.values():
        assert values.shape == (2, 80, 112)
        assert 0 <= values.min() < values.max() <= 1
    blocks: list[BlockOutput] = []
    module.encode(images, keep=blocks)
    rows = sum(block.class_rows.mean(1) for block in blocks[-3:])[0, 1].unflatten(0, (5, 7))
    peak = divmod(int(rows.argmax()), 7)
    place = divmod(int(maps["class attention"][0].argmax()), 112)
    assert (place[0] // 16, place[1] // 16) == peak
    assert module(images).class_logits[1].argmax() == 2
    labels[1] = torch.tensor([1.0, 0, 1, 0])
    both = module.gallery_maps(images, labels)
    labels[1, 0] = 0
    torch.testing.assert_close(both, module.gallery_maps(images, labels))
    # a cluster's number is one of 2 x 3
    assert set((maps["clusters"].unique() * 5).round(decimals=4).tolist()) <= set(range(6))


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "first", "per_epoch"), [(80, 50, 1175), (60, 40, 13680), (7, 3, 10)]
)
def test_segmentation_begins_with_its_epoch(epochs: int, first: int, per_epoch: int) -> None:
    module = tiny(max_steps=epochs * per_epoch, epochs=epochs, seg_from_epoch=first)
    assert not module.learns_segmentation(first * per_epoch - 1)
    assert module.learns_segmentation(first * per_epoch)
    assert module.epoch(epochs * per_epoch - 1) == epochs - 1


def test_epochs_need_not_be_whole_steps() -> None:
    module = tiny(max_steps=100, epochs=80, seg_from_epoch=50)  # 0.8 of an epoch a step
    epochs = {0: 0, 1: 0, 2: 1, 62: 49, 63: 50, 99: 79}
    assert {step: module.epoch(step) for step in epochs} == epochs
    assert [module.learns_segmentation(step) for step in (62, 63)] == [False, True]
    few = tiny(max_steps=9, epochs=80)
    assert [few.epoch(step) for step in range(9)] == [0, 8, 17, 26, 35, 44, 53, 62, 71]


def test_first_phase_computes_neither_cams_nor_segmentation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = tiny()
    for name in ("cams", "pseudo_labels"):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(module.decoder, "forward", None)
    result = losses_at(module, 0)
    assert set(result.losses) == {"cls_loss", "patch_loss"}
    result.total.backward()
    assert all(p.grad is None for p in module.decoder.parameters())
    assert not tiny(seg_weight=0.0).learns_segmentation(MAX_STEPS - 1)


def test_total_is_the_weighted_sum() -> None:
    result = losses_at(tiny(), MAX_STEPS - 1)
    loss = {name: value.item() for name, value in result.losses.items()}
    assert set(loss) == {"cls_loss", "patch_loss", "seg_loss"}
    expected = loss["cls_loss"] + loss["patch_loss"] + 0.1 * loss["seg_loss"]
    assert result.total.item() == pytest.approx(expected, rel=1e-6)
    assert set(result.seen["pseudo_label"].unique().tolist()) <= {0, 1, 2, 3, 255}


def test_only_feature_maps_bring_gradient_to_the_mixing_scalars() -> None:
    module = tiny()
    result = losses_at(module, MAX_STEPS - 1)
    scalars = module.mixing()
    for name, loss in result.losses.items():
        gradients = torch.autograd.grad(loss, scalars, retain_graph=True, allow_unused=True)
        if name == "cls_loss":
            assert gradients == (None,) * 4
        else:
            assert all(gradient is not None and gradient.item() != 0 for gradient in gradients)
    assert not module.backbone.vit.norm.weight.requires_grad


@both_ways
def test_a_few_steps_lower_the_loss(quirks: Quirks) -> None:
    module = tiny(quirks, lr=1e-3)
    optimizer = module.optimizer(module.param_groups())
    first = losses_at(module, MAX_STEPS - 1)
    for _ in range(6):
        optimizer.zero_grad()
        losses_at(module, MAX_STEPS - 1).total.backward()
        optimizer.step()
    last = losses_at(module, MAX_STEPS - 1)
    assert last.total.item() < first.total.item()
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_every_parameter_is_in_exactly_one_group() -> None:
    module = tiny(lr=1e-4, weight_decay=0.02, head_lr_factor=5.0)
    groups = module.param_groups()
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in module.parameters()}
    settings = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert settings == {
        "decayed": (1e-4, 0.02),
        "not decayed": (1e-4, 0.0),
        "decayed, new": (pytest.approx(5e-4), 0.02),
        "not decayed, new": (pytest.approx(5e-4), 0.0),
    }


def test_what_pretraining_does_not_give_has_a_rate_of_its_own() -> None:
    module = tiny(head_lr_factor=5.0)
    groups = module.param_groups()
    fast = {id(p) for g in groups if g["lr"] > module.settings.lr for p in g["params"]}
    names = {name for name, parameter in module.named_parameters() if id(parameter) in fast}
    assert names == {
        "backbone.vit.cls_token",
        *(name for name, _ in module.named_parameters() if name.startswith(("patch_", "decoder"))),
        *(f"branches.{i}.{part}" for i in range(4) for part in ("mixing", "to_space.weight")),
        *(f"branches.{i}.to_space.bias" for i in range(4)),
    }


def test_class_tokens_start_as_copies_unless_noise_parts_them() -> None:
    starts, mixing = {}, {}
    for noise in (0.0, 0.5):
        torch.manual_seed(0)
        module = built(backbone_of(depth=2), num_classes=200, max_steps=1, token_noise=noise)
        starts[noise] = module.backbone.vit.cls_token.detach()
        mixing[noise] = module.mixing()[0].item()
    assert mixing[0.0] == mixing[0.5]  # runs that differ in noise start alike in all else
    copies = starts[0.0]
    assert torch.equal(copies, copies[:, :1].expand_as(copies))
    difference = starts[0.5] - copies
    assert difference.std().item() == pytest.approx(0.5, rel=0.05)
    assert difference.mean().item() == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("token_noise", -1.0),
        ("token_noise", float("nan")),
        ("head_lr_factor", -1.0),
        ("weight_decay", -1.0),
        ("seg_weight", -1.0),
        ("warmup_epochs", -1.0),
        ("decoder_channels", 0),
    ],
)
def test_a_setting_of_the_wrong_sign_is_named_by_its_key(setting: str, value: float) -> None:
    with pytest.raises(WSSSError, match=f"method.{setting}={value}: expected"):
        tiny(**{setting: value})


@both_ways
def test_trainer_logs_losses_and_mixing_scalars(quirks: Quirks, tmp_path: Path) -> None:
    module = tiny(quirks, max_steps=4, epochs=4, seg_from_epoch=2)
    trainer = fit(module, tmp_path, 4)
    logged = trainer.callback_metrics
    assert set(logged) >= {f"train/mixing_{index:02d}" for index in range(4)}
    assert set(logged) >= {"train/cls_loss", "train/patch_loss", "train/seg_loss", "train/lr"}
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    assert "train/mixing_03" in header


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    module = tiny()
    with torch.no_grad():
        module.patch_head.bias.fill_(torch.nan)
    with pytest.raises(WSSSError, match=r"step 0: the loss is not finite \(.*patch_loss nan"):
        fit(module, tmp_path, 1)
