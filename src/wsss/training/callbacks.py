"""What every training has beside the method: checkpoints when it stops, a log, a progress bar."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from wsss.core.errors import WSSSError
from wsss.core.files import cannot_write
from wsss.models.weights import read_torch_file, save_atomically
from wsss.runs.folder import check_checkpoint
from wsss.training.parallel import GradientAveraging


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target and renames, so that the previous checkpoint survives a full disk.

    Lightning's own way goes through the system's temporary folder, whence a move may be a copy.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            WSSSError: the disk is full or read-only.
        """
        save_atomically(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint to resume from, also one of an earlier version.

        Raises:
            WSSSError: it is missing, damaged or not ours; says how to go on.
        """
        try:
            return check_checkpoint(read_torch_file(Path(path)), Path(path), to_resume=True)
        except WSSSError as error:
            raise WSSSError(f"{error}; without this file the run begins anew") from error


class SaveOnStop(Callback):
    """Save a checkpoint whenever training stops: at the end, on Ctrl-C or SIGTERM, on an error.

    A signal waits for the step in progress, so that what is saved stands between two steps; a
    second one stops at once and leaves the previous checkpoint. All processes of a run stop after
    the same step, whichever of them got the signal.

    Args:
        path: the checkpoint to write.
        after_validation: save after each validation too, since a validation changes the state of a
            callback that may stop the run.

    Attributes:
        stop_signal: the signal that came, if one did.
        began: whether training began; what is restored has been restored then.
    """

    def __init__(self, path: Path, *, after_validation: bool = False) -> None:
        self.path = path
        self.after_validation = after_validation
        self.stop_signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self.began = False  # a checkpoint to resume from has been restored by then
        self._stepping = False  # weights and optimiser are being changed
        self._between_steps = False  # it is here that training stopped

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Note what signals did; submitit says with SIGUSR2 that time is up."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if callable(signal.getsignal(signal.SIGUSR2)):
            numbers.append(signal.SIGUSR2)
        self._before = {number: signal.getsignal(number) for number in numbers}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Take signals over, after Lightning and until it gives them back.

        Lightning's own handler would broadcast from within, in the middle of a step. Notebooks may
        train outside the main thread, where no handler can be set.
        """
        self.began = True
        if threading.current_thread() is threading.main_thread():
            for number in self._before:
                signal.signal(number, self._stop)

    def _stop(self, number: int, frame: Any) -> None:
        self.stop_signal = signal.Signals(number)
        for each, before in self._before.items():
            signal.signal(each, before)
        again = "Ctrl-C" if number == signal.SIGINT else self.stop_signal.name
        # not print: the interrupted code may be printing
        os.write(2, f"\nstopping after this step ({again} again: at once)\n".encode())

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Note that from here to the end of the batch there is no state to save."""
        self._stepping = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Stop here after a signal, unless gradients of a step are being accumulated."""
        if not self._stepping:
            return
        self._stepping = False
        if trainer.strategy.reduce_boolean_decision(bool(self.stop_signal), all=False):
            self._between_steps = True
            raise KeyboardInterrupt

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Stop here after a signal; several processes, whose shares differ, go on to the end.

        The checkpoint from before the validation stays: resuming never begins in the middle of one.
        """
        if self.stop_signal and trainer.world_size == 1:
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Save what the validation has changed, where it has."""
        if self.after_validation and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Save the last iterate: it is the result, nothing is selected on a validation split."""
        trainer.save_checkpoint(self.path)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save where training stood, unless the weights are what broke or a step was cut."""
        if isinstance(trainer.strategy, GradientAveraging):
            trainer.strategy.alone = True  # the others may be dead, or anywhere else
        at_once = not isinstance(exception, Exception) and not self._between_steps
        cut = self._stepping or at_once
        finite = all(bool(torch.isfinite(p).all()) for p in pl_module.parameters())
        if trainer.global_step > 0 and finite and not cut:
            try:
                trainer.save_checkpoint(self.path)
            except WSSSError as error:  # what ended the run is reported, not this
                print(f"wsss train: {error}", file=sys.stderr)


class MetricsFile(CSVLogger):
    """Log to ``metrics.csv``; a full disk ends in an error that names this file."""

    def save(self) -> None:
        """Write what has been logged since the last time.

        Raises:
            WSSSError: the file cannot be written.
        """
        try:
            super().save()
        except OSError as error:
            raise cannot_write(Path(self.log_dir) / "metrics.csv", error) from error


class EndsLogged(Callback):
    """Log the first and the last step too, so that the shortest run has a curve."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Log the first step of a run that begins, also in callbacks that look before this one."""
        self._every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step == 0:
            trainer.log_every_n_steps = 1  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Log as the configuration says between the first and the last step."""
        is_end = trainer.global_step in (0, trainer.max_steps - 1)
        trainer.log_every_n_steps = 1 if is_end else self._every  # type: ignore[attr-defined]


class NamedLosses(TQDMProgressBar):
    """Show the named losses in the progress bar, without Lightning's version number."""

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Give losses without their ``train/`` prefix."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {
            name.removeprefix("train/").removesuffix("_loss"): value
            for name, value in metrics.items()
        }
