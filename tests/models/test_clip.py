"""CLIP's towers as the shared encoder: names of files, GELU, projection, what frozen means."""

import json
import zipfile
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
from wsss.methods.getam import GETAM, GETAMSettings
from wsss.methods.tkp_pcl import TKPPCL, TKPPCLSettings
from wsss.methods.toco import ToCo, ToCoSettings
from wsss.models.backbone import Backbone, Features
from wsss.models.clip import image_tower, timm_name
from wsss.models.conv_backbone import ConvBackbone
from wsss.models.vit import block_with_attention
from wsss.models.weights import read_torch_file

GOLDEN = Path(__file__).parents[1] / "golden" / "weclip" / "a_encoder.npz"
QUICK = "vit_base_patch16_clip_quickgelu_224"
TINY: dict[str, Any] = {"embed_dim": 48, "depth": 12, "num_heads": 3, "img_size": 64}
SIZES = (64, 112)


def tower(name: str = QUICK, *, frozen: bool = True, **changed: Any) -> Backbone:
    torch.manual_seed(0)
    overrides = TINY | ({"num_classes": 32} if frozen else {}) | changed
    return Backbone(name=name, weights="random", overrides=overrides, frozen=frozen)


def golden_state() -> dict[str, Tensor]:
    """A whole CLIP under OpenAI's names, by the rule of the golden README."""
    case = np.load(GOLDEN, allow_pickle=False)
    names, shapes = (json.loads(str(case[f"param_{k}"])) for k in ("names", "shapes"))
    state = {}
    for name, shape in zip(names, shapes, strict=True):
        if not name.startswith("encoder.") or name.endswith("_new"):
            continue
        z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        z = np.float32(z)
        if name.endswith("logit_scale"):
            z = np.float32(np.log(20))
        elif name.endswith(("class_embedding", "positional_embedding")):
            z = 0.5 * z
        elif len(shape) >= 2:
            gains = {"in_proj_weight": 2, "out_proj.weight": 0.4, "c_proj.weight": 0.4}
            gain = next((g for end, g in gains.items() if name.endswith(end)), 1)
            z = gain * z / np.sqrt(np.prod(shape[1:]))
        else:
            z = 0.1 * z if name.endswith("bias") else 1 + 0.1 * z
        state[name.removeprefix("encoder.")] = torch.from_numpy(np.asarray(z, np.float32))
    return state


@pytest.fixture(scope="module")
def openai_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(golden_state(), path)
    return path


def load(path: Path, **options: Any) -> Backbone:
    given = {"name": QUICK, "overrides": TINY | {"num_classes": 32}, "frozen": True} | options
    return Backbone(weights=str(path), declared_pretraining="400 M pairs", **given)


def images_of(size: int) -> Tensor:
    pixels = np.load(GOLDEN, allow_pickle=False)[f"in_img_{size}x{size}"].astype(np.float64)
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    return torch.from_numpy(((pixels - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)


def tokens_of(features: Features, block: int) -> Tensor:
    return torch.cat([features.prefixes[block], features.intermediates[block]], dim=1)


@pytest.mark.parametrize("size", SIZES)
def test_a_file_of_openai_gives_the_golden_tokens(openai_file: Path, size: int) -> None:
    case, backbone = np.load(GOLDEN, allow_pickle=False), load(openai_file)
    backbone.position_mode = "bilinear"
    found = backbone(images_of(size), taps=range(11), mean_attentions=range(11), blocks=11)
    for block in (0, 5, 10):
        expected = torch.from_numpy(case[f"out_tokens_block{block}_{size}x{size}"])
        torch.testing.assert_close(tokens_of(found, block), expected, rtol=0, atol=5e-5)
    for block in (0, 10):
        expected = torch.from_numpy(case[f"out_attn_block{block}_{size}x{size}"])
        torch.testing.assert_close(found.mean_attentions[block], expected, rtol=0, atol=5e-6)
    assert backbone.projection is not None
    assert torch.equal(backbone.projection, golden_state()["visual.proj"])


def test_positions_decide_at_another_size(openai_file: Path) -> None:
    backbone, found = load(openai_file), []
    for mode in ("bicubic", "bilinear"):
        backbone.position_mode = mode  # type: ignore[assignment]
        found.append(tokens_of(backbone(images_of(112), taps=(10,)), 10))
    assert float((found[0] - found[1]).abs().max()) > 1e-2


def test_tokens_are_those_of_timm_with_quick_gelu(openai_file: Path) -> None:
    backbone = load(openai_file)
    theirs = timm.create_model(QUICK, pretrained=False, num_classes=32, **TINY).eval()
    exact = timm.create_model(QUICK.replace("_quickgelu", ""), num_classes=32, **TINY).eval()
    state = {k: v for k, v in image_tower(golden_state()).items() if k != "head.bias"}
    for network in (theirs, exact):
        network.load_state_dict(state, strict=False)
    images = images_of(64)
    with torch.no_grad():
        expected, wrong = (
            network.forward_intermediates(images, norm=False, intermediates_only=True,
                                          output_fmt="NLC")[10] for network in (theirs, exact)
        )  # fmt: skip
    patches = backbone(images, taps=(10,)).intermediates[10]
    torch.testing.assert_close(patches, expected, rtol=0, atol=1e-5)
    assert float((patches - wrong).abs().max()) > 0.02


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vit_base_patch16_clip_224.openai", f"backbone.name={QUICK}.openai"),
        ("vit_base_patch16_clip_224.metaclip_400m", f"backbone.name={QUICK}.metaclip_400m"),
        ("vit_base_patch16_clip_224.dfn2b", r"\+backbone.overrides.act_layer=quick_gelu"),
    ],
)
def test_exact_gelu_under_weights_of_quick_gelu(name: str, hint: str) -> None:
    with pytest.raises(WSSSError, match=f"QuickGELU.*{hint}"):
        tower(name, depth=1)
    assert tower(name, depth=1, act_layer="quick_gelu").projection is not None
    assert tower(name, depth=1, frozen=False).projection is None  # fine-tuning adapts


