"""``wsss tune``: one search for settings a method, all of the same length."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from wsss.comparison.grids import print_grids
from wsss.comparison.searches import part_searches, read_searches, search_grids
from wsss.core.arguments import parse_arguments
from wsss.core.errors import WSSSError
from wsss.core.extras import import_optuna
from wsss.core.failures import exit_status_of
from wsss.core.ranges import Count, Seed
from wsss.core.schema import plain
from wsss.results.search import OVERLAY_FILE, SEARCH_FILE
from wsss.runs.line import (
    canonical,
    check_surroundings,
    choices_made,
    compose_line,
    search_folders,
    sweep_jobs,
    take_folders,
    with_folders,
)
from wsss.runs.space import read_space, settings_of

if TYPE_CHECKING:
    from wsss.training.search import Plan


@dataclass
class TuneArguments:
    """Arguments of ``wsss tune`` beside those of ``wsss train``.

    Attributes:
        trials: of every search; the first is the settings as they are.
        startup: trials before TPE proposes.
        search_seed: of the searches.
        space: choice of ``conf/space``; null: that of the method.
    """

    trials: Count = 16
    startup: Count = 8
    search_seed: Seed = 0
    space: str | None = None


OWN = tuple(field.name for field in fields(TuneArguments))


def parse(arguments: Sequence[str]) -> tuple[TuneArguments, list[list[str]]]:
    """Split the verb's own arguments from the lines that its searches begin from.

    Raises:
        WSSSError: a flag, a key nearly of the verb, or an argument that cannot be read.
    """
    rest, folders = take_folders(arguments)
    for flag in (each for each in rest if each.startswith("-")):
        raise WSSSError(f"{flag}: wsss tune takes no such flag; a,b are searches of their own")
    # a key that is nearly one of these is refused as theirs
    own = [a for a in rest if get_close_matches(a.partition("=")[0], OWN, cutoff=0.8)]
    line = with_folders([each for each in rest if each not in own], folders)
    return parse_arguments(TuneArguments, own)[0], sweep_jobs(canonical(line)).samples


def main(arguments: list[str]) -> int:
    """Run the verb."""
    if arguments[:1] == ["--show"]:
        return _show(arguments[1:])
    chosen, jobs = parse(arguments)
    _check(jobs, chosen.space)
    from wsss.training.search import NEED, plan_search

    import_optuna(NEED)
    plans = [
        plan_search(
            job,
            trials=chosen.trials,
            startup=chosen.startup,
            seed=chosen.search_seed,
            space=chosen.space,
        )
        for job in jobs
    ]
    _check_masks(plans)
    return max(exit_status_of("tune", partial(_search, plan)) for plan in plans)


def _check(jobs: Sequence[list[str]], space: str | None) -> None:
    """Check what needs no torch: the line and the space of each search, and their equal terms.

    Raises:
        WSSSError: a key, a value, a path, or searches of one command that are no equal terms.
    """
    configs = []
    for job in jobs:
        config, method = plain(compose_line(job)), choices_made(job)["method"]
        check_surroundings(config)
        declared = read_space(space or method, search_folders(job))
        settings_of(config, declared, space or method)
        configs.append((config, method))
    _check_equal(configs)


def _check_equal(configs: Sequence[tuple[dict[str, Any], str]]) -> None:
    """Raise WSSSError where searches of one command are no equal terms."""
    for key in ("objective", "budget.max_steps", "eval.holdout_per_class"):
        group, _, name = key.rpartition(".")
        values = [((one[group] if group else one)[name], method) for one, method in configs]
        _check_same(key, values, f"give {key}=VALUE, or search apart")


def _check_masks(plans: Sequence["Plan"]) -> None:
    """Raise WSSSError where searches of one command are judged by more masks than others."""
    values = [
        (plan.judging.masks, f"{plan.method} on {plan.config['data']['name']} {plan.judging.split}")
        for plan in plans
    ]
    _check_same("the number of masks that judge", values, "search apart")


def _check_same(what: str, values: Sequence[tuple[Any, str]], mend: str) -> None:
    """Raise WSSSError where a value is not the same of every holder."""
    if len({value for value, _ in values}) > 1:
        said = ", ".join(f"{value} of {holder}" for value, holder in values)
        raise WSSSError(f"{what} is not the same for all ({said}); {mend}")


def _search(plan: "Plan") -> int:
    """Run one search and print what it found; where other processes still run trials, so far."""
    from wsss.training.search import run_search

    _print([run_search(plan)])
    return 0


def _show(arguments: Sequence[str]) -> int:
    """Print searches that were run: those given, and those below a given folder."""
    if not arguments:
        raise WSSSError("--show: no search is given; expected folders that hold search.json")
    found: list[Path] = []
    for path in map(Path, arguments):
        _, below = part_searches([path])
        if not below or not path.exists():
            raise WSSSError(
                f"{path}: no {SEARCH_FILE} there or below; give a folder that `wsss tune` wrote"
            )
        found += below
    _print(found)
    return 0


def _print(folders: Sequence[Path]) -> None:
    """Print searches, and where their overlays are."""
    searches = read_searches(list(dict.fromkeys(folders)))
    print_grids(search_grids(searches), Console())
    for folder, search in zip(dict.fromkeys(folders), searches.values(), strict=True):
        overlay = folder / OVERLAY_FILE
        if search.status == "running":
            left = search.planned - len(search.trials)
            print(f"{left} of {search.planned} trials have not ended", file=sys.stderr)
        elif overlay.is_file():
            print(overlay)
