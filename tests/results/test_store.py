import json
import math
import resource
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from wsss.core.errors import WSSSError
from wsss.results.store import print_table, read_results, write_results

RESULTS = {
    "method": "ToCo",
    "data": "minivoc",
    "seed": 3,
    "splits": {
        "val": {
            "seed_miou": 0.6123,
            "seg_miou": None,
            "notes": ["no segmentation head: segmentation is not scored"],
            "per_class": {"class": ["background", "cat"], "seed_iou": [0.9, math.nan]},
            "confusion": {"seed": [[5, 1], [0, 7]]},
        },
        "val_unseen": {"seed_miou": 0.4, "per_class": {"class": ["background", "cat"]}},
    },
}


def test_round_trip_with_plain_values_and_null_for_nan(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    extra = {"t": torch.tensor([1, 2]), "n": np.float32(0.5), "p": Path("a/b"), "u": (1, math.inf)}
    write_results(path, {**RESULTS, "extra": extra})
    text = path.read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = read_results(path)
    assert back["schema"] == 1
    assert back["seed"] == 3
    val = back["splits"]["val"]
    assert val["seed_miou"] == 0.6123
    assert val["per_class"]["seed_iou"] == [0.9, None]
    assert val["confusion"]["seed"] == [[5, 1], [0, 7]]
    assert val["notes"] == RESULTS["splits"]["val"]["notes"]
    assert back["extra"] == {"t": [1, 2], "n": 0.5, "p": "a/b", "u": [1, None]}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, {"seed": 1})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_results(path, {"seed": object()})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))  # fails in the middle, as a full disk
    try:
        with pytest.raises(WSSSError, match=r"results\.json: cannot be written \(File too large"):
            write_results(path, {"seed": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "not valid JSON"),
        ("[]", "schema None"),
        ("{}", "schema"),
        ('{"schema": 1}', "holds no splits"),
    ],
)
def test_unreadable_results_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(WSSSError, match=message) as caught:
        read_results(path)
    assert str(path) in str(caught.value)


def test_table_shows_splits_as_columns_and_says_what_is_missing() -> None:
    out = StringIO()
    print_table(RESULTS, console=Console(file=out, width=120), per_class=True)
    text = out.getvalue()
    assert "ToCo · minivoc" in text
    seeds = next(line for line in text.splitlines() if "CAM seed mIoU" in line)
    assert "61.2" in seeds
    assert "40.0" in seeds
    assert "no segmentation head" in text
    assert "segmentation mIoU" not in text
    cat = next(line for line in text.splitlines() if "cat" in line)
    assert "-" in cat
