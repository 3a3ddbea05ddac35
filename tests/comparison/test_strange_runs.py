"""Runs that somebody else hands over: numbers are taken again, names are text and nothing else."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from runs_on_disk import make_run

from wsss.cli import main
from wsss.comparison.compare import CompareArguments, compare
from wsss.comparison.dashboard import read_runs
from wsss.comparison.entries import logged_series
from wsss.comparison.grids import (
    FORMATS,
    Cell,
    Grid,
    comma_separated,
    html_tables,
    latex,
    markdown,
    print_grids,
)
from wsss.core.errors import WSSSError
from wsss.results.store import CELLS_FILE, RESULTS_FILE, print_table

ATTACK = "<img src=x onerror=alert(1)>"


def change(run: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Changes val's entry in results.json."""
    results = json.loads((run / RESULTS_FILE).read_text())
    edit(results["splits"]["val"])
    (run / RESULTS_FILE).write_text(json.dumps(results))
    return run


def set_key(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def edit(metrics: dict[str, Any]) -> None:
        node: Any = metrics
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_key("seed_miou", value=0.99), "seed_miou is 0.99, but the counts in images.npz give"),
        (set_key("seg_miou_ms_crf", value=0.99), "seg_miou_ms_crf is 0.99"),
        (set_key("maps", "seg", "miou", value=0.99), "maps.seg.miou is 0.99"),
        (set_key("per_class", "seg_iou", 1, value=0.99), "per_class.seg_iou of cat is 0.99"),
        (set_key("per_class", "seg_iou", 1, value=None), "per_class.seg_iou of cat is None"),
    ],
)
@pytest.mark.parametrize("ranked", [True, False])
def test_numbers_that_the_counts_do_not_give_are_refused(
    edit: Callable[[dict[str, Any]], None], message: str, ranked: bool, tmp_path: Path
) -> None:
    runs = [make_run(tmp_path / name, method=name) for name in "AB"]
    change(runs[1], edit)
    with pytest.raises(WSSSError, match=rf"B/results\.json: splits\.val: {message}") as caught:
        compare(runs, CompareArguments(resamples=10, unranked=not ranked))
    assert f"run `wsss eval run={runs[1]}` again" in str(caught.value)


def test_counts_of_no_image_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    with np.load(run / CELLS_FILE) as stored:
        arrays = dict(stored)
    np.savez(run / CELLS_FILE, **(arrays | {"val/seg": arrays["val/seg"][:0]}))
    with pytest.raises(WSSSError, match=r"images\.npz: has no counts of seg; run `wsss eval"):
        compare([run], CompareArguments(resamples=10))


@pytest.mark.parametrize("digest", [5, ["x"], {"a": 1}, True])
def test_a_hash_of_another_kind_is_no_obstacle(digest: object, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, method=name) for name in "AB"]
    change(runs[1], set_key("protocol", "backbone", "state_sha256", value=digest))
    with pytest.raises(WSSSError, match=r"protocols differ.*vit \(bbbbbbbb\)"):
        compare(runs, CompareArguments(resamples=10))


def test_a_number_may_differ_by_rounding(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    value = json.loads((run / RESULTS_FILE).read_text())["splits"]["val"]["seed_miou"]
    change(run, set_key("seed_miou", value=value + 1e-8))
    assert compare([run], CompareArguments(resamples=10))


def test_the_command_for_maps_made_elsewhere_is_named(tmp_path: Path) -> None:
    run = change(make_run(tmp_path / "a"), set_key("seed_miou", value=0.99))
    results = json.loads((run / RESULTS_FILE).read_text())
    source = {"cams": "irn/cam", "first_class": 0}
    (run / RESULTS_FILE).write_text(json.dumps(results | {"source": source}))
    with pytest.raises(WSSSError, match=rf"`wsss eval cams=irn/cam out={run}` again"):
        compare([run], CompareArguments())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("protocol", "supervision"), r"protocol\.supervision is missing"),
        (("protocol", "list_sha256"), r"protocol\.list_sha256 is missing"),
        (("per_class", "seg_iou"), r"has seg_miou.*, but not maps\.seg.* and seg_.*iou"),
        (("maps", "seg"), r"has seg_miou, but not maps\.seg and seg_iou"),
        (("per_class",), r"per_class\.class is missing"),
        (("protocol",), r"protocol\.supervision is missing"),
    ],
)
def test_what_a_comparison_reads_and_is_not_there_is_named(
    path: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    def edit(metrics: dict[str, Any]) -> None:
        node = metrics
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]

    run = change(make_run(tmp_path / "a"), edit)
    with pytest.raises(WSSSError, match=message):
        compare([run], CompareArguments())


