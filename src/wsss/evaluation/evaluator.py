"""Turn a module into numbers: as a callback while it trains, and in full for `wsss eval`.

An evaluator sees only ``forward`` and ``cams``. Every number comes from counts that are summed
over batches and ranks, so any number of processes gives the same result to the last integer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from wsss.core.errors import WSSSError
from wsss.core.modes import evaluating
from wsss.core.stopwatch import device_name
from wsss.evaluation.crf_queue import CRFQueue, crf_pool
from wsss.evaluation.inference import HasFurtherMaps
from wsss.evaluation.ledger import check_ledger, record_reading
from wsss.evaluation.protocol import Protocol
from wsss.evaluation.tally import Batch, Tally
from wsss.evaluation.watched import LOGGED


def evaluate(
    module: nn.Module,
    dataloader: Iterable[Batch],
    protocol: Protocol,
    class_names: Sequence[str],
    *,
    device: torch.device | str | None = None,
    crf_jobs: int | None = None,
    description: str | None = None,
) -> dict[str, Any]:
    """Evaluate a module in full: one pass over the images gives every number of the protocol.

    Where ``torch.distributed`` is initialised, each rank passes its share of the images and all
    get the numbers of the whole.

    Args:
        module: a method: ``forward(images) -> Outputs`` and ``cams(images, labels)``. Its training
            mode is restored afterwards. Further maps, where it names some, are scored too.
        dataloader: batches of evaluation images, each once.
        protocol: what is measured.
        class_names: the K foreground classes.
        device: where to run; by default where the module's parameters are.
        crf_jobs: processes of the dense CRF; by default one a core.
        description: title of a progress bar, or None for no bar.

    Returns:
        The metrics of :meth:`Tally.compute`, with ``cost`` of this process: seconds, seconds an
        image, seconds by phase.

    Raises:
        WSSSError: there is no image, or the module and the data disagree.
    """
    if device is None:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
    device = torch.device(device)
    started = time.perf_counter()
    module.to(device)
    further = module.further_map_names if isinstance(module, HasFurtherMaps) else ()
    tally = Tally(protocol=protocol, class_names=class_names, full=True, further=further)
    tally.to(device)
    tally.reset()
    batches = dataloader if description is None else track(dataloader, description=description)
    num_images = 0  # of this process
    with evaluating(module), crf_pool(protocol, device, crf_jobs) as pool:
        queue = None if pool is None else CRFQueue(pool)
        for batch in batches:
            tally.update(module, batch, queue)  # type: ignore[arg-type]
            num_images += len(batch["index"])
        if queue is not None:
            with tally.watch("crf"):
                queue.drain()
    seconds = time.perf_counter() - started
    result = tally.compute()
    if result["num_images"] == 0:
        raise WSSSError("evaluation got no image; check the split's list")
    return result | {
        "cost": {
            "seconds": seconds,
            "seconds_per_image": seconds / max(num_images, 1),
            "phases": {
                name: value / max(num_images, 1) for name, value in tally.watch.seconds.items()
            },
            "device": device_name(device),
            "threads": torch.get_num_threads(),
        }
    }


class Evaluator(Callback):
    """Score the module at every validation: CAM seeds, image level, plain segmentation.

    It uses :meth:`Protocol.during_training`, so its numbers are for watching a run; results come
    from :func:`evaluate`. Sanity-check batches never count. One validation data loader.

    Args:
        protocol: the run's protocol.
        class_names: the K foreground classes.
        split: name of the validation split, for the ledger.
        ledger: run folder whose ledger records every reading, or None.

    Raises:
        WSSSError: the ledger cannot be read or written.

    Attributes:
        last: all metrics of the latest validation.
        history: (optimiser step, metrics) of every validation.
    """

    def __init__(
        self,
        *,
        protocol: Protocol,
        class_names: Sequence[str],
        split: str = "val",
        ledger: Path | None = None,
    ) -> None:
        super().__init__()
        self.tally = Tally(protocol=protocol.during_training(), class_names=class_names)
        self.split = split
        self.ledger = ledger
        if ledger is not None:
            check_ledger(ledger)  # not at the first validation, after hours
        self.last: dict[str, Any] = {}
        self.history: list[tuple[int, dict[str, Any]]] = []

    def on_validation_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Start from zero, also after sanity checking."""
        self.tally.to(pl_module.device).reset()

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count one batch."""
        if not trainer.sanity_checking:
            self.tally.update(pl_module, batch, None)  # type: ignore[arg-type]

    def on_validation_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Sum over ranks and log ``val/...``."""
        if trainer.sanity_checking:
            return
        self.last = self.tally.compute()
        self.history.append((trainer.global_step, self.last))
        if self.ledger is not None and trainer.is_global_zero:
            record_reading(
                self.ledger,
                split=self.split,
                purpose="watching training",
                step=trainer.global_step,
                num_images=self.last["num_images"],
            )
        for key in LOGGED:
            if self.last[key] is not None:
                # the value is the same on every rank already; sync_dist only quiets Lightning
                pl_module.log(f"val/{key}", self.last[key], sync_dist=trainer.world_size > 1)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print how the run went, one validation a row."""
        if trainer.is_global_zero and self.history:
            Console().print(self.table())

    def table(self) -> Table:
        """Make a table of the validations so far, in percent."""
        table = Table(title="validation during training (%)", title_justify="left")
        table.add_column("step", justify="right")
        for heading in LOGGED.values():
            table.add_column(heading, justify="right")
        for step, metrics in self.history:
            values = [metrics[key] for key in LOGGED]
            table.add_row(str(step), *("-" if v is None else f"{100 * v:.1f}" for v in values))
        return table
