"""Sweeps through the command line: stopped, resumed, with a failing job; submitit; Optuna."""

import json
import os
import re
import signal
import stat
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from small_runs import PLAIN, SMALL, Command, processes_of

from wsss.core.errors import WSSSError
from wsss.runs.compose import compose_config
from wsss.runs.line import sweep_jobs
from wsss.training.sweeps import Outcome, exit_status, outcomes, share_devices, summary

JOB = [
    "method=toco",
    *SMALL,
    *PLAIN,
    "budget.warmup_steps=1",
    "budget.max_steps=24",
    "budget.eval_every=100",
    "method.decoder_channels=16",
]
SWEEP = ["train", "-m", *JOB, "hydra.launcher.jobs=2"]
# the third job's first step spoils the weights; the second one finds it out
RATES = "method.lr=6e-5,5e-5,1e30"


def begun(runs: Path) -> list[Path]:
    """Folders of runs that were trained for a step at least."""
    return sorted(path.parents[1] for path in runs.rglob("last.ckpt"))


def logs(runs: Path) -> list[str]:
    """What the jobs of the latest sweep printed; nothing before its folder is there."""
    latest = sorted(runs.glob("sweeps/*"), key=lambda path: path.stat().st_mtime_ns)[-1:]
    found = [path for folder in latest for path in sorted(folder.glob("*.log"))]
    return [path.read_text(errors="replace") for path in found]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one sweep is begun, repeated and optimised."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
def test_ctrl_c_stops_the_jobs_of_a_sweep_with_checkpoints(runs: Path, tmp_path: Path) -> None:
    sweep = Command([*SWEEP, RATES, f"runs_dir={runs}"], tmp_path / "log")

    def both_train() -> bool:
        return sum("/2 [" in log for log in logs(runs)) == 2

    sweep.until(both_train)
    sweep.send(signal.SIGINT)
    assert sweep.end() == 130, sweep.text()
    assert "2 of 3 jobs were stopped, 1 did not begin" in sweep.text()
    assert len(begun(runs)) == 2
    assert not list(runs.rglob("results.json"))


@pytest.mark.slow
def test_same_command_goes_on_and_lists_failures(runs: Path, tmp_path: Path) -> None:
    sweep = Command([*SWEEP, RATES, f"runs_dir={runs}"], tmp_path / "log")
    assert sweep.end() == 2, sweep.text()
    first, second, third = logs(runs)
    assert "resuming from" in first
    assert "resuming from" in second
    assert len(list(runs.rglob("results.json"))) == 2
    told = sweep.text().split("1 of 3 jobs failed:")[1].splitlines()
    assert told[1].startswith("wsss train:   wsss train method=toco")
    assert " method.lr=1e+30 " in told[1]
    assert re.search(r"step [12]: the loss is not finite \(cls_loss", told[2]), "step and terms"
    assert "images mini_train_" in told[2]
    assert told[3].endswith("002.log")
    assert "Traceback" not in third


TPE = ["tpe", "hydra.sweeper.sampler.seed=0", "hydra.sweeper.sampler.n_startup_trials=1"]


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "trials"), [(["grid"], 2), (TPE, 4)], ids=["grid", "tpe"])
def test_optuna_works_on_the_objective_of_finished_runs(
    runs: Path, tmp_path: Path, sampler: list[str], trials: int
) -> None:
    """All trials are runs of the sweep before, so they are skipped and still give their number."""
    pytest.importorskip("optuna")
    arguments = [
        "hydra/sweeper=optuna",
        f"hydra/sweeper/sampler={sampler[0]}",
        *sampler[1:],
        "hydra.sweeper.direction=maximize",
        f"hydra.sweeper.n_trials={trials}",
        "method.lr=choice(6e-5,5e-5)",
        f"runs_dir={runs}",
    ]
    sweep = Command([*SWEEP, *arguments], tmp_path / "log")
    assert sweep.end() == 0, sweep.text()
    assert all("is finished" in log for log in logs(runs))
    found = [json.loads(path.read_text()) for path in runs.rglob("results.json")]
    values = {f["config"]["method"]["lr"]: f["splits"]["val"]["seed_miou"] for f in found}
    path = max(runs.rglob("optimization_results.yaml"), key=lambda found: found.stat().st_mtime)
    best = OmegaConf.load(path)
    assert best.best_value == max(values.values())
    assert values[best.best_params["method.lr"]] == best.best_value


# what a cluster would do with the script: run it once for each element of its array
SBATCH = """#!/bin/bash
echo Submitted batch job 7
script=$(<"$1")  # submitit moves the file
for task in 0 1; do
  SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task bash -c "$script" &
done >/dev/null 2>&1
"""
# srun's own options end where the command begins; %A, %a and %t are array, element and task
SRUN = """#!/bin/bash
while [[ $1 != *python* ]]; do
  [[ $1 == --output ]] && output=${2//%A_%a/${SLURM_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  shift
done
output=${output//%t/0}
mkdir -p "$(dirname "$output")"
SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1 \\
  SLURM_JOB_NODELIST=$(hostname) exec "$@" >"$output" 2>&1
"""
SACCT = """#!/bin/bash
echo "JobID|State|NodeList"
for task in 0 1; do echo "7_$task|RUNNING|here"; done
"""


