import csv
import html
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs_on_disk import IMAGES, label_maps, make_run

from wsss.cli import main
from wsss.comparison.bootstrap import draw
from wsss.comparison.compare import CompareArguments, compare
from wsss.comparison.entries import THRESHOLDS, find_results
from wsss.comparison.grids import Cell, Grid, html_tables, latex, markdown
from wsss.comparison.page import page_of
from wsss.comparison.protocols import MEASURING
from wsss.comparison.tables import tables
from wsss.core.errors import WSSSError
from wsss.evaluation.per_image import mean_iou
from wsss.evaluation.protocol import Protocol
from wsss.results.store import RESULTS_FILE, ROWS, read_cells


def plain_miou(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    truth, guess = (np.stack(maps) for maps in zip(*pairs, strict=True))
    ious = [
        ((truth == c) & (guess == c)).sum() / ((truth == c) | (guess == c)).sum()
        for c in range(3)
        if (truth == c).any()
    ]
    return float(np.mean(ious))


def grid_of(paths: list[Path], **options: object) -> list[Grid]:
    (comparison,) = compare(paths, CompareArguments(**{"resamples": 300, **options}))  # type: ignore[arg-type]
    return tables(comparison)


def row(grid: Grid, name: str) -> list[Cell]:
    return next(cells for heading, cells in grid.rows if heading == name)


@pytest.fixture
def three_seeds(tmp_path: Path) -> list[Path]:
    return [
        make_run(tmp_path / f"{method}-{seed}", method=method, seed=seed, quality=quality)
        for method, quality in (("ToCo", 0.7), ("GETAM", 0.85))
        for seed in range(3)
    ]


def test_mean_deviation_and_a_clear_winner_in_bold(three_seeds: list[Path]) -> None:
    numbers, differences, _, classes = grid_of(three_seeds)
    assert numbers.header == ["metric", "ToCo (n=3)", "GETAM (n=3)"]
    values = [100 * plain_miou(label_maps(seed, 0.7)) for seed in range(3)]
    toco, getam = row(numbers, "CAM seed mIoU, image labels given")
    assert toco.text == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    assert (toco.bold, getam.bold) == (False, True)
    assert not any(cell.bold for cell in row(numbers, "image mAP")), "nothing to draw from"
    assert row(differences, "CAM seed mIoU, image labels given")[1].text == "reference"
    assert row(differences, "CAM seed mIoU, image labels given")[0].text.startswith("-")
    assert len(classes.rows) == 3


def test_unequal_choices_of_settings_are_shown_not_ranked(tmp_path: Path) -> None:
    """A run of an earlier version declares nothing."""
    tuned = "tuned: 16 trials on a holdout of 24 masks"
    runs = [
        make_run(tmp_path / "a", method="A", choice=tuned),
        make_run(tmp_path / "b", method="B"),
        make_run(tmp_path / "c", method="C", choice=None),
    ]
    said = rf"differ in choice \(choice: \"{tuned}\" of A / \"not declared\" of B, C\)"
    with pytest.raises(WSSSError, match=rf"{said}.*allow=\[choice\]"):
        grid_of(runs)
    numbers, *_ = grid_of(runs, allow=["choice"])
    chosen = [cell.text for cell in row(numbers, "settings chosen")]
    assert chosen == [tuned, "not declared", "not declared"]
    assert any("differs: choice" in note for note in numbers.notes)
    equal, *_ = grid_of(runs[1:])
    assert "settings of all chosen: not declared" in equal.notes
    assert "settings chosen" not in [name for name, _ in equal.rows]


def test_settings_tuned_for_other_numbers_are_ranked_and_said(tmp_path: Path) -> None:
    """A segmenter is tuned for another number than maps are; a run by hand for none."""
    tuned = "tuned: 16 trials on a holdout of 24 masks"
    runs = [
        make_run(tmp_path / name, method=name, choice=tuned, config={"objective": number})
        for name, number in (("A", "seed_miou"), ("B", "seg_miou"), ("C", "seed_miou"))
    ]
    numbers, *_ = grid_of(runs)
    assert f"settings of all chosen: {tuned}" in numbers.notes
    assert "settings tuned for seed_miou: A, C" in numbers.notes
    assert "settings tuned for seg_miou: B" in numbers.notes
    byhand = make_run(tmp_path / "D", method="D", config={"objective": "seed_miou"})
    assert not any("tuned for" in note for note in grid_of([byhand])[0].notes)


def test_ties_are_not_bold_and_one_seed_is_said(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", method="A", quality=0.7, draw=0),
        make_run(tmp_path / "b", method="B", quality=0.7, draw=1),
    ]
    numbers, differences, *_ = grid_of(runs, baseline="a")
    cells = row(numbers, "CAM seed mIoU, image labels given")
    assert not any(cell.bold for cell in cells)
    assert row(differences, "CAM seed mIoU, image labels given")[1].text.endswith("tie")
    assert any("one seed only: A, B" in note for note in numbers.notes)


@pytest.mark.parametrize(
    ("card", "named"),
    [
        ({"seg_scales": [1.0, 1.5]}, "seg_scales: [1.0] of A / [1.0, 1.5] of B"),
        ({"crf": {"name": "psa"}}, "crf: toco of A / psa of B"),
        ({"crf": None}, "crf: toco of A / null of B"),
        ({"list_sha256": "c" * 64}, "list_sha256"),
        ({"backbone": {"name": "dino", "state_sha256": "d" * 64}}, "vit (bbbbbbbb) of A / dino"),
        ({"iterations": 20000}, "iterations: 400 of A / 20000 of B"),
    ],
)
def test_other_protocols_are_refused_by_name(tmp_path: Path, card: dict, named: str) -> None:
    runs = [make_run(tmp_path / "a", method="A"), make_run(tmp_path / "b", method="B", **card)]
    with pytest.raises(WSSSError, match="not ranked") as caught:
        grid_of(runs)
    assert named in str(caught.value)
    numbers, *rest = grid_of(runs, unranked=True)
    assert not any(cell.bold for _, cells in numbers.rows for cell in cells)
    assert len(rest) == 2, "no differences of runs that are not ranked"
    assert any(next(iter(card)) in note for note in numbers.notes)


def test_an_untouched_difference_is_no_obstacle(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", method="A"),
        make_run(tmp_path / "b", method="B", crf={"name": "psa"}, seg_scales=[0.5]),
    ]
    with pytest.raises(WSSSError, match="metrics=") as caught:
        grid_of(runs)
    (untouched,) = re.findall(r"metrics=\[(.*?)\]", str(caught.value))
    assert untouched == "seed_miou,seed_threshold_oracle,seg_miou,image_map"
    assert grid_of(runs, metrics=untouched.split(","))
    training = [make_run(tmp_path / "c", method="C", crop_size=448), runs[0]]
    numbers, *_ = grid_of(training, allow=["crop_size"])
    assert any(note.startswith("differs: crop_size") for note in numbers.notes)
    with pytest.raises(WSSSError, match="allow=crf"):
        grid_of(runs, allow=["crf"])


def change(run: Path, **values: Any) -> Path:
    """Changes a split's entries in results.json."""
    results = json.loads((run / RESULTS_FILE).read_text())
    results["splits"]["val"].update(values)
    (run / RESULTS_FILE).write_text(json.dumps(results))
    return run


def test_every_setting_of_a_protocol_is_compared_or_a_methods() -> None:
    assert set(MEASURING) == {key for _, key, _ in ROWS}
    measured = {name for names in MEASURING.values() for name in names}
    # what a holdout is says the hash of its list, wherever that was taken from
    held_out = {"holdout_per_class", "holdout_split"}
    assert {field.name for field in fields(Protocol)} <= measured | {*THRESHOLDS} | held_out


@pytest.mark.parametrize(
    ("card", "touched", "untouched"),
    [
        ({"single_resize": 448}, ["image_map"], ["seed_miou", "seg_miou_ms_crf"]),
        ({"single_resize": 448}, ["seg_miou"], ["seed_miou"]),
        ({"resize": 448}, ["seg_miou_ms_crf"], ["seg_miou"]),
        ({"merge_of": "probabilities"}, ["seg_miou_ms_crf"], ["seg_miou"]),
        ({"seg_sizes": [256]}, ["seg_miou_ms_crf"], ["seg_miou"]),
        ({"crf_backend": "torch"}, ["seg_miou_ms_crf"], ["seg_miou", "seed_miou"]),
        ({"oracle_thresholds": [0.5]}, ["seed_threshold_oracle"], ["seed_miou"]),
        ({"use_image_labels": False}, ["seed_miou"], ["seg_miou"]),
        ({"train_list_sha256": "e" * 64}, ["seed_miou"], []),
        ({"holdout_per_class": 9, "holdout_split": "train"}, [], ["seed_miou", "seg_miou"]),
    ],
)
def test_a_setting_bars_the_numbers_that_it_decides(
    tmp_path: Path, card: dict, touched: list[str], untouched: list[str]
) -> None:
    runs = [make_run(tmp_path / "a", method="A"), make_run(tmp_path / "b", method="B", **card)]
    for metric in touched:
        with pytest.raises(WSSSError, match=f"differ in .*{next(iter(card))}"):
            grid_of(runs, metrics=[metric])
    for metric in untouched:
        assert grid_of(runs, metrics=[metric])


def test_other_masks_or_holdouts_are_refused_if_lists_agree(tmp_path: Path) -> None:
    hashes = {"labels": "1" * 64, "masks": "2" * 64}
    one = change(make_run(tmp_path / "a", method="A"), data_sha256=hashes)
    other = make_run(tmp_path / "b", method="B")
    change(other, data_sha256=hashes | {"masks": "3" * 64})
    with pytest.raises(WSSSError, match="differ in masks_sha256"):
        grid_of([one, other])
    change(other, data_sha256=hashes | {"labels": "3" * 64})
    with pytest.raises(WSSSError, match="differ in labels_sha256"):
        grid_of([one, other])
    assert grid_of([one, other], metrics=["seg_miou"]), "segmentation is given no labels"
    held = [
        make_run(tmp_path / name, method=name, holdout={"list_sha256": digit * 64})
        for name, digit in (("C", "4"), ("D", "5"))
    ]
    assert grid_of(held)
    for run in held:
        change(run, seed_miou_holdout=0.5)
    with pytest.raises(WSSSError, match="differ in holdout_list_sha256"):
        grid_of(held)


def test_encoders_that_start_at_random_are_alike(tmp_path: Path) -> None:
    def start(method: str, digit: str, **overrides: int) -> Path:
        vit = {"name": "vit", "source": "random", "state_sha256": digit * 64}
        config = {"method": {}, "backbone": {"overrides": overrides}}
        return make_run(tmp_path / digit, method=method, backbone=vit, config=config)

    runs = [start("A", "4", patch_size=8), start("B", "5", patch_size=8)]
    assert grid_of(runs)
    cut = start("B", "6", patch_size=8, depth=5)
    with pytest.raises(WSSSError, match=r"vit \(random, depth=5, patch_size=8\)"):
        grid_of([runs[0], cut])
    results = json.loads((cut / RESULTS_FILE).read_text())
    results["config"]["backbone"]["overrides"] = "damaged"
    (cut / RESULTS_FILE).write_text(json.dumps(results))
    with pytest.raises(WSSSError, match=r"vit \(random\)"):
        grid_of([runs[0], cut])


def test_thresholds_are_a_methods_but_a_group_shares_them(tmp_path: Path) -> None:
    one, other = (
        make_run(
            tmp_path / str(seed),
            seed=seed,
            cam_threshold=0.4 + seed / 10,
            config={"method": {}, "eval": {"cam_threshold": 0.4 + seed / 10}},
        )
        for seed in range(2)
    )
    with pytest.raises(WSSSError, match=r"cam_threshold differs; use by=method,eval\.cam_thresh"):
        grid_of([one, other])
    assert grid_of([one, make_run(tmp_path / "b", method="B", cam_threshold=0.3)])


def test_runs_without_masks_are_compared_by_image_scores(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, method=name) for name in ("A", "B")]
    for run in runs:
        change(run, seed_miou=None, seg_miou=None, seg_miou_ms_crf=None, maps={})
    (numbers,) = grid_of(runs)
    assert [cell.text for cell in row(numbers, "image mAP")] == ["50.0", "50.0"]


