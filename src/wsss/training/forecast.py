"""What the rest of a training takes, said once, after its first steps."""

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from wsss.core.places import config_root
from wsss.core.ranks import is_first_process
from wsss.core.stopwatch import device_name, duration
from wsss.runs.folder import Run
from wsss.runs.line import compose_open

# (steps, seconds), whichever comes first: a step of DeiT-B at 448 px takes a CPU over half a minute
WARM = (3, 10.0)
MEASURED = (10, 10.0)
BLOCKS = 12  # of an encoder without overrides, at least
LONG = 3600.0  # of a training on a CPU, from which a small start is named


class Forecast(Callback):
    """Measure the first steps of a training, and print how long the others take.

    The first steps, slower than the rest, are left out, and so are validations. A training that is
    over sooner passes without a word. Of several processes the first one prints.

    Args:
        crops: what a step trains on, as ``4 crops of 448 px``.
        advice: gives what takes less time; called where a CPU needs hours.
    """

    def __init__(self, *, crops: str, advice: Callable[[], str]) -> None:
        self.crops = crops
        self.advice = advice
        self._clock = time.perf_counter
        self._warm = False
        self._said = not is_first_process()
        self._step = 0  # the last one that ended
        self._first = 0  # before the steps that are counted
        self._since = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Start the clock, also where a run is resumed."""
        self._begin(trainer.global_step)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        """Count a step once all its batches are there; print when enough have been measured."""
        if self._said or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        steps, seconds = self._step - self._first, self._clock() - self._since
        enough = MEASURED if self._warm else WARM
        if steps < enough[0] and seconds < enough[1]:
            return
        if not self._warm:
            self._warm = True
            self._begin(self._step)
            return
        self._said = True
        self._say(trainer, pl_module, seconds / steps)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        self._since -= self._clock()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Let it go on."""
        self._since += self._clock()

    def _begin(self, step: int) -> None:
        self._step = self._first = step
        self._since = self._clock()

    def _say(self, trainer: lightning.Trainer, pl_module: Any, each: float) -> None:
        """Print one line, and a second one where a CPU needs hours."""
        bar = trainer.progress_bar_callback
        show = bar.print if bar is not None and getattr(bar, "is_enabled", False) else print
        left = trainer.max_steps - self._step
        if not left:
            return
        show(
            f"{left:,} of {trainer.max_steps:,} steps are left: about {duration(left * each)} on "
            f"{device_name(pl_module.device)} ({each:.2g} s a step of {self.crops}); evaluation "
            "comes on top, and later phases of a method may take longer"
        )
        if pl_module.device.type == "cpu" and left * each > LONG:
            show(
                "warning: that is long for a CPU; Ctrl-C stops, trainer=gpu wants a GPU, and "
                + self.advice(),
                file=sys.stderr,
            )


def forecast_of(run: Run) -> Forecast:
    """Make the forecast of a run, with what would take less time."""
    budget = run.config["budget"]
    crops = f"{budget['global_batch_size']} crops of {budget['crop_size']} px"
    return Forecast(crops=crops, advice=partial(_advice, run.config))


def _advice(config: Mapping[str, Any]) -> str:
    """Name the small start of a run's method, or fewer steps where the run is no larger itself."""
    name = config["method"]["_target_"].split(".")[-2]  # its package
    start = "small" if config["data"]["_target_"].endswith(".TableDataModule") else "minivoc"
    known = (config_root() / "experiments" / name / f"{start}.yaml").is_file()
    experiment = f"{name if known else 'toco'}/{start}"
    root = ["data.root=x"] if start == "small" else []
    if _size(config) <= _size(compose_open([f"+experiments={experiment}", *root])):
        return "a smaller budget.max_steps= is over sooner"
    return f"experiment={experiment} is a start that a CPU trains within minutes"


def _size(config: Mapping[str, Any]) -> float:
    """Give the pixels of a whole training times the blocks of its encoder."""
    budget, overrides = config["budget"], config["backbone"].get("overrides") or {}
    pixels = budget["max_steps"] * budget["global_batch_size"] * budget["crop_size"] ** 2
    return float(pixels * overrides.get("depth", BLOCKS))
