"""Full disks, damaged files, two commands at once and nonsense: named before or without loss."""

import json
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_runs import PLAIN, SMALL, Command

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.core.lock import LOCK_FILE, lock
from wsss.data.builtin import minivoc_root
from wsss.data.train_masks import CARD_FILE, read_card
from wsss.evaluation.ledger import past_readings
from wsss.runs.compose import compose_run
from wsss.runs.config import override_config
from wsss.runs.folder import load_run
from wsss.runs.line import quoted
from wsss.runs.masks import write_masks
from wsss.runs.prepare import prepare
from wsss.runs.wandb import run_id
from wsss.training.run import train

TINY = [
    "method=toco",
    *SMALL,
    *PLAIN,
    "data.limit=4",
    "budget.max_steps=2",
    "budget.eval_every=2",
    "budget.warmup_steps=1",
    "method.decoder_channels=16",
]


def wsss(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as leave:
        return int(leave.code or 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two steps."""
    runs = tmp_path_factory.mktemp("runs")
    assert wsss("train", *TINY, f"runs_dir={runs}") == 0
    return next(runs.rglob("config.yaml")).parent


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(trained, tmp_path / trained.name))


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process may be larger, as where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_folder_has_no_lock_and_no_rest(trained: Path) -> None:
    assert not [path for path in trained.rglob(".*") if path.name != ".gitignore"]


def test_half_a_line_in_the_ledger_ends_no_evaluation(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (run / "ledger.jsonl").open("a") as stream:
        stream.write('{"time": "2026-01-0')
    before = len(past_readings(run))
    assert wsss("eval", f"run={run}", "splits=[val]") == 0
    assert "ledger.jsonl: line 3 is damaged" in capsys.readouterr().err
    assert len(past_readings(run)) == before + 1
    (out,) = (run / "eval").iterdir()
    results = json.loads((out / "results.json").read_text())
    assert results["splits"]["val"]["readings"] == before + 1


def test_a_ledger_that_cannot_be_used_is_named_before_the_work(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "ledger.jsonl").unlink()
    (run / "ledger.jsonl").mkdir()
    monkeypatch.setattr("wsss.runs.scoring.evaluate", lambda *_, **__: pytest.fail("evaluated"))
    assert wsss("eval", f"run={run}") == 2
    assert "ledger.jsonl: cannot be read (it is no file)" in capsys.readouterr().err


@pytest.mark.parametrize("largest", [2000, 6000, 12_000])
def test_a_full_disk_loses_no_number_of_an_evaluation(
    largest: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The counts, the results or a sheet of the gallery do not fit."""
    out = tmp_path / "out"
    (run / "ledger.jsonl").unlink()
    make = [f"run={run}", f"out={out}", "gallery=2", "splits=[val]"]
    with full_disk(5000 if largest == 2000 else largest):
        if largest == 2000:
            (run / "ledger.jsonl").write_text("\n" * 4990)
        status = wsss("eval", *make)
    captured = capsys.readouterr()
    assert status == 2
    assert "CAM seed mIoU" in captured.out, "the numbers are shown"
    (line,) = [text for text in captured.err.splitlines() if text.startswith("wsss eval")]
    assert re.search(
        r"/(ledger|images|results|sheet)\S*: cannot be written \((File too|No space)", line
    )
    assert "make room" in line
    assert not list(out.rglob(".*"))
    if "sheet" in line:
        assert (out / "results.json").is_file()
    assert wsss("eval", *make) == 0


def test_a_full_disk_ends_every_verb_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    source = next((minivoc_root() / "VOC2012" / "JPEGImages").glob("*.jpg"))
    shutil.copy(source, images)
    for arguments in (
        ["pseudo", f"run={run}", f"out={tmp_path / 'labels'}"],
        ["predict", f"run={run}", f"out={tmp_path / 'masks'}", f"images={images}"],
        ["compare", str(run), f"out={tmp_path / 'table.md'}", "resamples=10"],
        ["report", str(run), f"out={tmp_path / 'page'}", "resamples=10"],
    ):
        with full_disk(100):
            assert wsss(*arguments) == 2
        captured = capsys.readouterr().err
        (line,) = [text for text in captured.splitlines() if text.startswith("wsss ")]
        assert re.search(r"\S+: cannot be written \(File too large\).*; make room", line), line


def test_a_class_list_that_cannot_be_written_is_named(run: Path, tmp_path: Path) -> None:
    loaded = load_run(run)
    (tmp_path / "classes.txt").mkdir()
    with pytest.raises(WSSSError, match=r"classes\.txt: cannot be written"):
        write_masks(loaded, {}, tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("verb", "place", "doing"),
    [
        (["eval"], ".", "evaluating"),
        (["eval", "gallery=0", "out=OUT"], "OUT", "evaluating"),
        (["pseudo", "out=OUT"], "OUT", "labelling"),
        (["report", "out=OUT", "gallery=0", "resamples=10"], "OUT", "writing a report"),
    ],
)
def test_two_commands_do_not_write_in_one_folder(
    verb: list[str], place: str, doing: str, run: Path, tmp_path: Path
) -> None:
    folder = run if place == "." else tmp_path / place
    folder.mkdir(exist_ok=True)
    arguments = [a.replace("OUT", str(tmp_path / "OUT")) for a in verb]
    arguments.insert(1, str(run) if verb[0] == "report" else f"run={run}")
    before = (run / "results.json").read_bytes()
    with lock(folder, doing):
        other = Command(arguments, tmp_path / "log")
        assert other.end() == 2, other.text()
    assert f"{folder}: another process (" in other.text()
    assert f"is {doing} here; wait until it ends" in other.text()
    assert (run / "results.json").read_bytes() == before
    assert [p.name for p in folder.iterdir()] == [p.name for p in run.iterdir()] or not list(
        folder.iterdir()
    )
    again = Command(arguments, tmp_path / "log2")
    assert again.end() == 0, again.text()
    assert not (folder / LOCK_FILE).exists()


def test_an_evaluation_waits_for_no_killed_one(run: Path, tmp_path: Path) -> None:
    arguments = ["eval", f"run={run}", f"out={tmp_path / 'out'}", "gallery=0"]
    first = Command(arguments, tmp_path / "1.log")
    first.until((tmp_path / "out" / LOCK_FILE).is_file)
    first.send(signal.SIGKILL)
    first.end()
    assert Command(arguments, tmp_path / "2.log").end() == 0
    assert not (tmp_path / "out" / LOCK_FILE).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"supervision": 5}', "supervision=5"),
        ('{"supervision": ""}', "supervision=''"),
        ('{"status": "done"}', "status='done'"),
        ('{"made_from": [1]}', "made_from"),
    ],
)
def test_a_card_of_another_kind_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).write_text(content)
    with pytest.raises(WSSSError, match=rf"{CARD_FILE}: .*{message}.*run wsss pseudo again"):
        read_card(str(tmp_path))