def test_runs_of_other_data_have_no_common_table_of_classes(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "A", method="A")]
    runs.append(make_run(tmp_path / "B", method="B", data="other", classes=["background", "cat"]))
    numbers, details = grid_of(runs, unranked=True)
    assert any("differs: data" in note for note in numbers.notes)
    assert "in detail" in details.title
    assert main(["report", *map(str, runs), f"out={tmp_path / 'r'}", "unranked=true"]) == 0
    page = (tmp_path / "r" / "index.html").read_text()
    assert "not evaluated on the same images" in page


def test_kinds_of_supervision_are_kept_apart(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", method="A"),
        make_run(tmp_path / "b", method="B", supervision="image labels + saliency", crf=None),
    ]
    found = compare(runs, CompareArguments(resamples=10))
    assert [c.supervision for c in found] == ["image labels", "image labels + saliency"]
    change(runs[1], seed_miou=None)
    chosen = CompareArguments(resamples=10, baseline="a", metrics=["seed_miou"], metric="seed_miou")
    assert [c.baseline for c in compare(runs, chosen)] == ["A", None], "of its supervision"
    again = make_run(tmp_path / "c", method="A", supervision="pixel masks")
    assert len(compare([*runs, again], CompareArguments(resamples=10))) == 3
    # a card of an earlier version, which names the weights alone
    weights = {"name": "vit_base_patch16_siglip_224.webli", "source": "timm:", "pretraining": "-"}
    tower = make_run(tmp_path / "d", method="A", backbone=weights)
    (found,) = [c for c in compare([*runs, tower], CompareArguments(resamples=10))[2:]]
    assert (found.supervision, list(found.groups)) == ("image labels + CLIP", ["A"])


