"""``wsss train``: the command line of one run and of a sweep."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra import main as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from wsss.core.errors import WSSSError
from wsss.core.failures import JOB_STEM, exit_status_of
from wsss.core.places import config_root
from wsss.core.schema import plain
from wsss.runs.choice import choice_of
from wsss.runs.line import (
    Composed,
    canonical,
    check_surroundings,
    compose_open,
    composed_line,
    of_jobs,
    quoted,
    sweep_jobs,
    take_folders,
    with_folders,
)
from wsss.training.sweeps import (
    end_with_sweep,
    exit_status,
    job_stem,
    new_folder,
    outcomes,
    record,
    summary,
    write_value,
)

#: what ``--info`` shows, and Hydra's flags that print something and run nothing
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
SHOWING = ("--cfg", "--info", "--hydra-help")


def main(arguments: list[str]) -> int:
    """Run the verb: Hydra's own command line, after checks that report errors in one line.

    What is wrong with the line is found before torch is imported.
    """
    overrides, flags = read_line(arguments)
    if any(flag in flags for flag in SHOWING):
        compose_open(overrides)  # what is wrong with it, in one line
        _run_hydra(_nothing, overrides, flags)
        return 0
    if "--multirun" in flags:
        return _sweep(overrides, flags)
    end_with_sweep()
    (found,) = _check([overrides])
    job = Job(found.further)
    _run_hydra(job, [*overrides, *found.further], flags)
    return max(job.statuses, default=0)


def _check(lines: list[list[str]]) -> list[Composed]:
    """Compose and check every job: first what needs no torch, of all of them."""
    found = [composed_line(overrides) for overrides in lines]
    if len(found) == 1:  # of a sweep each job says it, and the others go on
        check_surroundings(plain(found[0].config))
    from wsss.runs.config import check_config

    for each in found:
        check_config(each.config)
    return found


def _sweep(overrides: list[str], flags: list[str]) -> int:
    """Run many jobs, and print at the end what failed."""
    jobs = sweep_jobs(overrides)
    configs = [plain(each.config) for each in _check(jobs.samples)]
    folder = new_folder(Path(configs[0]["runs_dir"]))
    overrides = [*overrides, *_said_to_trackers(configs)]
    try:
        _run_hydra(Job(), [*overrides, f"hydra.sweep.dir={quoted(str(folder))}"], flags)
    finally:
        ended = outcomes(folder)
        if ended:
            for line in summary(ended, begun_of=jobs.count):
                print(f"wsss train: {line}", file=sys.stderr)
    return exit_status(ended)


def _said_to_trackers(contents: Sequence[dict[str, Any]]) -> list[str]:
    """Give the override by which the jobs of a sweep know what varies among them.

    A tracker names and groups runs by it.

    Args:
        contents: configurations of the jobs.
    """
    from wsss.runs.config import LoggerConfig
    from wsss.runs.naming import varying

    settings = LoggerConfig(**contents[0]["logger"])
    keys = varying(contents)
    if settings.varied or not keys or not (settings.wandb or settings.mlflow):
        return []
    return [f"++logger.varied=[{','.join(keys)}]"]


def _run_hydra(job: Callable[[DictConfig], Any], overrides: list[str], flags: list[str]) -> None:
    """Let Hydra compose and run."""
    # this file, not the console script: DDP starts its other processes from sys.argv
    sys.argv = [__file__, *overrides, *flags]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # we report errors, in one line
    conf = str(config_root() / "conf")
    hydra_main(version_base="1.3", config_path=conf, config_name="train")(job)()


def _nothing(config: DictConfig) -> None:
    """Run nothing: Hydra shows what it was asked for."""


class Job:
    """Take Hydra's call with a composed configuration: here, or where submitit has sent it.

    Args:
        dependents: overrides of the line that follow from the others.
    """

    def __init__(self, dependents: Sequence[str] = ()) -> None:
        self.statuses: list[int] = []
        self.dependents = dependents

    def __call__(self, config: DictConfig) -> float:
        """Train one run; give its objective, NaN where there is none."""
        hydra = HydraConfig.get()
        given = [one for one in hydra.overrides.task if one not in self.dependents]
        config.choice = choice_of(config.choice, given)
        own_files = hydra.mode == RunMode.MULTIRUN
        if own_files:  # of a sweep whose launcher is not ours
            stem = job_stem(Path(hydra.sweep.dir), hydra.job.num)
            os.environ[JOB_STEM] = str(stem)
            # DDP starts its other processes from here
            sys.argv = [__file__, *hydra.overrides.task, *of_jobs(hydra.overrides.hydra)]
            sys.modules["__main__"].__spec__ = None
            from wsss.runs.compose import compose_config

            config = compose_config(list(hydra.overrides.task))  # with what follows from a name
        from wsss.core.ranks import is_first_process

        status, value = _run_job(config)
        self.statuses.append(status)
        if is_first_process():
            if own := os.environ.get(JOB_STEM):
                write_value(Path(own), value)
            if own_files:
                record(stem, list(hydra.overrides.task), status)
        return float("nan") if value is None else value


class _OneLineParser(argparse.ArgumentParser):
    """Parse arguments, with errors like all others here."""

    def error(self, message: str) -> NoReturn:
        raise WSSSError(f"{message} (wsss train --help)")


def read_line(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split overrides from flags of Hydra's, which wants them apart.

    ``--config-dir DIR`` becomes a place of the search path: the jobs of a sweep and the processes
    of a run compose by themselves, and read it there.

    Raises:
        WSSSError: an unknown flag, flags that exclude each other, or a folder that is missing.
    """
    parser = _OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument("-m", "--multirun", action="store_true")
    one_of.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    one_of.add_argument("-i", "--info", nargs="?", const="all", choices=INFO)
    one_of.add_argument("--hydra-help", action="store_true")
    parser.add_argument("-p", "--package")
    parser.add_argument("--resolve", action="store_true")
    arguments, folders = take_folders(arguments)
    read = parser.parse_intermixed_args(_values_first(arguments))
    switches = ("multirun", "resolve", "hydra_help")
    flags = [f"--{name.replace('_', '-')}" for name in switches if getattr(read, name)]
    for name in ("cfg", "package", "info"):
        if getattr(read, name) is not None:
            flags += [f"--{name}", getattr(read, name)]
    return canonical(with_folders(read.overrides, folders)), flags


def _values_first(arguments: list[str]) -> list[str]:
    """Give ``--info`` its value where an override or nothing follows, which argparse would take."""
    given = list(arguments)
    for flag in ("-i", "--info"):
        if flag in given and (given[given.index(flag) + 1 :] or [""])[0] not in INFO:
            given.insert(given.index(flag) + 1, "all")
    return given


def _run_job(config: DictConfig) -> tuple[int, float | None]:
    """Train one run; give its exit status and its objective, where it has that number."""
    from wsss.core.ranks import is_first_process
    from wsss.results.store import RESULTS_FILE, read_results
    from wsss.training.parallel import naming_lost_processes
    from wsss.training.run import train

    value: float | None = None

    def run() -> int:
        nonlocal value
        content = plain(config)
        with naming_lost_processes():
            folder = train(content)
        # a limited run has no results, and so no objective
        if is_first_process() and (folder / RESULTS_FILE).is_file():
            splits = read_results(folder / RESULTS_FILE)["splits"]
            value = splits[content["data"]["val_split"]].get(content["objective"])
        return 0

    # reported here, since Hydra would wrap an exception in lines of its own
    return exit_status_of("train", run), value


if __name__ == "__main__":
    sys.exit(exit_status_of("train", lambda: main(sys.argv[1:])))
