"""``hydra/sweeper=optuna``: a sweep whose values Optuna proposes, over keys of the line.

Hydra takes sweepers from this namespace only. Its own for Optuna stops at Optuna 2, whose studies
cannot be kept on disk any more; this one takes the same keys.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Transformer
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler


class OptunaSweeper(Sweeper):
    """Asks Optuna for the values of swept keys and tells it the objective of each job.

    Args:
        sampler: made from the class that its node names; ``grid`` gets the choices of the line.
        direction: ``maximize`` or ``minimize``.
        n_trials: jobs.
        n_jobs: jobs that are proposed together.
        max_failure_rate: share of failed jobs with which the sweep goes on.
        storage: Optuna's, as text; None: memory.
        study_name: in the storage.
        params: swept keys of a file; those of the line replace them.
    """

    def __init__(
        self,
        *,
        sampler: Any,
        direction: str,
        n_trials: int,
        n_jobs: int,
        max_failure_rate: float,
        storage: str | None,
        study_name: str | None,
        params: DictConfig | None,
    ) -> None:
        self.sampler, self.direction = sampler, direction
        self.n_trials, self.n_jobs, self.max_failure_rate = n_trials, n_jobs, max_failure_rate
        self.storage, self.study_name, self.params = storage, study_name, params
        self.config: Any = None
        self.launcher: Any = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Make the launcher of the jobs."""
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run all jobs, and write the best values to ``optimization_results.yaml``."""
        from wsss.core.extras import import_optuna  # Hydra imports this file in every run

        optuna = import_optuna("hydra/sweeper=optuna")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        lines = [f"{key!s}={value}" for key, value in (self.params or {}).items()]
        parsed = OverridesParser.create(config_loader=None).parse_overrides([*lines, *arguments])
        # what the line says takes the place of what a file says
        overrides = {str(each.get_key_element()): each for each in parsed}
        space = {k: _distribution(o) for k, o in overrides.items() if o.is_sweep_override()}
        fixed = [str(o.input_line) for o in overrides.values() if not o.is_sweep_override()]
        study = optuna.create_study(
            study_name=self.study_name,
            storage=self.storage,
            sampler=self._sampler(space),
            direction="maximize" if self.direction == "maximize" else "minimize",
            load_if_exists=True,
        )
        failed, begun = 0, 0
        while begun < self.n_trials:
            trials = [study.ask(space) for _ in range(min(self.n_jobs, self.n_trials - begun))]
            jobs = [[*fixed, *(f"{k}={v}" for k, v in trial.params.items())] for trial in trials]
            returns = self.launcher.launch(jobs, initial_job_idx=begun)
            begun += len(trials)
            for trial, returned in zip(trials, returns, strict=True):
                value = returned.return_value
                state = optuna.trial.TrialState.COMPLETE
                if value != value:  # NaN
                    failed += 1
                    value, state = None, optuna.trial.TrialState.FAIL
                try:
                    study.tell(trial, value, state=state)
                except RuntimeError:
                    # a grid that is complete stops a study that Optuna itself would drive
                    if not isinstance(study.sampler, optuna.samplers.GridSampler):
                        raise
            if failed > self.max_failure_rate * begun:
                print(
                    f"wsss train: {failed} of {begun} jobs failed; the sweep ends", file=sys.stderr
                )
                break
        done = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
        if done:
            best = {
                "name": "optuna",
                "best_params": study.best_params,
                "best_value": study.best_value,
            }
            folder = Path(self.config.hydra.sweep.dir)
            OmegaConf.save(OmegaConf.create(best), folder / "optimization_results.yaml")

    def _sampler(self, space: "dict[str, BaseDistribution]") -> "BaseSampler":
        """Make the sampler; a grid is over the choices of the space."""
        from hydra.utils import instantiate
        from optuna.distributions import CategoricalDistribution

        made: BaseSampler
        if str(self.sampler["_target_"]).endswith(".GridSampler"):
            grid = {
                key: list(each.choices)
                for key, each in space.items()
                if isinstance(each, CategoricalDistribution)
            }
            made = instantiate(self.sampler, search_space=grid)
        else:
            made = instantiate(self.sampler)
        return made


def _distribution(override: Override) -> "BaseDistribution":
    """Give Optuna's form of ``choice(...)``, ``a,b``, ``range(...)`` and ``interval(...)``."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        log = "log" in value.tags
        if isinstance(value.start, int) and isinstance(value.end, int):
            return IntDistribution(value.start, value.end, log=log)
        return FloatDistribution(value.start, value.end, log=log)
    return CategoricalDistribution(list(override.sweep_iterator(transformer=Transformer.encode)))
