"""Maps in the layouts that other repositories write, by hand; scored through the command line."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.data.builtin import minivoc_root
from wsss.evaluation.folders import find_files, read_class_maps, read_label_map

K = 8
MINIVOC = minivoc_root() / "VOC2012"
NAMES = (MINIVOC / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[:4]
SMALL = ["data=minivoc", "data.limit=4"]


def truth(name: str) -> np.ndarray:
    return np.array(Image.open(MINIVOC / "SegmentationClass" / f"{name}.png"))


def maps_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Classes (from 0) and soft, partly wrong maps of one image, rounded to what uint8 holds."""
    mask = truth(name)
    classes = np.unique(mask[(mask > 0) & (mask < 255)]).astype(np.int64) - 1
    rng = np.random.default_rng(len(name) + int(name[-2:]))
    soft = [np.roll(mask == c + 1, 6, 1) * 0.5 + rng.random(mask.shape) * 0.5 for c in classes]
    return classes, np.round(np.stack(soft) * 255).astype(np.float32) / 255


def irn(path: Path, classes: np.ndarray, maps: np.ndarray) -> None:
    tensors = {"keys": torch.from_numpy(classes), "cam": torch.from_numpy(maps[:, ::4, ::4].copy())}
    np.save(path, {**tensors, "high_res": maps}, allow_pickle=True)


def seam(path: Path, classes: np.ndarray, maps: np.ndarray) -> None:
    by_class = {int(c): m for c, m in zip(classes, maps, strict=True)}
    np.save(path, by_class, allow_pickle=True)  # type: ignore[arg-type]


def arrays(path: Path, classes: np.ndarray, maps: np.ndarray) -> None:
    np.savez(path.with_suffix(".npz"), keys=classes, cam=maps)


def dense(path: Path, classes: np.ndarray, maps: np.ndarray) -> None:
    everything = np.zeros((K, *maps.shape[1:]), np.uint8)
    everything[classes] = np.round(maps * 255)
    np.save(path, everything)


def with_background(path: Path, classes: np.ndarray, maps: np.ndarray) -> None:
    everything = np.zeros((K + 1, *maps.shape[1:]), np.float32)
    everything[0] = 0.3
    everything[classes + 1] = maps
    np.save(path, everything)


@pytest.mark.parametrize("write", [irn, seam, arrays, dense, with_background])
def test_every_layout_gives_the_same_maps(write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    classes, maps = maps_of(NAMES[0])
    write(tmp_path / "a.npy", classes, maps)
    (path,) = tmp_path.iterdir()
    found = read_class_maps(path, num_classes=K)
    np.testing.assert_allclose(found[classes], maps, atol=1e-6)
    assert not found[[k for k in range(K) if k not in classes]].any()


def test_classes_may_count_from_one(tmp_path: Path) -> None:
    classes, maps = maps_of(NAMES[0])
    seam(tmp_path / "a.npy", classes + 1, maps)
    found = read_class_maps(tmp_path / "a.npy", num_classes=K, first_class=1)
    np.testing.assert_allclose(found[classes], maps)


class Malice:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def test_a_pickle_that_wants_to_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "evil.npy", {"keys": Malice()}, allow_pickle=True)  # type: ignore[arg-type]
    with pytest.raises(WSSSError, match=r"evil\.npy.*wants to call .*system"):
        read_class_maps(tmp_path / "evil.npy", num_classes=K)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"keys": np.array([0]), "maps": np.full((1, 4, 4), 3.0)}, "values from 0 to 3"),
        ({"keys": np.array([0]), "maps": np.full((1, 4, 4), np.nan)}, "normalised"),
        ({"keys": np.array([9]), "maps": np.zeros((1, 4, 4))}, "class 9"),
        ({"keys": np.array([0, 1]), "maps": np.zeros((1, 4, 4))}, "2 classes but maps"),
        ({"keys": np.array([2, 2]), "maps": np.zeros((2, 4, 4))}, r"a class twice, in \[2, 2\]"),
        ({2: np.zeros((4, 4)), "2": np.zeros((4, 4))}, "a class twice"),
        ({"keys": np.array([0]), "other": np.zeros((1, 4, 4))}, "holds keys but none of"),
        (np.zeros((3, 4, 4)), "expected \\(8, h, w\\)"),
    ],
)
def test_maps_that_do_not_fit_are_named(content: object, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "bad.npy", content, allow_pickle=True)  # type: ignore[arg-type]
    with pytest.raises(WSSSError, match=message) as caught:
        read_class_maps(tmp_path / "bad.npy", num_classes=K)
    assert "bad.npy" in str(caught.value)


