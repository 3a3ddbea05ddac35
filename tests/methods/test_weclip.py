"""WeCLIP and CLIP-CAM as methods: what they give, refuse, store, and leave alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_runs import METHODS, PLAIN, SMALL
from small_weclip import DIM, WIDTH, batch_of, tiny, tiny_cam, tower

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.evaluation.protocol import Protocol
from wsss.evaluation.tally import Tally
from wsss.methods.official import load_official
from wsss.methods.weclip.gradcam import class_slots
from wsss.methods.weclip.official import official_name
from wsss.methods.weclip.tower import CLIP_MEAN, CLIP_STD
from wsss.models.backbone import Backbone
from wsss.models.text import TextFeatures, write_text_features
from wsss.models.weights import state_sha256
from wsss.runs.folder import load_run

CLASSES = ("apple", "leaf", "sky")
LABELS = torch.tensor([[1.0, 0, 1], [0, 1, 0]])


def text_file(folder: Path, *, classes: Any = CLASSES, width: int = WIDTH, **changes: Any) -> str:
    """Text features of three classes and five backgrounds."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((len(classes) + 5, width)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    content: dict[str, Any] = {
        "foreground": rows[: len(classes)],
        "background": rows[len(classes) :],
        "foreground_names": tuple(classes),
        "foreground_prompts": tuple(f"a {name}" for name in classes),
        "background_prompts": tuple("abcde"),
        "logit_scale": 50.0,
        "model": "a small one",
        "weights_sha256": "0" * 64,
    }
    path = folder / "text.npz"
    write_text_features(TextFeatures(**{**content, **changes}), path)
    return str(path)


# ---- what an evaluator sees ----------------------------------------------------------------------


@torch.no_grad()
def test_logits_and_maps_have_their_shapes() -> None:
    model, images = tiny(), torch.randn(2, 3, 48, 40)
    outputs = model(images)
    assert outputs.class_logits.shape == (2, 3)
    assert outputs.seg_logits is not None
    assert outputs.seg_logits.shape == (2, 4, 6, 5)
    odds = outputs.seg_logits[:, 1:] - outputs.seg_logits[:, :1]
    assert torch.equal(outputs.class_logits, odds.amax((2, 3)))
    for size in ((48, 37), (45, 40)):  # one side that is no whole number of patches
        odd = model(images[..., : size[0], : size[1]]).seg_logits
        assert odd is not None
        assert odd.shape == (2, 4, *size)
    for method in (model, tiny_cam()):
        cams = method.cams(images, LABELS)
        assert cams.shape == (2, 3, 48, 40)
        assert 0 <= cams.min() <= cams.max() <= 1
        assert not cams[LABELS == 0].any()
        assert cams[LABELS == 1].amax((1, 2)).min() > 0.5
        assert not method.cams(images, torch.zeros(2, 3)).any()
        assert method.cams(images[..., :45, :33], LABELS).shape == (2, 3, 45, 33)


@torch.no_grad()
def test_clip_cam_is_weclip_without_rfm() -> None:
    images = torch.randn(2, 3, 48, 48)
    static = tiny(rfm_start=None).cams(images, LABELS)
    assert torch.equal(tiny_cam().cams(images, LABELS), static)
    assert not torch.equal(tiny().cams(images, LABELS), static)  # evaluation always has RFM


@torch.no_grad()
def test_zero_shot_logits_compare_with_backgrounds() -> None:
    model, images = tiny_cam(), torch.randn(2, 3, 32, 32)
    vit, projection = model.backbone.vit, model.backbone.projection
    assert projection is not None
    tokens = model.backbone(images, taps=(-1,)).intermediates[model.backbone.depth - 1]
    unit = F.normalize(vit.norm(tokens).mean(1) @ projection, dim=1)
    for k in range(3):
        rows = torch.cat([model.texts.foreground[k : k + 1], model.texts.background])
        share = (100 * unit @ rows.T).softmax(1)[:, 0]
        found = model(images).class_logits[:, k].sigmoid()
        torch.testing.assert_close(found, share, rtol=1e-3, atol=1e-6)
    assert model(images).seg_logits is None


@torch.no_grad()
def test_one_class_alone_works() -> None:
    labels = torch.tensor([[1.0], [0.0]])
    step = tiny(1).losses(batch_of(labels), 20)
    assert step.total.isfinite()
    assert {*step.seen["pseudo_label"][0].unique().tolist()} == {0, 1}
    assert tiny_cam(1).cams(torch.randn(2, 3, 32, 32), labels)[0].max() > 0.5


