"""What every method is: a LightningModule that gives logits, localisation maps and a loss."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.profiler import record_function

from wsss.core.errors import WSSSError
from wsss.models.backbone import Backbone

Batch = dict[str, Any]


class Outputs(NamedTuple):
    """What an evaluator sees of a forward pass.

    Attributes:
        class_logits: image-level logits, (B, K).
        seg_logits: logits with the background first, (B, K+1, h, w), or None where the method has
            no segmentation head.
    """

    class_logits: Tensor
    seg_logits: Tensor | None


class WSSSModule(LightningModule):
    """Base of all methods: one optimiser recipe, one way of logging, no training logic.

    A method writes out its own ``training_step``; an evaluator uses only :meth:`forward` and
    :meth:`cams`. Everything a method needs is a keyword-only, typed constructor argument, since
    Hydra checks configurations against it.

    Several processes average their gradients. What a loss divides by, and
    the batch that a batch norm sees, are those of one forward pass: ``global_batch_size`` over
    processes times ``accumulate_grad_batches``. Where that quotient stays, a run is the same on any
    number of processes, random draws included (:meth:`own_draws`); each method says below
    *Several processes* for which losses it is also the same for any quotient.

    Args:
        backbone: the shared encoder.
        num_classes: K, foreground classes.
        max_steps: optimiser steps of the whole run, the length of every schedule.
    """

    #: Opens a named phase of the step; the benchmark puts a stopwatch here.
    phase: Callable[[str], AbstractContextManager[Any]] = staticmethod(record_function)

    def __init__(self, *, backbone: Backbone, num_classes: int, max_steps: int) -> None:
        super().__init__()
        if num_classes < 1 or max_steps < 1:
            raise WSSSError(
                f"method: num_classes={num_classes} and max_steps={max_steps} must be at least 1"
            )
        self.backbone = backbone
        self.num_classes = num_classes
        self.max_steps = max_steps
        #: resolved configuration, saved as a plain dictionary inside every checkpoint
        self.run_config: dict[str, Any] = {}

    @property
    def title(self) -> str:
        """The method's name as its field writes it, for tables and reports; here the class's."""
        return type(self).__name__

    @abstractmethod
    def forward(self, images: Tensor) -> Outputs:
        """Logits for normalised images (B, 3, H, W) of any size."""

    @abstractmethod
    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """The method's localisation maps, (B, K, H, W) in [0, 1].

        Args:
            images: (B, 3, H, W), normalised.
            labels: image-level labels, (B, K) in {0, 1}; maps of absent classes are zero, and the
                map of a class does not depend on which others are asked for.
        """

    def gallery_maps(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Further maps worth looking at: name -> (B, H, W) in [0, 1]; none by default.

        Args:
            images: (B, 3, H, W), normalised.
            labels: image-level labels, (B, K) in {0, 1}.
        """
        return {}

    def compiled_parts(self) -> list[nn.Module]:
        """What ``trainer.compile`` compiles: parts whose graph is the same at every step."""
        return list(self.backbone.vit.blocks)

    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups: each with ``name``, ``params`` and ``lr``."""

    @abstractmethod
    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The method's optimiser over its groups."""

    @abstractmethod
    def lr_multiplier(self, step: int) -> float:
        """Factor on every group's learning rate at a 0-based optimiser step."""

    def configure_optimizers(self) -> Any:
        """The method's optimiser with its learning rate set anew at each step."""
        optimizer = self.optimizer(self.param_groups())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_multiplier)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Nothing: the evaluator callback reads :meth:`forward` and :meth:`cams` itself."""

    def on_fit_start(self) -> None:
        """Remember the run's seed for :meth:`own_draws`."""
        self._seed = torch.initial_seed()

    @contextmanager
    def own_draws(self, batch_idx: int, *, enabled: bool) -> Iterator[None]:
        """Random draws that depend on seed, step and place within the global batch alone.

        So a resumed run draws the same, and so do two processes and one that accumulates.

        Args:
            batch_idx: of the training step.
            enabled: False leaves the global generators as they are.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices, enabled=enabled):
            if enabled:
                batch, part = divmod(batch_idx, self.trainer.accumulate_grad_batches)
                place = part * self.trainer.world_size + self.global_rank
                torch.manual_seed(hash((self._seed, place, self.global_step, batch)) % 2**63)
            yield

    def require_finite(self, losses: Mapping[str, Tensor], total: Tensor, batch: Batch) -> None:
        """Stop a run that has gone astray, before the weights are spoilt.

        Raises:
            WSSSError: the total is not finite; names the losses and images.
        """
        if bool(torch.isfinite(total)):
            return
        terms = ", ".join(f"{name} {loss.item():.3g}" for name, loss in losses.items())
        raise WSSSError(
            f"step {self.global_step}: the loss is not finite ({terms}; images "
            f"{', '.join(batch['name'])}); lower method.lr, or look at these images"
        )

    def log_losses(self, losses: Mapping[str, Tensor], total: Tensor, batch_size: int) -> None:
        """Log named losses, the total and every learning rate under ``train/``.

        ``lr`` is the first parameter group's rate, ``lr_NAME`` that of each further one.
        """
        for name, loss in losses.items():
            self.log(f"train/{name}", loss.detach(), prog_bar=True, batch_size=batch_size)
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=batch_size)
        first, *further = self.trainer.optimizers[0].param_groups
        self.log("train/lr", first["lr"], batch_size=batch_size)
        for group in further:
            name = group["name"].replace(" ", "_")
            self.log(f"train/lr_{name}", group["lr"], batch_size=batch_size)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is needed to build the module again: plain values only."""
        checkpoint["wsss"] = {
            "config": self.run_config,
            "backbone": self.backbone.weights_info.as_dict(),
        }


def check_positive(**settings: float | Sequence[float]) -> None:
    """Raise WSSSError unless settings, given by their keys, are finite numbers above zero."""
    for name, value in settings.items():
        numbers = list(value) if isinstance(value, Sequence) else [value]
        if not all(0 < number < math.inf for number in numbers):
            raise WSSSError(f"method.{name}={value}: expected finite numbers above zero")


def check_not_negative(**settings: float) -> None:
    """Raise WSSSError unless settings, given by their keys, are finite and not below zero."""
    for name, value in settings.items():
        if not 0 <= value < math.inf:
            raise WSSSError(f"method.{name}={value}: expected a finite number, 0 or more")


def check_thresholds(*, low: float, high: float) -> None:
    """Raise WSSSError unless the two thresholds of pseudo labels are 0 <= low <= high <= 1."""
    if not 0 <= low <= high <= 1:
        raise WSSSError(
            f"method: expected 0 <= low_threshold <= high_threshold <= 1, got {low} and {high}"
        )