@pytest.mark.parametrize(
    ("name", "width"),
    [
        (f"{QUICK}.openai", 512),
        (f"{QUICK}.metaclip_2pt5b", 512),
        ("vit_base_patch16_clip_224.laion2b", 512),
        ("vit_base_patch16_clip_224", 512),  # its first tag is a fine-tuned one
        ("vit_base_patch16_clip_224.openai_ft_in1k", None),
        ("vit_base_patch16_clip_384", None),  # fine-tuned ones alone
        ("vit_base_patch16_siglip_224.webli", None),
        ("vit_base_patch16_siglip_gap_224.v2_webli", None),
        ("vit_tiny_patch16_224", None),
    ],
)
def test_towers_that_share_a_space_with_texts(name: str, width: int | None) -> None:
    small = {"embed_dim": 48, "depth": 1, "num_heads": 3}
    backbone = Backbone(name=name, weights="random", overrides=small, frozen=True)
    shape = None if backbone.projection is None else tuple(backbone.projection.shape)
    assert shape == (None if width is None else (48, width))
    # the encoder's own names and hash are those without a projection
    plain = Backbone(name=name, weights="random", overrides=small)
    assert plain.vit.state_dict().keys() == backbone.vit.state_dict().keys()
    assert plain.projection is None
    assert "projection" not in plain.state_dict()


def test_files_of_timm_openai_and_open_clip_are_one(openai_file: Path, tmp_path: Path) -> None:
    state = golden_state()
    timms = image_tower(state) | {"head.bias": torch.zeros(32)}
    save_file({k: v.contiguous() for k, v in timms.items()}, tmp_path / "timm.safetensors")
    half = {f"module.{k}": v.half() if v.ndim > 1 else v for k, v in state.items()}
    torch.save({"state_dict": half}, tmp_path / "open_clip.pt")
    trunk = {f"visual.trunk.{k}": v for k, v in image_tower(state).items() if "head" not in k}
    torch.save(trunk | {"visual.head.proj.weight": timms["head.weight"]}, tmp_path / "trunk.pt")
    first, second = load(openai_file), load(tmp_path / "timm.safetensors")
    assert first.weights_info.state_sha256 == second.weights_info.state_sha256
    assert first.projection is not None
    assert torch.equal(first.projection, second.projection)
    assert load(tmp_path / "trunk.pt", frozen=False, overrides=TINY).weights_info.state_sha256 == (
        first.weights_info.state_sha256
    )
    halved = load(tmp_path / "open_clip.pt")
    assert halved.projection is not None
    assert halved.projection.dtype == torch.float32
    torch.testing.assert_close(halved.projection, first.projection, atol=1e-3, rtol=0)


def test_files_say_that_they_are_of_clip(openai_file: Path, tmp_path: Path) -> None:
    # a tower of another name; what is stated says nothing either
    plain = {"name": "vit_tiny_patch16_224", "frozen": False}
    sizes = TINY | {"pre_norm": True, "act_layer": "quick_gelu"}
    timms = {k: v for k, v in image_tower(golden_state()).items() if "head" not in k}
    torch.save(timms, tmp_path / "timm.pt")
    for path in (openai_file, tmp_path / "timm.pt"):
        found = load(path, **plain, overrides=sizes).weights_info.pretraining
        assert found == "declared by the user: 400 M pairs (CLIP)"
    other = Backbone(name="vit_tiny_patch16_224", weights="random", overrides=TINY)
    torch.save(other.vit.state_dict(), tmp_path / "plain.pt")
    info = load(tmp_path / "plain.pt", **plain, overrides=TINY).weights_info
    assert info.pretraining == "declared by the user: 400 M pairs"


