"""Searches: equal for equal seeds, gone on with after kill -9, judged on the holdout alone."""

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from small_runs import FORKED, PLAIN, SMALL

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.core.places import choices, config_root
from wsss.results.search import OVERLAY_FILE, Range, Search, read_search
from wsss.results.store import RESULTS_FILE, read_results
from wsss.runs.compose import compose_run
from wsss.runs.space import MOST_KEYS, read_space, settings_of
from wsss.training.chosen import overlay as overlay_of
from wsss.training.run import train
from wsss.training.search import JOURNAL, Plan, plan_search, run_search, settings_of_trial
from wsss.training.sweeps import Outcome

pytest.importorskip("optuna")
LINE = [
    "method=segmenter_vit",
    "backbone=vit_pico",
    *SMALL,
    *PLAIN,
    "budget.max_steps=2",
    "budget.eval_every=100",
    "data.limit=12",
    "data.train_masks=ground_truth",
    "eval.holdout_per_class=1",
    "objective=seg_miou",
]


def here(overrides: list[str], folder: Path, number: int) -> Outcome:
    """Run a trial in this process."""
    config = compose_run(overrides)
    run = train(config)
    splits = read_results(run / RESULTS_FILE)["splits"]
    assert list(splits) == [config["data"]["val_split"]]
    value = splits[config["data"]["val_split"]].get(config["objective"])
    return Outcome(overrides, 0, value=value)


def plan(runs: Path, *line: str, trials: int = 4, startup: int = 2, seed: int = 0) -> Plan:
    overrides = [*(line or LINE), f"runs_dir={runs}"]
    return plan_search(overrides, trials=trials, startup=startup, seed=seed)


def found(search: Search) -> list[tuple[int, Any, float | None]]:
    return [(trial.number, trial.settings, trial.value) for trial in search.trials]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_search(plan(tmp_path_factory.mktemp("runs")), here)


def test_a_search_begins_with_the_settings_as_they_are(undisturbed: Path) -> None:
    search = read_search(undisturbed)
    assert [trial.number for trial in search.trials] == [0, 1, 2, 3]
    assert [trial.by for trial in search.trials] == ["overlay", "random", "TPE", "TPE"]
    config = compose_run(LINE)
    assert search.trials[0].settings == {f"method.{key}": config["method"][key]
        for key in ("lr", "head_lr_factor", "weight_decay")}  # fmt: skip
    assert len({json.dumps(trial.settings) for trial in search.trials}) == 4
    best = search.best_trial
    assert best is not None
    assert best.value == max(search.values) >= search.values[0]
    assert search.choice == f"tuned: 4 trials on a holdout of {search.masks} masks"
    for trial in search.trials:
        assert trial.run is not None
        assert trial.commit
        assert trial.seconds
        results = read_results(undisturbed / trial.run / RESULTS_FILE)
        (numbers,) = results["splits"].values()
        assert numbers["seg_miou"] == trial.value
        assert numbers["protocol"]["list_sha256"] == search.list_sha256


def kill_at(plan: Plan, reached: Any) -> None:
    """Run a search in a process, and end it with SIGKILL once something has been reached."""
    process = FORKED.Process(target=run_search, args=(plan, here))
    process.start()
    deadline = time.monotonic() + 300
    while not reached():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.slow
def test_three_kills_leave_an_undisturbed_search(tmp_path: Path, undisturbed: Path) -> None:
    """In the middle of a trial's training, of its keys being asked for, of its scores."""
    search = plan(tmp_path)
    trials = search.folder / "trials"
    journal = search.folder / JOURNAL

    def trains() -> bool:
        return len(list(trials.glob("*/.lock"))) == 1

    def asks() -> bool:  # TPE's first proposal, the first of three keys
        return journal.read_bytes().count(b'"param_name":"method.lr"') == 3

    def has_checkpoint() -> bool:
        return len(list(trials.glob("*/checkpoints/last.ckpt"))) == 4

    for reached in (trains, asks, has_checkpoint):
        kill_at(search, reached)
    run_search(search, here)
    assert found(read_search(search.folder)) == found(read_search(undisturbed))
    assert (search.folder / OVERLAY_FILE).read_text() == (undisturbed / OVERLAY_FILE).read_text()


def test_two_searches_with_one_seed_choose_the_same(tmp_path: Path, undisturbed: Path) -> None:
    """A longer search goes on with the shorter one, also behind a line that a power cut left."""
    short = run_search(plan(tmp_path, trials=2), here)
    assert read_search(short).choice == "tuned: 2 trials on a holdout of 6 masks"
    with (short / JOURNAL).open("ab") as journal:
        journal.write(b'{"op_code":4,"wor')
    again = run_search(plan(tmp_path), here)
    assert again == short
    assert found(read_search(again)) == found(read_search(undisturbed))
    assert run_search(plan(tmp_path), here) == short, "the journal is whole"