@pytest.mark.slow
def test_slurm_runs_the_generated_script_and_failures_are_listed(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script is submitit's own; the cluster is a few lines of shell that run it here."""
    pytest.importorskip("submitit")
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    own = [
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=gpu",
        "hydra.launcher.timeout_min=90",
        "hydra.launcher.array_parallelism=2",
        f"data.root={tmp_path}/nothing,builtin",
        "method.lr=6e-5",
        f"runs_dir={runs}",
    ]
    sweep = Command(["train", "-m", *JOB, *own], tmp_path / "log")
    assert sweep.end() == 2, sweep.text()
    (script,) = runs.rglob("7_submission.sh")
    for line in ("--array=0-1%2", "--partition=gpu", "--time=90", "--signal=USR2@120"):
        assert f"#SBATCH {line}" in script.read_text()
    bad, good = outcomes(script.parents[2])
    assert (bad.status, good.status) == (2, 0)
    assert good.value is not None, "a finished run is skipped and gives its number"
    assert f"{tmp_path}/nothing is missing" in sweep.text().split("1 of 2 jobs failed:")[1]


def task_of(sweep: Command) -> int:
    """The process of submitit's local executor that trains."""
    assert sweep.process.pid is not None
    for pid in processes_of(sweep.process.pid):
        if b"submitit.core._submit" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError(sweep.text())


@pytest.mark.slow
def test_a_job_that_submitit_preempts_resumes(tmp_path: Path) -> None:
    """SIGUSR2 is what a cluster sends before a time limit and on preemption."""
    pytest.importorskip("submitit")
    runs = tmp_path / "runs"
    own = ["hydra/launcher=submitit_local", f"runs_dir={runs}"]
    sweep = Command(["train", "-m", *JOB, *own], tmp_path / "log")

    def told() -> str:
        return "".join(path.read_text() for path in runs.rglob(".submitit/*/*_0_log.*"))

    sweep.until(lambda: "/2 [" in told())
    os.kill(task_of(sweep), signal.SIGUSR2)
    assert sweep.end() == 0, told()
    assert "SIGUSR2 again: at once" in told()
    step = int(re.search(r"stopped at step (\d+); the same command resumes", told())[1])
    assert 0 < step < 24
    assert "Requeued job" in told()
    assert "resuming from" in told()
    (folder,) = (runs / "sweeps").iterdir()
    (ended,) = outcomes(folder)
    (results,) = runs.rglob("results.json")
    assert ended.value == json.loads(results.read_text())["splits"]["val"]["seed_miou"]


def test_jobs_of_a_sweep_are_known_before_it_begins() -> None:
    jobs = sweep_jobs(["seed=0,1", "method.lr=1e-5,2e-5", "data=minivoc"])
    assert jobs.count == 4
    assert {tuple(sorted(job)) for job in jobs.samples} == {
        ("data=minivoc", f"method.lr={rate}", f"seed={seed}")
        for rate in ("1e-05", "2e-05")
        for seed in (0, 1)
    }
    ends = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=7", "method.lr=interval(1e-5,1e-3)"]
    jobs = sweep_jobs([*ends, "seed=choice(0,1)"])
    assert jobs.count == 7
    chosen = {(lr, seed) for *_, lr, seed in jobs.samples}
    assert chosen == {
        ("method.lr=1e-05", "seed=0"),
        ("method.lr=0.001", "seed=0"),
        ("method.lr=1e-05", "seed=1"),
    }


def test_a_missing_launcher_is_named_with_its_package() -> None:
    with pytest.raises(WSSSError, match=r"hydra/launcher=joblib: no such choice$"):
        compose_config(["hydra/launcher=joblib"])


def test_jobs_at_a_time_share_gpus() -> None:
    assert share_devices([], 3) == [[], [], []]
    assert share_devices(["0", "1", "2", "3"], 2) == [["0", "1"], ["2", "3"]]
    assert share_devices(["0", "1", "2"], 2) == [["0"], ["1"]]
    assert share_devices(["4", "5"], 3) == [["4"], ["5"], ["4"]]


def test_what_ended_a_job_is_in_the_status_and_in_the_list() -> None:
    ended = [
        Outcome(["seed=0"], 0),
        Outcome(["eval.seg_scales=[1.0]"], -signal.SIGKILL, "ended by SIGKILL (out of memory?)"),
        Outcome(["seed=2"], 143, "exit status 143"),
    ]
    assert exit_status(ended) == 143
    assert exit_status(ended[:2]) == 137
    assert summary(ended[:1], begun_of=1) == []
    assert summary(ended, begun_of=4) == [
        "1 of 4 jobs failed:",
        "  wsss train 'eval.seg_scales=[1.0]'",
        "      ended by SIGKILL (out of memory?)",
        "1 of 4 jobs were stopped, 1 did not begin or end; the same command resumes",
    ]
