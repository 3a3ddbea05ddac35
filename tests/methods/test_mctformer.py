"""MCTformer+: its start, settings, names, what an evaluator sees, its training."""

import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_mctformer import (
    NUM_CLASSES,
    SIDE,
    backbone_of,
    built,
    fit,
    losses_at,
    make_images,
    make_pictures,
    tiny,
)
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.maps.pixels import normalise
from wsss.methods.mctformer import MCTformerPlus, MCTformerPlusSettings
from wsss.methods.mctformer.maps import pictures_of, scaled_size
from wsss.methods.mctformer.official import (
    CORRECTED,
    JOINED,
    OFFICIAL,
    POSITIONS,
    Quirks,
    official_name,
    our_name,
    parted,
)
from wsss.methods.official import convert_official, load_official
from wsss.models.backbone import Backbone
from wsss.models.weights import read_state_dict
from wsss.runs.compose import compose_config

both_ways = pytest.mark.parametrize("quirks", [CORRECTED, OFFICIAL], ids=["default", "official"])
State = dict[str, Tensor]


# ---- start ---------------------------------------------------------------------------------------


def test_start_copies_the_encoder() -> None:
    torch.manual_seed(0)
    backbone = backbone_of()
    with torch.no_grad():
        backbone.vit.cls_token.normal_()
    before = {name: value.clone() for name, value in backbone.vit.state_dict().items()}
    module = built(backbone, num_classes=3)
    after = module.backbone.vit.state_dict()
    assert torch.equal(after.pop("cls_token"), before.pop("cls_token").expand(1, 3, 48))
    row, grid = before["pos_embed"][:, :1], before.pop("pos_embed")[:, 1:]
    assert torch.equal(after.pop("pos_embed"), torch.cat([row.expand(1, 3, 48), grid], 1))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not module.backbone.vit.norm.weight.requires_grad, "it is never applied"


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "vit_small_patch14_reg4_dinov2"])
def test_backbones_without_one_class_token_are_refused(name: str) -> None:
    overrides = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    backbone = Backbone(name=name, weights="random", overrides=overrides)
    with pytest.raises(WSSSError, match="method=mctformer turns the class token into one a class"):
        built(backbone)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("vit_small_patch14_dinov2", {"img_size": 56}),  # with layer scale
        ("vit_small_patch16_224", {"qk_norm": True, "scale_attn_norm": True}),
    ],
)
def test_maps_are_of_the_network_that_is_trained(name: str, overrides: dict[str, Any]) -> None:
    """Whatever lies inside its blocks: the pass that keeps attention is the pass that does not."""
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, **overrides}
    torch.manual_seed(0)
    module = built(Backbone(name=name, weights="random", overrides=sizes), input_size=70).eval()
    for block in module.backbone.vit.blocks:
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    seen, encode = [], module.encode

    def watched(images: Tensor, *attention: Any) -> Any:
        seen.append(encode(images, *attention))
        return seen[-1]

    module.encode = watched  # type: ignore[method-assign]
    images = make_images(70, 56)
    module(images)
    maps = module.raw_maps(images, torch.arange(NUM_CLASSES))
    plain, attending = seen
    torch.testing.assert_close(plain.class_tokens, attending.class_tokens)
    torch.testing.assert_close(plain.features, attending.features)
    assert maps.shape[-2:] == plain.features.shape[-2:]
    assert 0 <= maps.min() < maps.max()


# ---- settings ------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_configuration() -> None:
    method = dict(compose_config(["method=mctformer", "data.root=unset"]).method)
    settings = MCTformerPlusSettings(max_steps=method["max_steps"])
    for field in fields(settings):
        value = getattr(settings, field.name)
        assert method[field.name] == (list(value) if isinstance(value, tuple) else value)
    assert settings.lr == pytest.approx(5e-4 * 32 / 512, rel=1e-15)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("token_noise", -1.0),
        ("pooling_decay", 1.5),
        ("pooling_decay", -0.1),
        ("cct_weight", -1.0),
        ("num_cct", 0),
        ("cam_layers", 0),
        ("input_size", 0),
        ("drop_path", 1.0),
        ("warmup_epochs", -1.0),
        ("min_lr", -1.0),
        ("map", "cam"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, value: object) -> None:
    with pytest.raises(WSSSError, match=rf"method\.{setting}='?{value}'?: expected"):
        tiny(**{setting: value})


