"""Shares of variance of a factorial study: against regressions, through compare and report."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from runs_on_disk import make_run
from small_runs import printer

from wsss.comparison.bootstrap import Draws
from wsss.comparison.compare import CompareArguments, Comparison, compare
from wsss.comparison.factors import Factors, factors_of, means, shares
from wsss.comparison.tables import tables
from wsss.core.errors import WSSSError

KEYS = ["a", "b", "c"]
DESIGN = list(itertools.product(["a0", "a1"], ["b0", "b1", "b2"], ["c0", "c1"]))
BY = "maps.method,method.head,method.loss"


def drawn(values: np.ndarray, keys: list[str] = KEYS) -> tuple[Factors, Draws]:
    """A study whose cells have these numbers, each draw a little more."""
    groups = {", ".join(cell): cell for cell in DESIGN}
    factors = factors_of(keys, groups)
    assert factors is not None
    flat = dict(zip(groups, values.ravel(), strict=True))
    noise = np.random.default_rng(1).normal(0, 1e-3, (100, len(flat)))
    return factors, Draws(flat, {name: flat[name] + noise[:, k] for k, name in enumerate(flat)})


def explained(values: np.ndarray, columns: list[tuple[int, ...]]) -> float:
    """Sum of squares of a regression on all combinations of the levels of these sets of factors."""
    rows = list(itertools.product(range(2), range(3), range(2)))
    dummies = [np.ones(len(rows))]
    for chosen in columns:
        for levels in {tuple(row[k] for k in chosen) for row in rows}:
            dummies.append(np.array([float(tuple(r[k] for k in chosen) == levels) for r in rows]))
    matrix = np.stack(dummies, axis=1)
    fitted = matrix @ np.linalg.lstsq(matrix, values.ravel(), rcond=None)[0]
    return float(((fitted - values.mean()) ** 2).sum())


def test_shares_are_those_of_regressions() -> None:
    values = np.random.default_rng(0).random((2, 3, 2))
    found = {effect.name: effect for effect in shares(*drawn(values))}
    assert list(found) == ["a", "b", "c", "a x b", "a x c", "b x c", "higher orders"]
    total = ((values - values.mean()) ** 2).sum()
    mains = [(0,), (1,), (2,)]
    for name, chosen in (("a", (0,)), ("b", (1,)), ("c", (2,))):
        assert found[name].value == pytest.approx(explained(values, [chosen]) / total)
    for name, chosen in (("a x b", (0, 1)), ("a x c", (0, 2)), ("b x c", (1, 2))):
        more = explained(values, [*mains, chosen]) - explained(values, mains)
        assert found[name].value == pytest.approx(more / total)
    assert sum(effect.value for effect in found.values()) == pytest.approx(1)
    assert all(e.low <= e.value <= e.high for e in found.values())
    assert all(0 < e.high - e.low < 0.05 for e in found.values())


def test_a_sum_of_two_factors_has_no_interaction() -> None:
    a, b = np.array([0.0, 3.0])[:, None, None], np.array([0.0, 1.0, 2.0])[None, :, None]
    factors, draws = drawn(np.broadcast_to(a + b, (2, 3, 2)))
    found = {effect.name: effect.value for effect in shares(factors, draws)}
    assert found["a"] == pytest.approx(2.25 / (2.25 + 2 / 3))
    assert found["b"] == pytest.approx(1 - found["a"])
    assert [found[name] for name in found if name not in "ab"] == pytest.approx([0] * 5)
    by_level = {e.name: e.value for own in means(factors, draws).values() for e in own}
    assert by_level == pytest.approx(
        {"a0": 1, "a1": 4, "b0": 1.5, "b1": 2.5, "b2": 3.5, "c0": 2.5, "c1": 2.5}
    )


def test_equal_cells_have_nothing_to_share() -> None:
    factors, draws = drawn(np.full((2, 3, 2), 0.5))
    assert all(effect.value == 0 for effect in shares(factors, draws))


def test_one_varying_factor_is_no_design() -> None:
    assert factors_of(["a", "b"], {"x": ("1", "2"), "y": ("1", "3")}) is None
    found = factors_of(["a", "b", "c"], {"x": ("1", "2", "0"), "y": ("3", "4", "0")})
    assert found is not None
    assert (found.missing, found.first_missing) == (2, ("1", "4"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two maps, three heads and three losses with two seeds: the maps decide, then the head."""
    root = tmp_path_factory.mktemp("runs")
    cells = itertools.product(["GETAM", "ToCo"], ["dpt", "v2", "v3"], ["balanced", "plain", "x"])
    for number, (maps, head, loss) in enumerate(cells):
        quality = 0.6 + 0.1 * (maps == "ToCo") + 0.02 * (head == "v3")
        for seed in range(2):
            folder = make_run(
                root / f"{number}-{seed}", quality=quality, seed=seed, draw=2 * number + seed
            )
            path = folder / "results.json"
            config = {"method": {"head": head, "loss": loss}, "maps": {"method": maps}}
            path.write_text(json.dumps(json.loads(path.read_text()) | {"config": config}))
    return root


def compared(paths: list[Path], **options: object) -> Comparison:
    (found,) = compare(paths, CompareArguments(by=BY, resamples=200, **options))  # type: ignore[arg-type]
    return found


