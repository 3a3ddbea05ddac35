"""``hydra/launcher=local``: jobs of a sweep in processes of their own, so many at a time.

Hydra takes launchers from this namespace only.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ProcessLauncher(Launcher):
    """Starts ``wsss train`` for each job (:func:`wsss.training.sweeps.run_jobs`).

    Args:
        jobs: how many at a time.
    """

    def __init__(self, *, jobs: int) -> None:
        self.jobs = jobs
        self.config: Any = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Remember the sweep's configuration; the jobs compose their own."""
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run jobs to their end; one that failed returns NaN, so that a sweeper goes on."""
        # Hydra imports this file in every run
        from wsss.runs.line import of_jobs
        from wsss.training.sweeps import run_jobs

        settings = self.config.hydra
        # composed in the child, where -m would sweep again
        hidden = ["hydra.mode=RUN", *of_jobs(settings.overrides.hydra)]
        outcomes = run_jobs(
            job_overrides,
            hidden=hidden,
            limit=self.jobs,
            folder=Path(settings.sweep.dir),
            first=initial_job_idx,
        )
        returns = []
        for overrides, outcome in zip(job_overrides, outcomes, strict=True):
            done = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
            done.return_value = float("nan") if outcome.value is None else outcome.value
            returns.append(done)
        return returns
