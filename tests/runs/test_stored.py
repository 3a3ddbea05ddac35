"""A stranger's checkpoint or run folder runs no code, reads no secret and is read with care."""

import copy
import functools
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.core.schema import plain
from wsss.data.views.tkp_pcl import SquareViews
from wsss.methods.toco import ToCo
from wsss.runs.compose import compose_config
from wsss.runs.config import config_hash
from wsss.runs.folder import load_run
from wsss.runs.starts import with_start
from wsss.runs.stored import check_stored
from wsss.runs.targets import with_current_targets
from wsss.training.labels import with_labels

TESTS = Path(__file__).parents[1]
(STORED,) = (TESTS / "before").glob("tkppcl-*")
CHECKPOINT = STORED / "checkpoints" / "last.ckpt"


def stored_config() -> dict[str, Any]:
    content = torch.load(CHECKPOINT, weights_only=True)
    config: dict[str, Any] = with_current_targets(content["wsss"]["config"])
    return config


def put(config: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node = config
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value


def altered(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A run folder whose checkpoint's content was changed."""
    run = tmp_path / "run"
    shutil.copytree(STORED, run)
    content = torch.load(CHECKPOINT, weights_only=True)
    change(content)
    torch.save(content, run / "checkpoints" / "last.ckpt")
    return run


TOUCH = "import pathlib; pathlib.Path('owned').touch()"
EVIL: list[tuple[str, Any]] = [
    ("data.train_transform", {"_target_": "timeit.Timer", "stmt": TOUCH}),
    ("data.train_transform", {"_target_": "logging.FileHandler", "filename": "owned"}),
    ("data.train_transform", {"_target_": "io.FileIO", "file": "owned", "mode": "w"}),
    ("data.train_transform", {"_target_": "zipfile.ZipFile", "file": "owned", "mode": "w"}),
    ("data.train_transform", {"_target_": "subprocess.Popen", "args": ["touch", "owned"]}),
    ("data.train_transform", {"_target_": "wsss.core.files.os.system", "command": "touch owned"}),
    ("data.train_transform", {"_target_": "wsss.data.views.toco.np.save", "file": "owned"}),
    ("data.train_transform", {"_target_": "wsss.data.views.toco.Image"}),
    ("data.train_transform", {"_target_": "wsss.methods.toco.ToCo"}),
    ("data.train_transform", {"_target_": "..os.system"}),
    ("data.train_transform", {"_target_": ".toco.ToCoViews"}),
    ("data", {"_target_": "io.FileIO", "file": "owned", "mode": "w"}),
    ("data", {"_target_": "builtins.exec", "_args_": [TOUCH]}),
    ("data.class_names", [{"_target_": "io.FileIO", "file": "owned", "mode": "w"}]),
    ("data.root", {"_target_": "io.FileIO", "file": "owned", "mode": "w"}),
    ("method", {"_target_": "timeit.Timer", "stmt": TOUCH}),
    ("method._target_", "antigravity.open"),
    ("method._target_", "wsss.methods.base.torch.hub.load"),
    ("method._target_", "wsss.methods.base.WSSSModuleX"),
    ("method.lr", {"_target_": "io.FileIO", "file": "owned", "mode": "w"}),
    ("method.scales", [[{"_target_": "io.FileIO", "file": "owned", "mode": "w"}]]),
    ("backbone", {"_target_": "io.FileIO", "file": "owned", "mode": "w"}),
    ("backbone.overrides.norm_layer", {"_target_": "io.FileIO", "file": "owned", "mode": "w"}),
    ("trainer", {"_target_": "io.FileIO", "file": "owned", "mode": "w"}),
    ("trainer.callbacks", [{"_target_": "logging.FileHandler", "filename": "owned"}]),
    ("trainer.logger", {"_target_": "logging.FileHandler", "filename": "owned"}),
    ("logger", {"_target_": "logging.FileHandler", "filename": "owned"}),
    ("eval", {"_target_": "logging.FileHandler", "filename": "owned"}),
    ("hydra", {"_target_": "logging.FileHandler", "filename": "owned"}),
    ("second_stage", {"method": {"_target_": "timeit.Timer", "stmt": TOUCH}}),
    ("second_stage", {"data": {"train_transform": {"_target_": "timeit.Timer"}}}),
    ("maps", {"run": "x", "random_walk": {"method": {"_target_": "timeit.Timer", "stmt": TOUCH}}}),
    ("callbacks", {"a": {"_target_": "logging.FileHandler", "filename": "owned"}}),
    ("callbacks", {"a": {"_target_": "lightning.pytorch.callbacks.LambdaCallback"}}),
    ("callbacks.a.b", {"_target_": "io.FileIO", "file": "owned", "mode": "w"}),
    ("method._partial_", True),
    ("data._args_", ["owned"]),
    ("data._recursive_", True),
    ("method._target_", 5),
    ("method._target_", ["wsss.methods.toco.ToCo"]),
    ("method._target_", "builtins.dict"),
    ("method._target_", ""),
    ("study", "${oc.env:SECRET}"),
    ("data.name", "x${oc.env:SECRET}"),
    ("data.class_names", ["${oc.decode:1}"]),
]


@pytest.mark.parametrize(("path", "value"), EVIL, ids=[f"{i:02d}" for i in range(len(EVIL))])
def test_a_stored_configuration_runs_no_code(
    path: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "swordfish")
    before = set(tmp_path.rglob("*"))
    config = stored_config()
    put(config, path, value)
    with pytest.raises(WSSSError, match=r"^a file: ") as refused:
        check_stored(config, "a file")
    assert "swordfish" not in str(refused.value)
    assert len(str(refused.value)) < 400
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", ["eval", "predict", "pseudo"])
def test_verbs_refuse_a_strangers_class(
    verb: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run = altered(
        tmp_path,
        lambda c: put(c["wsss"]["config"], "data.train_transform", EVIL[0][1]),
    )
    Path("photos").mkdir()
    shutil.copy(TESTS.parent / "docs" / "images" / "more_minivoc.jpg", "photos")
    further = {"predict": ["images=photos", "out=masks"]}.get(verb, [])
    assert main([verb, f"run={run}", *further]) == 2
    said = capsys.readouterr().err
    assert "timeit.Timer" in said
    assert "trust=[timeit]" in said
    assert not Path("owned").exists()


def test_a_report_draws_nothing_of_a_strangers_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(STORED, "run")
    results = json.loads(Path("run/results.json").read_text())
    results["config"]["data"]["train_transform"] = EVIL[1][1]
    Path("run/results.json").write_text(json.dumps(results))
    assert main(["report", "run", "out=page", "gallery=1"]) == 0
    page = Path("page/index.html").read_text()
    assert "no pictures" in page
    assert "logging.FileHandler" in page
    assert not Path("owned").exists()


def test_a_report_shows_trusted_and_other_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class from outside is the first run's alone: the other's pictures need no word."""
    monkeypatch.syspath_prepend(outside(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = altered(tmp_path, lambda c: put(c["wsss"]["config"], "method._target_", "elsewhere.Mine"))
    shutil.copytree(STORED, "second")
    results = json.loads((run / "results.json").read_text())
    results["config"]["method"]["_target_"] = "elsewhere.Mine"
    (run / "results.json").write_text(json.dumps(results | {"method": "Mine"}))
    line = ["report", "run", "second", "out=page", "gallery=1", "resamples=50"]
    found = {}
    for further in ([], ["trust=[elsewhere]"]):
        assert main([*line, *further]) == 0
        page = Path("page/index.html").read_text()
        found[len(further)] = page.count('class="zoom"'), "trust=[elsewhere]" in page
    images = 4  # of each reason; a row has image, truth, and mask and CAM of each run, image again
    assert found == {0: (5 * images, True), 1: (7 * images, False)}


def test_loading_builds_no_training_view(monkeypatch: pytest.MonkeyPatch) -> None:
    @functools.wraps(SquareViews.__init__)
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a training view was built")

    monkeypatch.setattr(SquareViews, "__init__", fail)
    run = load_run(STORED)
    assert run.data.train_transform is None
    with pytest.raises(WSSSError, match="made to evaluate"):
        run.data.setup("fit")


def outside(folder: Path) -> Path:
    """Write a method from outside the package; give the folder that Python finds it in."""
    (folder / "elsewhere.py").write_text(
        "from wsss.methods.tkp_pcl import TKPPCL\n\n\nclass Mine(TKPPCL):\n    pass\n"
    )
    return folder


def test_a_trusted_package_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(outside(tmp_path))
    run = altered(tmp_path, lambda c: put(c["wsss"]["config"], "method._target_", "elsewhere.Mine"))
    with pytest.raises(WSSSError, match=r"trust=\[elsewhere\]"):
        load_run(run)
    assert type(load_run(run, trust=["elsewhere"]).module).__name__ == "Mine"


def test_a_run_that_train_begins_from_needs_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the line names, or its ``trust``, may be named by the run; nothing else."""
    monkeypatch.syspath_prepend(outside(tmp_path))
    run = altered(tmp_path, lambda c: put(c["wsss"]["config"], "method._target_", "elsewhere.Mine"))
    plainly, trusting = (
        plain(compose_config(["method=tkp_pcl", "data=minivoc", *further]))
        for further in ([], ["trust=[elsewhere]"])
    )
    assert config_hash(plainly) == config_hash(trusting)
    begin = {"init_from": str(run)}
    with pytest.raises(WSSSError, match=r"^init_from: .* trust=\[elsewhere\]$"):
        with_start(plainly | begin)
    with pytest.raises(WSSSError, match=r"^init_from=\S+: holds weights of elsewhere\.Mine"):
        with_start(trusting | begin)
    named = {"method": plainly["method"] | {"_target_": "elsewhere.Mine"}}
    assert with_start(plainly | begin | named)["init_from"]["method"] == "TKP-PCL"
    maps = {"maps": {"run": str(run)}, "data": plainly["data"] | {"class_names": ["cat"]}}
    with pytest.raises(WSSSError, match=r"^maps\.run: .* trust=\[elsewhere\]$"):
        with_labels(plainly | maps, torch.device("cpu"))
    with pytest.raises(WSSSError, match=r"^maps\.run=\S+: has the classes"):
        with_labels(trusting | maps, torch.device("cpu"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("data.train_transform._target_=timeit.Timer", "expected a transform"),
        ("data.train_transform._target_=wsss.methods.toco.ToCo", "expected a transform"),
        ("method._target_=builtins.dict", "expected a WSSSModule"),
        ("method._target_=5", "expected the dotted name of a class"),
        ("method._target_=wsss.Backbone", "expected a WSSSModule"),
        ("backbone._target_=lightning.Trainer", "expected a Backbone or a ConvBackbone"),
        ("data._target_=io.FileIO", "expected a ImageDataModule"),
        ("trainer._target_=io.FileIO", "expected a Trainer"),
        ("method.scales=[{_target_:io.FileIO}]", "expected a list of float"),
        ("+backbone.overrides.a._target_=io.FileIO", "no part of an architecture"),
        ("+logger.a._target_=io.FileIO", "no class belongs there"),
    ],
)
def test_a_line_names_classes_of_their_kind(line: str, words: str) -> None:
    with pytest.raises(WSSSError, match=words):
        compose_config(["method=toco", "data=minivoc", line])


def test_ones_own_class_may_stand_on_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_methods.py").write_text(
        "from wsss.methods.toco import ToCo\n\n\nclass Mine(ToCo):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = compose_config(["method=toco", "data=minivoc", "method._target_=my_methods.Mine"])
    assert plain(config)["method"]["_target_"] == "my_methods.Mine"


# ---- parts of a checkpoint -----------------------------------------------------------------------


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(name)


def setting(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: put(content, path, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("wsss"), "not a wsss checkpoint"),
        (without("state_dict"), "its state_dict is missing"),
        (setting("state_dict", [1]), "its state_dict is missing or damaged"),
        (setting("state_dict.more", 3), "holds more than tensors"),
        (setting("wsss", 5), "its wsss is missing or damaged"),
        (setting("wsss.config", None), "its configuration is missing"),
        (setting("wsss.config", {}), "is missing"),
        (setting("wsss.config.method", 5), "method=5: expected"),
        (setting("wsss.backbone", {"name": 1}), "encoder's weights is damaged"),
        (setting("global_step", "many"), "global_step='many'"),
        (setting("global_step", -1), "global_step=-1"),
        (setting("global_step", 10**40), "global_step"),
        (setting("callbacks.CostMeter", {"seconds": "x"}), "its cost is damaged"),
        (setting("callbacks.CostMeter.seconds", float("nan")), "out of range"),
    ],
)
def test_parts_of_a_checkpoint_are_looked_at(
    change: Callable[[dict[str, Any]], None], words: str, tmp_path: Path
) -> None:
    run = altered(tmp_path, change)
    with pytest.raises(WSSSError, match=words):
        load_run(run)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (setting("wsss.backbone.name", 5), "encoder's weights is damaged"),
        (setting("wsss.backbone.source", ["x"]), "encoder's weights is damaged"),
        (setting("wsss.backbone.file_sha256", 0), "encoder's weights is damaged"),
        (setting("wsss.files_sha256", {"x": {"y": 1}}), "its files_sha256 is damaged"),
        (setting("wsss.files_sha256", {1: "x"}), "its files_sha256 is damaged"),
        (setting("wsss.config.seed", torch.zeros(3)), "its seed is a Tensor, which is no value"),
        (setting("wsss.config.data.class_names", {"a"}), r"data\.class_names is a set"),
        (setting("wsss.config.data.limit", 1 + 2j), r"data\.limit is a complex"),
        (setting("wsss.config.data.root", b"a"), r"data\.root is a bytes"),
    ],
)
def test_a_checkpoints_values_are_of_their_kind(
    change: Callable[[dict[str, Any]], None], words: str, tmp_path: Path
) -> None:
    run = altered(tmp_path, change)
    with pytest.raises(WSSSError, match=rf"last\.ckpt: .*{words}"):
        load_run(run)


