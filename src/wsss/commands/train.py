"""``wsss train``: the command line of one run and of a sweep."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra import main as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from wsss.core.errors import WSSSError
from wsss.core.failures import JOB_STEM, exit_status_of
from wsss.core.places import config_root
from wsss.core.ranks import is_first_process
from wsss.results.store import RESULTS_FILE, read_results
from wsss.runs.choice import choice_of
from wsss.runs.compose import compose_config, quoted, sweep_jobs, with_search_path
from wsss.runs.config import LoggerConfig, plain
from wsss.runs.naming import varying
from wsss.runs.trainer_settings import with_trainer_keys
from wsss.training.parallel import naming_lost_processes
from wsss.training.run import train
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


def main(arguments: list[str]) -> int:
    """Run the verb: Hydra's own command line, after a check that reports errors in one line."""
    overrides, flags = _read_command_line(arguments)
    if "--multirun" in flags:
        return _sweep(overrides, flags)
    end_with_sweep()
    compose_config(overrides)
    job = Job()
    _run_hydra(job, overrides, flags)
    return max(job.statuses, default=0)


def _sweep(overrides: list[str], flags: list[str]) -> int:
    """Run many jobs, and print at the end what failed."""
    jobs = sweep_jobs(overrides)
    configs = [compose_config(each) for each in jobs.samples]
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


def _said_to_trackers(configs: Sequence[DictConfig]) -> list[str]:
    """Give the override by which the jobs of a sweep know what varies among them.

    A tracker names and groups runs by it.

    Args:
        configs: of the jobs.
    """
    contents = [plain(config) for config in configs]
    settings = LoggerConfig(**contents[0]["logger"])
    keys = varying(contents)
    if settings.varied or not keys or not (settings.wandb or settings.mlflow):
        return []
    return [f"++logger.varied=[{','.join(keys)}]"]


def _run_hydra(job: "Job", overrides: list[str], flags: list[str]) -> None:
    """Let Hydra compose and run."""
    # this file, not the console script: DDP starts its other processes from sys.argv
    sys.argv = [__file__, *with_search_path(with_trainer_keys(overrides)), *flags]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # we report errors, in one line
    conf = str(config_root() / "conf")
    hydra_main(version_base="1.3", config_path=conf, config_name="train")(job)()


class Job:
    """Take Hydra's call with a composed configuration: here, or where submitit has sent it."""

    def __init__(self) -> None:
        self.statuses: list[int] = []

    def __call__(self, config: DictConfig) -> float:
        """Train one run; give its objective, NaN where there is none."""
        hydra = HydraConfig.get()
        config.choice = choice_of(config.choice, list(hydra.overrides.task))
        own_files = hydra.mode == RunMode.MULTIRUN
        if own_files:  # of a sweep whose launcher is not ours
            stem = job_stem(Path(hydra.sweep.dir), hydra.job.num)
            os.environ[JOB_STEM] = str(stem)
            # DDP starts its other processes from here
            sys.argv = [__file__, *with_search_path(list(hydra.overrides.task))]
            sys.modules["__main__"].__spec__ = None
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


def _read_command_line(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split overrides from those of Hydra's flags that are supported (it wants them apart)."""
    parser = _OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("-p", "--package")
    parser.add_argument("--resolve", action="store_true")
    read = parser.parse_intermixed_args(arguments)
    flags = [f"--{name}" for name in ("multirun", "resolve") if getattr(read, name)]
    for name in ("cfg", "package"):
        if getattr(read, name) is not None:
            flags += [f"--{name}", getattr(read, name)]
    return read.overrides, flags


def _run_job(config: DictConfig) -> tuple[int, float | None]:
    """Train one run; give its exit status and its objective, where it has that number."""
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