def test_a_rate_that_would_rise_is_refused_before_training() -> None:
    MCTformerPlusSettings(max_steps=1, lr=1e-5).check_schedule()
    settings = MCTformerPlusSettings(max_steps=1, lr=9e-6)
    with pytest.raises(WSSSError, match=r"method\.min_lr=1e-05: above method\.lr=9e-06"):
        settings.check_schedule()
    settings = MCTformerPlusSettings(max_steps=1, warmup_epochs=46)
    with pytest.raises(WSSSError, match=r"method\.warmup_epochs=46: longer than the run"):
        settings.check_schedule()


# ---- official checkpoints ------------------------------------------------------------------------


def official_shapes(
    *, dim: int = 48, depth: int = 2, num_classes: int = NUM_CLASSES, side: int = 6
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official checkpoint, from mctformer.md section 1."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, num_classes, dim),
        "pos_embed": (1, 1 + side * side // 4, dim),
        "pos_embed_cls": (1, num_classes, dim),
        "pos_embed_pat": (1, side * side, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "head.weight": (num_classes, dim, 3, 3),
        "head.bias": (num_classes,),
    }
    for i in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", 4 * dim, dim),
            ("mlp.fc2", dim, 4 * dim),
        ):
            shapes[f"blocks.{i}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{i}.{name}.bias"] = (rows,)
        for name in ("norm1", "norm2"):
            shapes[f"blocks.{i}.{name}.weight"] = shapes[f"blocks.{i}.{name}.bias"] = (dim,)
    return shapes


def random_state(shapes: dict[str, tuple[int, ...]]) -> State:
    """Parameters of these shapes, every entry different from every other one."""
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_official_parameter_lands_where_it_belongs(prefix: str, tmp_path: Path) -> None:
    state, module = random_state(official_shapes()), built(backbone_of(depth=2))
    torch.save({"model": {prefix + name: v for name, v in state.items()}}, tmp_path / "a.pth")
    load_official("mctformer", module, read_state_dict(tmp_path / "a.pth"), "a.pth")
    own = module.state_dict()
    positions = own.pop("backbone.vit.pos_embed")
    parts = [state[name] for name in ("pos_embed_cls", "pos_embed_pat")]
    assert torch.equal(positions, torch.cat(parts, 1)), "the file's grid, 6 x 6, not 4 x 4"
    unused = [name for name in state if our_name(name) is None]
    assert unused == ["pos_embed"]
    rest = {name: v for name, v in state.items() if name not in (*unused, *POSITIONS)}
    assert own.keys() == {our_name(name) for name in rest}
    for name, value in rest.items():
        ours = our_name(name)
        assert ours is not None
        assert torch.equal(own[ours], value), name
        assert official_name(ours) == name
    back = parted({"backbone.vit.pos_embed": positions, **own}, NUM_CLASSES)
    assert back.keys() == state.keys() - {*unused}
    assert all(torch.equal(value, state[name]) for name, value in back.items())
    assert our_name(official_name("backbone.vit.pos_embed")) == "backbone.vit.pos_embed"


@pytest.mark.parametrize(("num_classes", "count"), [(20, 22_050_836), (80, 22_304_336)])
def test_the_official_number_of_parameters(num_classes: int, count: int) -> None:
    shapes = official_shapes(dim=384, depth=12, num_classes=num_classes, side=28)
    assert len(shapes) == 154
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count
    backbone = Backbone(name="deit_small_patch16_224", weights="random")
    module = built(backbone, num_classes=num_classes, input_size=448)
    own = sum(p.numel() for p in module.parameters())
    assert own == count - int(np.prod(shapes["pos_embed"]))
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == count - 76_416


def with_(name: str, value: Tensor) -> Callable[[State], object]:
    return lambda state: state.update({name: value})


def without(*names: str) -> Callable[[State], object]:
    return lambda state: [state.pop(name) for name in names]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("head.bias"), r"missing 1: head\.bias$"),
        (without("pos_embed_pat"), r"missing 1: pos_embed_cls \+ pos_embed_pat$"),
        (with_("blocks.2.norm1.bias", torch.zeros(48)), r"extra 1: blocks\.2\.norm1\.bias$"),
        (
            without("pos_embed_cls", "pos_embed_pat"),
            r"^a\.pth: is of MCTformer V2, whose positions are one pos_embed; expected MCTformer\+",
        ),
        (
            without("pos_embed_cls", "pos_embed_pat", "head.weight", "head.bias"),
            r"is of MCTformer V1,",
        ),
    ],
)
def test_misfits_are_named_as_in_the_file(change: Callable[[State], object], message: str) -> None:
    state, module = random_state(official_shapes()), built(backbone_of(depth=2))
    change(state)
    with pytest.raises(WSSSError, match=message) as caught:
        load_official("mctformer", module, state, "a.pth")
    assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_of_other_classes_is_one_line() -> None:
    state, module = random_state(official_shapes(num_classes=7)), built(backbone_of(depth=2))
    with pytest.raises(WSSSError, match=r"misshapen 4: cls_token \(expected \(1, 4, 48\), got \(1"):
        load_official("mctformer", module, state, "a.pth")
    converted, back = convert_official("mctformer", state)
    assert converted["patch_head.bias"] is state["head.bias"]
    assert back["backbone.vit.pos_embed"] == JOINED


