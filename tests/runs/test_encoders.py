"""An encoder by name: what a run would be made of and what it would record."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from wsss.core.errors import WSSSError
from wsss.core.pretraining import pretraining_of
from wsss.models.backbone import Backbone
from wsss.models.named import encoder_named
from wsss.runs.compose import compose_run
from wsss.runs.config import config_hash
from wsss.runs.folder import build, build_module
from wsss.runs.line import composed_line, sweep_jobs
from wsss.runs.targets import with_current_targets

HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
IN1K, IN21K = "ImageNet-1k classification", "ImageNet-21k classification"


def composed(*lines: str) -> dict[str, Any]:
    return compose_run(["data=minivoc", *lines])


def recorded(node: dict[str, Any]) -> str:
    return pretraining_of(node["name"], node["weights"], None, node.get("declared_pretraining"))


NAMES = {
    "vit_small_patch16_224.augreg_in1k": (IN1K, HALF),
    "vit_base_patch16_224.augreg_in21k": (IN21K, HALF),
    "vit_small_patch16_384.augreg_in21k_ft_in1k": (f"{IN21K}, then {IN1K}", HALF),
    "vit_small_patch16_224.dino": ("DINO, self-supervised on ImageNet-1k", {}),
    "vit_base_patch16_224.mae": ("MAE, self-supervised on ImageNet-1k", {}),
    "deit_tiny_distilled_patch16_224.fb_in1k": (f"{IN1K}, distilled from a RegNetY-16GF", {}),
    "vit_small_patch14_dinov2.lvd142m": ("DINOv2, self-supervised on LVD-142M", {}),
    "vit_base_patch16_clip_quickgelu_224.openai": (
        "CLIP on OpenAI's 400 million image-text pairs",
        {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_all_else_follows_from_a_name(name: str) -> None:
    pretraining, colours = NAMES[name]
    alone = {"_target_": "wsss.Backbone", "name": name, "weights": "timm", **colours}
    # the preset has a file and sizes of its own
    renamed = composed("backbone=vit_pico", f"backbone.name={name}")["backbone"]
    assert renamed == {**alone, "overrides": {}}
    assert recorded(renamed) == pretraining
    assert encoder_named(name) == alone


def test_a_name_goes_where_a_preset_goes() -> None:
    name = "vit_small_patch16_224.augreg_in1k"
    chosen, renamed = composed(f"backbone={name}"), composed(f"backbone.name={name}")
    assert chosen["backbone"] == encoder_named(name)
    assert len({config_hash(one) for one in (chosen, renamed, composed())}) == 3


def test_the_users_word_stays() -> None:
    lines = ["backbone.name=vit_small_patch16_224.augreg_in1k", "backbone.overrides.depth=5",
             "backbone.weights=random", "+backbone.mean=[0.1,0.2,0.3]"]  # fmt: skip
    node = composed(*lines)["backbone"]
    assert node["weights"] == "random"
    assert node["overrides"] == {"depth": 5}  # as the preset has it, and yet of the user
    assert node["mean"] == [0.1, 0.2, 0.3]
    assert recorded(node) == "none (random weights)"


def test_a_preset_under_its_own_name_stays() -> None:
    node = composed("backbone.name=vit_tiny_patch16_224")["backbone"]
    assert node["weights"] == "package:weights/vit_pico.safetensors"
    assert node["overrides"] == {"patch_size": 8, "depth": 5, "img_size": 96}
    assert composed_line(["data=minivoc", "backbone.overrides.depth=4"]).further == []


def test_convolutional_weights_follow_too() -> None:
    lines = ["method=segmenter", "backbone=resnet101", "+data.train_masks=ground_truth"]
    node = composed(*lines, "backbone.name=mobilenet_v3_small")["backbone"]
    assert node["weights"] == "MobileNet_V3_Small_Weights.IMAGENET1K_V1"
    assert recorded(node) == IN1K
    masks = composed("+experiments=minivoc/second_stage",
                     "second_stage.backbone.name=vit_small_patch16_224.dino")  # fmt: skip
    assert masks["second_stage"]["backbone"]["weights"] == "timm"
    assert not masks["second_stage"]["backbone"]["overrides"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_small_patch16_224", r"no pretrained tag.*pin one of: vit_small_patch16_224\.augreg"),
        ("vit_small_patch16_224.augreg", r"is not a pretrained tag.*vit_small_patch16_224\.dino"),
        (
            "vit_smal_patch16_224.dino",
            "is not a timm model; near: vit_small_patch16_224.augreg_in1k",
        ),
        ("resnet50", r"no plain ViT; what works is a ViT.*backbone=resnet101"),
        ("swin_tiny_patch4_window7_224.ms_in1k", "no plain ViT; what works is a ViT"),
        ("convnext_tiny.fb_in1k", "no plain ViT"),
        ("vit_base_mci_224.apple_mclip", "convolutional stem"),
    ],
)
def test_names_that_do_not_work_say_what_does(name: str, expected: str) -> None:
    with pytest.raises(WSSSError, match=f"backbone.*{expected}") as caught:
        composed(f"backbone={name}")
    assert "\n" not in str(caught.value)


def test_a_name_on_a_preset_is_checked_too() -> None:
    with pytest.raises(WSSSError, match=r"backbone.name=vit_small_patch16_224 has no pretrained"):
        composed("backbone.name=vit_small_patch16_224")


def test_an_argument_that_a_name_does_not_set_is_added() -> None:
    line = ["method=toco", "data=minivoc", "backbone=vit_small_patch16_224.augreg_in1k"]
    with pytest.raises(WSSSError, match=r"add it as \+backbone.overrides.img_size=VALUE"):
        compose_run([*line, "backbone.overrides.img_size=96"])
    composed = compose_run([*line, "+backbone.overrides.img_size=96"])
    assert composed["backbone"]["overrides"]["img_size"] == 96


def test_a_mistyped_preset_names_the_nearest() -> None:
    with pytest.raises(WSSSError, match=r"backbone=deit_smal: no such choice; did you mean deit_s"):
        composed("backbone=deit_smal")


def test_names_are_swept_over() -> None:
    jobs = sweep_jobs(["data=minivoc", "backbone=vit_small_patch16_224.dino,deit_small"])
    assert [compose_run(job)["backbone"]["name"] for job in jobs.samples] == [
        "vit_small_patch16_224.dino", "deit_small_patch16_224.fb_in1k"
    ]  # fmt: skip


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize("path", ["backbone", "second_stage.backbone"])
def test_the_pretraining_is_not_set(plus: str, path: str) -> None:
    with pytest.raises(WSSSError, match=rf"{path}.pretraining follows from the weights.*declared"):
        composed("+experiments=minivoc/second_stage", f"{plus}{path}.pretraining=ImageNet")


def test_a_file_is_declared_or_unknown(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 12, "depth": 1, "num_heads": 3, "img_size": 32}
    source = Backbone(name="vit_tiny_patch16_224", weights="random", overrides=sizes)
    save_file(source.vit.state_dict(), tmp_path / "own.safetensors")
    lines = [f"backbone.weights={tmp_path}/own.safetensors", "+backbone.overrides.num_heads=3",
             "+backbone.overrides.embed_dim=12", "backbone.overrides.depth=1",
             "backbone.overrides.patch_size=16"]  # fmt: skip
    unknown = composed(*lines)
    said = composed(*lines, "+backbone.declared_pretraining='Places, 1.8 M images'")
    found = [build(config["backbone"]).weights_info for config in (unknown, said)]
    assert [info.pretraining for info in found] == [
        "unknown", "declared by the user: Places, 1.8 M images"
    ]  # fmt: skip
    assert found[0].state_sha256 == found[1].state_sha256 == source.weights_info.state_sha256
    assert config_hash(unknown) != config_hash(said)


# ---- configurations of an earlier version --------------------------------------------------------


def test_sentences_of_presets_change_no_hash() -> None:
    config = composed()
    old = {**config["backbone"], "pretraining": "Of my own"}
    new = with_current_targets(old)
    assert new == {**config["backbone"], "declared_pretraining": "Of my own"}
    assert config_hash({**config, "backbone": new}) == config_hash({**config, "backbone": old})
    for weights in ("timm", "random"):  # which follow from the name
        assert "declared_pretraining" not in with_current_targets({**old, "weights": weights})


# ---- colours -------------------------------------------------------------------------------------


def test_images_reach_the_encoder_in_its_colours() -> None:
    sizes = {"embed_dim": 12, "depth": 1, "num_heads": 3, "img_size": 32}

    def made(**colours: Any) -> Backbone:
        torch.manual_seed(0)
        return Backbone(name="vit_tiny_patch16_224", weights="random", overrides=sizes, **colours)

    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(timm.data.constants.__dict__[f"IMAGENET_DEFAULT_{k}"]).view(3, 1, 1)
                 for k in ("MEAN", "STD"))  # fmt: skip
    plain, own = made(), made(**HALF)
    found = own((pixels - mean) / std).patch_tokens
    torch.testing.assert_close(found, plain((pixels - 0.5) / 0.5).patch_tokens)
    assert not torch.allclose(found, plain((pixels - mean) / std).patch_tokens, atol=1e-3)
    assert own.state_dict().keys() == plain.state_dict().keys()
    own.take_as_given()
    assert torch.equal(own(pixels).patch_tokens, plain(pixels).patch_tokens)


def test_methods_with_a_setting_of_colours_go_by_it() -> None:
    lines = ["method=tkp_pcl", "backbone=vit_small_patch16_224.augreg_in1k",
             "backbone.weights=random", "+backbone.overrides.depth=1"]  # fmt: skip
    assert build_module(composed(*lines), 3).backbone.scale is None
    lines[0] = "method=toco"
    assert build_module(composed(*lines, "method.aux_layer=-1"), 3).backbone.scale is not None


# ---- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with one repository in it, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--someone--small" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    refs = folder.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    torch.manual_seed(0)
    sizes = {"embed_dim": 12, "depth": 1, "num_heads": 3, "img_size": 32}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=7, **sizes)
    save_file(vit.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 7, "model_args": sizes,
              "pretrained_cfg": {"tag": "augreg_in21k", **HALF}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_repository_of_the_hub(hub: Path) -> None:
    node = composed("backbone=hf_hub:someone/small")["backbone"]
    assert node["weights"] == "hf_hub:someone/small"
    assert node["overrides"] == {"embed_dim": 12, "depth": 1, "num_heads": 3, "img_size": 32}
    assert {k: node[k] for k in HALF} == HALF
    info = build(node).weights_info
    assert (info.source, info.pretraining) == ("hf_hub:someone/small", "unknown")
    assert len(info.file_sha256 or "") == 64


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("architecture", "resnet50", "no plain ViT"),
        ("architecture", None, "describes no model of timm"),
        ("architecture", "${oc.env:HOME}", "describes no model of timm"),
        (
            "model_args",
            {"checkpoint_path": "x.pth"},
            r"checkpoint_path: no part of an architecture",
        ),
        ("model_args", {"depth": 10**9}, r"overrides.depth=1000000000: expected"),
        ("model_args", {"act_layer": "${oc.env:HOME}"}, "describes no model of timm"),
        ("model_args", "depth", "describes no model of timm"),
        ("mean", [0.5], r".mean=\[0.5\]: expected a list of 3"),
        ("mean", "grey", "its colours are"),
    ],
)
def test_what_a_repository_says_is_checked(
    hub: Path, key: str, value: object, expected: str
) -> None:
    content = json.loads((hub / "config.json").read_text())
    place = content["pretrained_cfg"] if key == "mean" else content
    place[key] = value
    (hub / "config.json").write_text(json.dumps(content))
    with pytest.raises(WSSSError, match=f"backbone.*{expected}") as caught:
        composed("backbone=hf_hub:someone/small")
    assert "\n" not in str(caught.value)


def test_without_network_one_line_says_so(hub: Path) -> None:
    for name in ("nobody/none", "someone/small@v2"):
        with pytest.raises(
            WSSSError, match=r"config.json is not cached and cannot be dow"
        ) as caught:
            composed(f"backbone=hf_hub:{name}")
        assert "\n" not in str(caught.value)
    (hub / "model.safetensors").unlink()
    with pytest.raises(WSSSError, match=r"model.safetensors is not cached and cannot"):
        build(composed("backbone=hf_hub:someone/small")["backbone"])
    with pytest.raises(WSSSError, match="expected hf_hub:ORG/NAME"):
        composed("backbone=hf_hub:a/b/c")
