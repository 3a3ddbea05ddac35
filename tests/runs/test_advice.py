"""The command that `wsss pseudo` prints is taken, and trains on what its run was trained on."""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from trees import make_photos, write_photo_table

from wsss.runs.advice import second_stage_command
from wsss.runs.compose import compose_run
from wsss.runs.folder import build_data

TINY = [
    "+backbone.overrides.embed_dim=48",
    "backbone.weights=random",
    "budget.crop_size=64",
    "budget.local_size=16",
]
CASES = {
    "small start": (["+experiments=toco/small", "budget.max_steps=4"], "segmenter/small"),
    "photographs": (["+experiments=getam/photos", "seed=3", "trainer=gpu"], "segmenter/photos"),
    "by hand": (["data=table", "backbone=vit_pico", *TINY, "runs_dir=else/where"], "data=table"),
    "another table": (
        ["data=table", "data.csv=b, c.csv", "data.name=mine", "data.limit=6", "trainer=cpu"],
        "data=table",
    ),
    "VOC": (["data=voc", "data.limit=16"], "segmenter/voc"),
    "MiniVOC": (["data=minivoc", *TINY], "segmenter/minivoc"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_printed_command_fits_the_run(case: str, tmp_path: Path) -> None:
    overrides, expected = CASES[case]
    root = tmp_path / "my photos, 2"
    write_photo_table(root, make_photos(root, 3))
    (root / "b, c.csv").write_text((root / "labels.csv").read_text())
    given = [] if case == "MiniVOC" else [f"data.root='{root}'"]
    config = compose_run([o.replace("b, c.csv", "'b, c.csv'") for o in [*overrides, *given]])
    run: Any = SimpleNamespace(config=config, data=build_data(config))
    config["data"]["class_names"] = list(run.data.class_names)  # as a run stores them
    program, verb, *words = shlex.split(second_stage_command(run, tmp_path / "my labels"))
    assert (program, verb) == ("wsss", "train")
    assert expected in words[0] + words[1]
    assert len(words) < 12, "the shortest line"

    second = compose_run(words)
    assert second["data"]["train_masks"] == str(tmp_path / "my labels")
    assert second["method"]["_target_"].endswith("Segmenter")
    assert list(build_data(second).class_names) == list(run.data.class_names)
    for key in ("name", "root", "limit", "num_workers", "train_split", "val_split"):
        assert second["data"][key] == config["data"][key], key
    assert second["data"].get("long_side") == config["data"].get("long_side")
    for key in ("seed", "runs_dir"):
        assert second[key] == config[key]
    if case not in ("VOC", "MiniVOC"):  # whose second stages are settled
        assert second["budget"] == config["budget"]
        assert second["backbone"] == config["backbone"]
        assert second["trainer"]["accelerator"] == config["trainer"]["accelerator"]
