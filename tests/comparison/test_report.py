import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs_on_disk import make_run

from wsss.cli import main
from wsss.comparison.charts import Point, draw, look_of
from wsss.comparison.compare import CompareArguments, compare
from wsss.comparison.headline import Headline, headline_of
from wsss.comparison.page import MOST_POINTS, thinned, training_charts
from wsss.comparison.panels import pick_images
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


def test_charts_are_balanced_and_leave_out_what_is_not_there() -> None:
    nan, names = float("nan"), ["<x>", "y"]
    lines = [Point("<x>", 0, 1, line=0), Point("<x>", 1, nan, line=0), Point("<x>", 2, 3, line=0)]
    rows = [Point("<x>", 10, "dog"), Point("y", 20, "cat", low=19, high=21), Point("y", nan, "cat")]
    charts = [
        *draw("a<b", names, [*lines, Point("<x>", 0, 1, "<here>")], x="t", y="y"),
        *draw("b", names, rows, x="IoU", rows=18),
        *draw("s", names, [Point("y", 0.5, 3, low=2, high=4)], x="t", y="y"),
    ]
    svgs = [str(chart.svg) for chart in charts]
    for svg in svgs:
        parsed(svg)
        assert "NaN" not in svg
        assert "http" not in svg
    assert [svg.count('aria-roledescription="point"') for svg in svgs] == [3, 2, 1]
    assert 'aria-label="&lt;here&gt;"' in svgs[0]
    assert "y: 20, cat [19.0, 21.0]" in svgs[1]
    assert svgs[1].index(">dog<") < svgs[1].index(">cat<"), "rows are in their order"
    assert draw("e", names, [Point("y", 0, nan)], x="") == draw("e", [], [], x="") == []


def test_long_lines_are_thinned_but_keep_their_end() -> None:
    found = thinned([(float(step), 1.0) for step in range(10_000)])
    assert found[0] == (0.0, 1.0)
    assert found[-1] == (9999.0, 1.0)
    assert MOST_POINTS <= len(found) <= MOST_POINTS + 1
    assert thinned(found[:5]) == found[:5]
    assert thinned([]) == []


def test_no_two_of_48_names_share_colour_and_dash() -> None:
    looks = [look_of(k) for k in range(48)]
    assert len({(look["color"], *look["strokeDash"]) for look in looks}) == 48


def lines_of(svg: str) -> dict[str, tuple[str, str]]:
    """Colour and dash pattern of each name's lines."""
    found = {}
    for path in re.findall(
        r'<path aria-label="[^"]*" role="graphics-symbol"[^>]*dasharray[^>]*>', svg
    ):
        ((name, stroke, dash),) = re.findall(
            r'aria-label="([^:]*):.* stroke="([^"]*)".* stroke-dasharray="([^"]*)"', path
        )
        found[name] = (stroke, dash)
    return found


def test_a_loss_looks_alike_everywhere_and_has_its_own_axis() -> None:
    large = [(float(step), 1000.0 - 400 * step) for step in range(3)]
    small = [(float(step), 0.001 * step) for step in range(3)]
    logged = {
        "A": [{"train/cls_loss": large, "train/loss": small}],
        "B": [{"train/loss": large, "train/seg_loss": small, "train/lr": small}],
    }
    one, other = (str(chart.svg) for chart in training_charts(logged))
    looks = [lines_of(one), lines_of(other)]
    assert [sorted(found) for found in looks] == [["cls_loss", "loss"], ["loss", "seg_loss"]]
    assert looks[0]["loss"] == looks[1]["loss"]
    assert len({*looks[0].values(), *looks[1].values()}) == 3
    for svg in (one, other):
        assert re.search(r">0\.00\d+<", svg), "the small loss has ticks of its size"
        assert re.search(r">(500|1,000)<", svg)


