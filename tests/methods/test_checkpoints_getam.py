"""Official GETAM checkpoints of all four backbones become ours."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.methods.getam.method import GETAM, GETAMSettings
from wsss.methods.getam.official import official_name
from wsss.methods.official import convert_official, load_official
from wsss.models.backbone import Backbone
from wsss.runs.folder import load_run

NAMES = {
    "vitb": "vit_tiny_patch16_224",
    "deit_distilled": "deit_tiny_distilled_patch16_224",
    "vitb_hybrid": "vit_base_r50_s16_384",
}


def module_of(kind: str) -> GETAM:
    overrides = {"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 64}
    backbone = Backbone(name=NAMES[kind], weights="random", overrides=overrides)
    settings = GETAMSettings(max_steps=10, decoder_channels=16)
    return GETAM(backbone=backbone, num_classes=4, settings=settings).eval()


def official_state(kind: str) -> dict[str, Tensor]:
    """A checkpoint as the page lists it: our parameters, renamed, and those that nothing uses."""
    torch.manual_seed(1)
    own = module_of(kind)
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter)
    state = {official_name(name): value for name, value in own.state_dict().items()}
    state["pretrained.model.head.weight"] = torch.zeros(1000, 48)
    state["pretrained.model.head.bias"] = torch.zeros(1000)
    if kind == "deit_distilled":
        state["pretrained.model.head_dist.weight"] = torch.zeros(1000, 48)
        state["pretrained.model.head_dist.bias"] = torch.zeros(1000)
    for name in [n for n in state if n.startswith("scratch.refinenet3.resConfUnit1.")]:
        state[name.replace("refinenet3", "refinenet4")] = torch.zeros_like(state[name])
    return state


def test_names_are_those_of_the_page() -> None:
    names = set(official_state("vitb"))
    assert {
        "pretrained.model.cls_token",
        "pretrained.model.patch_embed.proj.weight",
        "pretrained.model.blocks.3.attn.qkv.weight",
        "pretrained.model.norm.weight",
        "pretrained.act_postprocess1.0.project.0.weight",
        "pretrained.act_postprocess1.3.weight",
        "pretrained.act_postprocess1.4.weight",
        "pretrained.act_postprocess3.3.bias",
        "pretrained.act_postprocess4.4.bias",
        "scratch.layer1_rn.weight",
        "scratch.refinenet1.resConfUnit1.bn1.running_mean",
        "scratch.refinenet4.resConfUnit2.conv2.weight",
        "scratch.refinenet2.out_conv.bias",
        "scratch.output_conv.0.weight",
        "scratch.output_conv.1.num_batches_tracked",
        "scratch.output_conv.4.bias",
        "cam_module.body.2.bias",
        "cam_module.fc.0.weight",
        "cls_head.weight",
    } <= names
    hybrid = set(official_state("vitb_hybrid"))
    assert "pretrained.model.patch_embed.backbone.stages.2.blocks.8.conv3.weight" in hybrid
    assert not any(name.startswith("pretrained.act_postprocess1") for name in hybrid)
    assert not any(name.startswith("pretrained.act_postprocess2") for name in hybrid)
    assert "pretrained.model.dist_token" in official_state("deit_distilled")


@pytest.mark.parametrize("kind", list(NAMES))
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_backbone_loads(kind: str, prefix: str) -> None:
    state = {prefix + name: value for name, value in official_state(kind).items()}
    module = module_of(kind)
    load_official("getam", module, state, "official.pth")
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[prefix + official_name(name)]), name


def test_misfits_are_named_as_in_the_file() -> None:
    state, module = official_state("vitb"), module_of("vitb")
    state["surplus"] = state.pop("scratch.layer2_rn.weight")
    state["cls_head.bias"] = torch.zeros(20)
    expected = (
        r"missing 1: scratch\.layer2_rn\.weight; extra 1: surplus; "
        r"misshapen 1: cls_head\.bias \(expected \(4,\), got \(20,\)\)"
    )
    with pytest.raises(WSSSError, match=expected):
        load_official("getam", module, state, "official.pth")
    state = official_state("vitb")
    del state["pretrained.act_postprocess1.4.bias"]
    with pytest.raises(WSSSError, match=r"missing 1: pretrained\.act_postprocess1\.4\.bias"):
        load_official("getam", module, state, "official.pth")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "count"),
    [
        ("vit_base_patch16_384", 113_120_000),
        ("deit_base_distilled_patch16_384", 113_890_000),
        ("vit_base_r50_s16_384", 124_620_000),
    ],
)
def test_number_of_parameters_is_the_official_one(backbone: str, count: int) -> None:
    """getam.md section 1 counts the unused ImageNet heads and level 4's unit too."""
    with torch.device("meta"):
        encoder, settings = _meta_backbone(backbone), GETAMSettings(max_steps=1)
        module = GETAM(backbone=encoder, num_classes=20, settings=settings)
    own = sum(p.numel() for p in module.parameters())
    heads = (768 + 1) * 1000 * (2 if "distilled" in backbone else 1)
    unit = 2 * 256 * 256 * 9 + 4 * 256
    assert own + heads + unit == pytest.approx(count, abs=5000)


def _meta_backbone(name: str) -> Backbone:
    with torch.device("cpu"):
        return Backbone(name=name, weights="random")


def test_converted_checkpoint_is_read_back(tmp_path: Path) -> None:
    state = official_state("vitb")
    torch.save(state, tmp_path / "official.pth")
    shape = [
        "data=minivoc",
        "data.class_names=[a,b,c,d]",
        "backbone.name=vit_tiny_patch16_224",
        "+backbone.overrides.embed_dim=48",
        "backbone.overrides.patch_size=16",
        "backbone.overrides.depth=4",
        "backbone.overrides.img_size=64",
        "method.decoder_channels=16",
        "method.official_compat=true",
    ]
    out = tmp_path / "ours.ckpt"
    assert main(["convert", "getam", str(tmp_path / "official.pth"), str(out), *shape]) == 0
    run = load_run(out, [])
    assert isinstance(run.module, GETAM)
    assert run.module.backbone.position_mode == "bilinear"
    converted, _ = convert_official("getam", state)
    assert torch.equal(run.module.classifier.weight, converted["classifier.weight"])
