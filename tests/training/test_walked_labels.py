"""``wsss pseudo refine=random_walk``: labels, network, walk, and what becomes of a stopped one."""

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from small_runs import METHODS, PLAIN, SMALL

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.core.files import file_sha256
from wsss.core.schema import plain
from wsss.core.supervision import PIXEL_MASKS
from wsss.data.images import read_mask
from wsss.data.train_masks import CARD_FILE
from wsss.evaluation.inference import localise
from wsss.maps.pixels import normalise
from wsss.maps.pseudo_labels import alpha_background, confident_labels
from wsss.maps.refine.dense_crf import CRF_PRESETS, dense_crf
from wsss.maps.refine.random_walk import WalkSettings, walked_maps
from wsss.methods.affinity_net import AffinityNet, AffinityNetSettings
from wsss.models.backbone import Backbone, WeightsInfo
from wsss.models.weights import save_atomically
from wsss.runs.compose import compose_run
from wsss.runs.config import check_refinement, check_walk, override_config
from wsss.runs.folder import Run, build_module, load_run
from wsss.runs.line import compose_walk
from wsss.runs.random_walk import RandomWalk, supervision_with
from wsss.runs.stored import check_stored
from wsss.training.random_walk import trained_walk

WALK = [
    "random_walk=minivoc",
    "random_walk.budget.max_steps=4",
    "random_walk.budget.global_batch_size=4",
    "random_walk.budget.crop_size=48",
    "random_walk.method.widths=[4,4,8]",
]
CONFIG = ["method=toco", *SMALL, *PLAIN, "data.limit=4", "budget.max_steps=2"]
CONFIG += ["budget.warmup_steps=1"]
COMMAND = ["refine=random_walk", *WALK, "device=cpu", "crf_jobs=1"]