def test_a_damaged_journal_is_named(tmp_path: Path, undisturbed: Path) -> None:
    search = plan(tmp_path)
    search.folder.mkdir(parents=True)
    lines = (undisturbed / JOURNAL).read_text().splitlines(keepends=True)
    gone = next(i for i, line in enumerate(lines) if '"param_name":"method.weight_decay"' in line)
    for damaged, said in (
        ([*lines[:3], "{no line}\n", *lines[3:]], "damaged"),
        ([*lines[:3], '{"op_code":99,"worker_id":"x"}\n', *lines[3:]], "damaged"),
        (lines[:gone] + lines[gone + 1 :], "trial 0 has no method.weight_decay"),
    ):
        (search.folder / JOURNAL).write_text("".join(damaged))
        with pytest.raises(WSSSError, match=f"{said}.*bring back a copy"):
            run_search(search, here)


def test_who_proposed_is_what_was_known_then(tmp_path: Path) -> None:
    """Trial 1 is asked for while trial 0 runs, so TPE knows nothing yet, as with two processes."""
    search = plan(tmp_path, trials=2, startup=1)

    def slow(overrides: list[str], folder: Path, number: int) -> Outcome:
        if number == 0:
            run_search(search, lambda line, *_: Outcome(line, 1, "failed"))
        return here(overrides, folder, number)

    trials = read_search(run_search(search, slow)).trials
    assert [(each.number, each.by) for each in trials] == [(0, "overlay"), (1, "random")]


def test_nothing_stops_a_trial_early(tmp_path: Path) -> None:
    with pytest.raises(WSSSError, match=r"callbacks\.early_stopping: it would stop a trial"):
        plan(tmp_path, *LINE, "callbacks=early_stopping")


def test_a_folder_that_takes_no_lock_fails_no_trial(tmp_path: Path, undisturbed: Path) -> None:
    """A trial that could not begin has not been tried: the same command goes on."""
    search = plan(tmp_path, trials=2)
    run = read_search(undisturbed).trials[1].run
    assert run is not None
    obstacle = search.folder / run / ".lock"
    obstacle.mkdir(parents=True)
    with pytest.raises(WSSSError, match=r"\.lock"):
        run_search(search, here)
    assert len(read_search(search.folder).trials) == 1
    obstacle.rmdir()
    assert found(read_search(run_search(search, here))) == found(read_search(undisturbed))[:2]


def test_rounded_settings_stay_within_their_range(tmp_path: Path) -> None:
    space = {
        "method.lr": Range(low=1.00001e-4, high=1.00049e-4),
        "method.weight_decay": Range(choices=[0.123456, 0.5]),
        "method.head_lr_factor": Range(low=1.0, high=50.0),
    }
    values = {"method.lr": 1.00002e-4, "method.weight_decay": 0.123456,
              "method.head_lr_factor": 2.718281}  # fmt: skip
    rounded = settings_of_trial(replace(plan(tmp_path), space=space), 1, values)
    assert all(choice.contains(rounded[key]) for key, choice in space.items())
    assert rounded["method.head_lr_factor"] == 2.718


def test_the_chosen_overlay_composes_to_the_best_trial(tmp_path: Path, undisturbed: Path) -> None:
    search = read_search(undisturbed)
    (tmp_path / "experiments" / "mine").mkdir(parents=True)
    text = (undisturbed / OVERLAY_FILE).read_text()
    assert str(undisturbed) not in text
    assert "Of the search alone: data.limit=8" in text
    (tmp_path / "experiments" / "mine" / "tuned.yaml").write_text(text)
    places = f"hydra.searchpath=[file://{config_root()},file://{tmp_path}]"
    config = compose_run(["+experiments=mine/tuned", places])
    assert config["choice"] == search.choice
    assert config["objective"] == search.objective == "seg_miou"
    assert config["study"] == "minivoc-tuned"
    assert config["backbone"]["overrides"]["depth"] == 4
    assert config["data"]["name"] == "minivoc"
    assert config["data"]["train_masks"] == "ground_truth", "the same supervision"
    assert config["budget"]["max_steps"] == 400, "those of the search are its own"
    best = search.best_trial
    assert best is not None
    assert settings_of(config, search.space, "segmenter_vit") == best.settings