@pytest.mark.parametrize("content", ["../../x", "a" * 100, "a\nb", "\xff"])
def test_a_wandb_id_that_is_none_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "wandb_id.txt").write_bytes(content.encode("latin-1"))
    with pytest.raises(WSSSError, match=r"wandb_id\.txt: holds no W&B id; remove it"):
        run_id(tmp_path)


NONSENSE = [
    (["trainer.devices=[]"], "trainer.devices=[]"),
    (["trainer.devices=0"], "trainer.devices=0"),
    (["trainer.devices=[0,0]"], "trainer.devices=[0, 0]"),
    (["trainer.devices=-2"], "trainer.devices=-2"),
    (["trainer.max_steps=-1"], "trainer.max_steps=-1"),
    (["trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0"),
    (["+trainer.num_nodes=0"], "trainer.num_nodes=0"),
    (["trainer.log_every_n_steps=0"], "trainer.log_every_n_steps=0"),
    (["gallery=1e9"], "gallery=1000000000.0"),
    (["gallery=-1"], "gallery=-1"),
    (["seed=-1"], "seed=-1"),
    (["runs_dir={a:1}"], "runs_dir={'a': 1}: expected"),
    (["study={a:1}"], "study={'a': 1}: expected"),
    (["seed=4294967296"], "seed=4294967296"),
    (["objective=nope"], "objective='nope'"),
    (["study=/etc"], "study='/etc'"),
    (["study=../../x"], "study='../../x'"),
    (["study=.."], "study='..'"),
    (["study=' '"], "study=' '"),
    (["study=''"], "study=''"),
    (["study='a\\tb'"], "study="),
    (["data.name=../../y"], "data.name='../../y'"),
    (["data.name=a/b"], "data.name='a/b'"),
    (["data.limit=-1"], "data.limit=-1"),
    (["data.eval_batch_size=0"], "data.eval_batch_size=0"),
    (["data.num_workers=-1"], "data.num_workers=-1"),
    (["budget.max_steps=0"], "budget.max_steps=0"),
    (["budget.crop_size=100000"], "budget.crop_size=100000"),
    (["budget.scale_range=[0,1]"], "budget.scale_range=[0, 1]"),
    (["budget.cam_size=-3"], "budget.cam_size=-3"),
    (["budget.warmup_steps=-1"], "budget.warmup_steps=-1"),
    (["budget.warmup_steps=3"], "longer than the run, max_steps=2; set budget.warmup_steps or"),
    (["method.scales=[1,0.05]"], "method.scales: scale 0.05 of a 64 px crop leaves 3 px"),
    (["eval.seg_scales=[1,0.001]"], "eval.seg_scales=[1, 0.001]"),
    (["eval.holdout_per_class=-1"], "eval.holdout_per_class=-1"),
    (["budget.max_steps=1000000000000000000"], "budget.max_steps=1000000000000000000"),
    (["data.num_workers=1000000"], "data.num_workers=1000000"),
    (["data.seed=18446744073709551616"], "data.seed=18446744073709551616"),
    (["data.eval_batch_size=1000000"], "data.eval_batch_size=1000000"),
    (["eval.seg_scales=[" + "1," * 999 + "1]"], "a list of float, at most 100 of them"),
    (["method.scales=[1e9]"], "method.scales=[1000000000.0]"),
    (["method.decoder_channels=1000000"], "method.decoder_channels=1000000"),
    (["backbone.overrides.depth=1000000000"], "backbone.overrides.depth=1000000000"),
    (["+trainer.logger=false"], "trainer.logger: every run has its own"),
    (["+trainer.callbacks=[]"], "trainer.callbacks: every run has its own"),
    (["+trainer.default_root_dir=/etc"], "what sets it is runs_dir="),
    (["+trainer.enable_checkpointing=false"], "what sets it is budget.eval_every="),
    (["data._target_=wsss.train"], "data._target_=wsss.train: no such class"),
    (["+backbone.overrides.act_layer=os.system"], "timm cannot build it with overrides"),
    (["study=CON"], "study='CON'"),
    (["study=nul.txt"], "study='nul.txt'"),
    (["study='a:b?'"], "study='a:b?'"),
    (["study=-rf"], "study='-rf'"),
    (["study='~'"], "study='~'"),
    (["study='$HOME'"], "study='$HOME'"),
    (["study='a*'"], "study='a*'"),
    (["study=a."], "study='a.'"),
    (["data.name='a?'"], "data.name='a?'"),
    (["data.train_split=val"], "data.train_split=val: 4 of its images are also in 'val'"),
    (["data.test_splits=[val_unseen]", "data.train_split=val_unseen"], "data.test_splits has scor"),
]


@pytest.mark.parametrize(("settings", "message"), NONSENSE)
def test_nonsense_is_refused_before_anything_is_written(
    settings: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert wsss("train", *TINY, *settings) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_lists_of_training_may_be_scored_too(tmp_path: Path) -> None:
    """Seeds are scored on the list they are made for."""
    splits = ["data.val_split=train", "data.test_splits=[train]"]
    assert prepare(compose_run([*TINY, *splits, f"runs_dir={tmp_path}"])).data.val_split == "train"


@pytest.mark.parametrize("name", ["toco-minivoc", "a b", "lr=0.1,x+y", "été_2", "CONV", "1.0"])
def test_names_of_folders_that_are_in_use(name: str) -> None:
    assert compose_run([*TINY, f"study={quoted(name)}"])["study"] == name


@pytest.mark.parametrize(
    ("setting", "ended"),
    [
        ("+trainer.max_time=00:00:00:00", "0 of 2 steps"),
        ("trainer.max_epochs=1", "1 of 2 steps"),
        ("trainer.limit_val_batches=1", "2 of 2 steps"),
        ("trainer.overfit_batches=1", "2 of 2 steps"),
    ],
)
def test_a_limited_run_has_no_scores(
    setting: str, ended: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wsss("train", *TINY, setting, f"runs_dir={tmp_path}") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"not a finished run: {ended} under {setting.lstrip('+')}; it has no")
    assert not [*tmp_path.rglob("results.json")]


def test_a_smoke_test_begins_anew_and_is_never_compared(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, text = tmp_path / "own", "1 of 2 steps under trainer.fast_dev_run=true"
    line = ["train", *TINY, "trainer.fast_dev_run=true", f"runs_dir={runs}", "logger=wandb"]
    assert wsss(*line) == 0
    assert f"not a finished run: {text}" in capsys.readouterr().out
    (config,) = runs.rglob("config.yaml")
    assert not [*config.parent.glob("wandb*")]
    assert wsss("eval", f"run={config.parent}") == 0
    status = json.loads((config.parent / "results.json").read_text())["status"]
    assert status == f"unfinished: {text}"
    assert wsss("compare", str(config.parent)) == 2
    assert f"no finished run there: {config.parent.name}" in capsys.readouterr().err
    assert wsss("compare", str(run), str(runs), "by=run", "resamples=10") == 0
    assert f"not finished (1): {config.parent.name}" in " ".join(capsys.readouterr().out.split())
    assert wsss(*line) == 0
    printed = capsys.readouterr().out
    assert f"not a finished run: {text}" in printed, "results of a part make no run finished"
    assert "resuming" not in printed


def test_a_stored_configuration_that_is_refused_names_its_file(run: Path) -> None:
    file = run / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    content["wsss"]["config"]["method"]["lr"] = -1.0
    torch.save(content, file)
    with pytest.raises(WSSSError, match=rf"^{re.escape(str(file))}: its method\.lr=-1\.0: expec"):
        load_run(run)
    with pytest.raises(WSSSError, match=r"^data\.limit=-1"):
        load_run(run, ["data.limit=-1", "method.lr=0.1"])


def test_a_configuration_in_python_that_lacks_a_key_is_named(tmp_path: Path) -> None:
    config = compose_run([*TINY, f"runs_dir={tmp_path}"])
    for key in ("seed", "method"):
        given = {name: value for name, value in config.items() if name != key}
        with pytest.raises(WSSSError, match=rf"^{key} is missing in the configuration given; add"):
            train(given)
    with pytest.raises(WSSSError, match=r"method\.lr=-1: expected a number greater than 0"):
        train(config | {"method": config["method"] | {"lr": -1}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.log_every_n_steps=!!python/x", "cannot be read as a value"),
        ("trainer.log_every_n_steps=[", "cannot be read as a value"),
        ("eval.seg_scales={a:1}", "expected what is there now, a list or a group"),
        ("runs_dir={a:1}", r"runs_dir=\{'a:1': None\}: expected"),
        ("x" * 3000 + "=1", "unknown key"),
        ("x" * 3000, "expected KEY=VALUE"),
    ],
)
def test_changes_that_fit_nothing_are_one_short_line(override: str, message: str) -> None:
    with pytest.raises(WSSSError, match=message) as caught:
        override_config(compose_run(TINY), [override])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_long_overrides_are_cut() -> None:
    with pytest.raises(WSSSError, match="several values are swept") as caught:
        compose_run([*TINY, "+backbone+=" + "x" * 3000])
    assert len(str(caught.value)) < 1000


def test_a_phase_beyond_the_run_is_refused(tmp_path: Path) -> None:
    common = [*(a for a in TINY if not a.startswith("method")), f"runs_dir={tmp_path}"]
    for settings, message in (
        (["method=clustercam", "method.epochs=50"], r"method\.seg_from_epoch=50: beyond the run"),
        (["method=clustercam", "method.warmup_epochs=81"], r"method\.warmup_epochs=81: longer th"),
        (["method=tkp_pcl", "budget.warmup_steps=9"], r"method\.warmup_steps=9: longer than the"),
    ):
        with pytest.raises(WSSSError, match=message):
            prepare(compose_run([*common, *settings]))
    settings = ["method=clustercam", "method.epochs=6", "method.seg_weight=0"]
    assert prepare(compose_run([*common, *settings, "method.decoder_channels=16"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "run=x", "first_class=2"], "first_class=2"),
        (["eval", "cams=x", "seed=-1"], "seed=-1"),
        (["pseudo", "run=x", "crf_jobs=0"], "crf_jobs=0"),
        (["report", "x", "out=y", "gallery=1000000000"], "gallery=1000000000"),
        (["compare", "x", "resamples=1000000000000"], "resamples=1000000000000"),
        (["dashboard", "study=../../x"], "study='../../x'"),
        (["dashboard", "study=/etc"], "study='/etc'"),
    ],
)
def test_arguments_of_the_other_verbs_have_ranges(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wsss(*arguments) == 2
    assert message in capsys.readouterr().err


def test_advice_is_what_the_same_verb_takes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an error says to give, the same command takes."""
    monkeypatch.setattr("wsss.runs.wandb.offline_runs", lambda folders: [tmp_path])
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert wsss("sync", str(tmp_path)) == 2
    assert "logger=" not in capsys.readouterr().err
    folder = tmp_path / "others"
    folder.mkdir()
    (folder / "note.txt").touch()
    assert wsss("pseudo", f"run={run}", f"out={folder}") == 2
    assert "give another out=" in capsys.readouterr().err
    assert wsss("pseudo", f"run={run}") == 0
    (labels,) = (run / "pseudo_labels").iterdir()
    (labels / CARD_FILE).unlink()
    capsys.readouterr()
    assert wsss("pseudo", f"run={run}") == 2
    assert "remove that folder" in capsys.readouterr().err
    shutil.rmtree(labels)
    assert wsss("pseudo", f"run={run}") == 0
    assert os.listdir(labels)