# ---- what an evaluator sees ----------------------------------------------------------------------


def test_pixels_are_recovered_exactly() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert np.array_equal(pictures_of(normalise(levels)[None])[0], levels)
    assert pictures_of(torch.full((1, 3, 1, 1), 99.0)).max() == 255
    assert pictures_of(torch.full((1, 3, 1, 1), -99.0)).min() == 0


def test_scaled_sides_are_rounded_half_to_even_then_raised() -> None:
    assert scaled_size((375, 500), 0.75, 1) == (281, 375)
    assert scaled_size((54, 90), 0.75, 1) == (40, 68)  # 40.5, 67.5
    assert scaled_size((375, 500), 0.75, 16) == (288, 384)
    with pytest.raises(WSSSError, match=r"method\.scales: scale 0\.1 of a 4x80 image is empty"):
        scaled_size((4, 80), 0.1, 16)


def test_maps_are_of_the_wanted_classes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module, wanted = tiny(), []
    patch_map = module.patch_map

    def spy(features: Tensor, classes: Tensor) -> Tensor:
        wanted.append(classes.tolist())
        return patch_map(features, classes)

    monkeypatch.setattr(module, "patch_map", spy)
    images, labels = make_images(48, 64), torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 0]])
    some = module.cams(images, labels)
    assert wanted == [[0, 2]] * 3
    every = module.cams(images, torch.ones(2, NUM_CLASSES))
    torch.testing.assert_close(some, every * labels[..., None, None], rtol=0, atol=1e-5)
    assert not some[1, 0].any()
    alone = module.cams(images[:1], torch.ones(1, NUM_CLASSES))
    torch.testing.assert_close(alone, every[:1], rtol=0, atol=1e-5)
    assert 0 <= every.min() < every.max() <= 1
    assert not module.cams(images, torch.zeros(2, NUM_CLASSES)).any()
    assert len(wanted) == 9, "without a class nothing is computed"


@both_ways
def test_one_class_is_enough(quirks: Quirks) -> None:
    module = tiny(quirks, num_classes=1)
    images, labels = make_images(), torch.tensor([[1.0], [0.0]])
    result = module.losses({"image": images, "labels": labels}, 0)
    assert result.losses["cct_loss"].item() == 0
    result.total.backward()
    cam = module.cams(images, labels)
    assert cam.shape == (2, 1, SIDE, SIDE)
    assert cam[0].max() > 0.99
    assert not cam[1].any()


