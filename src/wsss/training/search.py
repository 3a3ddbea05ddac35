"""Searches for settings: the same for every method, and read nothing but the declared holdout.

Each trial is a run (``wsss train`` in processes of its own) whose ``data.val_split`` is the
holdout. Trial 0 is the settings as they are, then some are drawn at random, then TPE proposes. What
was proposed and found stands in Optuna's own journal, so that a killed search goes on and several
processes share one.

A proposal depends on the search's seed, the trial's number, the key and the trials that have
ended, and on nothing that a killed process takes with it: a trial that was running when its search
was killed runs again under its number with its settings, and TPE sees the history that it would
have seen.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wsss.core.errors import WSSSError
from wsss.core.extras import import_optuna
from wsss.core.files import first_line, make_writable, write_atomically
from wsss.core.lock import lock
from wsss.results.search import (
    OVERLAY_FILE,
    SEARCH_FILE,
    SEARCHES,
    Range,
    Setting,
    Trial,
    best_of,
    write_search,
)
from wsss.results.store import RESULTS_FILE, look_up, read_results
from wsss.runs.callback_settings import is_early_stopping
from wsss.runs.compose import compose_run
from wsss.runs.config import config_hash
from wsss.runs.folder import method_name, run_folder
from wsss.runs.judging import Judging, judging_of
from wsss.runs.line import choices_made, declared_reported, of_jobs, quoted, search_folders
from wsss.runs.space import Space, read_space, settings_of
from wsss.training.chosen import overlay
from wsss.training.sweeps import STOPPED, Outcome, run_jobs

if TYPE_CHECKING:
    import optuna

JOURNAL = "journal.log"
NEED = "wsss tune needs Optuna"
BY = "by"  # attribute of a trial: who proposed it
TRIALS = "trials"  # study of the trials, and their folder
#: keys of the line that a trial has otherwise, and that change nothing of what is searched
NOT_OF_TRIALS = ("runs_dir", "study", "gallery", "second_stage", "logger", "choice")
NOT_OF_TRIALS_BELOW = ("logger.", "second_stage.", "hydra.", "hydra/")


@dataclass(frozen=True)
class Plan:
    """A search, checked before anything runs.

    Attributes:
        overrides: the line that it begins from.
        config: resolved configuration of that line.
        method: choice of ``conf/method``.
        space: what is varied.
        start: values of the keys as they are, trial 0.
        judging: what trials are judged on.
        trials: number of trials.
        startup: trials before TPE proposes.
        seed: of the search, not of its runs.
    """

    overrides: tuple[str, ...]
    config: dict[str, Any]
    method: str
    space: Space
    start: dict[str, Any]
    judging: Judging
    trials: int
    startup: int
    seed: int

    @property
    def folder(self) -> Path:
        """Where it lies; a search that differs in anything but its length has another one."""
        identity = {
            "config": config_hash(self.config),
            "objective": self.config["objective"],
            "space": {key: choice.model_dump() for key, choice in self.space.items()},
            "judging": [self.judging.split, self.judging.train_split, self.judging.list_sha256],
            "startup": self.startup,
            "seed": self.seed,
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
        name = f"{method_name(self.config)}-{self.config['data']['name']}-s{self.config['seed']}"
        runs = Path(self.config["runs_dir"]).absolute()
        return runs / SEARCHES / f"{name}-{digest.hexdigest()[:8]}"

    def trial_overrides(self, settings: Mapping[str, Any], number: int) -> list[str]:
        """Give the line of a trial: that of the search, its lists, its settings."""
        kept = [each for each in self.overrides if not _is_not_of_trials(each)]
        kept += of_jobs(self.overrides)
        own = {
            "runs_dir": quoted(str(self.folder)),
            "study": TRIALS,
            "gallery": 0,
            "second_stage": "null",
            "logger": "csv",
            "data.val_split": quoted(self.judging.split),
            "data.test_splits": "[]",
            "eval.holdout_per_class": 0,
            "eval.holdout_split": "null",
        }
        if self.judging.train_split != self.config["data"]["train_split"]:
            own["data.train_split"] = quoted(self.judging.train_split)
        values = {} if number == 0 else {key: written(value) for key, value in settings.items()}
        return [*kept, *(f"{key}={value}" for key, value in (own | values).items())]


def plan_search(
    overrides: Sequence[str], *, trials: int, startup: int, seed: int, space: str | None = None
) -> Plan:
    """Compose and check a search.

    Args:
        overrides: what would follow ``wsss train``.
        space: choice of ``conf/space``; None: the method's.
        trials: how many.
        startup: how many of them before TPE proposes, trial 0 among them.
        seed: of the search.

    Raises:
        WSSSError: bad configuration or data, no declared space, settings outside of it, no
            holdout, or one among images whose scores are reported.
    """
    config = compose_run(list(overrides))
    for name, node in (config.get("callbacks") or {}).items():
        if is_early_stopping(node.get("_target_")):
            raise WSSSError(
                f"callbacks.{name}: it would stop a trial by the holdout that judges it, and all "
                "trials are of the same length; leave it out"
            )
    chosen = choices_made(overrides)
    method = chosen["method"]
    name = space or method
    keys = read_space(name, search_folders(overrides))
    return Plan(
        tuple(overrides),
        config,
        method,
        keys,
        settings_of(config, keys, name),
        judging_of(config, declared_reported(chosen["data"], overrides)),
        trials,
        startup,
        seed,
    )


def _is_not_of_trials(override: str) -> bool:
    key = override.lstrip("+~").partition("=")[0]
    return key in NOT_OF_TRIALS or key.startswith(NOT_OF_TRIALS_BELOW)


def written(value: Any) -> str:
    """Write a value for a line of overrides."""
    if isinstance(value, str):
        return quoted(value)
    return json.dumps(value)


#: runs a trial, given its overrides, the folder for its files and its number
Runner = Callable[[list[str], Path, int], Outcome]


def in_processes(overrides: list[str], folder: Path, number: int) -> Outcome:
    """Run a trial in processes of its own, which print into a log file."""
    hidden = ["hydra.mode=RUN"]
    jobs = run_jobs([overrides], hidden=hidden, limit=1, folder=folder, first=number, quiet=True)
    return jobs[0]


def run_search(plan: Plan, run: Runner = in_processes) -> Path:
    """Run the trials that are missing, and write the record after each.

    Several processes may run one search; each takes the next trial.

    Args:
        plan: the search.
        run: how a trial is run.

    Returns:
        The folder, with ``search.json`` and, once every trial has ended, ``chosen.yaml``.

    Raises:
        WSSSError: Optuna is missing, the journal is damaged, trial 0 fails, no trial has the
            objective.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM; the same command goes on.
    """
    make_writable(plan.folder)
    (plan.folder / TRIALS).mkdir(exist_ok=True)
    print(f"search: {plan.folder}")
    while True:
        with ExitStack() as held:
            with _turn(plan.folder):
                study = _open_study(plan)
                trial = _next_trial(study, plan, held)
                if trial is None:
                    _write_record(study, plan)
                    return plan.folder
            _run_trial(study, plan, trial, run)


def _open_study(plan: Plan) -> "optuna.Study":
    """Open the journal, or begin it with the settings as they are.

    Raises:
        WSSSError: Optuna is missing, or the journal is damaged.
    """
    optuna = import_optuna(NEED)
    path = plan.folder / JOURNAL
    try:
        backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=_InTurn())
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=plan.folder.name,
            direction="maximize",
            load_if_exists=True,
        )
        if not study.trials:
            study.enqueue_trial(dict(plan.start))
    except (ValueError, KeyError, TypeError, AssertionError) as error:  # lines not Optuna's
        raise _damaged(plan, first_line(error)) from error
    for ended in _ended(study):
        known = {*ended.params, *ended.user_attrs}
        if missing := [key for key in (*plan.space, BY) if key not in known]:
            raise _damaged(plan, f"trial {ended.number} has no {missing[0]}")
    return study


def _ended(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    """List the trials that have a value or failed."""
    state = import_optuna(NEED).trial.TrialState
    return study.get_trials(deepcopy=False, states=(state.COMPLETE, state.FAIL))


def _damaged(plan: Plan, what: str) -> WSSSError:
    """Say that the journal is damaged, and how the search goes on."""
    return WSSSError(
        f"{plan.folder / JOURNAL}: damaged ({what}); bring back a copy of it, or remove "
        f"{plan.folder} and search again"
    )


class _InTurn:
    """The journal's lock: it is written by whoever has its turn alone.

    Optuna's own locks are files that a killed process leaves behind.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return None


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Let one process at a time look at the journal and write it; a killed one's turn ends."""
    handle = os.open(folder / ".turn", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        _cut_unfinished_line(folder / JOURNAL)
        yield
    finally:
        os.close(handle)


def _cut_unfinished_line(path: Path) -> None:
    """Cut the part of a line that a power cut or a full disk left; Optuna would write behind it."""
    with suppress(FileNotFoundError), path.open("rb+") as journal:
        content = journal.read()
        journal.truncate(content.rfind(b"\n") + 1)


def _claim(path: Path, held: ExitStack) -> bool:
    """Lock the file of a trial until ``held`` ends; False where a living process has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return False
    held.callback(os.close, handle)
    return True


def _next_trial(study: "optuna.Study", plan: Plan, held: ExitStack) -> "optuna.Trial | None":
    """Take a trial that nobody runs any more, else the next one; None where all are taken."""
    optuna = import_optuna(NEED)
    running = optuna.trial.TrialState.RUNNING
    study.sampler = _sampler(plan, 0, "")  # until the keys are asked for
    every = study.get_trials(deepcopy=False)
    for frozen in every:
        if frozen.state == running and _claim(_lock_file(plan, frozen.number), held):
            trial = optuna.Trial(study, frozen._trial_id)
            break
    else:
        if sum(each.state != optuna.trial.TrialState.WAITING for each in every) >= plan.trials:
            return None
        trial = study.ask()
        if not _claim(_lock_file(plan, trial.number), held):
            raise WSSSError(f"{plan.folder}: another process has taken trial {trial.number} too")
    if BY not in trial.user_attrs:
        known = sum(each.state == optuna.trial.TrialState.COMPLETE for each in every)
        trial.set_user_attr(BY, _by(plan, trial.number, known))
    for key in plan.space:
        study.sampler = _sampler(plan, trial.number, key)
        _suggest(trial, plan.space, key)
    return trial


def _lock_file(plan: Plan, number: int) -> Path:
    return plan.folder / TRIALS / f"{number:03d}.lock"


def _sampler(plan: Plan, number: int, key: str) -> Any:
    """Make the sampler of one key of one trial, whose draws depend on nothing else."""
    digest = hashlib.sha256(f"{plan.seed} {number} {key}".encode()).digest()
    return import_optuna(
        NEED
    ).samplers.TPESampler(
        n_startup_trials=plan.startup,
        multivariate=False,  # a key at a time, so that a half-asked trial can be asked on
        seed=int.from_bytes(digest[:4], "big"),
    )


def _suggest(trial: "optuna.Trial", space: Space, key: str) -> None:
    """Ask for a key's value; one that the trial has already stays."""
    choice = space[key]
    if choice.choices is not None:
        trial.suggest_categorical(key, choice.choices)
        return
    assert choice.low is not None
    assert choice.high is not None
    if choice.whole:
        trial.suggest_int(key, int(choice.low), int(choice.high), log=choice.log)
    else:
        trial.suggest_float(key, choice.low, choice.high, log=choice.log)


def settings_of_trial(plan: Plan, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Give a trial's settings: those of the line for trial 0, else of four digits."""
    if number == 0:
        return dict(plan.start)
    return {key: _rounded(value, plan.space[key]) for key, value in values.items()}


def _rounded(value: Setting, choice: Range) -> Setting:
    """Give a number of a range four digits, as far as its ends allow; a choice is as declared."""
    if choice.low is None or choice.high is None or not isinstance(value, float):
        return value
    return min(max(float(f"{value:.4g}"), choice.low), choice.high)


def _run_trial(study: "optuna.Study", plan: Plan, trial: "optuna.Trial", run: Runner) -> None:
    """Train and judge one trial, and tell the journal."""
    optuna = import_optuna(NEED)
    settings = settings_of_trial(plan, trial.number, {k: trial.params[k] for k in plan.space})
    overrides = plan.trial_overrides(settings, trial.number)
    folder, details = None, {}
    try:
        folder = run_folder(compose_run(overrides))
    except WSSSError as error:  # settings that contradict each other
        outcome = Outcome(overrides, 2, str(error))
    else:
        _wait_for_others(folder)
        outcome = run(overrides, plan.folder / TRIALS, trial.number)
    if outcome.status in STOPPED:
        raise SystemExit(outcome.status if outcome.status > 0 else 128 - outcome.status)
    if outcome.status == 0 and outcome.value is None:
        objective, split = plan.config["objective"], plan.judging.split
        if trial.number == 0:
            raise WSSSError(
                f"objective={objective}: trial 0 has no such number on {split}; choose another "
                f"one, {_numbers_of(folder, plan)}"
            )
        outcome = replace(outcome, error=f"has no {objective} on {split}")
    if outcome.status and trial.number == 0:
        raise WSSSError(f"trial 0, the settings as they are, failed: {outcome.error}")
    if outcome.status == 0 and folder is not None:
        details = _details(folder, plan)
    print(f"trial {trial.number}: {outcome.error or outcome.value}")
    with _turn(plan.folder):
        for key, value in {**details, "error": outcome.error or None}.items():
            trial.set_user_attr(key, value)
        if outcome.value is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, outcome.value)
        _write_record(study, plan)


def _wait_for_others(folder: Path) -> None:
    """Wait until a killed search's run has saved and ended, or another trial of these settings."""
    if folder.is_dir():
        with lock(folder, "waiting", patient=True):
            pass


def _details(folder: Path, plan: Plan) -> dict[str, Any]:
    """Read what a trial cost and was made by."""
    results = read_results(folder / RESULTS_FILE)
    split = results["splits"][plan.judging.split]
    hours = look_up(results, ("cost", "train_wall_hours")) or 0.0
    return {
        "run": str(folder.relative_to(plan.folder)),
        "seconds": 3600 * hours + (look_up(split, ("cost", "seconds")) or 0.0),
        "commit": look_up(split, ("protocol", "commit")),
    }


def _numbers_of(folder: Path | None, plan: Plan) -> str:
    """List the mIoUs that a run has on the holdout."""
    assert folder is not None
    found = read_results(folder / RESULTS_FILE)["splits"][plan.judging.split]
    return ", ".join(k for k, v in found.items() if "miou" in k and isinstance(v, float))


def _write_record(study: "optuna.Study", plan: Plan) -> None:
    """Write ``search.json``, and the overlay once every trial has ended."""
    optuna = import_optuna(NEED)
    trials = [_recorded(plan, each) for each in _ended(study)]
    best = best_of({each.number: each.value for each in trials if each.value is not None})
    judging, done = plan.judging, len(trials) >= plan.trials
    choice = f"tuned: {len(trials)} trials on a holdout of {judging.masks} masks" if done else None
    content = {
        "status": "finished" if done else "running",
        "method": plan.method,
        "data": plan.config["data"]["name"],
        "study": plan.config["study"],
        "objective": plan.config["objective"],
        "split": judging.split,
        "masks": judging.masks,
        "masks_trained_on": judging.trained_on,
        "list_sha256": judging.list_sha256,
        "steps": plan.config["budget"]["max_steps"],
        "planned": plan.trials,
        "startup": plan.startup,
        "seed": plan.seed,
        "searcher": f"Optuna {optuna.__version__}: trial 0 as it was, random, TPE from trial "
        f"{plan.startup}",
        "overrides": list(plan.overrides),
        "space": {key: each.model_dump() for key, each in plan.space.items()},
        "trials": [each.model_dump() for each in trials],
        "best": best,
        "choice": choice,
    }
    write_search(plan.folder, content)
    if choice is not None and best is not None:
        (chosen,) = (each.settings for each in trials if each.number == best)
        text = overlay(plan.overrides, plan.config, chosen, choice, plan.folder / SEARCH_FILE)
        write_atomically(plan.folder / OVERLAY_FILE, text.encode())


def _recorded(plan: Plan, frozen: "optuna.trial.FrozenTrial") -> Trial:
    """Give a trial that has ended as the record has it."""
    finished = frozen.state == import_optuna(NEED).trial.TrialState.COMPLETE
    settings = settings_of_trial(plan, frozen.number, {k: frozen.params[k] for k in plan.space})
    known = {key: frozen.user_attrs.get(key) for key in ("seconds", "commit", "run", "error")}
    return Trial(
        number=frozen.number,
        state="finished" if finished else "failed",
        by=frozen.user_attrs[BY],
        settings=settings,
        value=frozen.value if finished else None,
        **known,
    )


def _by(plan: Plan, number: int, known: int) -> Literal["overlay", "random", "TPE"]:
    """Say who proposes a trial.

    Args:
        plan: the search.
        number: of the trial.
        known: trials that have a value when it is asked for; TPE needs ``startup`` of them.
    """
    if number == 0:
        return "overlay"
    return "random" if known < plan.startup else "TPE"