def test_a_report_shows_a_search_that_was_run(tmp_path: Path, undisturbed: Path) -> None:
    runs = undisturbed.parents[1]
    assert main(["report", str(runs), f"out={tmp_path / 'out'}"]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert 'id="search-0"' in page
    search = read_search(undisturbed)
    for trial in search.trials:
        assert f'aria-label="trial {trial.number}: {100 * (trial.value or 0):.1f}; lr ' in page
    assert f"<dt>declared as</dt><dd>{search.choice}</dd>" in page


def test_a_trial_that_fails_is_recorded_and_stops_nothing(
    tmp_path: Path, undisturbed: Path
) -> None:
    """The search has another seed, which proposes others; TPE waits for two values."""

    def fails(overrides: list[str], folder: Path, number: int) -> Outcome:
        if number == 1:
            return Outcome(overrides, 2, "step 1: the loss is not finite")
        outcome = here(overrides, folder, number)
        return replace(outcome, value=None) if number == 2 else outcome

    search = read_search(run_search(plan(tmp_path, trials=4, seed=1), fails))
    assert [trial.state for trial in search.trials] == ["finished", "failed", "failed", "finished"]
    assert [trial.by for trial in search.trials] == ["overlay", "random", "random", "random"]
    assert search.trials[1].error == "step 1: the loss is not finite"
    assert search.trials[2].error == f"has no seg_miou on {search.split}"
    known = read_search(undisturbed).trials
    assert search.trials[0].settings == known[0].settings
    assert search.trials[1].settings != known[1].settings

    def broken(overrides: list[str], folder: Path, number: int) -> Outcome:
        return Outcome(overrides, 2, "no such data")

    with pytest.raises(WSSSError, match="trial 0, the settings as they are, failed: no such data"):
        run_search(plan(tmp_path, seed=3), broken)


def test_a_number_that_no_trial_has_is_named(tmp_path: Path) -> None:
    line = [each for each in LINE if not each.startswith("objective")]
    with pytest.raises(WSSSError, match=r"objective=lam_miou: trial 0 .*choose .*seg_miou"):
        run_search(plan(tmp_path, *line, "objective=lam_miou"), here)


def test_a_trial_of_a_living_process_is_left_to_it(tmp_path: Path) -> None:
    """The next one is taken, and with none left the search ends without them."""
    search = plan(tmp_path, trials=2)
    seen = []

    def inner(overrides: list[str], folder: Path, number: int) -> Outcome:
        seen.append(number)
        if number == 0:  # meanwhile the same command in another terminal
            run_search(search, inner)
            assert read_search(search.folder).status == "running"
        return here(overrides, folder, number)

    run_search(search, inner)
    assert seen == [0, 1]
    assert read_search(search.folder).status == "finished"


@pytest.mark.parametrize(
    "line",
    [
        ["+experiments=[minivoc/protocol,segmenter/minivoc]", "init_from=RUN"],
        ["+experiments=few_shot/minivoc"],  # whose base has one of its own
        ["method=segmenter_vit", "data=minivoc", "+maps.run=RUN", "+maps.refine=random_walk",
         "+random_walk@maps.random_walk=minivoc"],
    ],
)  # fmt: skip
def test_an_overlay_keeps_what_training_starts_from(tmp_path: Path, line: list[str]) -> None:
    config = compose_run(line)
    file = tmp_path / "experiments" / "mine" / "tuned.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(overlay_of(line, config, {}, "tuned", Path("search") / "search.json"))
    again = compose_run(["+experiments=mine/tuned", f"hydra.searchpath=[file://{tmp_path}]"])
    for key in ("init_from", "maps", "method", "data", "eval"):
        assert again[key] == config[key]


def test_an_overlay_takes_choices_of_the_users_folders(tmp_path: Path) -> None:
    conf = config_root() / "conf"
    texts = {
        "method/mine": (conf / "method" / "toco.yaml").read_text().replace("lr: 6e-5", "lr: 7e-5"),
        "data/mydata": (conf / "data" / "minivoc.yaml").read_text(),
        "further/strong": "# @package _global_\nmethod: {momentum: 0.8, temperature: 0.6}\n",
    }
    folders = f"hydra.searchpath=[file://{tmp_path}]"
    line = ["method=mine", "data=mydata", "+further=strong", "method.temperature=0.7", folders]
    for name, text in texts.items():
        file = tmp_path / f"{name}.yaml"
        file.parent.mkdir()
        file.write_text(text)
    config = compose_run(line)
    assert [config["method"][key] for key in ("lr", "momentum", "temperature")] == [7e-5, 0.8, 0.7]
    text = overlay_of(line, config, {}, "tuned", Path("search") / "search.json")
    content = yaml.safe_load(text)
    groups = [{"override /method": "mine"}, {"override /data": "mydata"}]
    assert content["defaults"] == [{"/further": "strong"}, "_self_", *groups]
    assert content["method"] == {"temperature": 0.7}
    assert "data" not in content
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "tuned.yaml").write_text(text)
    again = compose_run(["+experiments=tuned", folders])
    for key in ("method", "data", "eval", "budget", "backbone"):
        assert again[key] == config[key]


