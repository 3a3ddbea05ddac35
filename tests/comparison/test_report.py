import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs_on_disk import make_run

from wsss.cli import main
from wsss.comparison.page import pick_images
from wsss.comparison.svg import Series, bar_chart, line_chart, scatter, ticks
from wsss.data.builtin import minivoc_root

VOID = {"meta", "img", "br"}


class Balanced(HTMLParser):
    """Checks that every element is closed, and keeps what was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def parsed(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    assert not parser.stack
    return parser


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(23.4, 61.0) == [30, 40, 50, 60]
    assert ticks(0, 0.0037) == [0, 0.001, 0.002, 0.003]


def test_charts_are_balanced_and_leave_out_what_is_not_there() -> None:
    nan = float("nan")
    line = line_chart("a<b", [Series("x", 0, [(0, 1), (1, nan), (2, 3)], [(0, 1, "here")])],
                      x_label="t", y_label="y")  # fmt: skip
    assert "a&lt;b" in line
    assert "nan" not in line
    assert "x: here" in line
    parsed(line)
    parsed(scatter("s", [Series("x", 9, [(0.5, 3)], spread=1.0)], x_label="t", y_label="y"))
    bars = bar_chart("b", ["cat", "dog"], [("x", 0, [10.0, None]), ("y", 1, [20.0, 30.0])])
    assert bars.count("<rect") == 3
    assert line_chart("e", [Series("x", 0, [(0, nan)])], x_label="", y_label="") == ""
    assert scatter("e", [], x_label="", y_label="") == ""


def test_images_of_every_kind_are_picked_once() -> None:
    scores = np.array([[0.1, 0.5, 0.9, 0.5, 0.4, 0.55], [0.1, 0.5, 0.9, 0.5, 0.8, 0.55]])
    picks = {p.reason: p.index for p in pick_images(scores, 1)}
    assert picks["best"] == 2
    assert picks["worst"] == 0
    assert picks["largest disagreement"] == 4
    assert picks["median"] in (1, 3, 5)
    assert len({p.index for p in pick_images(scores, 3)}) == 6


def test_a_page_of_folders_with_pictures_needs_no_network(tmp_path: Path) -> None:
    root = minivoc_root() / "VOC2012"
    names = (root / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[:6]
    for name, shift in (("near", 3), ("far", 25)):
        folder = tmp_path / name
        folder.mkdir()
        for image in names:
            mask = np.array(Image.open(root / "SegmentationClass" / f"{image}.png"))
            guess = np.where(mask == 255, 0, np.roll(mask, shift, 1))
            Image.fromarray(np.where(guess == 255, 0, guess)).save(folder / f"{image}.png")
        arguments = [f"masks={folder}", "data=minivoc", "data.limit=6", f"out={tmp_path}/e/{name}"]
        assert main(["eval", *arguments]) == 0
    out = tmp_path / "report"
    assert main(["report", f"{tmp_path}/e", f"out={out}", "gallery=1", "resamples=50"]) == 0
    page = (out / "index.html").read_text()
    found = parsed(page)
    pictures = [a["src"] for tag, a in found.tags if tag == "img"]
    assert len(pictures) == 4 * 4, "image, truth and two methods for four images"
    assert all(src.startswith("data:image/jpeg;base64,") for src in pictures)
    links = [v for _, a in found.tags for k, v in a.items() if k in ("src", "href")]
    assert set(links) == set(pictures)
    assert "http" not in page
    assert not [tag for tag, _ in found.tags if tag in ("script", "link", "iframe")]
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page
    for reason in ("best", "median", "worst", "largest disagreement"):
        assert f"{reason}: mini_val" in page
    assert {p.name for p in out.iterdir()} == {"index.html", "table.md", "table.csv", "table.tex"}


def test_runs_with_losses_costs_and_no_data(tmp_path: Path) -> None:
    runs = []
    for method, quality in (("ToCo", 0.6), ("GETAM", 0.8)):
        for seed in range(2):
            run = make_run(
                tmp_path / "runs" / f"{method}{seed}", method=method, seed=seed, quality=quality
            )
            logs = run / "logs" / "version_0"
            logs.mkdir(parents=True)
            (logs / "metrics.csv").write_text(
                "epoch,step,train/cls_loss,train/loss\n0,9,0.6,1.5\n0,19,,1.2\n0,29,0.4,1.0\n"
            )
            runs.append(str(run))
    out = tmp_path / "report"
    assert main(["report", *runs, f"out={out}", "resamples=50", "gallery=0"]) == 0
    page = (out / "index.html").read_text()
    parsed(page)
    titles = re.findall(r'aria-label="([^"]+)"', page)
    for wanted in (
        "CAM seeds: mIoU by threshold",
        "IoU per class",
        "IoU by object size",
        "near boundaries",
        "against training",
        "against evaluation",
        "ToCo: losses",
        "GETAM: losses",
    ):
        assert any(wanted in title for title in titles), wanted
    assert "<img" not in page


def test_out_is_required(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main(["report", str(run)]) == 2
    assert "out is missing" in capsys.readouterr().err