def test_truncated_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.npy"
    path.write_bytes(pickle.dumps({"keys": [1]})[:5])
    with pytest.raises(WSSSError, match=r"cut\.npy"):
        read_class_maps(path, num_classes=K)


def test_label_maps_as_png_and_npy(tmp_path: Path) -> None:
    labels = np.array([[0, 8], [255, 1]], np.uint8)
    Image.fromarray(labels).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", labels.astype(np.int64))
    for suffix in ("png", "npy"):
        found = read_label_map(tmp_path / f"a.{suffix}", num_classes=K, size=(2, 2))
        np.testing.assert_array_equal(found, labels)
    for bad, message in ((labels[:1], "array"), (labels + np.int64(2), "class id")):
        np.save(tmp_path / "b.npy", bad)
        with pytest.raises(WSSSError, match=message):
            read_label_map(tmp_path / "b.npy", num_classes=K, size=(2, 2))


def test_a_folder_of_cams_is_scored_like_numpy_says(tmp_path: Path) -> None:
    folder, out = tmp_path / "cams", tmp_path / "out"
    folder.mkdir()
    matrix = np.zeros((K + 1, K + 1), np.int64)
    for name in NAMES:
        classes, maps = maps_of(name)
        irn(folder / f"{name}.npy", classes, maps)
        label = np.where(maps.max(0) > np.float32(0.45), classes[maps.argmax(0)] + 1, 0)
        valid = truth(name) != 255
        np.add.at(matrix, (truth(name)[valid], label[valid]), 1)
    arguments = [f"cams={folder}", *SMALL, "eval.cam_threshold=0.45", f"out={out}", "name=IRN"]
    assert main(["eval", *arguments]) == 0
    results = json.loads((out / "results.json").read_text())
    metrics = results["splits"]["val"]
    hit, union = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    occurs = matrix.sum(1) > 0
    assert metrics["confusion"]["seed"] == matrix.tolist()
    assert metrics["seed_miou"] == pytest.approx((hit / np.maximum(union, 1))[occurs].mean())
    assert results["method"] == "IRN"
    card = metrics["protocol"]
    assert card["seg_scales"] is None, "what is not known is not claimed"
    assert card["cam_threshold"] == 0.45
    assert metrics["readings"] == 1


def test_a_folder_of_masks_is_scored_and_may_abstain(tmp_path: Path) -> None:
    folder, out = tmp_path / "masks", tmp_path / "out"
    folder.mkdir()
    for name in NAMES:
        mask = truth(name)
        mask[:40] = 255
        Image.fromarray(mask).save(folder / f"{name}.png")
    arguments = [f"masks={folder}", *SMALL, "eval.crf=psa", f"out={out}"]
    assert main(["eval", *arguments]) == 0
    metrics = json.loads((out / "results.json").read_text())["splits"]["val"]
    assert metrics["pseudo_label_miou_excluded"] == 1.0
    assert metrics["pseudo_label_miou_ignored_as_background"] < 1.0
    assert metrics["pseudo_label_coverage"] == pytest.approx(0.75, abs=0.01)
    assert metrics["protocol"]["crf"]["name"] == "psa", "stated by the user"
    assert metrics["protocol"]["flip"] is None


