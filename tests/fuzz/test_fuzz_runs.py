"""Altered files of runs: refused, or the same numbers and weights; never code, never others."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import altered, bytes_altered, outcome, seeds
from runs_on_disk import make_run

from wsss.comparison.compare import CompareArguments, Comparison, compare
from wsss.comparison.entries import MIOUS
from wsss.comparison.grids import FORMATS
from wsss.comparison.page import page_of
from wsss.comparison.tables import tables
from wsss.core.errors import WSSSError
from wsss.evaluation.ledger import LEDGER_FILE, check_ledger, past_readings, record_reading
from wsss.results.store import CELLS_FILE, RESULTS_FILE
from wsss.runs.checkpoint_paths import LAST_CHECKPOINT
from wsss.runs.folder import Run, load_run
from wsss.runs.origin import DATA_FILE, check_origin

STORED = next((Path(__file__).parents[1] / "before").glob("tkppcl-*"))
TOUCH = "import pathlib; pathlib.Path('owned').touch()"
TARGETS = [
    "os.system", "posix.system", "subprocess.Popen", "timeit.Timer", "logging.FileHandler",
    "io.FileIO", "zipfile.ZipFile", "builtins.exec", "builtins.dict", "wsss.os.system",
    "wsss.core.files.os.system", "wsss.core.files.write_atomically", "wsss.methods.toco.ToCo",
    "wsss.methods.base.torch.hub.load", "wsss.data.views.toco.np.save", "wsss.cli.main",
    "lightning.Trainer", "hydra.utils.call", "hydra.utils.instantiate", "hydra._internal.utils",
    "..os.system", ".toco", "", "wsss.", "wsss.data.views.", "torch.load", "antigravity.open",
]  # fmt: skip
#: what the classes above are called with, should anything call them
ARGUMENTS: dict[str, Any] = {
    "command": "touch owned", "args": ["touch", "owned"], "stmt": TOUCH, "filename": "owned",
    "file": "owned", "mode": "w", "path": "owned", "content": "x", "_args_": ["touch owned"],
    "_partial_": True, "_recursive_": True, "_convert_": "all", "hydra": {"_target_": "os.system"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Code that runs would leave a file in the empty folder of the process; so would a secret."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("SECRET", "swordfish")
    yield
    assert not list(place.iterdir()), "code of a stranger's file was run"


def numbers(comparisons: list[Comparison]) -> dict[str, float]:
    """Every mIoU that is compared, by run; without counts a run is listed with a note."""
    found = {}
    for comparison in comparisons:
        for entries in comparison.groups.values():
            for entry in entries:
                if entry.has_counts:
                    for metric in MIOUS:
                        if (value := entry.metrics.get(metric)) is not None:
                            found[f"{entry.folder.name} {metric}"] = value
    return found


def read_comparison(folders: list[Path]) -> dict[str, float]:
    """Do what `wsss compare` and `wsss report` do, and give the numbers."""
    comparisons = compare(folders, CompareArguments(resamples=5, unranked=True))
    grids = [grid for comparison in comparisons for grid in tables(comparison)]
    for write in FORMATS.values():
        write(grids).encode()
    page = page_of(comparisons, {}, gallery=0)
    assert "<script>alert" not in page
    return numbers(comparisons)


def test_fuzz_results(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, method=name, seed=n) for n, name in enumerate("AB")]
    whole = {name: (folders[1] / name).read_bytes() for name in (RESULTS_FILE, CELLS_FILE)}
    expected = read_comparison(folders)
    read = 0
    for seed in seeds(1200):
        rng = random.Random(seed)
        name = rng.choice([RESULTS_FILE, RESULTS_FILE, CELLS_FILE])
        if name == RESULTS_FILE and seed % 5:
            tree = json.loads(whole[name])
            if rng.random() < 0.5:  # few of all places matter to a reader
                split, how = altered(rng, tree["splits"]["val"], rng.choice([1, 2]))
                tree["splits"]["val"] = split
            else:
                tree, how = altered(rng, tree, rng.choice([1, 1, 3]))
            content = json.dumps(tree).encode()
        elif name == CELLS_FILE and seed % 3:
            content, how = altered_arrays(rng, folders[1] / CELLS_FILE)
        else:
            content, how = bytes_altered(rng, whole[name])
        (folders[1] / name).write_bytes(content)
        case = f"seed {seed}: {name}: {how}"
        found = outcome(case, lambda: read_comparison(folders))
        (folders[1] / name).write_bytes(whole[name])
        if isinstance(found, WSSSError):
            continue
        read += 1
        for key, value in found.items():
            assert key in expected, f"{case}: {key} appears"
            assert value == pytest.approx(expected[key], abs=1e-6), f"{case}: another {key}"
    assert read > 100, "everything is refused: nothing was tried"


def altered_arrays(rng: random.Random, path: Path) -> tuple[bytes, str]:
    """Alter the counts of the images: values, shapes, types, names."""
    with np.load(path) as stored:
        arrays = dict(stored)
    key = rng.choice(sorted(arrays))
    values, kind = arrays[key], rng.choice(["value", "shape", "type", "name", "huge", "short"])
    changed: Any = values.copy()
    if kind == "value":
        flat = changed.reshape(-1)
        flat[rng.randrange(flat.size)] = rng.choice([-1, 0, 7, 10**6, 2**31 - 1])
    elif kind == "shape":
        changed = rng.choice([changed.T, changed.reshape(-1), changed[None], changed[:0]])
    elif kind == "type":
        changed = rng.choice([changed.astype("U8"), changed == changed, np.array("x")])
    elif kind == "name":
        arrays[rng.choice(["val/seed", "x", "../x", "val/"])] = arrays.pop(key)
    elif kind == "huge":
        changed = np.broadcast_to(np.zeros((), np.int8), (2**20, 3))
    else:
        changed = changed[:-1]
    if kind != "name":
        arrays[key] = changed
    target = path.with_name("altered.npz")
    np.savez_compressed(target, **arrays)
    content = target.read_bytes()
    target.unlink()
    return content, f"{kind} of {key}"


def test_fuzz_ledger(tmp_path: Path) -> None:
    path = tmp_path / LEDGER_FILE
    for step in range(4):
        record_reading(tmp_path, split="val", purpose="watching training", step=step)
    whole = path.read_bytes()
    for seed in seeds(800):
        rng = random.Random(seed)
        content, how = whole, ""
        if seed % 2:
            content, how = bytes_altered(rng, content)
        else:
            lines = [json.loads(line) for line in content.splitlines()]
            lines, how = altered(rng, lines, rng.choice([1, 3]))
            content = "\n".join(map(json.dumps, lines)).encode() + rng.choice([b"", b"\n"])
        path.write_bytes(content)
        case = f"seed {seed}: {how}"

        def use() -> tuple[int, int]:
            check_ledger(tmp_path)
            before = sum(entry["split"] == "val" for entry in past_readings(tmp_path))
            return before, record_reading(tmp_path, split="val", purpose="report")

        used = outcome(case, use)
        assert not isinstance(used, WSSSError), f"{case}: ends an evaluation: {used}"
        assert used[1] == used[0] + 1, case
        assert path.read_bytes().startswith(content), f"{case}: lines are lost"


def test_fuzz_origin(tmp_path: Path) -> None:
    """Of ``data.json``: it is damaged, or the data is not the run's, or it is the run's."""
    folder = Path(shutil.copytree(STORED, tmp_path / STORED.name))
    run, whole = load_run(folder), (folder / DATA_FILE).read_bytes()
    check_origin(run, ["train", "val"])
    for seed in seeds(600):
        rng = random.Random(seed)
        if seed % 3:
            tree, how = altered(rng, json.loads(whole), rng.choice([1, 2]))
            content = json.dumps(tree).encode()
        else:
            content, how = bytes_altered(rng, whole)
        (folder / DATA_FILE).write_bytes(content)
        outcome(f"seed {seed}: {how}", lambda: check_origin(run, ["train", "val"]))


def evil(rng: random.Random, config: Any) -> tuple[Any, str]:
    """Name a class somewhere that runs something, in one of the ways that Hydra knows."""
    node: dict[str, Any] = {"_target_": rng.choice(TARGETS)}
    for key in rng.sample(sorted(ARGUMENTS), rng.randrange(4)):
        node[key] = ARGUMENTS[key]
    place = rng.choice(
        ["method", "backbone", "data", "data.train_transform", "trainer", "trainer.callbacks",
         "trainer.logger", "eval", "logger", "budget", "second_stage", "second_stage.method",
         "method.scales", "data.class_names", "backbone.overrides", "hydra", "study"]
    )  # fmt: skip
    *parents, last = place.split(".")
    copy = at = json.loads(json.dumps(config))
    for key in parents:
        at[key] = at[key] if isinstance(at.get(key), dict) else {}
        at = at[key]
    old = at.get(last)
    kind = rng.randrange(4)
    if kind == 0:
        at[last] = node
    elif kind == 1:
        at[last] = [node] if rng.random() < 0.5 else {"a": {"b": [node]}}
    elif isinstance(old, dict):
        at[last] = {**old, **node} if kind == 2 else {**old, "_target_": node["_target_"]}
    else:
        at[last] = f"${{oc.env:SECRET}}{rng.choice(['', 'x'])}"
    return copy, f"{place}: {str(at[last])[:150]}"


def test_fuzz_stored_configuration(tmp_path: Path) -> None:
    content = torch.load(STORED / LAST_CHECKPOINT, weights_only=True)
    config, path = content["wsss"]["config"], tmp_path / "x.ckpt"
    weights = content["state_dict"]
    for seed in seeds(250):
        rng = random.Random(seed)
        if seed % 3:
            changed, how = evil(rng, config)
        else:
            changed, how = altered(rng, config, rng.choice([1, 2]))
        parts = {**content, "wsss": {**content["wsss"], "config": changed}}
        if seed % 7 == 0:
            parts, how = altered(rng, content, 1)
        torch.save(parts, path)
        same_weights(f"seed {seed}: {how}", path, weights)


def test_fuzz_bytes_of_a_checkpoint(tmp_path: Path) -> None:
    path, whole = tmp_path / "x.ckpt", (STORED / LAST_CHECKPOINT).read_bytes()
    weights = torch.load(STORED / LAST_CHECKPOINT, weights_only=True)["state_dict"]
    for seed in seeds(250):
        content, how = bytes_altered(random.Random(seed), whole)
        path.write_bytes(content)
        same_weights(f"seed {seed}: {how}", path, weights)


def same_weights(case: str, path: Path, weights: dict[str, Any]) -> None:
    """A checkpoint is refused, or has the weights that it was written with."""
    found: Run | WSSSError = outcome(case, lambda: load_run(path))
    if isinstance(found, WSSSError):
        return
    for name, value in found.module.state_dict().items():
        if name in weights:
            assert torch.equal(value, weights[name]), f"{case}: other weights in {name}"