def wsss(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as leave:
        return int(leave.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as training leaves it, with weights that were drawn and not trained."""
    config = compose_run(CONFIG)
    torch.manual_seed(0)
    module = build_module(config, 8)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 2}
    module.on_save_checkpoint(checkpoint)
    made = tmp_path_factory.mktemp("runs") / "toco"
    (made / "checkpoints").mkdir(parents=True)
    save_atomically(checkpoint, made / "checkpoints" / "last.ckpt")
    return made


@pytest.fixture(scope="module")
def walked(folder: Path) -> Path:
    """The same run, whose maps have walked."""
    assert wsss("pseudo", f"run={folder}", *COMMAND) == 0
    return folder


@pytest.fixture(scope="module")
def loaded(walked: Path) -> tuple[Run, RandomWalk]:
    """That run and its walk, which is finished: it is read and not trained again."""
    run = load_run(walked)
    return run, trained_walk(run, compose_walk(WALK), alone=True)


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def card_of(folder: Path, name: str = CARD_FILE) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def items(run: Run, count: int = 2) -> Iterator[dict[str, Any]]:
    dataset = run.data.unmasked_dataset("train")
    return (dataset[index] for index in range(count))


@torch.no_grad()
def test_confident_labels_are_those_of_two_backgrounds(
    walked: Path, loaded: tuple[Run, RandomWalk]
) -> None:
    run, labels = loaded[0], only(walked, "random_walk/labels-*")
    found = set()
    for item in items(run):
        shown = item["labels"][None]
        cams = localise(run.module, item["image"][None], shown, (160, 160), run.protocol)
        ids = item["labels"].nonzero().flatten()
        table, won = torch.cat([torch.zeros(1, dtype=torch.long), ids + 1]), []
        for alpha in (1.0, 12.0):
            scores = torch.cat([alpha_background(cams, alpha), cams[:, ids]], 1)
            smooth = dense_crf(item["rgb"], scores[0].numpy(), CRF_PRESETS["psa"])
            won.append(table[smooth.argmax(0)])
        written = read_mask(labels / f"{item['name']}.png", num_classes=8)
        assert np.array_equal(written, confident_labels(*won).numpy())
        found |= {*np.unique(written)}
    assert {0, 255} < found
    assert card_of(labels)["supervision"] == "image labels"


@torch.no_grad()
def test_pseudo_labels_are_the_best_after_the_walk(
    walked: Path, loaded: tuple[Run, RandomWalk]
) -> None:
    (run, walk), labels = loaded, only(walked, "pseudo_labels/train-*")
    different = 0
    for item in items(run):
        image, shown = item["image"][None], item["labels"][None]
        cams = localise(run.module, image, shown, (160, 160), run.protocol)
        features = walk.network.features(image)
        assert features.shape == (1, 16, 20, 20)
        maps = walked_maps(features, cams, stride=8, radius=5, settings=walk.settings)
        maps[:, 1:][shown == 0] = -1
        written = read_mask(labels / f"{item['name']}.png", num_classes=8)
        assert np.array_equal(written, maps[0].argmax(0).numpy())
        still = torch.cat([torch.full_like(cams[:, :1], 0.39), cams], 1)[0].argmax(0)
        different += int((still.numpy() != written).sum())
    assert different > 100


def test_card_names_the_refinement_and_its_cost(walked: Path) -> None:
    card = card_of(only(walked, "pseudo_labels/train-*"))
    network = only(walked, "random_walk/network-*")
    checkpoint = file_sha256(network / "checkpoints" / "last.ckpt")
    assert card["made_from"]["refine"] == {
        "name": "random_walk", "beta": 8.0, "steps": 64, "background": 0.39,
        "affinity_sha256": checkpoint,
    }  # fmt: skip
    labels = card_of(only(walked, "random_walk/labels-*"))["made_from"]
    assert {key: labels[key] for key in ("alphas", "crf", "split", "resize_long")} == {
        "alphas": [1.0, 12.0], "crf": "psa", "split": "train", "resize_long": None,
    }  # fmt: skip
    trained = card["refinement"]["affinity_network"]
    assert trained["made_from"]["labels"] == labels
    assert trained["made_from"]["budget"] == {
        "max_steps": 4, "global_batch_size": 4, "crop_size": 48, "scale_range": [1.0, 1.0],
    }  # fmt: skip
    assert trained == card_of(network, "affinity_network.json")
    assert trained["steps"] == 4
    assert trained["cost"]["train_wall_hours"] > 0
    count = sum(v.numel() for v in load_run(walked).module.backbone.parameters())
    assert trained["parameters"] == count + 48 * 16 + 16 + 16 * 16
    assert not list(walked.rglob("results.json"))  # nothing to compare or report


def test_repeating_does_nothing_other_settings_walk_elsewhere(
    walked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["pseudo", f"run={walked}", *COMMAND]
    assert wsss(*again) == 0
    assert capsys.readouterr().out.count("is finished") == 3
    assert wsss(*again, "random_walk.beta=2", "split=val") == 0
    assert capsys.readouterr().out.count("is finished") == 2  # labels and network are the same
    other = only(walked, "pseudo_labels/val-*")
    assert card_of(other)["made_from"]["refine"]["beta"] == 2.0
    assert wsss(*again, "split=val", f"out={other}") == 2
    assert "another refine" in capsys.readouterr().err
    assert wsss("pseudo", f"run={walked}", "split=val", f"out={other}") == 2
    assert "another refine" in capsys.readouterr().err
    shutil.rmtree(other)


@pytest.mark.slow
def test_stopped_network_goes_on_to_the_same_weights(
    walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its third step fails; the command, repeated, begins with that step."""
    broken = tmp_path / "toco"
    shutil.copytree(walked, broken, ignore=shutil.ignore_patterns("network-*", "pseudo_labels"))
    command = ["pseudo", f"run={broken}", *COMMAND]
    whole, steps = AffinityNet.losses, []

    def losses(self: AffinityNet, batch: dict[str, Any], step: int) -> Any:
        steps.append(step)
        if len(steps) == 3:
            raise WSSSError("this image is broken")
        return whole(self, batch, step)

    monkeypatch.setattr(AffinityNet, "losses", losses)
    assert wsss(*command) == 2
    assert not list(broken.glob("pseudo_labels/*"))
    assert wsss(*command) == 0
    assert steps == [0, 1, 2, 2, 3]
    states = [
        torch.load(only(f, "random_walk/network-*/checkpoints/last.ckpt"))["state_dict"]
        for f in (walked, broken)
    ]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert card_of(only(broken, "pseudo_labels/*"))["refinement"]["affinity_network"]["steps"] == 4


def test_altered_network_is_refused(
    walked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "toco"
    shutil.copytree(walked, copied)
    checkpoint = only(copied, "random_walk/network-*/checkpoints/last.ckpt")
    checkpoint.write_bytes(checkpoint.read_bytes() + b"0")
    assert wsss("pseudo", f"run={copied}", *COMMAND) == 2
    assert "not what was trained; remove" in capsys.readouterr().err


def test_altered_cost_of_a_network_is_refused(
    walked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "toco"
    shutil.copytree(walked, copied)
    path = only(copied, "random_walk/network-*/affinity_network.json")
    card = json.loads(path.read_text())
    for group, key, value in (
        (card["cost"], "train_wall_hours", "<b>none</b>"),
        (card["cost"], "sessions", -1),
        (card, "steps", "4"),
    ):
        before, group[key] = group[key], value
        path.write_text(json.dumps(card))
        group[key] = before
        assert wsss("pseudo", f"run={copied}", *COMMAND) == 2
        said = capsys.readouterr().err
        assert f"affinity_network.json: is damaged: {'cost.' * (key != 'steps')}{key}=" in said
        assert f"remove {path.parent}" in said


def test_network_is_not_evaluated(
    walked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = only(walked, "random_walk/network-*")
    arguments = ["device=cpu", "data.limit=1", "eval.crf=null", f"out={tmp_path}"]
    assert wsss("eval", f"run={network}", *arguments) == 2
    assert "has no maps of its own" in capsys.readouterr().err


def test_weights_that_saw_masks_are_on_the_card(
    walked: Path, loaded: tuple[Run, RandomWalk], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, walk = loaded
    assert card_of(only(walked, "pseudo_labels/train-*"))["supervision"] == "image labels"
    masks = WeightsInfo("resnet101", "file:deeplab.pth", f"COCO ({PIXEL_MASKS})", None, "0")
    monkeypatch.setattr(walk.network.backbone, "weights_info", masks)
    assert supervision_with(run, walk) == PIXEL_MASKS


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["refine=walk"], "refine=walk: expected random_walk"),
        (["refine=random_walk", "source=seg"], "give source=cam"),
        (["random_walk.beta=2"], "random_walk.beta=2: changes nothing without refine=random_walk"),
        (["refine=random_walk", "random_walk=vti"], "did you mean vit?"),
        (["refine=random_walk", "random_walk.bta=2"], "did you mean random_walk.beta?"),
        (["refine=random_walk", "random_walk.beta=-1"], "random_walk.beta=-1"),
    ],
)
def test_bad_arguments_are_named(
    folder: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wsss("pseudo", f"run={folder}", *arguments, "device=cpu") == 2
    assert expected in capsys.readouterr().err


def test_bad_settings_are_named_before_anything_is_written(folder: Path) -> None:
    run, node = load_run(folder), compose_walk(WALK)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for key, value, expected in [
        ("crf", "spa", r"random_walk\.crf='spa': expected one of toco"),
        ("method.lr", 0, r"random_walk\.method\.lr=0: expected"),
        ("method.taps", [-1], r"method\.widths=\[4, 4, 8\]: .* 1 method\.taps"),
        ("method.taps", [-1, -2, 9], r"method\.taps: 9 is none of the encoder's 4 parts"),
        ("budget.crop_size", 50, r"budget\.crop_size=50: expected a multiple of 8"),
        ("budget.crop_size", 32, r"method\.radius=5: larger than the grid"),
        ("method._target_", "wsss.ToCo", r"random_walk\.method"),
    ]:
        wrong = OmegaConf.create(deepcopy(node))
        OmegaConf.update(wrong, key, value)
        with pytest.raises(WSSSError, match=expected):
            trained_walk(run, plain(wrong), alone=True)
    with pytest.raises(WSSSError, match=r"random_walk\.budget is missing"):
        trained_walk(run, {k: v for k, v in node.items() if k != "budget"}, alone=True)
    with pytest.raises(WSSSError, match=r"random_walk\.bta: unknown key; did you mean .*beta"):
        trained_walk(run, node | {"bta": 2}, alone=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_every_choice_composes_with_the_defaults_of_the_code() -> None:
    config = compose_run(["method=toco", "data=minivoc"])
    for name in ("vit", "resnet101", "minivoc"):
        node = compose_walk([f"random_walk={name}"])
        settings = check_walk(config, node)
        assert settings == type(settings)()
    assert compose_walk(["random_walk=resnet101"])["backbone"]["name"] == "resnet101"


def test_second_stage_needs_a_refinement_and_its_settings() -> None:
    both = ["+second_stage.refine=random_walk", "+random_walk@second_stage.random_walk=minivoc"]
    config = compose_run(["+experiments=tkp_pcl/minivoc", *both])
    assert override_config(check_stored(config, "a checkpoint"), []) == config
    second = config["second_stage"]
    assert second["random_walk"]["method"]["max_steps"] == 200
    for change, expected in [
        ({"refine": None}, "need each other"),
        ({"random_walk": None}, "need each other"),
        ({"refine": "par"}, r"second_stage\.refine=par: expected random_walk"),
        ({"source": "seg"}, r"second_stage\.source=seg: .*source=cam"),
        (
            {"random_walk": second["random_walk"] | {"beta": 0}},
            r"second_stage\.random_walk\.beta=0: expected",
        ),
    ]:
        with pytest.raises(WSSSError, match=expected):
            check_refinement({**config, "second_stage": second | change})


@torch.no_grad()
def test_walk_takes_radius_and_stride_from_its_network() -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 3, "img_size": 16, "patch_size": 4}
    backbone = Backbone(name="vit_tiny_patch16_224", weights="random", overrides=sizes)
    chosen = AffinityNetSettings(max_steps=1, taps=(0,), widths=(8,), radius=3)
    network = AffinityNet(backbone=backbone, num_classes=8, settings=chosen).eval()
    walk = RandomWalk(network, WalkSettings(beta=2.0, steps=5, background=0.5), "0" * 64, {})
    image, cams, shown = torch.randn(1, 3, 22, 29), torch.rand(1, 8, 22, 29), torch.zeros(1, 8)
    shown[0, [2, 5]] = 1
    found = []
    for radius in (3, 5):
        features = network.features(image)
        maps = walked_maps(
            features, cams[:, [2, 5]], stride=4, radius=radius, settings=walk.settings
        )
        found.append(torch.tensor([0, 3, 6])[maps[0].argmax(0)].numpy())
    assert np.array_equal(walk.label(image, cams, shown), found[0])
    assert not np.array_equal(*found)


def test_network_learns_on_a_copy_of_a_frozen_encoder(tmp_path: Path) -> None:
    line = ["method=weclip", *SMALL, *METHODS["weclip"], *PLAIN, "data.limit=2"]
    config = compose_run([*line, "eval.crf_backend=torch", "budget.max_steps=2"])
    module = build_module(config, 8)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 2}
    module.on_save_checkpoint(checkpoint)
    save_atomically(checkpoint, tmp_path / "checkpoints" / "last.ckpt")
    run = load_run(tmp_path)
    assert run.module.backbone.frozen
    before = {name: value.clone() for name, value in run.module.state_dict().items()}
    short = [*WALK, "random_walk.budget.max_steps=1", "random_walk.budget.global_batch_size=2"]
    network = trained_walk(run, compose_walk(short), alone=True).network
    for name, value in run.module.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in network.backbone.vit.named_parameters():
        learnt = not torch.equal(value, before[f"backbone.vit.{name}"])
        assert learnt != name.startswith("norm."), name  # which no tap reads
    assert network.backbone.projection is None
    stored = OmegaConf.load(only(tmp_path, "random_walk/network-*/config.yaml"))
    assert stored.backbone.frozen is False


@torch.no_grad()
def test_image_without_a_label_is_background(loaded: tuple[Run, RandomWalk]) -> None:
    image = normalise(np.zeros((20, 30, 3), np.uint8))[None]
    label = loaded[1].label(image, torch.zeros(1, 8, 20, 30), torch.zeros(1, 8))
    assert label.shape == (20, 30)
    assert label.max() == 0