def test_a_table_without_splits_is_scored_where_it_has_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three classes in two masked rows: nothing could be held out for training, nothing need be."""
    root, folder, out = tmp_path / "own", tmp_path / "masks", tmp_path / "out"
    for made in (root, folder):
        made.mkdir()
    lines, labels = ["image,labels,mask"], {0: "a;b", 1: "c", 2: "a"}
    for number, names in labels.items():
        pixels = np.zeros((20, 24), np.uint8)
        pixels[4:12, 4 + number : 16] = "abc".index(names[0]) + 1
        Image.fromarray(pixels).convert("RGB").save(root / f"{number}.png")
        Image.fromarray(pixels).save(root / f"{number}_mask.png")
        mask = f"{number}_mask.png" if number < 2 else ""
        lines.append(f"{number}.png,{names},{mask}")
        if mask:
            Image.fromarray(pixels).save(folder / f"{number}.png")
    (root / "labels.csv").write_text("\n".join(lines))
    (root / "classes.txt").write_text("a\nb\nc\n")
    own = [f"masks={folder}", "data=table", f"data.root={root}", "kind=seg"]
    assert main(["eval", *own, f"out={out}"]) == 0
    splits = json.loads((out / "results.json").read_text())["splits"]
    assert list(splits) == ["masked"]
    assert splits["masked"]["num_images"] == 2
    assert splits["masked"]["seg_miou"] == 1.0
    (root / "labels.csv").write_text("image,labels\n0.png,a;b\n")
    assert main(["eval", *own]) == 2
    assert "names no mask" in capsys.readouterr().err


def test_an_incomplete_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(truth(NAMES[0])).save(tmp_path / f"{NAMES[0]}.png")
    assert main(["eval", f"masks={tmp_path}", *SMALL]) == 2
    error = capsys.readouterr().err
    assert f"3 of the split's 4 images have no file, the first is {NAMES[1]}" in error


def test_names_with_folders_are_found_in_them_or_in_one_folder(tmp_path: Path) -> None:
    names = ["val2014/COCO_val2014_000000000042", "val2014/COCO_val2014_000000000073"]
    nested, flat = tmp_path / "nested" / "val2014", tmp_path / "flat"
    for folder in (nested, flat):
        folder.mkdir(parents=True)
        for name in names:
            (folder / f"{Path(name).name}.npy").touch()
    suffixes = (".npy", ".npz")
    for root, folder in ((nested.parent, nested), (flat, flat)):
        found = find_files(root, names, suffixes, "cams")
        assert found == {name: folder / f"{Path(name).name}.npy" for name in names}
    twins = ["cats/001", "dogs/001"]  # one flat file could be of either
    (flat / "001.npy").touch()
    with pytest.raises(WSSSError, match="2 of the split's 2 images have no file"):
        find_files(flat, twins, suffixes, "cams")


def test_exactly_one_source_is_required(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", f"masks={tmp_path}", f"cams={tmp_path}", *SMALL]) == 2
    assert "one of run=" in capsys.readouterr().err


def header(shape: tuple[int, ...], kind: str = "<f4") -> bytes:
    """Of a .npy file of version 1.0, by hand."""
    text = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode().ljust(117)
    return b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text + b"\n"


def test_maps_of_terabytes_are_refused_by_their_header(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse.npy"
    with sparse.open("wb") as stream:
        stream.write(header((K, 2**18, 2**18)))
        stream.truncate(128 + 4 * K * 2**36)
    lying = tmp_path / "lying.npy"
    lying.write_bytes(header((K, 2**18, 2**18)))
    npz = tmp_path / "lying.npz"
    with zipfile.ZipFile(npz, "w") as archive:
        archive.writestr("keys.npy", header((1,), "<i8") + bytes(8))
        archive.writestr("cam.npy", header((1, 2**20, 2**20)))
    for path in (sparse, lying, npz):
        with pytest.raises(WSSSError, match=rf"{path.name}: cannot be read .*declares"):
            read_class_maps(path, num_classes=K, size=(48, 64))
    for path in (sparse, lying):
        with pytest.raises(WSSSError, match=rf"{path.name}: cannot be read .*declares"):
            read_label_map(path, num_classes=K, size=(48, 64))


def test_maps_much_larger_than_their_image_are_refused(tmp_path: Path) -> None:
    side = 1200
    maps = np.zeros((1, side, side), np.uint8)
    np.save(tmp_path / "plain.npy", np.zeros((2, side, side), np.uint8))
    np.save(tmp_path / "keys.npy", {"keys": np.array([0]), "cam": maps}, allow_pickle=True)  # type: ignore[arg-type]
    np.savez_compressed(tmp_path / "keys.npz", keys=[0], cam=np.repeat(maps, 3, 0))
    view = torch.zeros(1, 1, 1).expand(1, 2**20, 2**20)  # a byte that says it is a terabyte
    (tmp_path / "view.npy").write_bytes(pickle.dumps({"keys": [0], "cam": view}))
    for name in ("plain.npy", "keys.npy", "keys.npz", "view.npy"):
        with pytest.raises(WSSSError, match=rf"{name}: .*image"):
            read_class_maps(tmp_path / name, num_classes=1, size=(48, 64))
    found = read_class_maps(tmp_path / "keys.npy", num_classes=1, size=(300, 300))
    assert found.shape == (1, side, side), "four times the image's sides"


class Uninitialised:
    """A call that NumPy's own pickles make with a shape of 0."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __reduce__(self) -> tuple:
        return np._core.multiarray._reconstruct, (np.ndarray, self.shape, "f4")  # type: ignore[attr-defined]


