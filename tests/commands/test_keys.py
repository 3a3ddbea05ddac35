"""``--keys``, Hydra's own flags, ``experiment=`` and completion, as a user types them."""

import contextlib
import re
from pathlib import Path

import pytest

from wsss.cli import main
from wsss.commands.keys import ARGUMENTS, show
from wsss.commands.train import read_line
from wsss.core.declarations import declared
from wsss.core.errors import WSSSError
from wsss.core.places import choices, config_root
from wsss.runs.keys import keys_of_class, keys_of_run
from wsss.runs.line import canonical, compose_line, compose_open, of_jobs, sweep_jobs

OURS = f"hydra.searchpath=['file://{config_root()}','encoders://']"


@pytest.mark.parametrize("method", choices("method"))
def test_every_key_of_a_run_has_a_meaning(method: str) -> None:
    keys = keys_of_run(compose_open([f"method={method}", "data=table", "+data.train_masks=x"]))
    assert len(keys) > 100
    assert [key.name for key in keys if not key.meaning] == []
    assert len({key.name for key in keys}) == len(keys)


def test_a_group_of_groups_is_listed_key_by_key() -> None:
    keys = keys_of_run(compose_open(["+experiments=factorial/minivoc", "maps.run=x"]))
    found = {key.name: key.value for key in keys if key.name.startswith("maps")}
    assert found["maps.run"] == "x"
    assert found["maps.random_walk.method.radius"] == "5"
    assert not {"maps", "maps.random_walk"} & found.keys()
    assert {key.name for key in keys if not key.meaning} == set()


@pytest.mark.parametrize("verb", ARGUMENTS)
def test_every_argument_of_a_verb_has_a_meaning(verb: str) -> None:
    cls = declared(ARGUMENTS[verb][0])
    assert cls is not None
    keys = keys_of_class(cls)
    assert keys
    assert [key.name for key in keys if not key.meaning] == []


def test_a_word_narrows_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "method=toco", "method.ptc_weight=0.3", "--keys", "ptc"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert ["method.ptc_weight", "float >= 0", "0.3", "of patch token contrast"] in lines
    assert all("ptc" in f"{line[0]}{line[3]}".lower() for line in lines)
    assert main(["tune", "method=toco", "trials=4", "--keys", "search_seed"]) == 0
    assert capsys.readouterr().out.startswith("search_seed\tint >= 0")
    assert main(["tune", "method=toco", "trials=4", "--keys", "ptc_weight"]) == 0
    assert "method.ptc_weight\t" in capsys.readouterr().out
    assert main(["pseudo", "--keys", "crf_jobs"]) == 0
    expected = "crf_jobs\tint >= 1 and <= 1000000000 or null\tnull\tprocesses of the dense CRF"
    assert capsys.readouterr().out.startswith(expected)
    assert main(["eval", "--keys", "eval.crf"]) == 0
    assert "eval.crf\tstr or null\tas the run has it" in capsys.readouterr().out
    assert main(["export", "--keys", "tolerance"]) == 0
    assert capsys.readouterr().out.startswith("tolerance\tfloat > 0")
    assert main(["train", "--keys", "nothing_like_it"]) == 2
    assert "no key of wsss train holds" in capsys.readouterr().err


def test_experiment_is_the_overlay_by_its_usual_name() -> None:
    for word in ("experiment", "+experiment", "experiments"):
        line = canonical([f"{word}=toco/minivoc", "seed=1"])
        assert line == ["+experiments=toco/minivoc", "seed=1", OURS]
    assert compose_line(["experiment=toco/minivoc"]) == compose_line(["+experiments=toco/minivoc"])
    overrides, _ = read_line(["-m", "experiment=toco/minivoc,getam/minivoc"])
    jobs = sweep_jobs(overrides).samples
    expected = ["+experiments=toco/minivoc", "+experiments=getam/minivoc"]
    assert [job[0] for job in jobs] == expected