def test_what_is_declared_is_told_apart(tmp_path: Path) -> None:
    weights = {"name": "vit", "state_sha256": "b" * 64}
    tag = {"source": "timm:vit_base_patch16_224.augreg_in21k", "pretraining": "ImageNet-1k"}
    said = {"source": "file:a.pth", "pretraining": "declared by the user: Places"}
    before = {"source": "file:a.pth", "pretraining": "Places"}  # a sentence of an earlier version
    runs = [
        make_run(tmp_path / name, method=name, backbone=weights | more)
        for name, more in {"A": tag, "B": said, "C": before}.items()
    ]
    (found,) = compare(runs, CompareArguments(resamples=10))
    assert [note for note in found.notes if note.startswith("pretraining")] == [
        "pretraining: ImageNet-21k classification: A",
        "pretraining: declared by the user: Places: B, C",
    ]
    assert '"pretraining": "declared by the user: Places"' in html.unescape(
        page_of([found], {}, gallery=0)
    )


def test_runs_of_a_group_differ_in_their_seed_alone(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    with pytest.raises(WSSSError, match="seed 0 twice"):
        grid_of(runs)
    other = make_run(tmp_path / "c", seed=1)
    text = (other / RESULTS_FILE).read_text().replace('"weight": 0.2', '"weight": 0.5')
    (other / RESULTS_FILE).write_text(text)
    with pytest.raises(WSSSError, match=r"by=method,method\.weight"):
        grid_of([runs[0], other])
    numbers, *_ = grid_of([runs[0], other], by="method.weight")
    assert numbers.header[1:] == ["weight=0.2 (n=1)", "weight=0.5 (n=1)"]
    numbers, *_ = grid_of([runs[0], other], by="method,method.weight")
    assert numbers.header[1:] == ["ToCo, weight=0.2 (n=1)", "ToCo, weight=0.5 (n=1)"]


def test_bootstrap_agrees_with_drawing_images_by_hand(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / str(s), seed=s) for s in range(2)]
    (comparison,) = compare(folders, CompareArguments(resamples=10))
    counts = [entry.counts("seed_miou") for entry in comparison.groups["ToCo"]]
    draws = draw({"x": counts[:1], "y": counts[1:]}, resamples=60, seed=3)
    generator = np.random.default_rng(3)
    expected = []
    for size in (50, 10):
        weights = generator.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=size)
        generator.integers(1, size=(size, 1))
        generator.integers(1, size=(size, 1))
        for weight in weights:
            chosen = np.repeat(np.arange(IMAGES), weight)
            one, other = (plain_miou([label_maps(s, 0.7)[i] for i in chosen]) for s in range(2))
            expected.append(one - other)
    np.testing.assert_allclose(draws.drawn["x"] - draws.drawn["y"], expected, atol=1e-12)
    difference = draws.difference("x", "y")
    assert difference.value == pytest.approx(
        float(mean_iou(counts[0].sum(0)) - mean_iou(counts[1].sum(0)))
    )
    assert difference.low == pytest.approx(np.percentile(expected, 2.5))


