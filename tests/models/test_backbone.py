"""The shared encoder: equal to timm and to golden values at other sizes, strict about weights."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.models.backbone import Backbone, Features
from wsss.models.vit import resize_positions
from wsss.models.weights import load_encoder, state_sha256

GOLDEN = Path(__file__).parents[1] / "golden" / "toco" / "a_backbone.npz"
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64}


def tiny(**overrides: int | bool) -> Backbone:
    torch.manual_seed(0)
    return Backbone(
        name="vit_tiny_patch16_224", weights="random", overrides={**TINY, **overrides}
    ).eval()


def all_tokens(features: Features) -> Tensor:
    return torch.cat([features.cls_tokens, features.patch_tokens], dim=1)


@pytest.mark.parametrize(
    ("name", "overrides", "prefix"),
    [
        ("vit_tiny_patch16_224", {"depth": 3}, 1),
        ("deit_tiny_distilled_patch16_224", {"depth": 2}, 2),
        ("deit3_small_patch16_224", {"depth": 1}, 1),  # class token without position
        ("vit_small_patch14_dinov2", {"depth": 1, "img_size": 56}, 1),  # layer scale
        ("vit_small_patch14_reg4_dinov2", {"depth": 1, "img_size": 56}, 5),  # registers
        ("vit_base_patch16_clip_224", {"depth": 1}, 1),  # a norm before the blocks
    ],
)
def test_equals_timm_at_the_native_size(name: str, overrides: dict[str, int], prefix: int) -> None:
    torch.manual_seed(0)
    backbone = Backbone(name=name, weights="random", overrides=overrides).eval()
    side = backbone.vit.patch_embed.img_size[0]
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        features = backbone(images)
        expected = backbone.vit.forward_features(images)
    assert backbone.num_prefix_tokens == features.cls_tokens.shape[1] == prefix
    torch.testing.assert_close(all_tokens(features), expected, rtol=0, atol=2e-5)
    # the same network at a size timm refuses: not square, not a multiple of the patch
    odd = backbone(torch.randn(1, 3, 70, 90))
    assert odd.grid == (70 // backbone.patch_size, 90 // backbone.patch_size)
    assert odd.patch_tokens.shape[1] == odd.grid[0] * odd.grid[1]


def golden_weights(case: np.lib.npyio.NpzFile) -> dict[str, Tensor]:
    """The rule of the golden README: weights follow from name and shape."""
    names, shapes = case["param_names"].tolist(), json.loads(str(case["param_shapes"]))
    return {name: golden_weight(name, tuple(s)) for name, s in zip(names, shapes, strict=True)}


def golden_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    z = rng.standard_normal(shape).astype(np.float32)
    if name.endswith(("cls_token", "pos_embed")):
        z = 0.2 * z
    elif len(shape) >= 2:
        z = z / np.sqrt(np.prod(shape[1:]))
    elif name.endswith(".bias"):
        z = 0.1 * z
    else:
        z = 1 + 0.1 * z
    return torch.from_numpy(z.astype(np.float32))


@pytest.mark.parametrize("size", ["64x64", "96x96"])
def test_equals_golden_values(size: str) -> None:
    case = np.load(GOLDEN, allow_pickle=False)
    backbone = tiny(depth=4)
    load_encoder(backbone.vit, golden_weights(case), "golden")
    pixels = (case[f"in_img_{size}"] / 255 - MEAN) / STD
    images = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = backbone(images, taps=(1,))
    for name, value in (
        ("cls", features.cls_tokens[:, 0]),
        ("patch", features.patch_tokens),
        ("aux", features.intermediates[1]),
    ):
        expected = torch.from_numpy(case[f"out_{name}_{size}"])
        torch.testing.assert_close(value, expected, rtol=0, atol=5e-5, msg=name)


def test_positions_are_resized_without_antialias() -> None:
    positions = torch.randn(1, 1 + 36, 8)
    assert resize_positions(positions, (6, 6), 1) is positions
    small = resize_positions(positions, (3, 2), 1)
    assert small.shape == (1, 1 + 6, 8)
    assert torch.equal(small[:, 0], positions[:, 0])
    grid = positions[:, 1:].reshape(1, 6, 6, 8).permute(0, 3, 1, 2)
    for antialias in (False, True):
        resized = torch.nn.functional.interpolate(
            grid, size=(3, 2), mode="bicubic", align_corners=False, antialias=antialias
        )
        same = torch.allclose(small[:, 1:], resized.flatten(2).transpose(1, 2), atol=1e-6)
        assert same is not antialias


def test_remainders_on_the_right_and_at_the_bottom_are_dropped() -> None:
    backbone = tiny()
    images = torch.randn(2, 3, 75, 62)
    full, cropped = backbone(images), backbone(images[..., :64, :48])
    assert full.grid == (4, 3)
    assert torch.equal(all_tokens(full), all_tokens(cropped))


def test_grid_is_row_major() -> None:
    features = tiny()(torch.randn(2, 3, 48, 80))
    assert features.patch_map.shape == (2, 48, 3, 5)
    assert torch.equal(features.patch_map[:, :, 1, 2], features.patch_tokens[:, 5 + 2])
    assert features.patch_map.is_contiguous()  # or convolutions take it for channels-last


def test_taps_are_raw_outputs_of_their_blocks() -> None:
    backbone = tiny()
    images = torch.randn(1, 3, 64, 64)
    features = backbone(images, taps=(0, -1))
    assert set(features.intermediates) == {0, 1}
    torch.testing.assert_close(
        backbone.vit.norm(features.intermediates[1]), features.patch_tokens, rtol=0, atol=1e-6
    )
    assert not torch.allclose(features.intermediates[1], features.patch_tokens, atol=0.1)
    first = backbone.vit.blocks[0](backbone.embed(images)[0])[:, 1:]
    torch.testing.assert_close(features.intermediates[0], first)
    assert backbone(images).intermediates == {}


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_maps_are_distributions_and_change_no_output(qk_norm: bool) -> None:
    backbone = tiny(qk_norm=qk_norm)
    images = torch.randn(2, 3, 48, 64)
    fused = backbone(images)
    features = backbone(images, attentions=(0, -1))
    assert fused.attentions == {}
    assert set(features.attentions) == {0, 1}
    attention = features.attentions[1]
    assert attention.shape == (2, 3, 1 + 12, 1 + 12)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 13))
    assert (attention >= 0).all()
    torch.testing.assert_close(all_tokens(features), all_tokens(fused), rtol=0, atol=1e-5)
    attention.sum().backward()  # gradient-weighted attention needs the graph
    assert features.attentions[0].requires_grad


def test_image_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(WSSSError, match=r"image of \(64, 15\) pixels is smaller"):
        tiny()(torch.randn(1, 3, 64, 15))


# ---- weights -------------------------------------------------------------------------------------


def write_weights(folder: Path, kind: str, state: dict[str, Tensor]) -> Path:
    path = folder / f"weights{kind}"
    if kind == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    return path


def load_tiny(path: Path, **overrides: int) -> Backbone:
    return Backbone(
        name="vit_tiny_patch16_224", weights=str(path), overrides={**TINY, **overrides}
    ).eval()


@pytest.mark.parametrize("kind", [".safetensors", ".pth"])
def test_local_file_is_loaded_and_recorded(tmp_path: Path, kind: str) -> None:
    source = tiny()
    # heads of an ImageNet model are of no use here
    head = {"head.weight": torch.randn(1000, 48), "head.bias": torch.zeros(1000)}
    path = write_weights(tmp_path, kind, {**source.vit.state_dict(), **head})
    loaded = load_tiny(path)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images).patch_tokens, source(images).patch_tokens)
    info = loaded.weights_info
    assert info.source == f"file:{path.name}"
    assert info.file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert info.state_sha256 == source.weights_info.state_sha256
    assert source.weights_info.source == "random"
    assert source.weights_info.file_sha256 is None


def test_hash_follows_values_names_and_shapes() -> None:
    state = {"a": torch.arange(6.0)}
    assert state_sha256(state) != state_sha256({"a": torch.arange(6.0).reshape(2, 3)})
    assert state_sha256(state) != state_sha256({"b": torch.arange(6.0)})
    assert state_sha256(state) != state_sha256({"a": torch.arange(1.0, 7.0)})
    assert state_sha256(state) == state_sha256({"a": torch.arange(6.0)})


def test_file_made_at_another_size_keeps_its_position_grid(tmp_path: Path) -> None:
    source = tiny(img_size=96)
    loaded = load_tiny(write_weights(tmp_path, ".pth", source.vit.state_dict()))
    images = torch.randn(1, 3, 64, 64)
    assert loaded.vit.pos_embed.shape[1] == 37
    assert torch.equal(loaded(images).patch_tokens, source(images).patch_tokens)


def test_shipped_weights_load_by_package_path() -> None:
    backbone = Backbone(
        name="vit_tiny_patch16_224",
        weights="package:weights/vit_pico.safetensors",
        overrides={"patch_size": 8, "depth": 5, "img_size": 96},
    )
    assert backbone.weights_info.source == "file:vit_pico.safetensors"
    assert (backbone.patch_size, backbone.depth) == (8, 5)


def test_missing_file_says_where_weights_come_from() -> None:
    with pytest.raises(WSSSError, match=r"/no/such\.pth: no such file; put the weights there"):
        load_tiny(Path("/no/such.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.1.mlp.fc2.bias"), r"missing 1: blocks\.1\.mlp\.fc2\.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra 1: extra"),
        (
            lambda state: state.update({"norm.weight": torch.zeros(47)}),
            r"misshapen 1: norm\.weight \(expected \(48,\), got \(47,\)\)",
        ),
        (
            lambda state: state.update(pos_embed=torch.zeros(1, 16, 48)),
            r"misshapen 1: pos_embed \(expected \(1, 17, 48\), got \(1, 16, 48\)\)",
        ),
    ],
)
def test_keys_that_do_not_fit_are_named(tmp_path: Path, change: object, message: str) -> None:
    state = dict(tiny().vit.state_dict())
    assert callable(change)
    change(state)
    with pytest.raises(WSSSError, match=message) as caught:
        load_tiny(write_weights(tmp_path, ".pth", state))
    assert "weights.pth" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("vit_tiny_patch16_224", "timm", r"no pretrained tag.*pin one of: vit_tiny_patch16_224\."),
        ("vit_tiny_patch16_224.mine", "random", "not a pretrained tag"),
        ("vit_tinny_patch16_224", "random", "not a timm model; near: vit_tiny_patch16_224"),
        ("resnet18", "random", "is a ResNet; only ViT"),
        ("vit_base_mci_224", "random", "convolutional stem"),
    ],
)
def test_names_that_do_not_work_are_told_in_one_line(name: str, weights: str, message: str) -> None:
    with pytest.raises(WSSSError, match=message) as caught:
        Backbone(name=name, weights=weights)
    assert "\n" not in str(caught.value)


def test_mistyped_override_is_told_in_one_line() -> None:
    with pytest.raises(WSSSError, match=r"overrides.*depht"):
        Backbone(name="vit_tiny_patch16_224", weights="random", overrides={"depht": 3})


def test_offline_without_cache_says_where_to_put_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what HF_HUB_OFFLINE=1 and an empty HF_HOME set, once the library is imported
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WSSSError, match="not cached and cannot be downloaded") as caught:
        Backbone(name="vit_tiny_patch16_224.augreg_in21k_ft_in1k", weights="timm")
    assert "backbone.weights=/path/to/file.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["deit_base", "vit_base", "dinov2_small"])
def test_configured_names_are_pinned_tags_that_timm_knows(name: str) -> None:
    text = (Path(__file__).parents[2] / "conf" / "backbone" / f"{name}.yaml").read_text()
    pinned = next(line.split()[1] for line in text.splitlines() if line.startswith("name:"))
    assert pinned in timm.list_pretrained(f"{pinned.split('.')[0]}.*")


# ---- what GETAM asks for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        {"checkpoint_path": "other.pth"},
        {"pretrained_cfg": {"file": "other.pth"}},
        {"pretrained_cfg_overlay": {"file": "other.pth"}},
        {"cache_dir": "elsewhere"},
        {"features_only": True},
        {"scriptable": True},
    ],
)
def test_overrides_bring_no_weights(override: dict[str, Any]) -> None:
    (key,) = override
    with pytest.raises(WSSSError, match=rf"backbone\.overrides\.{key}: .*backbone\.weights alone"):
        Backbone(name="vit_tiny_patch16_224", weights="random", overrides={**TINY, **override})


@pytest.mark.parametrize(
    "override",
    [{"depth": 10**9}, {"embed_dim": 10**7}, {"reg_tokens": 10**6}, {"num_classes": 10**9},
     {"img_size": 10**6}, {"depth": 1000, "embed_dim": 2**16}, {"depth": "3"}],
)  # fmt: skip
def test_an_encoder_has_an_end(override: dict[str, Any]) -> None:
    with pytest.raises(WSSSError, match=r"^backbone\.overrides.*expected"):
        Backbone(name="vit_tiny_patch16_224", weights="random", overrides=override)


def hybrid(**overrides: int) -> Backbone:
    torch.manual_seed(0)
    size = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64}
    return Backbone(
        name="vit_base_r50_s16_384", weights="random", overrides={**size, **overrides}
    ).eval()


def test_hybrid_has_the_names_of_timm_and_gives_its_stages() -> None:
    backbone = hybrid()
    size = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64}
    reference = timm.create_model("vit_base_r50_s16_384", num_classes=0, **size).eval()
    assert reference.state_dict().keys() == backbone.vit.state_dict().keys()
    backbone.vit.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = backbone(images)
        expected = reference.forward_features(images)
    assert (backbone.patch_size, backbone.stem_channels) == (16, (256, 512, 1024))
    shapes = [tuple(one.shape[1:]) for one in features.stem_maps]
    assert shapes == [(256, 16, 16), (512, 8, 8), (1024, 4, 4)]
    # equal but for the standardisation's epsilon
    torch.testing.assert_close(all_tokens(features), expected, rtol=0, atol=2e-2)
    assert backbone(torch.randn(1, 3, 70, 100)).grid == (4, 6)
    with pytest.raises(WSSSError, match="smaller than one 16 px patch"):
        backbone(torch.randn(1, 3, 64, 15))


def test_hybrid_weights_are_divided_by_deviation_plus_epsilon() -> None:
    conv = hybrid().vit.patch_embed.backbone.stages[0].blocks[0].conv2
    with torch.no_grad():
        conv.weight.mul_(1e-3)  # so small that the epsilon shows
        weight = conv.weight.flatten(1)
        mean, std = weight.mean(1, keepdim=True), weight.std(1, keepdim=True, correction=0)
        expected = ((weight - mean) / (std + 1e-5)).view_as(conv.weight)
        x = torch.randn(1, conv.in_channels, 6, 6)
        result = torch.nn.functional.conv2d(x, expected, padding=1)
        torch.testing.assert_close(conv(x), result)


def test_other_convolutional_stems_are_refused() -> None:
    with pytest.raises(WSSSError, match="convolutional stem; choose a plain ViT or vit_base_r50"):
        Backbone(name="vit_small_r26_s32_224", weights="random")


def test_attention_parts_give_output_and_attention() -> None:
    backbone = tiny()
    images = torch.randn(2, 3, 48, 64)
    features = backbone(images, parts=(-1,), taps=(1,))
    whole = backbone(images, attentions=(1,))
    assert set(features.parts) == {1}
    part = features.parts[1]
    attention = (part.queries @ part.keys.transpose(-2, -1)).softmax(-1)
    torch.testing.assert_close(attention, whole.attentions[1])
    torch.testing.assert_close(part.output, attention @ part.values)
    torch.testing.assert_close(all_tokens(features), all_tokens(whole), rtol=0, atol=1e-5)
    tokens = torch.cat([features.prefixes[1], features.intermediates[1]], dim=1)
    torch.testing.assert_close(backbone.vit.norm(tokens), all_tokens(features))


def test_positions_may_be_resized_bilinearly() -> None:
    positions = torch.randn(1, 2 + 36, 8)
    small = resize_positions(positions, (3, 2), 2, mode="bilinear")
    grid = positions[:, 2:].reshape(1, 6, 6, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(3, 2), mode="bilinear")
    torch.testing.assert_close(small[:, 2:], expected.flatten(2).transpose(1, 2))
    assert torch.equal(small[:, :2], positions[:, :2])