def test_a_folder_of_the_users_has_groups_beside_ours(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults: [toco@_global_]\nmethod: {lr: 1e-4}\n"
    (tmp_path / "method" / "mine.yaml").write_text(text)
    (tmp_path / "experiment" / "short.yaml").write_text(
        "# @package _global_\nbudget: {max_steps: 3}\n"
    )
    given = ["method=mine", "data=minivoc"]
    overrides, _ = read_line([*given, "--config-dir", str(tmp_path)])
    again, _ = read_line([*given, f"hydra.searchpath=[file://{tmp_path}]"])
    assert overrides == again
    assert compose_line(overrides).method.lr == 1e-4
    assert compose_line([*overrides, "+experiment=short"]).budget.max_steps == 3
    assert compose_line([*overrides, "+experiments=toco/minivoc"]).study == "toco-minivoc"
    with pytest.raises(WSSSError, match=r"method=mien: no such choice; did you mean mine\?"):
        compose_line(["method=mien", "data=minivoc", overrides[-1]])
    # Hydra looks for the base of a base beside the one that begins from it
    (tmp_path / "experiments" / "lab").mkdir(parents=True)
    for name, base in (("first", "toco/minivoc"), ("next", "lab/first")):
        (tmp_path / "experiments" / "lab" / f"{name}.yaml").write_text(
            f"# @package _global_\ndefaults: [{base}]\n"
        )
    assert compose_line(["+experiments=lab/first", overrides[-1]]).study == "toco-minivoc"
    with pytest.raises(WSSSError, match="base of a base is written /experiments/toco/minivoc in"):
        compose_line(["+experiments=lab/next", overrides[-1]])
    # what a sweep's jobs get beside their own overrides
    assert of_jobs([overrides[-1], "hydra.mode=RUN"]) == [overrides[-1]]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["--info", "searchpath"], f"file://{config_root()}"),
        (["--info", "defaults", "seed=3"], "trainer/auto"),
        (["seed=3", "--info", "defaults-tree"], "method: toco"),
        (["--info", "plugins"], "ProcessLauncher"),
        (["--info", "config", "seed=3"], "seed: 3"),
        (["--cfg", "job", "seed=3"], "root: ???"),
        (["--cfg", "job", "--package", "budget"], "max_steps: 20000"),
        (["--cfg", "job", "--resolve", "data=minivoc", "-p", "method"], "max_steps: 400"),
        (["--hydra-help"], "--experimental-rerun"),
    ],
)
def test_flags_of_hydra_show_what_they_say(
    line: list[str],
    expected: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):  # Hydra ends the process itself
        assert main(["train", *line]) == 0
    assert expected in capfd.readouterr().out
    assert not list(tmp_path.iterdir())


def test_tab_completes_verbs_groups_and_keys(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offered(line: str) -> list[str]:
        monkeypatch.setenv("COMP_LINE", line)
        assert main(["-sc", "query=bash"]) == 0
        return capfd.readouterr().out.split()

    assert offered("wsss pr") == ["predict"]
    assert offered("wsss train method=cl") == ["method=clip_cam", "method=clustercam"]
    assert offered("wsss train method.ptc") == ["method.ptc_weight="]
    assert offered("wsss train -m method=mc") == ["method=mctformer"]
    assert offered("wsss pseudo crf") == ["crf_jobs="]
    assert "experiment=toco/minivoc" in offered("wsss train experiment=")
    assert offered("wsss tune +experiments=more/ph") == ["+experiments=more/photos"]
    assert offered("wsss train trainer.fast") == ["trainer.fast_dev_run="]
    assert offered("wsss data ") == ["check", "prepare"]
    assert offered("wsss data prepare voc sb") == ["sbd="]
    assert offered("wsss data check data=mini") == ["data=minivoc"]
    every = offered("wsss train ")
    assert {"method=", "trainer.", "experiment="} <= {*every}
    assert not {"src/", "docs/"} & {*every}
    assert main(["train", "-sc", "install=bash"]) == 0
    assert capfd.readouterr().out.rstrip().endswith("-F hydra_bash_completion wsss")
    assert main(["-sc", "install=tcsh"]) == 2
    assert "expected install=SHELL of bash, fish, zsh" in capfd.readouterr().err


def test_trainer_keys_are_listed_as_they_are_given() -> None:
    found = {key.name: key for key in keys_of_run(compose_open([]))}
    assert found["trainer.fast_dev_run"].value == "false"
    assert not {"trainer.logger", "trainer.callbacks", "trainer.plugins"} & found.keys()
    assert not any(name.startswith("+trainer.") for name in found)
    assert "+method.quirks.zero_weight_terms" in found, "Hydra wants its plus"
    # Lightning's text goes on for eight lines
    assert found["trainer.benchmark"].meaning.endswith("torch.backends.cudnn.benchmark to")


@pytest.mark.parametrize("width", [30, 80, 200])
def test_no_terminal_breaks_a_key(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    keys = keys_of_run(compose_open([]))
    show(keys)
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    first = [line.split(" ")[0] for line in lines if line[:1].strip()]
    assert [name for name in first if name in {key.name for key in keys}] == [k.name for k in keys]
    assert ("meaning" in lines[0]) == (width == 200)