def test_seeds_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    base = np.full((200, 2, 3), 100) - np.array([30, 0, 0]) + rng.integers(0, 5, (200, 2, 3))
    worse = base - np.array([20, 0, 0])
    narrow = draw({"a": [base], "b": [base]}, resamples=200).drawn["a"]
    wide = draw({"a": [base, worse], "b": [base]}, resamples=200).drawn["a"]
    assert np.std(wide) > 5 * np.std(narrow)


def test_methods_bear_their_fields_names_in_old_runs_too(tmp_path: Path) -> None:
    """Older runs wrote the name of the class; the two are one group, found as method= has it."""
    runs = [
        make_run(tmp_path / f"{seed}", method=method, seed=seed)
        for seed, method in enumerate(("TKPPCL", "TKP-PCL"))
    ]
    numbers, *_ = grid_of([*runs, make_run(tmp_path / "b", method="ToCo")], baseline="tkp_pcl")
    assert numbers.header[1:] == ["TKP-PCL (n=2)", "ToCo (n=1)"]


def test_every_format_through_the_command(three_seeds: list[Path], tmp_path: Path) -> None:
    for suffix in ("md", "csv", "tex", "html"):
        out = tmp_path / "tables" / f"t.{suffix}"
        arguments = [str(p) for p in three_seeds]
        options = ["--by", "method", "--baseline=toco", f"out={out}", "resamples=100"]
        assert main(["compare", *arguments, *options]) == 0
        assert "GETAM" in out.read_text()
    rows = list(csv.DictReader((tmp_path / "tables" / "t.csv").open()))
    assert {"table", "row", "column", "value", "bold"} == set(rows[0])