def test_a_pass_keeps_no_attention_of_all_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    softmax = Tensor.softmax

    def spy(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows.append(tensor.shape[-2])
        return softmax(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "softmax", spy)
    module, images = tiny(), make_images(160, 160)  # 100 patches
    module.raw_maps(images, torch.arange(NUM_CLASSES))
    assert rows == [NUM_CLASSES, 64, 36] * 3
    rows.clear()
    losses_at(module)
    tiny(affinity=False).raw_maps(images, torch.arange(2))
    assert rows == [NUM_CLASSES] * 3, "none in training, class rows alone without affinity"


def test_gallery_maps_are_of_the_strongest_labelled_class() -> None:
    module, images = tiny(), make_images(80, 112)
    order = module.encode(images).class_logits[1].argsort()  # ascending; two are not labelled
    labels = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 0]])
    labels[1, order[:2]] = 1
    maps = module.gallery_maps(images, labels)
    assert list(maps) == ["class attention", "PatchCAM", "fused"]
    shown = tiny(map="patchcam", affinity=False).raw_maps(images, order[1:2])[1, 0]
    for values in maps.values():
        assert values.shape == (2, 80, 112)
        assert 0 <= values.min() < values.max() <= 1
    place = divmod(int(maps["PatchCAM"][1].argmax()), 112)
    assert (place[0] // 16, place[1] // 16) == divmod(int(shown.argmax()), 7)


# ---- training ------------------------------------------------------------------------------------


def test_a_contrast_of_zero_weight_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsss.methods.mctformer.method.class_token_contrast", None)
    result = losses_at(tiny(cct_weight=0.0))
    assert list(result.losses) == ["cls_loss", "patch_loss"]
    total = sum(loss.item() for loss in result.losses.values())
    assert result.total.item() == pytest.approx(total, rel=1e-6)


def test_each_term_trains_its_own_part() -> None:
    module = tiny()
    result = losses_at(module)
    head, vit = list(module.patch_head.parameters()), module.backbone.vit
    for name, loss in result.losses.items():
        own = torch.autograd.grad(loss, head, retain_graph=True, allow_unused=True)
        assert all((g is not None) == (name == "patch_loss") for g in own), name
        (tokens,) = torch.autograd.grad(loss, vit.cls_token, retain_graph=True)
        assert tokens.any(), name
    result.total.backward()
    trained = {name for name, p in module.named_parameters() if p.grad is not None}
    everything = {name for name, _ in module.named_parameters()}
    assert everything - trained == {"backbone.vit.norm.weight", "backbone.vit.norm.bias"}


@both_ways
def test_a_few_steps_lower_the_loss(quirks: Quirks) -> None:
    module = tiny(quirks, lr=1e-3).train()
    optimizer = module.optimizer(module.param_groups())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert optimizer.defaults["eps"] == 1e-8
    first = losses_at(module)
    for _ in range(6):
        optimizer.zero_grad()
        losses_at(module).total.backward()
        optimizer.step()
    assert losses_at(module).total.item() < first.total.item()


def test_what_pretraining_does_not_give_has_a_rate_of_its_own() -> None:
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
    fast = {id(p) for g in groups if g["lr"] > 2e-4 for p in g["params"]}
    names = {name for name, parameter in module.named_parameters() if id(parameter) in fast}
    assert names == {"backbone.vit.cls_token", "patch_head.weight", "patch_head.bias"}


def test_noise_parts_the_class_tokens_and_nothing_else() -> None:
    starts = {}
    for noise in (0.0, 0.5):
        torch.manual_seed(0)
        starts[noise] = built(backbone_of(), num_classes=200, token_noise=noise).state_dict()
    plain, parted_ = (one.pop("backbone.vit.cls_token") for one in starts.values())
    assert torch.equal(plain, plain[:, :1].expand_as(plain))
    assert (parted_ - plain).std().item() == pytest.approx(0.5, rel=0.05)
    assert all(torch.equal(value, starts[0.5][name]) for name, value in starts[0.0].items())


def test_trainer_logs_the_terms(tmp_path: Path) -> None:
    module: MCTformerPlus = tiny(max_steps=2)
    logged = fit(module, tmp_path, 2).callback_metrics
    assert set(logged) >= {f"train/{name}_loss" for name in ("cls", "cct", "patch")}
    assert module.title == "MCTformer+"


@torch.no_grad()
def test_squashed_images_are_rounded_to_grey_levels() -> None:
    module, labels = tiny(), torch.ones(1, NUM_CLASSES)
    images = make_images(64, 96, count=1) + 0.3 / 255
    pictures = pictures_of(images)
    assert np.array_equal(pictures, make_pictures(64, 96))
    rounded = torch.stack([normalise(one) for one in pictures])
    assert torch.equal(module.cams(images, labels), module.cams(rounded, labels))