def test_every_parameter_of_the_tower_has_its_name() -> None:
    names = [k.removeprefix("visual.") for k in golden_state() if k.startswith("visual.")]
    expected = {*tower().vit.state_dict(), "head.weight"}
    assert {timm_name(name) for name in names} == expected
    assert timm_name("transformer.resblocks.11.attn.in_proj_bias") == "blocks.11.attn.qkv.bias"
    assert timm_name("ln_post.weight") == "norm.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("visual.proj"), "holds no projection"),
        (lambda s: s.update({"visual.proj": torch.zeros(48, 8)}), r"is \(8, 48\).*\(32, 48\)"),
        (lambda s: s.pop("visual.ln_pre.bias"), "missing 1: norm_pre.bias"),
        (lambda s: s.update({"visual.ln_mid.bias": torch.zeros(1)}), "extra 1: ln_mid.bias"),
    ],
)
def test_unfitting_files_are_named(change: Any, expected: str, tmp_path: Path) -> None:
    state = golden_state()
    change(state)
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(WSSSError, match=f"clip.pt: .*{expected}") as caught:
        load(tmp_path / "clip.pt")
    assert "\n" not in str(caught.value)


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ViT-B-16.pt", "w") as archive:
        archive.writestr("ViT-B-16/data.pkl", b"")
        archive.writestr("ViT-B-16/constants.pkl", b"")
    with pytest.raises(WSSSError, match=r"ViT-B-16\.pt: is a TorchScript archive.*safetensors"):
        read_torch_file(tmp_path / "ViT-B-16.pt")


def test_mean_attention_is_the_mean_of_the_heads() -> None:
    backbone = tower(depth=2)
    images = torch.randn(2, 3, 64, 48)
    whole = backbone(images, attentions=(0,), taps=(0,))
    mean = backbone(images, mean_attentions=(0,), taps=(0,))
    torch.testing.assert_close(mean.mean_attentions[0], whole.attentions[0].mean(1))
    torch.testing.assert_close(mean.patch_tokens, whole.patch_tokens)
    assert mean.attentions == {}


def test_blocks_are_run_as_far_as_is_said() -> None:
    backbone, images = tower(depth=3), torch.randn(1, 3, 64, 64)
    calls: list[int] = []
    for index, block in enumerate(backbone.vit.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    part, whole = backbone(images, taps=(1,), blocks=2), backbone(images, taps=(1,))
    assert calls == [0, 1, 0, 1, 2]
    assert torch.equal(part.intermediates[1], whole.intermediates[1])
    normed = backbone.vit.norm(tokens_of(part, 1))
    assert torch.equal(part.patch_tokens, normed[:, 1:])


def test_a_frozen_encoder_keeps_nothing() -> None:
    backbone = tower(depth=2, proj_drop_rate=0.5)
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    assert not backbone(images).patch_tokens.requires_grad
    assert torch.equal(backbone(images).patch_tokens, backbone(images).patch_tokens)
    trained = tower(depth=2, frozen=False).train()
    assert all(module.training for module in trained.modules())
    assert trained(images).patch_tokens.requires_grad
    trained.freeze()
    assert not trained.train()(images).patch_tokens.requires_grad
    tokens, _ = backbone.embed(images.detach())
    state = tokens.detach().requires_grad_()
    block_with_attention(backbone.vit.blocks[1], state)[0].sum().backward()
    assert state.grad is not None, "a method may take gradients in tokens"


def test_a_thawed_encoder_is_one_that_was_never_frozen() -> None:
    backbone, never = tower(depth=2), tower(depth=2, frozen=False)
    backbone.thaw()
    assert backbone.state_dict().keys() == never.state_dict().keys()
    assert all(module.training for module in backbone.train().modules())
    assert backbone(torch.randn(1, 3, 64, 64)).patch_tokens.requires_grad
    convolutions = ConvBackbone(name="mobilenet_v3_small").requires_grad_(False)
    convolutions.thaw()
    assert all(parameter.requires_grad for parameter in convolutions.parameters())


def test_methods_that_train_the_encoder_refuse_a_frozen_one() -> None:
    backbone = tower(depth=4)
    cases = ((TKPPCL, TKPPCLSettings(max_steps=9)), (GETAM, GETAMSettings(max_steps=9)))
    for method, settings in cases:
        with pytest.raises(WSSSError, match=r"frozen=true: \w+ trains its encoder.*frozen=false"):
            method(backbone=backbone, num_classes=3, settings=settings)  # type: ignore[arg-type]


def test_a_method_learns_on_a_frozen_tower() -> None:
    settings = ToCoSettings(max_steps=9, warmup_steps=1, decoder_channels=8, local_size=16)
    module = ToCo(backbone=tower(depth=4), num_classes=3, settings=settings).train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    optimizer = module.optimizer(module.param_groups())
    torch.manual_seed(0)
    batch = {
        "image": torch.randn(2, 3, 64, 64),
        "view2": torch.randn(2, 3, 64, 64),
        "local_view": torch.randn(2, 3, 64, 64),
        "labels": torch.tensor([[1.0, 0, 1], [0, 1, 0]]),
        "box": torch.tensor([[0, 64, 0, 64]] * 2),
    }
    module.losses(batch, 5).total.backward()
    optimizer.step()
    moved = {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
    assert "classifier.weight" in moved
    assert not [name for name in moved if name.startswith("backbone.")]
    encoder = {id(parameter) for parameter in module.backbone.parameters()}
    assert encoder.isdisjoint(id(parameter) for parameter in optimizer.state)