@torch.no_grad()
def test_classes_compete_and_the_evaluator_knows() -> None:
    """Each set of labels has its own maps there."""
    model, images = tiny_cam(), torch.randn(1, 3, 64, 64)
    some, every = torch.tensor([[1.0, 0, 0]]), torch.ones(1, 3)
    alone, among = model.cams(images, some), model.cams(images, every)
    assert not torch.equal(alone[:, 0], among[:, 0])
    tally = Tally(protocol=Protocol(), class_names=CLASSES)
    wanted = {"allowed": some, "guessed": every, "labels": some}
    maps = tally.class_maps(model, images, (64, 64), wanted)
    assert torch.equal(maps["allowed"], alone)
    assert torch.equal(maps["guessed"], among)
    assert maps["labels"] is maps["allowed"]


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny, tiny_cam])
def test_clips_own_normalisation_is_a_choice(make: Any) -> None:
    images = torch.randn(1, 3, 32, 32)
    ours, clip = (make(**how).encode(images).tokens[0] for how in ({}, {"normalisation": "clip"}))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    own_mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    own_std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = images * std[:, None, None] + mean[:, None, None]
    again = (pixels - own_mean[:, None, None]) / own_std[:, None, None]
    torch.testing.assert_close(clip, make().encode(again).tokens[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, clip, atol=1e-2)


@torch.no_grad()
def test_colours_are_the_methods_and_not_the_backbones() -> None:
    """CLIP's weights come with CLIP's own, and ``method.normalisation`` decides (Q1)."""
    images, colours = torch.randn(1, 3, 32, 32), {"mean": CLIP_MEAN, "std": CLIP_STD}
    torch.manual_seed(0)
    plain = tiny(backbone=tower()).encode(images).tokens[0]
    torch.manual_seed(0)
    assert torch.equal(tiny(backbone=tower(colours=colours)).encode(images).tokens[0], plain)


# ---- training ------------------------------------------------------------------------------------


def test_only_the_decoder_learns() -> None:
    model = tiny().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = model.optimizer(model.param_groups())
    model.losses(batch_of(LABELS), 20).total.backward()
    optimizer.step()
    assert not model.backbone.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("decoder."))
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_maps_are_float32_under_autocast() -> None:
    model, batch = tiny(), batch_of(LABELS)
    slots = class_slots(LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        encoded = model.encode(batch["image"], layers=3)
        assert encoded.last is not None
        assert encoded.last.target.dtype == torch.float32
        found = model.refined_maps(encoded, slots, None)
        step = model.losses(batch, 20)
    assert found.dtype == step.seen["affinity"].dtype == torch.float32
    assert torch.equal(found, model.refined_maps(encoded, slots, None))


# ---- texts and refusals --------------------------------------------------------------------------


def test_texts_come_from_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = text_file(tmp_path)
    model = tiny(text=path)
    assert model.texts.foreground.shape == (3, WIDTH)
    assert (len(model.texts.background), float(model.texts.scale)) == (5, 50)
    assert [*model.files_sha256] == ["text"]
    model.check_classes(CLASSES)
    assert "was made with other weights (a small one" in capsys.readouterr().err
    digest = model.backbone.weights_info.state_sha256
    tiny(text=text_file(tmp_path, weights_sha256=digest)).check_classes(CLASSES)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"classes": ("apple", "leaf")}, "texts of 2 classes, and the data 3"),
        ({"width": WIDTH + 1}, "are 17 wide, and backbone.projection 16"),
        ({"classes": ("leaf", "apple", "sky")}, "class 1 is 'leaf', and in the data 'apple'"),
    ],
)
def test_texts_that_do_not_fit_are_refused(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    for make in (tiny, tiny_cam):
        with pytest.raises(WSSSError, match=r"^method.text=.*text.npz: ") as caught:
            make(text=text_file(tmp_path, **changes)).check_classes(CLASSES)
        assert expected in str(caught.value)


def test_bad_settings_are_one_line_with_their_key(tmp_path: Path) -> None:
    with pytest.raises(WSSSError, match=r"method.text=gone.npz: no such file; `wsss text"):
        tiny(text="gone.npz")
    with pytest.raises(WSSSError, match=r"method.text=stored: expected a file"):
        tiny(text="stored").check_classes(CLASSES)
    with pytest.raises(WSSSError, match=r"method.rfm_layers=5: the backbone has 4 blocks"):
        tiny(rfm_layers=5)
    for make in (tiny, tiny_cam):
        with pytest.raises(WSSSError, match=r"method.static_layers=5: the backbone has 4 blocks"):
            make(static_layers=5)
    text = text_file(tmp_path)
    plain = {"embed_dim": 24, "depth": 4, "num_heads": 3, "img_size": 32, "patch_size": 8}
    vit = Backbone(name="vit_tiny_patch16_224", weights="random", overrides=plain)
    for backbone in (vit, tower(frozen=False)):
        with pytest.raises(WSSSError, match=r"backbone.name=vit.*method=weclip.*backbone.frozen"):
            tiny(text=text, backbone=backbone)
    model = tiny(backbone=vit)  # random texts go with it
    assert model.texts.foreground.shape == (3, DIM)
    assert not any(parameter.requires_grad for parameter in vit.parameters())
    distilled = "deit_tiny_distilled_patch16_224"
    with pytest.raises(WSSSError, match=r"one class token, and this one has 2"):
        tiny(backbone=Backbone(name=distilled, weights="random", overrides=plain))


# ---- official checkpoints ------------------------------------------------------------------------


def official_state(model: Any) -> dict[str, torch.Tensor]:
    """The model's parameters as the official code stores them, in half precision where it does."""
    state = {}
    for name, value in model.state_dict().items():
        if name in ("texts.foreground", "texts.background"):
            continue
        theirs = official_name(name)
        if theirs.endswith("class_embedding"):
            value = value.flatten()
        elif theirs.endswith("positional_embedding"):
            value = value[0]
        elif theirs.endswith("logit_scale"):
            value = value.log()
        state[theirs] = value.half().float().half() if ".c_fc." in theirs else value
    state["encoder.visual.positional_embedding_new"] = torch.zeros(1, 10, 24)  # Q17
    state["encoder.transformer.resblocks.0.ln_1.weight"] = torch.zeros(4)
    state["par.kernel"] = torch.zeros(8)
    return state


def test_official_checkpoints_become_ours() -> None:
    model = tiny()
    for module in model.modules():
        if hasattr(module, "fc1"):
            module.fc1.weight.data = module.fc1.weight.data.half().float()
            module.fc1.bias.data = module.fc1.bias.data.half().float()
    state = official_state(model)
    torch.manual_seed(9)
    other = tiny()
    for parameter in other.parameters():
        parameter.data.add_(1)
    load_official("weclip", other, state, "official.pth")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-6, atol=0)
    del state["encoder.visual.proj"]
    with pytest.raises(WSSSError, match=r"official.pth: lacks encoder.visual.proj"):
        load_official("weclip", other, state, "official.pth")
    state = official_state(model) | {"decoder.surplus": torch.zeros(1)}
    with pytest.raises(WSSSError, match=r"extra 1: decoder.surplus"):
        load_official("weclip", other, state, "official.pth")


