"""``wsss text``: words of the page, one's own classes, features of a small random CLIP."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsss.cli import main
from wsss.commands.text import read_wording
from wsss.core.errors import WSSSError
from wsss.models.backbone import Backbone
from wsss.models.text import read_text_features
from wsss.models.text_encoder import encode_texts, load_clip
from wsss.runs.compose import compose_run

#: a CLIP of the same parts as ViT-B-16-quickgelu
TINY: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 48, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TOWER = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64, "num_classes": 32}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a CLIP with random weights in a file."""
    open_clip = pytest.importorskip("open_clip", reason="the extra [clip] is not installed")
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-clip").state_dict(), folder / "clip.pt")
    return ["model=tiny-clip", f"pretrained={folder / 'clip.pt'}"]


def test_words_are_those_of_the_page() -> None:
    for name, classes, backgrounds in (("voc", 20, 25), ("coco", 80, 23)):
        wording = read_wording(name)
        names = compose_run([f"data={name}", "data.root=unset"])["data"]["class_names"]
        assert len(names) == classes
        assert wording.words.keys() <= set(names)
        assert len(wording.background) == backgrounds
        assert wording.words["person"] == "person with clothes,people,human"
        assert wording.words["bird"] == "bird avian"
        assert wording.templates == ["a clean origami {}."]
        assert (wording.model, wording.pretrained) == ("ViT-B-16-quickgelu", "openai")
    voc, coco = read_wording("voc"), read_wording("coco")
    assert set(voc.background) - set(coco.background) == {"keyboard", "sign"}
    assert len(voc.words) == 4
    assert coco.words["snowboard"] == "sknowboard"
    assert coco.words["hair drier"] == "hairdrier,blowdrier"
    assert len(coco.words) == 18


def test_text_of_voc_fits_the_tower_of_the_same_file(
    clip: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "text.npz"
    assert main(["text", "data=voc", f"out={out}", *clip]) == 0
    said = capsys.readouterr().out
    assert "class: a clean origami bird avian." in said
    assert "20 classes and 25 backgrounds" in said
    found = read_text_features(out)
    found.check_classes(compose_run(["data=voc", "data.root=unset"])["data"]["class_names"], "")
    assert found.foreground_prompts[2] == "a clean origami bird avian."
    assert found.background_prompts[0] == "a clean origami ground."
    assert found.model == "tiny-clip clip.pt"

    name = "vit_base_patch16_clip_quickgelu_224"
    weights = clip[1].removeprefix("pretrained=")
    backbone = Backbone(name=name, weights=weights, overrides=TOWER, frozen=True)
    found.check_tower(32, backbone.weights_info.state_sha256, str(out))
    assert capsys.readouterr().err == ""

    network, tokenizer = load_clip("tiny-clip", weights)
    assert found.logit_scale == pytest.approx(float(network.logit_scale.detach().exp()))
    with torch.no_grad():
        row = F.normalize(network.encode_text(tokenizer(["a clean origami boat."])), dim=1)
        images = torch.randn(1, 3, 64, 64)
        theirs = network.encode_image(images)
    np.testing.assert_allclose(found.foreground[3], row[0].numpy(), atol=1e-6)
    # images of the backbone lie in the space of these texts
    assert backbone.projection is not None
    ours = backbone(images).cls_tokens[:, 0] @ backbone.projection
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_several_templates_are_averaged_as_units(clip: list[str]) -> None:
    network, tokenizer = load_clip("tiny-clip", clip[1].removeprefix("pretrained="))
    templates = ["a {}.", "a photo of a {} {}."]
    found = encode_texts(network, tokenizer, ["cat", "dog"], templates)
    with torch.no_grad():
        rows = network.encode_text(tokenizer(["a dog.", "a photo of a dog dog."]))
    mean = F.normalize(rows, dim=1).mean(0)
    torch.testing.assert_close(found[1], mean / mean.norm(), rtol=0, atol=1e-6)
    swapped = encode_texts(network, tokenizer, ["dog"], templates[::-1])
    torch.testing.assert_close(swapped[0], found[1], rtol=0, atol=1e-6)
    single = encode_texts(network, tokenizer, ["dog"], templates[:1])
    assert float((single[0] - found[1]).abs().max()) > 1e-3


def test_own_classes_have_names_of_the_table(
    clip: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.csv").write_text("image,labels\na.png,owl;elk\nb.png,\n")
    out, words = tmp_path / "text.safetensors", tmp_path / "words.yaml"
    own = ["text", "data=table", f"data.root={tmp_path}", f"out={out}", *clip]
    assert main([*own, "background=[sky,tree trunk]", "templates=['a {}.']"]) == 0
    found = read_text_features(out)
    assert found.foreground_names == ("elk", "owl")
    assert found.foreground_prompts == ("a elk.", "a owl.")
    assert found.background_prompts == ("a sky.", "a tree trunk.")
    words.write_text("words: {owl: 'owl, a bird'}\nbackground: [sky]\n")
    assert main([*own, f"text={words}"]) == 0
    again = read_text_features(out)
    assert again.foreground_prompts[1] == "a clean origami owl, a bird."
    words.write_text("words: {own: 'owl, a bird'}\nbackground: [sky]\n")
    capsys.readouterr()
    assert main([*own, f"text={words}"]) == 2
    assert "words.own: no such class; did you mean owl?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data=voc"], "out is missing"),
        (["out=text.pkl"], "expected a file that ends in .npz or .safetensors"),
        (["out=t.npz", "text=vok"], "text=vok: no such file, and none of coco, voc; did you mean"),
        (["out=t.npz", "data=minivoc"], "background is missing: say what surrounds bottle, car"),
        (["out=t.npz", "background=[]"], "background is missing"),
        (["out=t.npz", "templates=[a cat]"], "'a cat' has no {}"),
        (["out=t.npz", "templates=[]"], "text.templates"),
        (["out=t.npz", "modl=x"], "unknown key"),
        (["out=t.npz", "data=table"], "data.root is missing"),
        (["out=t.npz", "text=words.yaml"], "words.yaml: cannot be read"),
        (["out=t.npz", "text=keys.yaml"], "keys.yaml.word"),
    ],
)
def test_bad_arguments_are_named_before_a_clip_is_loaded(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.yaml").write_text("words: {a: [")
    Path("keys.yaml").write_text("word: {a: b}\nbackground: [sky]\n")
    assert main(["text", *arguments]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "pretrained", "expected"),
    [
        ("ViT-B-17", "openai", "model=ViT-B-17: open_clip knows none"),
        ("ViT-B-16", "openai", "another GELU.*give model=ViT-B-16-quickgelu"),
        ("tiny-clip", "no-tag", "pretrained=no-tag: cannot be loaded .*no.* known tag"),
        ("tiny-clip", "words.pt", "pretrained=words.pt: cannot be loaded"),
    ],
)
def test_unknown_clips_are_named(
    model: str,
    pretrained: str,
    expected: str,
    clip: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"logit_scale": torch.ones(())}, "words.pt")
    with pytest.raises(WSSSError, match=expected) as caught:
        load_clip(model, pretrained)
    assert "\n" not in str(caught.value)
