"""Through the command line: train, skip, stop, resume, evaluate, predict, convert."""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import SMALL

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.data.builtin import minivoc_root
from wsss.data.images import voc_palette
from wsss.evaluation.ledger import past_readings
from wsss.methods.toco.official import official_name
from wsss.results.store import read_cells
from wsss.runs.compose import compose_run
from wsss.runs.folder import build_data, load_run

# a network and pictures small enough for a second a step
TINY = [
    "method=toco",
    *SMALL,
    "budget.warmup_steps=1",
    "method.decoder_channels=16",
    "eval.seg_scales=[1.0]",
    "trainer.deterministic=true",
    "gallery=4",
]


def _wsss(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as leave:
        return int(leave.code or 0)


def _only_run(runs: Path) -> Path:
    (folder,) = (path.parent for path in runs.rglob("config.yaml"))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of four steps."""
    runs = tmp_path_factory.mktemp("runs")
    assert (
        _wsss("train", *TINY, "budget.max_steps=4", "budget.eval_every=2", f"runs_dir={runs}") == 0
    )
    return _only_run(runs)


def test_run_folder_holds_everything(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["status"] == "finished"
    metrics = results["splits"]["val"]
    assert 0 <= metrics["seg_miou"] <= 1
    assert 0 <= metrics["seg_miou_ms_crf"] <= 1
    assert metrics["protocol"]["iterations"] == 4
    assert metrics["protocol"]["backbone"]["source"] == "random"
    assert len(metrics["protocol"]["list_sha256"]) == 64
    assert list((finished / "gallery").glob("*.png"))
    assert (finished / "checkpoints" / "last.ckpt").is_file()
    assert metrics["seed_miou_holdout"] in metrics["seed_curve"]["miou"]
    assert metrics["protocol"]["holdout"]["source"] == "train"
    assert set(metrics["maps"]) == {
        "seed",
        "pseudo_label",
        "seg",
        "seg_crf",
        "seg_ms",
        "seg_ms_crf",
    }
    assert results["cost"]["train_wall_hours"] > 0
    assert results["cost"]["train_gpu_hours"] is None or results["cost"]["num_devices"] == 1
    with (finished / "logs" / "version_0" / "metrics.csv").open() as stream:
        columns = next(csv.reader(stream))
    assert {"val/seg_miou", "val/seed_miou"} <= set(columns)


def test_every_reading_of_ground_truth_is_in_the_ledger(finished: Path) -> None:
    entries = [(e["split"], e["purpose"], e["step"]) for e in past_readings(finished)[:4]]
    assert entries == [
        ("val", "watching training", 2),
        ("val", "watching training", 4),
        ("holdout", "choosing a threshold", 4),
        ("val", "report", 4),
    ]


def test_cells_of_single_images_add_up_to_the_confusion(finished: Path) -> None:
    metrics = json.loads((finished / "results.json").read_text())["splits"]["val"]
    found = read_cells(finished / "images.npz", "val")
    assert len(found["names"]) == 8
    for kind, matrix in metrics["confusion"].items():
        if kind == "pseudo_label_abstained":
            continue
        total = np.zeros((9, 10), np.int64)
        np.add.at(total, np.divmod(found[kind][:, 1], 10), found[kind][:, 2])
        assert total[:, :9].tolist() == matrix
        assert sorted(set(found[kind][:, 0].tolist())) == list(range(8))


def test_holdout_is_evaluated_like_a_split_and_val_is_left_alone(
    finished: Path, tmp_path: Path
) -> None:
    before = [e["split"] for e in past_readings(finished)].count("val")
    arguments = [f"run={finished}", f"out={tmp_path}", "splits=[holdout]", "eval.crf=null"]
    assert _wsss("eval", *arguments, "gallery=0") == 0
    card = json.loads((tmp_path / "results.json").read_text())["splits"]["holdout"]["protocol"]
    assert card["split"] == "holdout"
    assert card["list_sha256"] == card["holdout"]["list_sha256"]
    assert [e["split"] for e in past_readings(finished)].count("val") == before
    undeclared = [*arguments, "eval.holdout_per_class=0"]
    assert _wsss("eval", *undeclared) == 2


def test_our_own_crf_gives_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    arguments = [f"run={finished}", f"out={tmp_path}", "eval.crf_backend=torch", "gallery=0"]
    assert _wsss("eval", *arguments) == 0
    ours = json.loads((tmp_path / "results.json").read_text())["splits"]["val"]
    theirs = json.loads((finished / "results.json").read_text())["splits"]["val"]
    for kind in ("seg_crf", "seg_ms_crf"):
        moved = np.abs(np.subtract(ours["confusion"][kind], theirs["confusion"][kind])).sum()
        assert moved / 2 <= 0.005 * np.sum(ours["confusion"][kind])
    assert ours["protocol"]["crf_backend"] == "torch"


def test_report_draws_a_run_again_from_its_checkpoint(finished: Path, tmp_path: Path) -> None:
    arguments = [str(finished), f"out={tmp_path}", "gallery=1", "resamples=20"]
    assert _wsss("report", *arguments) == 0
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/webp") == 3 * 5, "image twice, truth, map and CAM of three images"
    assert "validation during training: CAM seed" in page
    assert "watching training" in page


def test_finished_run_is_not_run_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    runs = finished.parents[1]
    assert (
        _wsss("train", *TINY, "budget.max_steps=4", "budget.eval_every=2", f"runs_dir={runs}") == 0
    )
    assert "is finished" in capsys.readouterr().out
    assert (finished / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_eval_repeats_the_numbers(finished: Path, tmp_path: Path) -> None:
    assert _wsss("eval", f"run={finished}", f"out={tmp_path}") == 0
    trained = json.loads((finished / "results.json").read_text())["splits"]["val"]
    again = json.loads((tmp_path / "results.json").read_text())["splits"]["val"]
    assert again["confusion"] == trained["confusion"]
    assert again["protocol"]["iterations"] == 4


def test_eval_under_another_protocol(finished: Path, tmp_path: Path) -> None:
    arguments = [f"run={finished}", f"out={tmp_path}", "eval.crf=null", "splits=[val_unseen]"]
    assert _wsss("eval", *arguments, "gallery=0") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["splits"]) == ["val_unseen"]
    assert results["splits"]["val_unseen"]["seg_miou_crf"] is None
    assert not (tmp_path / "gallery").exists()


def test_predict_writes_masks_of_the_images_own_size(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (50, 70, 3), np.uint8)).save(folder / "colour.jpg")
    Image.fromarray(rng.integers(0, 255, (61, 40), np.uint8)).save(folder / "grey.png")
    assert _wsss("predict", f"run={finished}", f"images={folder}", f"out={tmp_path / 'out'}") == 0
    for name, size in (("colour", (70, 50)), ("grey", (40, 61))):
        with Image.open(tmp_path / "out" / f"{name}.png") as mask:
            assert mask.mode == "P"
            assert mask.size == size
            assert np.asarray(mask).max() <= 8
        assert (tmp_path / "out" / f"{name}_overlay.jpg").is_file()
    assert "1 bottle" in (tmp_path / "out" / "classes.txt").read_text()


def test_predict_refuses_to_write_among_the_images(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = minivoc_root() / "VOC2012" / "JPEGImages"
    assert _wsss("predict", f"run={finished}", f"images={images}", f"out={images}") == 2
    assert "choose another folder" in capsys.readouterr().err


def test_predict_names_a_broken_image_before_it_writes(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for name in ("first.jpg", "second.jpg"):
        Image.new("RGB", (40, 40), (90, 60, 30)).save(folder / name)
    _cut(folder / "second.jpg")
    assert _wsss("predict", f"run={finished}", f"images={folder}", f"out={out}") == 2
    assert "second.jpg" in capsys.readouterr().err
    assert not out.exists()


def test_truncated_and_foreign_checkpoints_are_refused(finished: Path, tmp_path: Path) -> None:
    whole = (finished / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WSSSError, match=r"cut\.ckpt"):
        load_run(tmp_path / "cut.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(WSSSError, match="wsss convert"):
        load_run(tmp_path / "foreign.ckpt")


def _copy_of_minivoc(folder: Path) -> Path:
    root = folder / "VOC2012"
    shutil.copytree(minivoc_root() / "VOC2012", root)
    return root


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _rgb_mask(path: Path) -> None:
    Image.new("RGB", (160, 160)).save(path)


def _small_mask(path: Path) -> None:
    Image.new("P", (80, 160)).save(path)


def _foreign_id(path: Path) -> None:
    mask = Image.new("P", (160, 160), 9)
    mask.putpalette(voc_palette())  # without one, Pillow renumbers the values
    mask.save(path)


@pytest.mark.parametrize(
    ("file", "spoil", "expected"),
    [
        ("JPEGImages/{train}.jpg", _cut, "complete"),
        ("JPEGImages/{train}.jpg", Path.unlink, "missing"),
        ("JPEGImages/{val}.jpg", _cut, "complete"),
        ("SegmentationClass/{val}.png", _rgb_mask, "RGB"),
        ("SegmentationClass/{val}.png", _small_mask, "80x160"),
        ("SegmentationClass/{val}.png", _foreign_id, "9"),
        ("Annotations/{train}.xml", _cut, "annotation"),
        ("ImageSets/Segmentation/val.txt", Path.unlink, "val"),
    ],
)
def test_bad_data_is_named_before_anything_is_written(
    file: str,
    spoil: Callable[[Path], None],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, runs = _copy_of_minivoc(tmp_path), tmp_path / "runs"
    lists = root / "ImageSets" / "Segmentation"
    names = {split: (lists / f"{split}.txt").read_text().split()[2] for split in ("train", "val")}
    victim = root / file.format(**names)
    spoil(victim)
    steps = ["budget.max_steps=4", "budget.eval_every=4"]
    assert _wsss("train", *TINY, *steps, f"data.root={root}", f"runs_dir={runs}") == 2
    error = capsys.readouterr().err.strip()
    assert victim.name in error
    assert expected in error
    assert len(error.splitlines()) == 1
    assert not runs.exists()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("trainer.strategy=dpp", "dpp"),
        ("trainer.accumulate_grad_batches=3", "accumulate_grad_batches=3"),
        ("data.num_workers=-1", "data.num_workers=-1: expected a number greater than"),
        ("method.local_size=4", "method.local_size=4"),
        ("method.ptc_weight=-1", "ptc_weight"),
        ("method.lr=0", "method.lr=0: expected a number greater than 0"),
        ("method.scales=[1,0]", "method.scales=[1, 0]"),
        ("runs_dir=/proc/runs", "choose another folder"),  # where not even root may write
        pytest.param(
            "trainer=gpu",
            "torch sees no GPU here; give trainer=cpu",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="has a GPU"),
        ),
    ],
)
def test_impossible_settings_are_named_before_writing(
    setting: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    assert _wsss("train", *TINY, "budget.max_steps=4", f"runs_dir={runs}", setting) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert len(error.splitlines()) == 1
    assert not runs.exists()


@pytest.mark.parametrize(
    ("package", "setting", "expected"),
    [
        ("pydensecrf.densecrf", "eval.crf=toco", "pip install pydensecrf2"),
        ("wandb", "logger=wandb", "pip install wandb"),
        ("tensorboard", "logger=[csv,tensorboard]", "pip install tensorboard"),
        ("mlflow", "logger=mlflow", "pip install mlflow-skinny"),
    ],
)
def test_missing_package_is_named_before_training(
    package: str,
    setting: str,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    runs = tmp_path / "runs"
    assert _wsss("train", *TINY, "budget.max_steps=4", setting, f"runs_dir={runs}") == 2
    assert expected in capsys.readouterr().err
    assert not runs.exists()


def test_image_bad_in_decoding_alone_ends_training_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A PNG under a .jpg name has no end marker to look for; once mended, the run goes on."""
    root = _copy_of_minivoc(tmp_path)
    plain = ["eval.crf=null", "eval.holdout_per_class=0", "budget.cam_size=64", "gallery=0"]
    settings = [*TINY, *plain, "budget.max_steps=4", "budget.eval_every=4", f"data.root={root}"]
    data = build_data(compose_run(settings))
    data.setup("fit")
    _, second_batch = data.train_dataloader()
    victim = root / "JPEGImages" / f"{second_batch['name'][0]}.jpg"
    whole = victim.read_bytes()
    noise = np.random.default_rng(0).integers(0, 255, (160, 160, 3), np.uint8)
    Image.fromarray(noise).save(victim, format="PNG")
    _cut(victim)
    command = ["train", *settings, f"runs_dir={tmp_path / 'runs'}"]
    assert _wsss(*command) == 2
    error = capsys.readouterr().err
    assert victim.name in error
    assert "once mended, the same command resumes" in error
    assert "Traceback" not in error
    victim.write_bytes(whole)
    assert _wsss(*command) == 0
    assert "resuming from" in capsys.readouterr().out


def _official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our parameters under the official names, as an official file would hold them."""
    renamed = {f"module.{official_name(name)}": value for name, value in state.items()}
    renamed["module.encoder.head.weight"] = torch.zeros(1000, 48)
    renamed["module.encoder.head.bias"] = torch.zeros(1000)
    return renamed


def test_converted_checkpoint_gives_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    state = load_run(finished).module.state_dict()
    torch.save(_official(state), tmp_path / "official.pth")
    shape = [argument for argument in TINY if not argument.startswith(("method=", "gallery"))]
    out = tmp_path / "ours.ckpt"
    assert _wsss("convert", "toco", str(tmp_path / "official.pth"), str(out), *shape) == 0
    assert _wsss("eval", f"run={out}", f"out={tmp_path / 'eval'}", "gallery=0") == 0
    trained = json.loads((finished / "results.json").read_text())["splits"]["val"]
    again = json.loads((tmp_path / "eval" / "results.json").read_text())["splits"]["val"]
    assert again["confusion"] == trained["confusion"]
    assert again["protocol"]["backbone"]["source"] == "converted:official.pth"
    assert again["protocol"]["backbone"]["pretraining"] == "unknown"


def test_checkpoint_that_does_not_fit_is_refused_by_name(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = _official(load_run(finished).module.state_dict())
    state["module.stranger.weight"] = state.pop("module.decoder.conv6.weight")
    state["module.classifier.weight"] = state["module.classifier.weight"][:3]
    torch.save(state, tmp_path / "bad.pth")
    shape = [argument for argument in TINY if not argument.startswith(("method=", "gallery"))]
    out = tmp_path / "ours.ckpt"
    assert _wsss("convert", "toco", str(tmp_path / "bad.pth"), str(out), *shape) == 2
    error = capsys.readouterr().err
    for name in ("decoder.conv6.weight", "stranger.weight", "classifier.weight"):
        assert name in error
    assert not out.exists()