def test_pickles_without_the_values_they_claim_are_refused(tmp_path: Path) -> None:
    whole = pickle.dumps({"keys": [0], "cam": torch.zeros(1, 2, 2)})
    shape = b"K\x01K\x02K\x02\x87"
    call = b"cnumpy\nndarray\n" + shape + b"\x85R"
    contents = {
        "short": whole.replace(shape, shape.replace(b"\x02", b"\x09")),
        "empty": pickle.dumps({"keys": [0], "cam": Uninitialised((1, 2, 2))}),
        "called": b"\x80\x02}(X\x04\0\0\0keys]K\0aX\x03\0\0\0cam" + call + b"u.",
    }
    assert contents["short"] != whole
    messages = {
        "short": "larger than its values",
        "empty": r"maps of shape \(0,\)",
        "called": "'str' object is not callable",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.npy").write_bytes(content)
        with pytest.raises(WSSSError, match=rf"{name}\.npy.*{messages[name]}"):
            read_class_maps(tmp_path / f"{name}.npy", num_classes=K)


@pytest.mark.parametrize(
    "content",
    [
        {"keys": [np.nan], "cam": np.zeros((1, 4, 4))},
        {"keys": np.array([np.inf]), "cam": np.zeros((1, 4, 4))},
        {"keys": np.array([0.5]), "cam": np.zeros((1, 4, 4))},
        {"keys": ["cat"], "cam": np.zeros((1, 4, 4))},
        {"keys": [0, 0], "cam": np.zeros((2, 4, 4))},
        {"keys": None, "cam": np.zeros((1, 4, 4))},
        {"keys": [0], "cam": [[[0.0]]]},
        {"keys": [0], "cam": None},
        {"keys": [0], "cam": np.zeros((1, 4, 4), complex)},
        {"keys": [0], "cam": np.zeros((1, 0, 4))},
        {float("inf"): np.zeros((4, 4))},
        {0.5: np.zeros((4, 4))},
        {None: np.zeros((4, 4))},
        [1, 2],
        None,
        "text",
    ],
)
def test_contents_of_another_kind_are_one_line(content: object, tmp_path: Path) -> None:
    path = tmp_path / "odd.npy"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(WSSSError, match=r"odd\.npy"):
        read_class_maps(path, num_classes=K)


def test_damaged_maps_are_one_line(tmp_path: Path) -> None:
    classes, maps = maps_of(NAMES[0])
    rng, refused = np.random.default_rng(0), []
    for write in (irn, seam, arrays, dense):
        write(tmp_path / "a.npy", classes, maps[:, ::8, ::8])
        (path,) = tmp_path.iterdir()
        whole = path.read_bytes()
        for _ in range(100):
            damaged = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.3 else whole)
            for _ in range(rng.integers(1, 4) if damaged else 0):
                damaged[rng.integers(min(len(damaged), 400))] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            try:
                read_class_maps(path, num_classes=K, size=(120, 160))
            except WSSSError as error:
                refused.append(str(error))
        path.unlink()
    assert len(refused) > 100
    assert all("\n" not in text and len(text) < 600 for text in refused)


def test_bfloat16_tensors_are_read(tmp_path: Path) -> None:
    content = {"keys": torch.tensor([2]), "cam": torch.full((1, 2, 2), 0.5, dtype=torch.bfloat16)}
    (tmp_path / "a.npy").write_bytes(pickle.dumps(content))
    assert read_class_maps(tmp_path / "a.npy", num_classes=K)[2].tolist() == [[0.5, 0.5]] * 2
