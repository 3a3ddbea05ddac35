"""Every `wsss ...` command that README and pages quote is one that the program takes."""

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from wsss.benchmark.arguments import parse as parse_benchmark
from wsss.benchmark.arguments import parse_loading, parse_pce
from wsss.cli import VERBS
from wsss.commands import (
    dashboard,
    data,
    evaluate,
    export,
    predict,
    pseudo,
    report,
    submit,
    text,
    tune,
)
from wsss.commands.train import read_line
from wsss.comparison import compare as comparison
from wsss.core.arguments import parse_arguments, split_arguments
from wsss.core.errors import WSSSError
from wsss.core.schema import plain
from wsss.methods.official import CONVERTERS
from wsss.parity import METHODS
from wsss.runs.compose import compose_config, compose_run
from wsss.runs.config import check_walk, override_config
from wsss.runs.line import choices_made, compose_walk, sweep_jobs
from wsss.runs.space import read_space, settings_of

PROJECT = Path(__file__).parents[2]
PAGES = [PROJECT / "README.md"]
PAGES += sorted((PROJECT / "docs").rglob("*.md")) + sorted((PROJECT / "experiments").rglob("*.md"))
FENCE = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`(wsss [^`]+)`(?!`)")
# shapes of commands, not commands
SHAPE = re.compile(
    r"\.\.\.|\bVERB\b|\bMETHOD\b|\||\btoy\b|--help|--keys|--config-dir|-sc\b|\bown\b"
)


def commands() -> list[str]:
    """Commands in shell blocks, and those with settings inside sentences."""
    found: list[str] = []
    for page in PAGES:
        text = page.read_text()
        for block in FENCE.findall(text):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if line.startswith("wsss ")]
        inline = (" ".join(code.split()) for code in INLINE.findall(text))
        found += [code for code in inline if "=" in code]
    plain_ones = (shlex.join(shlex.split(command, comments=True)) for command in found)
    return [command for command in dict.fromkeys(plain_ones) if not SHAPE.search(command)]


def take_train(arguments: list[str]) -> None:
    overrides, flags = read_line(arguments)
    own = [one for one in overrides if not one.startswith(("seed=", "hydra.searchpath="))]
    if len(own) == 1 and own[0].startswith("+experiments="):  # test_configs composes them all
        name = own[0].removeprefix("+experiments=")
        assert (PROJECT / "experiments" / f"{name}.yaml").is_file()
        return
    if "--multirun" in flags:
        overrides = sweep_jobs(overrides).samples[0]
    compose_config(overrides)


def take_tune(arguments: list[str]) -> None:
    if arguments[0] == "--show":
        assert len(arguments) > 1
        return
    chosen, lines = tune.parse(arguments)
    assert chosen.trials >= chosen.startup
    for line in lines:
        space = chosen.space or choices_made(line)["method"]
        assert settings_of(compose_run(line), read_space(space), space)


def take_data(arguments: list[str]) -> None:
    what, *rest = arguments
    if what == "check":
        settings = [argument for argument in rest if argument != "--fast"]
        own = ("data=", "data.")
        compose_config([a if a.startswith(own) else f"data.{a}" for a in settings])
        return
    schemas = {"voc": data.VOCArguments, "coco": data.COCOArguments}
    parse_arguments(schemas[rest[0]], rest[1:])


def take_text(arguments: list[str]) -> None:
    _, overrides = parse_arguments(text.TextArguments, arguments, passed_on=("data",))
    compose_config([*overrides, "data.root=anywhere"])


def take_benchmark(arguments: list[str]) -> None:
    parts: dict[str, Callable[[list[str]], Any]] = {
        "part=data": parse_loading,
        "part=pce": parse_pce,
    }
    for part, take in parts.items():
        if part in arguments:
            take([a for a in arguments if a != part])
            return
    parse_benchmark(arguments)


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    """A run's configuration, for keys that are changed when it is read back."""
    return plain(compose_config(["data=minivoc"]))


def of_runs(schema: type, *passed_on: str) -> Callable[[list[str], dict[str, Any]], None]:
    def take(arguments: list[str], stored: dict[str, Any]) -> None:
        chosen, overrides = parse_arguments(schema, arguments, passed_on=passed_on)
        if isinstance(chosen, evaluate.EvalArguments) and (chosen.cams or chosen.masks):
            compose_config(overrides)
        else:
            override_config(stored, overrides)

    return take


def take_pseudo(arguments: list[str], stored: dict[str, Any]) -> None:
    chosen, overrides, walking = pseudo.parse(arguments)
    override_config(stored, overrides)
    if chosen.refine:
        check_walk(stored, compose_walk(walking))


def of_folders(schema: type) -> Callable[[list[str]], None]:
    return lambda arguments: split_arguments(schema, arguments) and None


def check_names(known: Sequence[str], count: int) -> Callable[[list[str]], None]:
    def take(arguments: list[str]) -> None:
        assert arguments[0] in known
        assert len(arguments) >= count

    return take


ALONE: dict[str, Callable[[list[str]], None]] = {
    "train": take_train,
    "tune": take_tune,
    "data": take_data,
    "benchmark": take_benchmark,
    "text": take_text,
    "compare": of_folders(comparison.CompareArguments),
    "report": of_folders(report.ReportArguments),
    "dashboard": lambda arguments: (
        parse_arguments(dashboard.DashboardArguments, arguments) and None
    ),
    "parity": check_names(METHODS, 2),
    "convert": check_names(list(CONVERTERS), 3),
    "sync": lambda arguments: None,
}
WITH_A_RUN = {
    "eval": of_runs(evaluate.EvalArguments, "data", "eval"),
    "predict": of_runs(predict.PredictArguments, "eval"),
    "export": of_runs(export.ExportArguments, "eval", "data"),
    "pseudo": take_pseudo,
    "submit": of_runs(submit.SubmitArguments, "eval", "data"),
}


def test_every_quoted_command_is_taken(stored: dict[str, Any]) -> None:
    assert ALONE.keys() | WITH_A_RUN.keys() == VERBS.keys()
    every = commands()
    assert {command.split()[1] for command in every} == VERBS.keys()
    refused = []
    for command in every:
        _, verb, *arguments = shlex.split(command)
        try:
            if verb in WITH_A_RUN:
                WITH_A_RUN[verb](arguments, stored)
            else:
                ALONE[verb](arguments)
        except (WSSSError, AssertionError) as error:
            refused.append(f"{command}: {error}")
    assert not refused, "\n".join(refused)