@pytest.mark.parametrize(("steps", "dots"), [(1, 1), (3, 3), (50, 0)])
def test_a_loss_of_few_steps_is_drawn_as_points(steps: int, dots: int) -> None:
    losses = [(float(step), 1.0 + step) for step in range(steps)]
    (chart,) = training_charts({"A": [{"train/loss": losses}]})
    assert str(chart.svg).count('aria-roledescription="point"') == dots


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
    images = [a for tag, a in found.tags if tag == "img"]
    layers = [a["src"] for a in images if a.get("class", "").startswith("s0-image-")]
    assert len(layers) == 4 * 4, "image, truth and two methods for four images"
    assert all(src.startswith("data:image/webp;base64,") for src in layers)
    assert page.count(".s0-image-0{") == page.count(".s0-image-0-faded{") == 1, "an image once"
    rows = [tag for tag, a in found.tags if a.get("class") == "zoom"]
    assert len(rows) == len(layers), "each can be enlarged"
    sources = {v for _, a in found.tags for k, v in a.items() if k in ("src", "href")}
    anchors = {f"#{a['id']}" for _, a in found.tags if "id" in a}
    assert {v for v in sources if not v.startswith("data:image/")} <= anchors | {""}
    assert "#s0-gallery" in sources, "listed among the contents"
    assert "http" not in page
    assert not [tag for tag, _ in found.tags if tag in ("link", "iframe")]
    assert [a for tag, a in found.tags if tag == "script"] == [{}], "its own script, none fetched"
    assert not re.findall(r"url\((?!data:image/jpeg;base64,)", page)
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
        "95 % interval and seeds",
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


def headlines(tmp_path: Path, qualities: list[float], **options: object) -> Headline:
    runs = [
        make_run(tmp_path / f"{k}{seed}", method=f"M{k}", seed=seed, draw=10 * k + seed, quality=q)
        for k, q in enumerate(qualities)
        for seed in range(2)
    ]
    (found,) = compare(runs, CompareArguments(**{"resamples": 200, **options}))  # type: ignore[arg-type]
    return headline_of(found)


def test_the_first_screen_says_who_leads_and_if_by_chance(tmp_path: Path) -> None:
    clear = headlines(tmp_path / "a", [0.6, 0.9, 0.7])
    assert re.fullmatch(r"M1 leads M2 by \d+\.\d points, more than chance", clear.lead)
    assert "which does not hold zero." in clear.sentences[0]
    assert "either" not in clear.sentences[0]
    assert clear.sentences[1].endswith("took 27 min of wall time; the cheapest, M0, took 18 min.")
    assert ("seeds", "2 runs (seed=0,1)") in clear.facts
    assert clear.table.header[-3:] == ["training, wall hours", "evaluation, s/image", "seeds"]
    assert [name for name, _ in clear.table.rows] == ["M1", "M2", "M0"]
    assert clear.table.rows[0][1][1].text == "reference"
    assert ("training", "400 steps of 8 images, crops of 96 px") in clear.facts
    level = headlines(tmp_path / "b", [0.7, 0.7, 0.7])
    assert level.lead.endswith("which may be chance")
    assert "which holds zero. No clear difference to M" in level.sentences[0]
    listed = headlines(tmp_path / "c", [0.6, 0.9], unranked=True)
    assert listed.lead.startswith("Not ranked")
    assert [name for name, _ in listed.table.rows] == ["M0", "M1"], "as given"
    assert "difference" not in " ".join(listed.table.header)
    alone = headlines(tmp_path / "d", [0.6])
    assert alone.lead.startswith("M0 reaches ")
    assert alone.sentences[1] == "Cost: training a run of M0 took 18 min of wall time."
    fair = headlines(tmp_path / "e", [0.6, 0.6])
    assert fair.sentences[1].endswith("took 18 min of wall time, and no other group less.")


def test_an_encoder_is_named_with_what_changes_it(tmp_path: Path) -> None:
    overrides = {"depth": 5, "patch_size": 8}
    for name, given in (("plain", {}), ("cut", overrides)):
        config = {"method": {}, "backbone": {"overrides": given}}
        make_run(tmp_path / name / "run", config=config)
    shown = {}
    for name in ("plain", "cut"):
        (found,) = compare([tmp_path / name], CompareArguments(resamples=10))
        shown[name] = dict(headline_of(found).facts)["encoder"]
        assert found.entries[0].card["backbone"]["overrides"] == (
            overrides if name == "cut" else {}
        )
    assert shown == {"plain": "vit, unknown", "cut": "vit with depth=5, patch_size=8, unknown"}


def test_out_is_required(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main(["report", str(run)]) == 2
    assert "out is missing" in capsys.readouterr().err