def test_parts_that_only_resuming_reads_may_be_absent(tmp_path: Path) -> None:
    run = altered(tmp_path, lambda c: [c.pop(k) for k in ("callbacks", "loops", "VOCDataModule")
                                       if k in c])  # fmt: skip
    assert load_run(run).cost is None


def refusal_of(path: Path) -> tuple[str, dict[str, torch.Tensor] | None]:
    try:
        return "", load_run(path).module.state_dict()
    except WSSSError as error:
        return str(error), None


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    """Every accepted file gives the very same weights."""
    expected = load_run(STORED).module.state_dict()
    whole = CHECKPOINT.read_bytes()
    draw = random.Random(0)
    path = tmp_path / "flipped.ckpt"
    refused = 0
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        words, found = refusal_of(path)
        if found is None:
            refused += 1
            assert str(path) in words
            assert "\n" not in words
        else:
            assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert refused > 25


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no checkpoint at all"])
def test_files_that_are_no_checkpoints(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(WSSSError, match=r"a\.ckpt: "):
        load_run(path)


def test_an_archive_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    path.write_bytes(CHECKPOINT.read_bytes()[:-2000])
    with pytest.raises(WSSSError, match=r"cut\.ckpt: "):
        load_run(path)
    assert zipfile.is_zipfile(CHECKPOINT)


def test_what_is_stored_today_is_accepted() -> None:
    config = plain(
        compose_config(["method=toco", "data=minivoc", "+method.quirks.box_in_pixels=true"])
    )
    assert check_stored(copy.deepcopy(config), "a file") == config
    second = plain(compose_config(["+experiments=tkp_pcl/minivoc"]))
    assert check_stored(second, "a file") == second
    assert ToCo.__module__.startswith("wsss.methods.")