@pytest.mark.parametrize("key", ["method", "data", "seed"])
def test_a_run_that_does_not_say_what_it_is_is_named(key: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    results = json.loads((run / RESULTS_FILE).read_text())
    del results[key]
    (run / RESULTS_FILE).write_text(json.dumps(results))
    with pytest.raises(WSSSError, match=f"{key} is missing"):
        compare([run], CompareArguments())


def test_counts_of_other_images_or_classes_are_named(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, method=name) for name in "AB"]
    with np.load(runs[1] / CELLS_FILE) as content:
        arrays = {key: content[key] for key in content.files}
    cells = arrays["val/seg"].copy()
    cells[cells[:, 0] == 3, 0] = 4  # the counts stay, an image goes
    np.savez(runs[1] / CELLS_FILE, **{**arrays, "val/seg": cells})
    with pytest.raises(WSSSError, match=r"images\.npz counts seg of 29 and 30 images"):
        compare(runs, CompareArguments(resamples=10))
    cells[0, 1] = 99
    np.savez(runs[1] / CELLS_FILE, **{**arrays, "val/seg": cells})
    with pytest.raises(WSSSError, match=r"images\.npz: counts other classes"):
        compare(runs, CompareArguments(resamples=10))
    del arrays["val/seg"]
    np.savez(runs[1] / CELLS_FILE, **arrays)
    with pytest.raises(WSSSError, match=r"images\.npz: has no counts of seg"):
        compare(runs, CompareArguments(resamples=10))


def test_a_list_of_runs_without_counts_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run / CELLS_FILE).unlink()
    (found,) = compare([run], CompareArguments(unranked=True))
    assert "no images.npz to check the numbers by: a" in found.notes
    with pytest.raises(WSSSError, match=r"images\.npz: there is no such file"):
        compare([run], CompareArguments())


STRANGE = Grid(
    f"t {ATTACK} ](http://x)",
    ["metric", "=cmd|' /C calc'!A0", f"| {ATTACK} |"],
    [
        ("-2+3", [Cell("+1.2 [-0.3, +2.0] tie"), Cell("61.2 ± 0.4", True)]),
        ("[/red]@SUM(A1)", [Cell("-1.5"), Cell("=1+1", True)]),
        ("@x", [Cell("-"), Cell("a\nb\x1b[2J")]),
        (r"\|", [Cell("+1e-5"), Cell("＝1")]),
    ],
    [ATTACK],
)


def test_markdown_holds_no_html_links_or_further_columns() -> None:
    text = markdown([STRANGE])
    assert "<" not in text
    assert "&lt;img" in text
    assert "](" not in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 4
            assert line.endswith("|")
    assert "| +1.2 [-0.3, +2.0] tie | **61.2 ± 0.4** |" in text, "numbers stay as they are"


def test_cells_of_a_spreadsheet_are_no_formulas() -> None:
    rows = list(csv.reader(io.StringIO(comma_separated([STRANGE]))))
    assert len(rows) == 1 + 4 * 2
    numbers = {"+1.2 [-0.3, +2.0] tie", "-1.5", "-", "+1e-5"}
    for row in rows:
        assert len(row) == 5
        for cell in row:
            assert cell in numbers or not cell.lstrip().startswith(tuple("=+-@＝＋－＠"))
    values = [row[3] for row in rows]
    assert numbers <= {*values}, "numbers stay numbers"
    assert {"'=1+1", "'＝1", "61.2 ± 0.4"} <= {*values}
    assert {row[1] for row in rows[1:]} == {"'-2+3", "[/red]@SUM(A1)", "'@x", r"\|"}


def test_latex_holds_no_command_of_a_name() -> None:
    grid = Grid(r"\input{x}", ["a^b~c"], [("[x]", []), (r"\write18{y}", [])], ["50% <b> {}"])
    text = latex([grid])
    assert r"\textbackslash input\{x\}" in text
    assert r"a\textasciicircum b\textasciitilde c" in text
    assert r"{}[x]" in text, "no argument of the line's end"
    assert r"\textbackslash write18\{y\}" in text
    assert r"50\% \textless b\textgreater  \{\}" in text


def test_html_and_terminal_show_names_as_they_are() -> None:
    assert "<img" not in html_tables([STRANGE])
    out = io.StringIO()
    print_grids([STRANGE], Console(file=out, width=200))
    assert "[/red]@SUM(A1)" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()
    results = {"method": "[/x]", "data": "[b]", "splits": {"[/val]": {"notes": ["[/n]"]}}}
    columns = {"class": ["[/cat]"], "seed_iou": [0.5]}
    results["splits"]["[/val]"] |= {"per_class": columns, "seed_miou": 0.5}  # type: ignore[index]
    print_table(results, console=Console(file=out, width=200), per_class=True)
    for text in ("[/x] · [b]", "[/val]", "[/n]", "[/cat]"):
        assert text in out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 300])