def test_compare_ends_with_the_factors(study: Path) -> None:
    numbers, *_, share, mean = tables(compared([study]))
    assert numbers.header[0] == ""
    assert len(numbers.rows) == 18, "many groups are rows"
    first, last = numbers.rows[0][0], numbers.rows[-1][0]
    assert first == "method=GETAM, head=dpt, loss=balanced (n=2)"
    assert last == "method=ToCo, head=v3, loss=x (n=2)"
    assert share.title.startswith("share of the variance among cells (2 method x 3 head x 3 loss)")
    texts = {name: cells[0].text for name, cells in share.rows}
    shown = {name: float(text.split()[0]) for name, text in texts.items()}
    assert shown["method"] > 80 > 20 > shown["head"] > max(shown["loss"], shown["head x loss"])
    assert sum(shown.values()) == pytest.approx(100, abs=0.4)
    assert all("[" in text for text in texts.values())
    assert [name for name, _ in mean.rows][:3] == ["method=GETAM", "method=ToCo", "head=dpt"]


def test_keys_that_end_alike_are_two_factors(study: Path) -> None:
    (found,) = compare([study], CompareArguments(by=f"method,{BY}", resamples=50))
    assert next(iter(found.groups)) == "ToCo, maps.method=GETAM, head=dpt, loss=balanced"
    share = tables(found)[-2]
    assert "(2 maps.method x 3 head x 3 loss)" in share.title


def test_a_missing_cell_is_named_and_nothing_shared(study: Path) -> None:
    some = sorted(study.iterdir())[2:]  # 0-0 and 0-1 are the first cell
    found = compared(some)
    assert any(
        note == "no shares of variance: of method x head x loss 1 cell is missing, the first "
        "method=GETAM, head=dpt, loss=balanced"
        for note in found.notes
    )
    assert not any("share of the variance" in grid.title for grid in tables(found))
    notes = compared(some[2:]).notes
    assert any("of method x head x loss 2 cells are missing, the first" in note for note in notes)


def test_a_group_has_the_maps_of_one_method(study: Path) -> None:
    own = "method.head,method.loss"
    said = rf"mixes settings .*: maps\.method differs; use by={own},maps\.method or by=study"
    with pytest.raises(WSSSError, match=said):
        compare([study], CompareArguments(by=own))


@pytest.mark.parametrize("by", ["method", "maps.method", "method.loss,method.head", "study"])
def test_the_keys_that_are_advised_make_groups(study: Path, by: str) -> None:
    with pytest.raises(WSSSError, match=r"mixes settings .* differs?; use by=") as raised:
        compare([study], CompareArguments(by=by))
    ways = [word.removeprefix("by=").rstrip(",") for word in str(raised.value).split()]
    advised = next(way for way in ways if way.startswith(f"{by},"))
    assert {*advised.split(",")} == {*by.split(","), *BY.split(",")}
    (found,) = compare([study], CompareArguments(by=advised, resamples=5))
    assert len(found.groups) == 18
    assert by not in ways


def test_keys_that_make_no_groups_are_not_advised(tmp_path: Path) -> None:
    settings = ({"head": "dpt"}, {"head": "dpt", "width": 3})
    runs = [
        make_run(tmp_path / str(seed), seed=seed, config={"method": method})
        for seed, method in enumerate(settings)
    ]
    for by, said in (
        ("method.head", r"use by=study or by=run, or leave"),
        ("study", r"use by=run, or leave"),
    ):
        with pytest.raises(WSSSError, match=rf"method\.width differs; {said}"):
            compare(runs, CompareArguments(by=by))
    for seed, name in enumerate("ab"):
        config = {"method": {"_target_": f"{name}.Net"}}
        make_run(tmp_path / name, seed=seed, method="Net", config=config)
    nets = [tmp_path / name for name in "ab"]
    with pytest.raises(WSSSError, match=r"several methods .*; use by=method,method\._target_ or"):
        compare(nets, CompareArguments())
    with pytest.raises(WSSSError, match=r"several methods .*; use by=study,method or by=run"):
        compare(nets, CompareArguments(by="study"))


@pytest.mark.parametrize(
    "by", [f"{BY},", f"[{BY}]", f"[ {BY.replace(',', ', ')} ]", f",{BY},,method.head"]
)
def test_keys_may_stand_in_brackets_and_be_empty(study: Path, by: str) -> None:
    (found,) = compare([study], CompareArguments(by=by, resamples=5))
    assert found.factors is not None
    assert [*found.factors.levels] == ["method", "head", "loss"]


@pytest.mark.parametrize("by", ["", ",", "[]", "[method", "method]", "["])
def test_half_a_bracket_and_no_key_are_named(study: Path, by: str) -> None:
    with pytest.raises(WSSSError, match=rf"^by={re.escape(by)}: expected a key, or several as by="):
        compare([study], CompareArguments(by=by))


def test_report_has_a_part_on_factors(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page"
    printer(capsys)("report", str(study), f"by={BY}", f"out={out}", "gallery=0", "resamples=50")
    page = (out / "index.html").read_text()
    own = page.split("<h3>Factors</h3>")[1].split("<h3>")[0]
    rest = page.replace(own, "")
    assert "share of the variance among cells" in own
    assert "share of the variance among cells" not in rest, "not in detail once more"
    assert "share of the variance among cells" in (out / "table.md").read_text()