# ---- runs ----------------------------------------------------------------------------------------

BUILT_IN = "[bottle,car,chair,diningtable,person,pottedplant,sofa,tvmonitor]"
TRAINING = ("method.rfm", "method.decoder", "method.warmup")
COMMON = [item for item in METHODS["weclip"] if not item.startswith(TRAINING)]
QUICK = [
    *[item for item in PLAIN if "resize" not in item],
    "eval.resize_long=80",
    "data.limit=4",
    "budget.eval_every=100",
]


def texts_of_minivoc(folder: Path) -> str:
    return text_file(folder, classes=tuple(BUILT_IN.strip("[]").split(",")), width=32)


@pytest.mark.slow
def test_a_run_stands_without_its_text_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = texts_of_minivoc(tmp_path)
    command = ["method=weclip", *SMALL, *METHODS["weclip"], *QUICK, f"method.text={path}"]
    assert main(["train", *command, "budget.max_steps=6"]) == 0
    (folder,) = (tmp_path / "runs" / "default").iterdir()
    results = json.loads((folder / "results.json").read_text())
    card = results["splits"]["val"]["protocol"]
    assert card["supervision"] == "image labels"  # random weights saw nothing
    assert (card["resize_long"], card["merge_at"], card["scale_by"]) == (80, "logits", "factor")
    assert [*card["files_sha256"]] == ["text"]
    Path(path).unlink()
    run = load_run(folder)
    assert run.step == 6
    assert run.module.texts.background.shape == (5, 32)  # type: ignore[union-attr]
    assert main(["eval", f"run={folder}", "splits=[val]", "out=again"]) == 0
    again = json.loads(Path("again/results.json").read_text())
    assert again["splits"]["val"]["seg_miou"] == results["splits"]["val"]["seg_miou"]
    assert again["splits"]["val"]["seed_miou"] == results["splits"]["val"]["seed_miou"]


@pytest.mark.slow
def test_clip_cam_only_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["method=clip_cam", *SMALL, *COMMON, *QUICK]
    command.append(f"method.text={texts_of_minivoc(tmp_path)}")
    assert main(["train", *command]) == 0
    (folder,) = (tmp_path / "runs" / "default").iterdir()
    results = json.loads((folder / "results.json").read_text())
    numbers = results["splits"]["val"]
    assert numbers["protocol"]["iterations"] == 0
    assert (numbers["seg_miou"], results["cost"]) == (None, None)
    assert 0 < numbers["seed_miou"] < 1
    fresh = load_run(folder)
    digest = fresh.module.backbone.weights_info.state_sha256
    assert state_sha256(fresh.module.backbone.vit.state_dict()) == digest
    assert main(["train", *command]) == 0  # finished
    assert main(["pseudo", f"run={folder}", "out=labels"]) == 0
    masks = sorted(Path("labels").glob("*.png"))
    assert len(masks) == 4
    assert Image.open(masks[0]).mode == "P"


def test_a_missing_text_file_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for method in ("weclip", "clip_cam"):
        command = ["train", f"method={method}", "data=minivoc", "backbone.weights=random"]
        command.append("+backbone.overrides={embed_dim: 24, num_heads: 3, num_classes: 8}")
        assert main([*command, "method.text=gone.npz"]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("wsss train: method.text=gone.npz: no such file")
        assert len(error.splitlines()) == 1
    assert not Path("runs").exists()
