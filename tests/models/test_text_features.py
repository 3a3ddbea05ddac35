"""Files of text features: written, read, and refused in one line each."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from wsss.core.errors import WSSSError
from wsss.models.text import TextFeatures, read_text_features, write_text_features

NAMES = ("cat", "dog", "sofa")
ENDINGS = (".npz", ".safetensors")


def unit(count: int, width: int = 8) -> Any:
    rows = np.random.default_rng(count).standard_normal((count, width))
    return np.float32(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def features() -> TextFeatures:
    return TextFeatures(
        foreground=unit(3),
        background=unit(2),
        foreground_names=NAMES,
        foreground_prompts=tuple(f"a {name}." for name in NAMES),
        background_prompts=("a sky.", "a wall, grey."),
        logit_scale=100.0,
        model="ViT-B-16-quickgelu openai",
        weights_sha256="0123456789abcdef" * 4,
    )


def write_content(path: Path, content: dict[str, Any]) -> None:
    """Write whatever is given, as another program might."""
    if path.suffix == ".npz":
        np.savez(path, **{k: np.asarray(v) for k, v in content.items()})
        return
    arrays = {k: np.asarray(v) for k, v in content.items()}
    words = {
        k: v if isinstance(v, str) else json.dumps(v)
        for k, v in content.items()
        if arrays[k].dtype.kind in "UO"
    }
    save_file({k: v for k, v in arrays.items() if k not in words}, path, metadata=words)


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_written_is_read(ending: str, tmp_path: Path) -> None:
    path, written = tmp_path / f"text{ending}", features()
    write_text_features(written, path)
    read = read_text_features(path)
    for field in fields(TextFeatures):
        np.testing.assert_array_equal(getattr(read, field.name), getattr(written, field.name))
    assert read.width == 8


def test_npz_is_that_of_the_page(tmp_path: Path) -> None:
    write_text_features(features(), tmp_path / "text.npz")
    with np.load(tmp_path / "text.npz", allow_pickle=False) as file:
        found = {name: (array.dtype.kind, array.shape) for name, array in file.items()}
        assert str(file["format"]) == "wsss-clip-text-1"
    assert found == {
        "format": ("U", ()),
        "foreground": ("f", (3, 8)),
        "background": ("f", (2, 8)),
        "foreground_names": ("U", (3,)),
        "foreground_prompts": ("U", (3,)),
        "background_prompts": ("U", (2,)),
        "logit_scale": ("f", ()),
        "model": ("U", ()),
        "weights_sha256": ("U", ()),
    }


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": "wsss-clip-text-9"}, "'wsss-clip-text-9', expected 'wsss-clip-text-1'"),
        ({"foreground": unit(3).astype(np.float64)}, r"foreground is float64 \(3, 8\)"),
        ({"foreground": unit(3)[0]}, r"foreground is float32 \(8,\)"),
        ({"background": unit(2)[:0]}, r"background is float32 \(0, 8\)"),
        ({"background": unit(2, 9)}, "foreground is 8 wide and background 9"),
        ({"foreground": unit(3) * 1.002}, "foreground row of 'a cat.' has length 1.002"),
        ({"background": unit(2) * [[1], [np.nan]]}, "float64"),
        ({"background": np.float32(unit(2) * [[1], [np.nan]])}, "'a wall, grey.' has length nan"),
        ({"foreground_prompts": ("a cat.",)}, "foreground has 3 rows and 1 prompts"),
        ({"foreground_names": ("cat",)}, "foreground has 3 rows and 1 names"),
        ({"logit_scale": np.float32(0)}, "logit_scale is 0.0, expected a positive number"),
        ({"logit_scale": np.float32(np.inf)}, "logit_scale is inf"),
        ({"logit_scale": np.float32([1, 2])}, r"logit_scale is float32 \(2,\), expected one"),
        ({"logit_scale": np.int64(100)}, r"logit_scale is int64 \(\)"),
        ({"weights_sha256": "unknown"}, "weights_sha256 is 'unknown', expected a SHA-256"),
        ({"model": None, "weights_sha256": None}, "has no model, weights_sha256"),
        ({"foreground": None}, "has no foreground"),
    ],
)
def test_unfitting_content_is_named(
    change: dict[str, Any], expected: str, ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"text{ending}"
    content = {k: v for k, v in (asdict(features()) | change).items() if v is not None}
    content["logit_scale"] = np.asarray(content["logit_scale"])
    if change.get("logit_scale") is None:
        content["logit_scale"] = np.float32(100)
    write_content(path, content)
    with pytest.raises(WSSSError, match=f"^{path}: .*{expected}.*wsss text") as caught:
        read_text_features(path)
    assert "\n" not in str(caught.value)


def test_lengths_may_be_rounded(tmp_path: Path) -> None:
    rounded = replace(features(), foreground=np.float32(features().foreground * 1.0009))
    write_text_features(rounded, tmp_path / "text.npz")
    assert read_text_features(tmp_path / "text.npz").width == 8


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("text.npz", None, "no such file; `wsss text"),
        ("text.npy", b"x", "expected text features in .npz or .safetensors"),
        ("text.npz", b"x", "cannot be read as arrays"),
        ("text.safetensors", b"x" * 99, "not a readable .safetensors file"),
    ],
)
def test_strange_files_are_refused(
    name: str, content: bytes | None, expected: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WSSSError, match=expected) as caught:
        read_text_features(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_nothing_is_unpickled_and_sizes_come_first(tmp_path: Path) -> None:
    content: dict[str, Any] = asdict(features())
    objects = content | {"foreground_names": np.array([*NAMES], dtype=object)}
    np.savez(tmp_path / "objects.npz", **objects)
    with pytest.raises(WSSSError, match="foreground_names holds pickled objects"):
        read_text_features(tmp_path / "objects.npz")
    np.savez(tmp_path / "names.npz", **content | {"foreground_names": np.zeros(3)})
    with pytest.raises(WSSSError, match=r"foreground_names is float64 \(3,\), expected text"):
        read_text_features(tmp_path / "names.npz")
    np.savez_compressed(tmp_path / "big.npz", foreground=np.zeros((2**25, 1), np.float32))
    with pytest.raises(WSSSError, match=r"foreground declares float32 .*more than 67,108,864"):
        read_text_features(tmp_path / "big.npz")
    with (tmp_path / "big.safetensors").open("wb") as stream:
        stream.truncate(2**26 + 1)
    with pytest.raises(WSSSError, match="more than 67,108,864 bytes"):
        read_text_features(tmp_path / "big.safetensors")
    write_content(tmp_path / "list.safetensors", content | {"foreground_names": "cat, dog, sofa"})
    with pytest.raises(WSSSError, match="foreground_names is no JSON list of texts"):
        read_text_features(tmp_path / "list.safetensors")


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (("cat", "dog"), "text.npz: has texts of 3 classes, and the data 2"),
        (("cat", "sofa", "dog"), "text.npz: class 2 is 'dog', and in the data 'sofa'"),
        (("cat", "dog", "Sofa"), "text.npz: class 3 is 'sofa', and in the data 'Sofa'"),
    ],
)
def test_classes_are_those_of_the_data_in_order(classes: tuple[str, ...], expected: str) -> None:
    features().check_classes(NAMES, "text.npz")
    with pytest.raises(WSSSError, match=expected):
        features().check_classes(classes, "text.npz")


def test_the_tower_has_the_width_and_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    own = features()
    own.check_tower(8, own.weights_sha256, "text.npz")
    assert capsys.readouterr().err == ""
    own.check_tower(8, "f" * 64, "text.npz")
    said = capsys.readouterr().err
    assert said.startswith("warning: text.npz: was made with other weights (ViT-B-16-quickgelu")
    assert "01234567" in said
    assert "ffffffff" in said
    with pytest.raises(WSSSError, match=r"are 8 wide, and backbone\.projection 512"):
        own.check_tower(512, own.weights_sha256, "text.npz")


def test_other_endings_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(WSSSError, match=r"text\.pkl: expected a file that ends in"):
        write_text_features(features(), tmp_path / "text.pkl")
    assert not list(tmp_path.iterdir())
