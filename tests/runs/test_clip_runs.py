"""A run of any method on CLIP's weights says so wherever it is compared."""

import json
from pathlib import Path

import pytest
import torch
from small_runs import PLAIN, SMALL

from wsss.cli import main
from wsss.models.backbone import Backbone
from wsss.runs.compose import compose_run
from wsss.runs.folder import build_data, build_module, load_run
from wsss.runs.prepare import prepare
from wsss.runs.scoring import supervision_of_run

NAME = "vit_base_patch16_clip_quickgelu_224"
SIZES = {"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 64}
#: of both towers
TOWER = ["backbone=clip_base", f"backbone.name={NAME}", "+backbone.overrides.embed_dim=48",
         "+backbone.overrides.num_heads=3", "+backbone.overrides.img_size=64"]  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a small CLIP under OpenAI's names."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_classes": 32}
    small = Backbone(name=NAME, weights="random", overrides=sizes, frozen=True)
    leaves = {"norm1": "ln_1", "norm2": "ln_2", "qkv.": "in_proj_", "proj.": "out_proj.",
              "fc1": "c_fc", "fc2": "c_proj"}  # fmt: skip
    state = {}
    for key, value in small.vit.state_dict().items():
        if key.startswith("blocks."):
            key = f"transformer.resblocks.{key.removeprefix('blocks.')}"
            for ours, theirs in leaves.items():
                key = key.replace(f".{ours}", f".{theirs}")
        key = {"cls_token": "class_embedding", "pos_embed": "positional_embedding",
               "patch_embed.proj.weight": "conv1.weight"}.get(key, key)  # fmt: skip
        key = key.replace("norm_pre", "ln_pre")
        key = f"ln_post.{key.removeprefix('norm.')}" if key.startswith("norm.") else key
        state[f"visual.{key}"] = value[0] if key.endswith("positional_embedding") else value
    state["visual.class_embedding"] = state["visual.class_embedding"].flatten()
    assert small.projection is not None
    state["visual.proj"] = small.projection
    path = tmp_path_factory.mktemp("weights") / "weights.pt"  # its name says nothing
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def arguments(weights: Path) -> list[str]:
    rest = [a for a in SMALL if not a.startswith(("backbone.", "+backbone."))]
    return [*rest, *PLAIN, *TOWER, f"backbone.weights={weights}",
            "+backbone.overrides.depth=4", "+backbone.overrides.num_classes=32"]  # fmt: skip


def test_a_run_on_a_frozen_tower(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = ["budget.max_steps=2", "budget.warmup_steps=1", "budget.eval_every=2", "method=toco"]
    small = ["method.seg_after=0", "method.decoder_channels=8"]
    assert main(["train", *arguments, *steps, *small]) == 0
    (folder,) = {path.parent for path in Path("runs").rglob("results.json")}
    protocol = json.loads((folder / "results.json").read_text())["splits"]["val"]["protocol"]
    assert protocol["supervision"] == "image labels + CLIP"
    assert protocol["backbone"]["pretraining"] == "unknown"
    run = load_run(folder)
    start = build_module(run.config, 8).backbone
    for name, value in start.state_dict().items():
        assert torch.equal(run.module.backbone.state_dict()[name], value), name
    assert run.module.backbone.projection is not None
    assert not run.module.backbone.vit.training
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    sizes = {tuple(state["exp_avg"].shape) for state in
             checkpoint["optimizer_states"][0]["state"].values()}  # fmt: skip
    assert (48, 48) not in sizes, "moments of the frozen encoder"
    assert (8, 48, 1, 1) in sizes


def test_files_are_known_by_the_names_in_them(arguments: list[str], weights: Path) -> None:
    config = compose_run([*arguments, "method=segmenter_vit"])
    sizes = {k: v for k, v in config["backbone"]["overrides"].items() if k != "num_classes"}
    tuned = {**config["backbone"], "overrides": sizes, "frozen": False}
    changed = {**config, "backbone": tuned}
    data = build_data(compose_run(["data=minivoc"]))
    for settings in (config, changed):
        module = build_module(settings, 8)
        assert supervision_of_run(module, data) == "image labels + CLIP"
    masks = build_data(compose_run(["data=minivoc", "method=segmenter",
                                    "+data.train_masks=ground_truth"]))  # fmt: skip
    assert supervision_of_run(module, masks) == "pixel masks + CLIP"
    random = {**config["backbone"], "weights": "random"}
    assert supervision_of_run(build_module({**config, "backbone": random}, 8), data) == (
        "image labels"
    )


def test_methods_look_at_the_classes_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = compose_run([*SMALL, *PLAIN, "method=toco"])
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        "wsss.methods.toco.ToCo.check_classes", lambda _, names: seen.append(tuple(names))
    )
    prepare(config)
    assert seen == [tuple(config["data"]["class_names"])]