def test_a_bare_switch_may_stand_anywhere(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "a"), make_run(tmp_path / "b", method="B", crf=None)
    for switch in (["--unranked"], ["--unranked", "true"], ["unranked=true"]):
        assert main(["compare", str(one), *switch, str(other)]) == 0
        assert main(["compare", str(one), str(other), *switch]) == 0
    assert main(["compare", str(one), str(other), "--unranked", "false"]) == 2


def test_a_file_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "a")
    (tmp_path / "file").touch()
    assert main(["compare", str(run), f"out={tmp_path / 'file' / 't.md'}"]) == 2
    assert "t.md: cannot be written" in capsys.readouterr().err


def test_text_is_escaped() -> None:
    grid = Grid("a & b", ["x|y", "A_1"], [("50%", [Cell("1 ± 2", True)])], ["<note>"])
    assert r"\&" in latex([grid])
    assert r"\textbf{1 $\pm$ 2}" in latex([grid])
    assert "x\\|y" in markdown([grid])
    assert "&lt;note&gt;" in html_tables([grid])


def test_folders_are_searched_without_a_runs_other_evaluations(tmp_path: Path) -> None:
    run = make_run(tmp_path / "study" / "run")
    make_run(run / "eval" / "abc")
    assert find_results([tmp_path]) == [run]
    assert find_results([run, run / RESULTS_FILE]) == [run]
    assert find_results([run / "eval" / "abc"]) == [run / "eval" / "abc"]
    with pytest.raises(WSSSError, match="no results"):
        find_results([tmp_path / "nothing"])


def test_unfinished_runs_are_left_out_by_name(
    three_seeds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, limited = tmp_path / "begun", make_run(tmp_path / "limited", quality=0.5, seed=7)
    inside = begun / "random_walk" / "network-1"
    inside.mkdir(parents=True)
    for folder in (begun, inside):
        (folder / "config.yaml").write_text("seed: 0\n")
    content = json.loads((limited / RESULTS_FILE).read_text())
    (limited / RESULTS_FILE).write_text(json.dumps(content | {"status": "unfinished: 1 of 9"}))
    (comparison,) = compare([tmp_path], CompareArguments(resamples=10))
    assert comparison.notes[-1] == "left out, not finished (2): begun, limited"
    assert {entry.folder for entry in comparison.entries} == {*three_seeds}
    assert main(["compare", str(limited), str(begun)]) == 2
    assert "no finished run there: limited, begun; " in capsys.readouterr().err


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    for options, message in (
        ({"split": "test"}, "has no split test"),
        ({"metrics": ["seed_moiu"]}, "no run has seed_moiu"),
        ({"metric": "image_map"}, "expected a mIoU"),
        ({"baseline": "afa"}, "there are ToCo"),
        ({"by": "method.wieght"}, "no such key"),
        ({"resamples": 0}, "resamples=0: expected a number greater than or equal to 1"),
    ):
        with pytest.raises(WSSSError, match=message):
            grid_of([run], **options)
    results = json.loads((run / RESULTS_FILE).read_text())
    del results["splits"]["val"]["maps"]
    (run / RESULTS_FILE).write_text(json.dumps(results))
    with pytest.raises(WSSSError, match="older version"):
        grid_of([run])
    (run / "images.npz").write_bytes(b"no")
    with pytest.raises(WSSSError, match=r"images\.npz"):
        read_cells(run / "images.npz", "val")
