"""``maps``: a run's maps are made once, its labels once a refinement; cells learn from them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from small_runs import PLAIN, SMALL, printer

from wsss.core.errors import WSSSError
from wsss.core.schema import plain
from wsss.data.images import read_mask
from wsss.evaluation.inference import localise
from wsss.models.weights import save_atomically
from wsss.runs import map_cache
from wsss.runs.compose import compose_config, compose_run
from wsss.runs.config import config_hash
from wsss.runs.folder import build_module, load_run
from wsss.runs.map_cache import MapCache
from wsss.training.labels import with_labels

CPU = torch.device("cpu")
# the CRF of maps in this process
TINY = [*SMALL, *PLAIN, "data.limit=4", "budget.max_steps=2", "eval.crf_backend=torch"]
CELL = ["+experiments=factorial/minivoc", *TINY, "method.channels=8"]
WALK = [f"maps.random_walk.{each}" for each in
        ("budget.max_steps=2", "budget.crop_size=48", "budget.global_batch_size=4",
         "method.widths=[4,4,8]")]  # fmt: skip


def make_source(folder: Path, *changes: str) -> Path:
    """A run folder as training leaves it, with weights that were drawn and not trained."""
    config = compose_run(["method=toco", *TINY, "budget.warmup_steps=1", *changes])
    torch.manual_seed(0)
    module = build_module(config, 8)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 2}
    module.on_save_checkpoint(checkpoint)
    save_atomically(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("runs") / "toco-source")


def cell(source: Path, *overrides: str) -> dict[str, Any]:
    return plain(compose_config([*CELL, f"maps.run={source}", *overrides]))


def labels_of(config: dict[str, Any]) -> dict[str, np.ndarray]:
    folder = Path(with_labels(config, CPU)["data"]["train_masks"])
    found = {path.name: read_mask(path, num_classes=8) for path in sorted(folder.glob("*.png"))}
    assert len(found) == 4
    return found


@pytest.fixture(scope="module")
def labels(source: Path) -> dict[str, dict[str, np.ndarray]]:
    """Labels of each refinement."""
    kinds = ("null", "par", "pamr", "crf", "random_walk")
    return {kind: labels_of(cell(source, f"maps.refine={kind}", *WALK)) for kind in kinds}


def counting(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every image whose maps are computed from now on."""
    seen: list[Any] = []

    def counted(*arguments: Any) -> torch.Tensor:
        seen.append(arguments)
        return localise(*arguments)

    monkeypatch.setattr(map_cache, "localise", counted)
    return seen