def test_narrow_terminals_shorten_names_and_no_numbers(width: int) -> None:
    heads = [f"toco-minivoc-ablation-of-losses-{k} (n=3)" for k in range(6)]
    names = ["CAM seed mIoU, image labels given", "CAM seed mIoU, predicted labels"]
    rows = [
        (name, [Cell(f"6{k}.{row} ± 0.{k}") for k in range(6)]) for row, name in enumerate(names)
    ]
    out = io.StringIO()
    print_grids([Grid("t", ["metric", *heads], rows)], Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    cells = [[text.strip() for text in line.strip("│┃").replace("┃", "│").split("│")]
             for line in lines if line.startswith(("│", "┃"))]  # fmt: skip
    shown = [text for row in cells for text in row[1:] if "±" in text]
    assert sorted(shown) == sorted(cell.text for _, found in rows for cell in found)
    headings = [text for row in cells if row[0] == "metric" for text in row[1:]]
    assert len({*headings}) == len(headings) == 6, "names stay different"
    blocks = len([row for row in cells if row[0] == "metric"])
    assert len(cells) == 3 * blocks, "no name is broken into lines"
    if width == 300:
        assert headings == heads
    else:
        whole = {row[0] for row in cells} == {"metric", *names}
        assert whole == (width > 60), "columns are shortened first"
        assert headings == list("012345")
        said = " ".join(out.getvalue().split())
        assert said.startswith(
            "columns without their common toco-minivoc-ablation-of-losses- t, n=3 "
        )


def test_a_column_has_one_short_name_in_all_tables() -> None:
    heads = [f"{start}-minivoc-on-images-{end}" for start in ("toco", "getam") for end in "xyz"]
    grids = [
        Grid(title, ["", *(f"{head}{count}" for head in heads)], [("a", [Cell(text)] * 6)])
        for title, count, text in (("t", " (n=1)", "1"), ("u", "", "+1.2 [-0.3, +4.5] tie"))
    ]
    out = io.StringIO()
    print_grids(grids, Console(file=out, width=80))
    found = re.findall(r"\S+…\S+", out.getvalue())
    assert len(found) == 12
    assert found[:6] == found[6:]
    assert len({*found}) == 6
    assert max(map(len, found)) <= 12


def test_class_names_of_strangers_reach_no_format_as_code(tmp_path: Path) -> None:
    classes = ["background", ATTACK, "=HYPERLINK(1)"]
    runs = [make_run(tmp_path / name, method=name, classes=classes) for name in "AB"]
    arguments = [*map(str, runs), "resamples=10", f"out={tmp_path / 'r'}", "gallery=0"]
    assert main(["report", *arguments]) == 0
    for name in ("table.md", "index.html"):
        assert "<img" not in (tmp_path / "r" / name).read_text()
    assert "'=HYPERLINK(1)" in (tmp_path / "r" / "table.csv").read_text()
    assert set(FORMATS) == {".md", ".csv", ".tex", ".html"}


def test_names_that_no_picture_can_hold_are_written_out(tmp_path: Path) -> None:
    """The renderer of charts would end the process."""
    names = {
        "method": "M\x00\x1b[31m",
        "choice": "by \ud800",
        "classes": ["background", "\x00", "d"],
    }
    run = make_run(tmp_path / "run", **names)  # type: ignore[arg-type]
    assert main(["report", str(run), "resamples=10", f"out={tmp_path / 'r'}", "gallery=0"]) == 0
    page = (tmp_path / "r" / "index.html").read_text()
    assert r"M\x00\x1b[31m" in page
    assert "by ?" in page


def test_rows_of_a_log_that_was_cut_are_passed_over(tmp_path: Path) -> None:
    logs = tmp_path / "logs" / "version_0"
    logs.mkdir(parents=True)
    rows = "epoch,step,train/loss\n0,9,1.5\n0,x,1.4\n0,19,1.\n0,29,1e\n0,39,1.0,7,8\n0\n\x00"
    (logs / "metrics.csv").write_text(rows)
    assert logged_series(tmp_path) == {"train/loss": [(9.0, 1.5), (19.0, 1.0), (39.0, 1.0)]}


@pytest.mark.parametrize(
    "text",
    [
        "method: [",
        "5",
        "{}",
        "method: toco\nstudy: x\ngallery: 0\nlogger: {}",
        "method: {_target_: 5}\nstudy: x\ngallery: 0\nlogger: {}",
        "method: {_target_: a.B}\nstudy: x\ngallery: many\nlogger: {}",
        "\x00",
        "method: {_target_: a.B}\nstudy: x\ngallery: 0\nlogger: wandb",
    ],
)
def test_a_configuration_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(text)
    (run / "wandb_id.txt").write_text("abc")
    with pytest.raises(WSSSError, match=r"run/config\.yaml: .*; restore it") as caught:
        read_runs(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_secret_in_a_configuration_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "swordfish")
    run = tmp_path / "run"
    run.mkdir()
    text = "method: {_target_: a.B}\nstudy: '${oc.env:SECRET}'\ngallery: 0\nlogger: {}\n"
    (run / "config.yaml").write_text(text)
    (run / "wandb_id.txt").write_text("abc")
    logs = run / "logs" / "version_0"
    logs.mkdir(parents=True)
    (logs / "metrics.csv").write_text("step,train/loss\n1,2\n")
    assert "swordfish" not in str(read_runs(tmp_path))
