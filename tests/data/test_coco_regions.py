"""Segmentations are checked before compiled code sees them, and give the pixels that they gave."""

from typing import Any

import numpy as np
import pytest
from trees import rectangle, run_lengths

from wsss.data.prepare.regions import decompress, read_region

pycocotools_mask = pytest.importorskip("pycocotools.mask")

HEIGHT, WIDTH = 40, 60
GOOD = rectangle(5, 5, 20, 20)


def packed(inside: np.ndarray) -> str:
    runs = pycocotools_mask.encode(np.asfortranarray(inside.astype(np.uint8)))
    text: str = runs["counts"].decode()
    return text


def blob(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((height, width)) > rng.uniform(0.05, 0.95)


def pixels(segmentation: Any) -> np.ndarray:
    return read_region(segmentation, HEIGHT, WIDTH).pixels()


@pytest.mark.parametrize("seed", range(20))
def test_both_spellings_of_run_lengths_are_the_same(seed: int) -> None:
    inside = blob(seed)
    counts = run_lengths(inside)["counts"]
    assert decompress(packed(inside)) == counts
    for shape in (packed(inside), counts, [float(count) for count in counts]):
        region = read_region({"size": [HEIGHT, WIDTH], "counts": shape}, HEIGHT, WIDTH)
        np.testing.assert_array_equal(region.pixels(), inside)
        assert region.area == inside.sum()


@pytest.mark.parametrize("inside", [np.zeros((40, 60), bool), np.ones((40, 60), bool)])
def test_run_lengths_of_nothing_and_of_everything(inside: np.ndarray) -> None:
    shape = {"size": [HEIGHT, WIDTH], "counts": packed(inside)}
    np.testing.assert_array_equal(pixels(shape), inside)


@pytest.mark.parametrize("seed", range(20))
def test_polygons_are_drawn_as_by_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = [(rng.random(8) * 70 - 5).tolist(), (rng.random(14) * 50).round(2).tolist()]
    runs = pycocotools_mask.merge(pycocotools_mask.frPyObjects(shape, HEIGHT, WIDTH))
    region = read_region(shape, HEIGHT, WIDTH)
    np.testing.assert_array_equal(region.pixels(), pycocotools_mask.decode(runs))
    assert region.area == pycocotools_mask.area(runs)


def test_a_list_of_run_lengths_and_polygons_is_their_union() -> None:
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[30:, 50:] = True
    both = pixels([{"size": [HEIGHT, WIDTH], "counts": packed(inside)}, GOOD])
    np.testing.assert_array_equal(both, inside | pixels([GOOD]))


def test_bytes_written_as_text_are_read() -> None:
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[4:, 1] = True  # the first run is 44, a backslash and a 1
    text = packed(inside)
    assert str(text.encode()).startswith("b'\\\\1")  # repr doubles it
    shape = {"size": [HEIGHT, WIDTH], "counts": str(text.encode())}
    np.testing.assert_array_equal(pixels(shape), inside)


def test_slivers_beside_a_polygon_are_left_out_and_counted() -> None:
    region = read_region([GOOD, [7, 7, 7, 9], [3, 3], []], HEIGHT, WIDTH)
    assert region.slivers == 3
    np.testing.assert_array_equal(region.pixels(), pixels([GOOD]))


def test_a_polygon_beyond_the_border_is_cut() -> None:
    over = pixels([rectangle(50, -10, 30, 25)])
    assert over[:15, 50:].all()
    assert over.sum() == 150
    assert pixels([rectangle(-60, -60, 180, 160)]).all()  # as far out as is allowed


def lengths(counts: Any, size: Any = (HEIGHT, WIDTH)) -> dict[str, Any]:
    return {"size": [*size] if isinstance(size, tuple) else size, "counts": counts}


BAD_RUNS = {
    "sum too small": (lengths([600, 5, 10]), "do not fill the image (they sum to 615"),
    "sum too large": (lengths([600, 5, 2400]), "do not fill"),
    "none": (lengths([]), "do not fill"),
    "empty text": (lengths(""), "do not fill"),
    "huge": (lengths([2400, 2**40]), "do not fill"),
    "wrapping to the sum": (lengths([2400, 2**32]), "do not fill"),
    "huger": (lengths([10**400, 2400]), "do not fill"),
    "negative": (lengths([600, -5, 10, 1795]), "the run length -5"),
    "negative, filling": (lengths([2405, -5]), "the run length -5"),
    "fraction": (lengths([600.5, 1799.5]), "the run length 600.5"),
    "NaN": (lengths([float("nan"), 2400]), "the run length nan"),
    "infinite": (lengths([float("inf")]), "the run length inf"),
    "text in the list": (lengths(["600", 1800]), "the run length '600'"),
    "boolean": (lengths([True, 2399]), "the run length True"),
    "null in the list": (lengths([None, 2400]), "the run length None"),
    "nested": (lengths([[2400]]), "the run length [2400]"),
    "no counts": ({"size": [40, 60]}, "read None"),
    "a number": (lengths(2400), "read 2400"),
    "no size": ({"counts": [2400]}, "run lengths for None, image [40, 60]"),
    "sides exchanged": (lengths([2400], (60, 40)), "run lengths for [60, 40], image [40, 60]"),
    "three sides": (lengths([2400], (40, 60, 1)), "run lengths for [40, 60, 1]"),
    "sides in words": (lengths([2400], ("40", "60")), "run lengths for ['40', '60']"),
    "boolean side": (lengths([2400], (True, 60)), "run lengths for [True, 60]"),
    "size a number": (lengths([2400], 2400), "run lengths for 2400"),
    "other characters": (lengths("Rc0~~"), "the character '~'"),
    "beyond ASCII": (lengths("Rc0é"), "the character 'é'"),
    "zero byte": (lengths("Rc0\x00"), "the character '\\x00'"),
    "breaks off": (lengths("Rc0d0d"), "break off"),
    "endless number": (lengths("o" * 5000), "beyond any image"),
    "negative in text": (lengths("N"), "the run length -2"),
    "empty object": ({}, "run lengths for None"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
@pytest.mark.parametrize("within", ["alone", "in a list"])
def test_bad_run_lengths_are_named(case: str, within: str) -> None:
    shape, expected = BAD_RUNS[case]
    with pytest.raises(ValueError, match=";") as error:
        read_region(shape if within == "alone" else [GOOD, shape], HEIGHT, WIDTH)
    assert expected in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("seed", range(200))
def test_a_spoilt_text_is_refused_or_fills_the_image(seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = [*packed(blob(seed % 5))]
    for _ in range(rng.integers(1, 4)):
        kind, place = rng.integers(3), rng.integers(len(text))
        if kind == 0:
            text[place] = chr(rng.integers(48, 112))
        elif kind == 1:
            del text[place]
        else:
            text.insert(place, chr(rng.integers(48, 112)))
    try:
        region = read_region(lengths("".join(text)), HEIGHT, WIDTH)
    except ValueError:
        return
    runs = decompress("".join(text))
    assert sum(runs) == HEIGHT * WIDTH
    straightforward = np.repeat(np.arange(len(runs)) % 2, runs).reshape(WIDTH, HEIGHT).T
    np.testing.assert_array_equal(region.pixels(), straightforward)


BAD_POLYGONS: dict[str, tuple[Any, str]] = {
    "NaN": ([[5, 5, 25, 5, float("nan"), 25]], "the coordinate nan"),
    "infinite": ([[5, 5, 25, 5, float("inf"), 25]], "the coordinate inf"),
    "far": ([[-1, -2, 2.08e8, 3.52e8, 25, 26, 27, 38]], "the coordinate 2.08e+08"),
    "farther than int": ([[5, 5, 2**63, 5, 5, 9]], "the coordinate 9.22"),
    "farther than float": ([[5, 5, 10**400, 5, 5, 9]], "the coordinate inf"),
    "far below": ([[5, 5, 25, 5, 25, -2e8]], "the coordinate -2e+08"),
    "just too far": ([rectangle(-61, 0, 70, 20)], "the coordinate -61, image 60x40"),
    "just too low": ([rectangle(0, 0, 20, 101)], "the coordinate 101"),
    "text": ([["5", "5", "25", "5", "25", "25"]], "the coordinate '5'"),
    "null": ([[5, 5, None, 5, 25, 25]], "the coordinate None"),
    "boolean": ([[5, 5, True, 5, 25, 25]], "the coordinate True"),
    "points in brackets": ([[[5, 5], [25, 5], [25, 25]]], "the coordinate [5, 5]"),
    "odd": ([[5, 5, 25, 5, 25, 25, 5]], "a polygon of 7 numbers"),
    "short and odd": ([GOOD, [5, 5, 5]], "a polygon of 3 numbers"),
    "NaN in a sliver": ([GOOD, [5, float("nan")]], "the coordinate nan"),
    "flat": ([5, 5, 25, 5, 25, 25, 5, 25], "a flat list of 8 coordinates"),
    "flat box": ([5, 5, 20, 20], "a flat list of 4 coordinates"),
    "a line": ([[5, 5, 25, 5]], "a polygon of fewer than three points"),
    "slivers alone": ([[5, 5, 25, 5], [1, 1]], "a polygon of fewer than three points"),
    "empty polygon": ([[]], "a polygon of fewer than three points"),
    "nothing": ([], "no segmentation, perhaps only a box"),
    "null alone": (None, "no segmentation"),
    "a text": ("[[5, 5, 25, 5, 25, 25]]", "the part '[[5, 5, 25"),
    "polygons in text": ([GOOD, "x"], "the part 'x'"),
    "a number": (7, "a flat list of 1"),
    "over and over": ([[0, 0, 60, 40] * 1000], "whose outline is"),
}


@pytest.mark.parametrize("case", BAD_POLYGONS)
def test_bad_polygons_are_named(case: str) -> None:
    shape, expected = BAD_POLYGONS[case]
    with pytest.raises(ValueError, match=";") as error:
        read_region(shape, HEIGHT, WIDTH)
    assert expected in str(error.value)
    assert len(str(error.value)) < 300


def test_every_pixel_may_be_on_the_outline() -> None:
    comb = [v for x in range(0, 60, 2) for v in (x, 0, x, 39, x + 1, 39, x + 1, 0)]
    assert read_region([comb], HEIGHT, WIDTH).area