def test_maps_are_made_once_for_all_refinements(
    source: Path,
    labels: dict[str, dict[str, np.ndarray]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(list(source.glob("maps/train-*/*.npy"))) == 4
    assert len(list(source.glob("pseudo_labels/*"))) == len(labels) == 5
    for one in labels:
        for other in set(labels) - {one}:
            assert any((labels[one][n] != labels[other][n]).any() for n in labels[one])
    seen = counting(monkeypatch)
    again = labels_of(cell(source, "maps.refine=crf", "maps.crf=psa"))
    assert not seen, "further labels, the same maps"
    assert any((again[name] != labels["crf"][name]).any() for name in again)
    capsys.readouterr()
    assert labels_of(cell(source, "maps.refine=par")).keys() == again.keys()
    assert "is finished" in capsys.readouterr().out, "labels are made once"
    assert len(list(source.glob("pseudo_labels/*"))) == 6


def test_labels_are_those_of_wsss_pseudo(
    source: Path,
    labels: dict[str, dict[str, np.ndarray]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = printer(capsys)
    line = ["pseudo", f"run={source}", "device=cpu", f"out={tmp_path}"]
    printed(*line, "eval.refine=pamr")
    assert "is finished" in printed(*line[:-1], "eval.refine=par"), "one name for the same labels"
    for name, label in labels["pamr"].items():
        assert np.array_equal(read_mask(tmp_path / name, num_classes=8), label)


def test_one_threshold_is_both_where_a_run_has_no_two(tmp_path: Path) -> None:
    alone = ["eval.cam_high=null", "eval.cam_low=null", "eval.cam_threshold=0.3"]
    made = make_source(tmp_path / "one", *alone)
    found = labels_of(cell(made, "maps.refine=par"))
    assert all(255 not in label for label in found.values())
    assert any(label.any() for label in found.values())


def damage_shape(path: Path) -> None:
    np.save(path, np.zeros((1, 10**4, 10**4), np.float32)[:, :1, :1])


def damage_header(path: Path) -> None:
    with path.open("wb") as stream:
        header = {"shape": (2**40, 160, 160), "fortran_order": False, "descr": "<f4"}
        np.lib.format.write_array_header_1_0(stream, header)


def damage_values(path: Path) -> None:
    np.save(path, np.full_like(np.load(path), np.nan))


def damage_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_objects(path: Path) -> None:
    np.save(path, np.array([print], object), allow_pickle=True)


@pytest.mark.parametrize(
    "damage", [damage_shape, damage_header, damage_values, damage_bytes, damage_objects]
)
def test_damaged_maps_are_made_again(
    damage: Callable[[Path], None],
    source: Path,
    labels: dict[str, dict[str, np.ndarray]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = load_run(source)
    cache, item = MapCache(run), run.data.unmasked_dataset("train")[1]
    path = cache.folder / f"{item['name']}.npy"
    before = path.read_bytes()
    with torch.no_grad():
        expected = cache(item)
        damage(path)
        seen = counting(monkeypatch)
        assert torch.equal(cache(item), expected)
    assert len(seen) == 1
    assert "damaged maps are made again" in capsys.readouterr().out
    assert path.read_bytes() == before


def test_other_maps_are_not_mixed_in(
    source: Path, labels: dict[str, dict[str, np.ndarray]]
) -> None:
    run = load_run(source)
    card = MapCache(run).folder / "maps.json"
    stored = card.read_text()
    card.write_text(json.dumps(json.loads(stored) | {"checkpoint_sha256": "0" * 64}))
    try:
        with pytest.raises(WSSSError, match=r"maps\.json: is of other maps; remove "):
            MapCache(run)
    finally:
        card.write_text(stored)


def test_maps_of_another_size_are_other_maps(source: Path) -> None:
    run = load_run(source)
    free = replace(run.protocol, single_resize=None, cam_resize=None)
    changes: list[dict[str, int]] = [{}, {"cam_resize": 32}, {"resize_long": 96}]
    others = [replace(run, protocol=replace(free, **change)) for change in changes]  # type: ignore[arg-type]
    assert len({MapCache(each).folder for each in (run, *others)}) == 4


@pytest.mark.slow
def test_a_cell_is_an_ordinary_run(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = printer(capsys)
    line = ["train", *CELL, f"maps.run={source}", "maps.refine=par", "method.head=dpt",
            "method.reg_weight=0.05", f"runs_dir={tmp_path}"]  # fmt: skip
    printed(*line)
    (folder,) = (path.parent for path in tmp_path.rglob("results.json"))
    results = json.loads((folder / "results.json").read_text())
    maps, card = results["config"]["maps"], results["splits"]["val"]["protocol"]["train_masks"]
    assert (maps["name"], maps["method"], maps["study"]) == (source.name, "ToCo", "default")
    assert card["made_from"]["checkpoint_sha256"] == maps["sha256"]
    assert card["made_from"]["eval"]["refine"] == maps["refine"] == "par"
    assert results["splits"]["val"]["seg_miou"] is not None
    assert (folder / "logs").is_dir()
    assert f"{folder} is finished" in printed(*line)
    moved = tmp_path / "elsewhere"
    source.rename(moved)
    try:
        line[line.index(f"maps.run={source}")] = f"maps.run={moved}"
        assert f"{folder} is finished" in printed(*line), "wherever the maps' run lies"
    finally:
        moved.rename(source)
    assert printed("eval", f"run={folder}", "splits=[val]", f"out={tmp_path / 'again'}")


def test_maps_that_cannot_be_used_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    with pytest.raises(WSSSError, match=r"data\.train_masks=ground_truth: .* from maps\.run="):
        cell(source, "data.train_masks=ground_truth")
    with pytest.raises(WSSSError, match=r"maps\.refine='parr': expected 'par' or"):
        cell(source, "maps.refine=parr")
    with pytest.raises(WSSSError, match=r"maps\.refine=random_walk needs settings"):
        cell(source, "maps.refine=random_walk", "maps.random_walk=null")
    with pytest.raises(WSSSError, match=r"maps\.random_walk\.stepz: unknown key"):
        cell(source, "+maps.random_walk.stepz=2")
    with pytest.raises(WSSSError, match=r"maps\.run: .*no such checkpoint"):
        with_labels(cell(tmp_path), CPU)
    other = cell(source)
    other["data"]["class_names"] = ["a", "b", "c", "d", "e", "f", "g", "h"]
    with pytest.raises(WSSSError, match=r"maps\.run=\S+: has the classes bottle, .* has a, b"):
        with_labels(other, CPU)


def test_maps_of_an_unfinished_run_are_refused(tmp_path: Path) -> None:
    folder = make_source(tmp_path / "half")
    path = folder / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    save_atomically(content | {"global_step": 1, "loops": {}}, path)
    with pytest.raises(WSSSError, match=r"is not a finished run \(1 of 2 steps\)"):
        with_labels(cell(folder), CPU)


def test_every_cell_is_a_run_of_its_own(source: Path) -> None:
    """Also before its labels are made; then these say whose maps they are."""
    config = cell(source)
    other = {**config, "maps": {**config["maps"], "refine": "par"}}
    assert config_hash(config) != config_hash(other)
    hashes = set()
    for maps, labels in (("a", "train-1"), ("b", "train-1"), ("b", "train-2")):
        masks = f"{maps}/pseudo_labels/{labels}"
        made = {**config, "data": {**config["data"], "train_masks": masks}}
        hashes.add(config_hash(made | {"maps": {**config["maps"], "run": maps}}))
    assert len(hashes) == 2


def test_settings_of_later_keep_the_hash_of_a_run() -> None:
    config = plain(compose_config(["method=segmenter_vit", "data=minivoc"]))
    before = OmegaConf.to_container(OmegaConf.create(config))
    assert isinstance(before, dict)
    for key in ("loss", "reg_weight", "channels", "dilation"):
        del before["method"][key]
    del before["maps"]
    assert config_hash(before) == config_hash(config)
    config["method"]["loss"] = "balanced"
    assert config_hash(before) != config_hash(config)
