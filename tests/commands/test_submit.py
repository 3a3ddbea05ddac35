"""`wsss submit`: the archive of VOC's evaluation server, and what is refused in it."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss import cli
from wsss.core.errors import WSSSError
from wsss.data.dataset import Sample
from wsss.data.images import mask_png, voc_palette
from wsss.data.voc import VOC_CLASSES
from wsss.models.weights import save_atomically
from wsss.runs.compose import compose_run
from wsss.runs.folder import build_module
from wsss.runs.submission import validate_archive, write_archive

NAMES = ["2008_000006", "2008_000011", "2008_000012"]
INNER = Path("results/VOC2012/Segmentation/comp6_test_cls")


def make_test_set(root: Path) -> Path:
    """VOC's test images: pictures and a list, neither annotations nor masks."""
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "test.txt").write_text("\n".join(NAMES))
    for number, name in enumerate(NAMES):
        pixels = np.random.default_rng(number).integers(0, 256, (40 + number, 56, 3), np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
    return root


def make_checkpoint(folder: Path, *overrides: str) -> Path:
    config = compose_run(
        [
            "method=toco",
            "backbone=vit_pico",
            "backbone.weights=random",
            "eval.crf=null",
            "budget.cam_size=64",
            "eval.seg_scales=[1.0]",
            "method.decoder_channels=16",
            *overrides,
        ]
    )
    module = build_module(config, len(config["data"]["class_names"]))
    checkpoint: dict[str, object] = {"state_dict": module.state_dict(), "global_step": 0}
    module.on_save_checkpoint(checkpoint)
    path = folder / "model.ckpt"
    save_atomically(checkpoint, path)
    return path


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Checkpoint, VOC root and output of a finished call."""
    folder = tmp_path_factory.mktemp("submit")
    root = make_test_set(folder / "VOC2012")
    checkpoint = make_checkpoint(folder, "data=voc", "data.root=unset")
    arguments = [f"run={checkpoint}", f"data.root={root}", f"out={folder / 'out'}"]
    assert cli.main(["submit", *arguments]) == 0
    return checkpoint, root, folder / "out"


def test_archive_has_the_servers_layout(submitted: tuple[Path, Path, Path]) -> None:
    _, root, out = submitted
    with tarfile.open(out / "comp6_test_cls.tar.gz") as tar:
        assert tar.getnames() == [str(INNER / f"{name}.png") for name in NAMES]
        for name in NAMES:
            stream = tar.extractfile(str(INNER / f"{name}.png"))
            assert stream is not None
            with Image.open(io.BytesIO(stream.read())) as mask:
                assert mask.mode == "P"
                assert mask.getpalette() == voc_palette()
                assert np.asarray(mask).max() <= 20
                assert mask.size == Image.open(root / "JPEGImages" / f"{name}.jpg").size


def test_a_second_call_goes_on_and_gives_the_same_bytes(
    submitted: tuple[Path, Path, Path],
) -> None:
    checkpoint, root, out = submitted
    archive = out / "comp6_test_cls.tar.gz"
    before = archive.read_bytes()
    kept = out / INNER / f"{NAMES[0]}.png"
    kept_time = kept.stat().st_mtime_ns
    (out / INNER / f"{NAMES[1]}.png").unlink()
    assert cli.main(["submit", f"run={checkpoint}", f"data.root={root}", f"out={out}"]) == 0
    assert archive.read_bytes() == before
    assert kept.stat().st_mtime_ns == kept_time


def test_masks_of_two_protocols_never_mix(
    submitted: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, root, out = submitted
    arguments = [f"run={checkpoint}", f"data.root={root}", f"out={out}", "eval.flip=false"]
    assert cli.main(["submit", *arguments]) == 2
    assert "another run or protocol" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["competition=comp4"], "expected comp5 or comp6"),
        (["split=tset"], "split 'tset' is missing (its folder has test)"),
        (["run=nowhere"], "no such checkpoint"),
        (["device=cuda:99"], "device=cuda:99: torch sees no such GPU"),
        (["data.root=nowhere"], "data folder nowhere is missing"),
    ],
)
def test_bad_arguments_are_one_line(
    submitted: tuple[Path, Path, Path],
    extra: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, root, _ = submitted
    given = [f"run={checkpoint}", f"data.root={root}", f"out={tmp_path / 'out'}", *extra]
    assert cli.main(["submit", *given]) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_other_classes_than_vocs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(tmp_path, "data=minivoc")
    assert cli.main(["submit", f"run={checkpoint}"]) == 2
    assert "not VOC's 20" in capsys.readouterr().err
    assert len(VOC_CLASSES) == 20


def samples_of(root: Path) -> list[Sample]:
    return [Sample(name, root / "JPEGImages" / f"{name}.jpg", None) for name in NAMES]


def remove_mask(folder: Path, names: list[str]) -> None:
    names.pop()


def surplus_mask(folder: Path, names: list[str]) -> None:
    (folder / INNER / "more.png").write_bytes(mask_png(np.zeros((40, 56), np.uint8)))
    names.append("more")


def doubled_mask(folder: Path, names: list[str]) -> None:
    names.append(names[0])


def small_mask(folder: Path, names: list[str]) -> None:
    (folder / INNER / f"{names[1]}.png").write_bytes(mask_png(np.zeros((3, 3), np.uint8)))


def void_mask(folder: Path, names: list[str]) -> None:
    (folder / INNER / f"{names[0]}.png").write_bytes(mask_png(np.full((40, 56), 255, np.uint8)))


def grey_mask(folder: Path, names: list[str]) -> None:
    Image.new("L", (56, 40)).save(folder / INNER / f"{names[0]}.png")


def no_mask(folder: Path, names: list[str]) -> None:
    (folder / INNER / f"{names[0]}.png").write_bytes(b"no image")


@pytest.mark.parametrize("spoil", [small_mask, void_mask, grey_mask, no_mask])
def test_a_damaged_mask_is_made_again(
    spoil: Callable[[Path, list[str]], None],
    submitted: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, root, out = submitted
    path = out / INNER / f"{NAMES[1] if spoil is small_mask else NAMES[0]}.png"
    whole = path.read_bytes()
    spoil(out, NAMES)
    assert cli.main(["submit", f"run={checkpoint}", f"data.root={root}", f"out={out}"]) == 0
    assert f"1 damaged masks are made again: {path} " in capsys.readouterr().out
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (remove_mask, "lacks 1 masks"),
        (surplus_mask, "expected each of 3 masks once"),
        (doubled_mask, "expected each of 3 masks once"),
        (small_mask, r"shape \(3, 3\)"),
        (void_mask, "ids up to 255"),
        (grey_mask, "has mode L"),
        (no_mask, "is no image"),
    ],
)
def test_a_bad_archive_is_not_called_valid(
    tmp_path: Path, spoil: Callable[[Path, list[str]], None], expected: str
) -> None:
    from pathlib import PurePosixPath

    root = make_test_set(tmp_path / "VOC2012")
    (tmp_path / INNER).mkdir(parents=True)
    for number, name in enumerate(NAMES):
        content = mask_png(np.zeros((40 + number, 56), np.uint8))
        (tmp_path / INNER / f"{name}.png").write_bytes(content)
    names = list(NAMES)
    inner = PurePosixPath(INNER)
    archive = tmp_path / "a.tar.gz"
    write_archive(archive, tmp_path, [inner / f"{name}.png" for name in names])
    validate_archive(archive, inner, samples_of(root))
    spoil(tmp_path, names)
    write_archive(archive, tmp_path, [inner / f"{name}.png" for name in names])
    with pytest.raises(WSSSError, match=expected):
        validate_archive(archive, inner, samples_of(root))


def test_a_truncated_archive_is_not_called_valid(submitted: tuple[Path, Path, Path]) -> None:
    from pathlib import PurePosixPath

    _, root, out = submitted
    archive = out / "cut.tar.gz"
    archive.write_bytes((out / "comp6_test_cls.tar.gz").read_bytes()[:-60])
    with pytest.raises(WSSSError, match="cannot be read"):
        validate_archive(archive, PurePosixPath(INNER), samples_of(root))