def test_an_overlay_keeps_what_trials_were_shown(tmp_path: Path) -> None:
    """Augmentation, batch and sides, but neither steps nor devices."""
    kept = ["budget.scale_range=[0.9,1.0]", "budget.blur_radius=[0.1,0.2]", "budget.local_size=16",
            "budget.crop_size=64", "budget.global_batch_size=4", "budget.cam_size=80",
            "budget.warmup_steps=3"]  # fmt: skip
    left = ["budget.max_steps=9", "budget.eval_every=7", "trainer.devices=2"]
    line = ["+experiments=toco/minivoc", *kept, *left]
    config = compose_run(line)
    file = tmp_path / "experiments" / "tuned.yaml"
    file.parent.mkdir()
    file.write_text(overlay_of(line, config, {}, "tuned", Path("search") / "search.json"))
    again = compose_run(["+experiments=tuned", f"hydra.searchpath=[file://{tmp_path}]"])
    assert f"# Of the search alone: {' '.join(left)}\n" in file.read_text()
    assert again["budget"] == config["budget"] | {"max_steps": 400, "eval_every": 1000}
    assert again["data"] == config["data"]


SPACES = choices("space")
ON_PICO = {"weclip": ["method.text=random", "method.static_layers=3", "method.rfm_layers=3"],
           "segmenter": ["backbone=resnet101", "backbone.weights=random"]}  # fmt: skip


@pytest.mark.parametrize("name", SPACES)
def test_every_key_of_a_space_is_a_setting_at_both_ends(name: str) -> None:
    method = "toco" if name == "plain_cam" else name
    space = read_space(name)
    assert len(space) <= MOST_KEYS
    base = [f"method={method}", "data=minivoc", *ON_PICO.get(name, [])]
    for key, choice in space.items():
        assert key == "eval.cam_threshold" or key.startswith("method.")
        assert choice.low is not None
        assert choice.high is not None
    for end in ("low", "high"):
        values = {key: getattr(choice, end) for key, choice in space.items()}
        whole = {k: int(v) if space[k].whole else v for k, v in values.items()}
        config = compose_run([*base, *(f"{key}={value}" for key, value in whole.items())])
        assert settings_of(config, space, name) == whole


@pytest.mark.parametrize("name", SPACES)
def test_overlays_begin_inside_of_what_is_searched(name: str) -> None:
    overlays = {"plain_cam": ["toco/minivoc_cam_only"], "segmenter_vit": ["segmenter/minivoc"],
                "segmenter": ["segmenter/voc"]}  # fmt: skip
    for overlay in overlays.get(name, [f"{name}/minivoc", f"{name}/voc_vitb", f"{name}/voc"]):
        if not (config_root() / "experiments" / f"{overlay}.yaml").is_file():
            continue
        needs = ["method.text=random"] if name == "weclip" else []
        config = compose_run([f"+experiments={overlay}", "data.root=builtin", *needs])
        assert settings_of(config, read_space(name), name)


def test_settings_outside_of_a_space_are_named() -> None:
    space = read_space("toco")
    config = compose_run(["method=toco", "data=minivoc", "method.lr=0.1"])
    with pytest.raises(WSSSError, match=r"method.lr=0.1: outside of 1e-05 to 0.001"):
        settings_of(config, space, "toco")
    with pytest.raises(WSSSError, match=r"method\.\w+: the method has no such setting"):
        settings_of(compose_run(["method=getam", "data=minivoc"]), space, "toco")
    with pytest.raises(WSSSError, match=r"space=nothing: no such search space .*clustercam"):
        read_space("nothing")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('data.val_split: {choices: [val, "train:holdout:3"]}', "data.val_split: a search varies"),
        ("budget.max_steps: {low: 100, high: 400, whole: true}", "budget.max_steps: a search va"),
        ("backbone.weights: {choices: [random, timm]}", "one encoder's weights"),
        ("method._target_: {choices: [wsss.ToCo]}", "all trials have one method"),
        ("method.lr: {low: 1e-5, hi: 1e-3}", "method.lr.hi: unknown key; did you mean high"),
        ("method.lr: {low: 1e-3, high: 1e-5}", "low=0.001 is not below high=1e-05"),
        ("method.lr: 3", "method.lr: 3: input should be"),
        ("method.lr: [1, 2", "cannot be read (while parsing a flow sequence)"),
    ],
)
def test_a_space_that_cannot_be_searched_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "space" / "own.yaml"
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(WSSSError, match=re.escape(f"{file}: ") + ".*" + re.escape(said)):
        read_space("own", [tmp_path])
