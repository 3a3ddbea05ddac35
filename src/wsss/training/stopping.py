"""Early stopping by the declared holdout of the training data."""

from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback, EarlyStopping

from wsss.core.errors import WSSSError
from wsss.core.modes import evaluating
from wsss.evaluation.holdout import Holdout
from wsss.evaluation.ledger import record_reading
from wsss.evaluation.tally import Tally
from wsss.evaluation.watched import HOLDOUT, LOGGED
from wsss.runs.folder import STOPPING_RULE, Run


class StoppingRule(Callback):
    """Log the holdout's numbers at every validation as ``holdout/...``, and say what stopped a run.

    The numbers are of :meth:`Protocol.during_training`, as those of the validation are. A run that
    was stopped stays so: going on from its checkpoint trains no further step.

    Args:
        run: with a declared holdout.
        rules: Lightning's callbacks that stop it.
        ledger: run folder whose ledger records every reading.
    """

    #: key of the callback's state in a checkpoint
    state_key = STOPPING_RULE

    def __init__(self, run: Run, rules: list[EarlyStopping], ledger: Path) -> None:
        self.holdout = Holdout(run.data, run.protocol)
        names = run.data.class_names
        self.tally = Tally(protocol=run.protocol.during_training(), class_names=names)
        self.rules = rules
        self.ledger = ledger

    @property
    def stopped(self) -> dict[str, Any] | None:
        """The rule that stopped the run, or None."""
        for rule in self.rules:
            # its reason is of lightning 2.6
            if getattr(rule, "stopping_reason_message", None) or rule.wait_count >= rule.patience:
                return {"monitor": rule.monitor}
        return None

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint keeps."""
        return {"stopped": self.stopped}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Refuse a number that the method does not have; train no further where a rule stopped.

        Raises:
            WSSSError: a rule looks at the segmentation of a method that has none.
        """
        image = self.holdout[0]["image"][None].to(pl_module.device)
        with evaluating(pl_module):
            segments = pl_module(image).seg_logits is not None
        for rule in self.rules:
            if "seg_" in rule.monitor and not segments:
                raise WSSSError(
                    f"callbacks: {pl_module.title} has no segmentation head, so nothing stops by "
                    f"{rule.monitor}; give callbacks.early_stopping.monitor={HOLDOUT}/seed_miou"
                )
        trainer.should_stop = trainer.should_stop or self.stopped is not None

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Measure the holdout, sum over processes, log."""
        if trainer.sanity_checking:
            return
        self.tally.to(pl_module.device).reset()
        for batch in self.holdout.loader():
            self.tally.update(pl_module, move_data_to_device(batch, pl_module.device), None)
        numbers = self.tally.compute()
        if trainer.is_global_zero:
            record_reading(
                self.ledger, split=HOLDOUT, purpose="stopping early", step=trainer.global_step
            )
        for key in LOGGED:
            if numbers[key] is not None:
                # the value is the same on every rank already; sync_dist only quiets Lightning
                several = trainer.world_size > 1
                pl_module.log(f"{HOLDOUT}/{key}", float(numbers[key]), sync_dist=several)
