"""What every method is: a LightningModule that gives logits, localisation maps and losses."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self, TypeVar

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.profiler import record_function

import wsss
from wsss.core.errors import WSSSError
from wsss.core.ranks import mean_over_ranks
from wsss.methods.settings import Settings, StepQuirks
from wsss.models.backbone import Backbone
from wsss.models.conv_backbone import ConvBackbone

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


Q = TypeVar("Q", bound=StepQuirks)


class Step(NamedTuple):
    """What a method says about one batch.

    Attributes:
        losses: named terms without their weights, in the paper's order; logged as ``train/NAME``.
        total: the weighted sum that is minimised, a scalar.
        outputs: of the forward pass; ``seg_logits`` is None where the step needed none.
        seen: the targets behind the losses, by name, for whoever wants to look at them.
        scalars: further numbers worth a curve; logged as ``train/NAME``.
    """

    losses: dict[str, Tensor]
    total: Tensor
    outputs: Outputs
    seen: Mapping[str, Any] = MappingProxyType({})
    scalars: Mapping[str, Tensor] = MappingProxyType({})


class WSSSModule(LightningModule):
    """Base of all methods: one optimiser recipe, one way of logging, no training logic.

    A method writes :meth:`losses`; the bookkeeping around it stands here, once. An evaluator uses
    only :meth:`forward` and :meth:`cams`.

    Several processes average their gradients. A loss divides by what one forward pass holds, and a
    batch norm sees the batch of one forward pass: ``global_batch_size`` over processes times
    ``accumulate_grad_batches``. A run is the same on any number of processes for which that
    quotient is the same, random draws included (:meth:`own_draws`). Each method says below
    *Several processes* which of its losses are the same for any quotient. Where ``over_ranks`` is
    set, losses divide by what the forward passes of all processes hold together.

    Args:
        backbone: the shared encoder.
        num_classes: K, foreground classes.
        settings: the method's own, checked already.
    """

    #: Opens a named phase of the step; the benchmark puts a stopwatch here.
    phase: Callable[[str], AbstractContextManager[Any]] = staticmethod(record_function)
    #: False: training steps draw from the global random generators (a quirk of official codes)
    draws_apart = True
    #: False: a loss that is not finite does not stop the run (a quirk of official codes)
    stops_unless_finite = True
    #: True: losses divide by counts of all processes, so those of one are its part of a mean; every
    #: process has the same terms at a step
    over_ranks = False
    #: False: nothing is trained, a run only evaluates
    trains = True
    #: True: the map of a class depends on which others are asked for
    classes_compete = False
    #: whether it learns on an encoder that learns nothing itself (``backbone.frozen``)
    takes_frozen = False
    #: whether it learns on a convolutional encoder, which has no tokens
    takes_convolutions = False
    #: settings that name a file whose content a checkpoint of ours holds -> what says so instead
    held_by_checkpoint: Mapping[str, Any] = MappingProxyType({})
    #: SHA-256 of the files beside data and weights that it learnt from, by name
    files_sha256: Mapping[str, str] = MappingProxyType({})
    #: whether the batch is the first of its optimiser step, as ``training_step`` found it
    first_of_step = True
    #: the run's seed, as ``on_fit_start`` found it
    seed = 0
    #: batch norms whose statistics and weights stay as they are, see :meth:`freeze_batch_norms`
    frozen_norms: Sequence[nn.Module] = ()
    #: keys of :meth:`further_cams`
    further_map_names: tuple[str, ...] = ()

    def __init__(self, *, backbone: Backbone, num_classes: int, settings: Settings) -> None:
        super().__init__()
        if num_classes < 1:
            raise WSSSError(f"num_classes={num_classes}: expected at least 1 class")
        if isinstance(backbone, ConvBackbone) and not self.takes_convolutions:
            raise WSSSError(
                f"backbone.name={backbone.weights_info.name}: {type(self).__name__} reads tokens, "
                "and a convolutional encoder has none; give a vision transformer, such as "
                "backbone=vit_base"
            )
        if backbone.frozen and not self.takes_frozen:
            raise WSSSError(
                f"backbone.frozen=true: {type(self).__name__} trains its encoder; give "
                "backbone.frozen=false"
            )
        self.backbone = backbone
        self.num_classes = num_classes
        self.settings = settings
        #: resolved configuration, saved as a plain dictionary inside every checkpoint
        self.run_config: dict[str, Any] = {}

    def follow(self, quirks: Q) -> Q:
        """Take a training step as an official code does where its quirks are on; give them back."""
        self.draws_apart = not quirks.shared_draws
        self.stops_unless_finite = not quirks.goes_on_after_nan
        return quirks

    @property
    def title(self) -> str:
        """The method's name as its field writes it, for tables and reports; here the class's."""
        return type(self).__name__

    # ---- what a method is ----------------------------------------------------------------------

    @abstractmethod
    def forward(self, images: Tensor) -> Outputs:
        """Give logits for normalised images (B, 3, H, W) of any size."""

    @abstractmethod
    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Give the method's localisation maps, (B, K, H, W) in [0, 1].

        Args:
            images: (B, 3, H, W), normalised.
            labels: image-level labels, (B, K) in {0, 1}; maps of absent classes are zero, and the
                map of a class does not depend on which others are asked for, unless
                ``classes_compete``.
        """

    @abstractmethod
    def losses(self, batch: Batch, step: int) -> Step:
        """Compute all losses of a batch at a 0-based optimiser step.

        Args:
            batch: what the method's training transform gives, with ``labels`` (B, K) and ``name``.
            step: decides which terms are in force.
        """

    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """Give the optimiser groups: each with ``name``, ``params`` and ``lr``."""

    @abstractmethod
    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make the method's optimiser over its groups."""

    @abstractmethod
    def lr_multiplier(self, step: int) -> float:
        """Give the factor on every group's learning rate at a 0-based optimiser step."""

    def freeze_batch_norms(self) -> None:
        """Keep the encoder's batch norms as pretraining left them, while training too."""
        self.frozen_norms = [m for m in self.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in self.frozen_norms:
            norm.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all but frozen batch norms."""
        super().train(mode)
        for norm in self.frozen_norms:
            norm.eval()
        return self

    def check_classes(self, class_names: Sequence[str]) -> None:
        """Raise WSSSError where the method cannot learn these K classes; by default it can.

        Args:
            class_names: of the data set, in its order.
        """

    def fit_to(self, state: Mapping[str, Tensor]) -> None:
        """Give what a checkpoint alone tells the size of that size, before it is loaded.

        By default there is nothing such.

        Args:
            state: the checkpoint's parameters and buffers.
        """

    def further_cams(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Give further localisation maps that are scored beside :meth:`cams`; none by default.

        Args:
            images: as of :meth:`cams`.
            labels: as of :meth:`cams`.

        Returns:
            Name -> maps as those of :meth:`cams`, with the names ``further_map_names``.
        """
        return {}

    def gallery_maps(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Give further maps worth looking at: name -> (B, H, W) in [0, 1]; none by default.

        Args:
            images: (B, 3, H, W), normalised.
            labels: image-level labels, (B, K) in {0, 1}.
        """
        return {}

    def compiled_parts(self) -> list[nn.Module]:
        """Give what ``trainer.compile`` compiles: parts whose graph is the same at every step."""
        return list(self.backbone.vit.blocks)

    # ---- the bookkeeping around a step -----------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the total loss of a batch; log it with its terms."""
        self.first_of_step = batch_idx % self.trainer.accumulate_grad_batches == 0
        with self.own_draws(batch_idx, enabled=self.draws_apart):
            step = self.losses(batch, self.global_step)
        if self.stops_unless_finite:
            self.require_finite(step, batch)
        self.log_step(step, len(batch["image"]))
        return step.total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Do nothing: the evaluator callback reads :meth:`forward` and :meth:`cams` itself."""

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Predict a batch of ``predict_dataloader``, for ``trainer.predict(module, loader)``.

        Args:
            batch: ``image`` (B, 3, H, W), normalised, and ``name``.
            batch_idx: of the batch.

        Returns:
            ``name`` (list of B), ``class_logits`` (B, K), ``seg_logits`` (B, K+1, h, w) or None,
            and ``cams`` (B, K, H, W) of the classes whose logit is above zero, or of the highest
            one where none is.
        """
        # Lightning predicts in inference mode, in which no CAM can take gradients
        with torch.inference_mode(False), torch.no_grad():
            images = batch["image"].clone()
            outputs = self(images)
            logits = outputs.class_logits
            labels = ((logits > 0) | (logits == logits.amax(1, keepdim=True))).to(images)
            cams = self.cams(images, labels)
        return {
            "name": list(batch["name"]),
            "class_logits": logits,
            "seg_logits": outputs.seg_logits,
            "cams": cams,
        }

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # a run says all that Lightning's takes
        cls,
        checkpoint_path: Path | str,
        map_location: torch.device | str = "cpu",
        *,
        trust: Sequence[str] = (),
    ) -> Self:
        """Load the module of a run folder or checkpoint, in eval mode; no code in the file is run.

        Args:
            checkpoint_path: folder or ``.ckpt`` file.
            map_location: device of the module.
            trust: packages beside ``wsss`` whose classes the checkpoint may name; their code is
                run.

        Raises:
            WSSSError: no such checkpoint, one that is damaged, not ours or of another method.
        """
        module = wsss.load_run(checkpoint_path, trust=trust).to(map_location).module
        if not isinstance(module, cls):
            raise WSSSError(
                f"{checkpoint_path}: holds {module.title}, not {cls.__name__}; give "
                f"{type(module).__name__}.load_from_checkpoint, or wsss.load_run for any method"
            )
        return module

    def configure_optimizers(self) -> Any:
        """Make the optimiser, with its learning rate set anew at each step."""
        optimizer = self.optimizer(self.param_groups())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_multiplier)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """Remember the run's seed for :meth:`own_draws`."""
        self.seed = torch.initial_seed()

    @contextmanager
    def own_draws(self, batch_idx: int, *, enabled: bool) -> Iterator[None]:
        """Make random draws depend on seed, step and place within the global batch alone.

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
                torch.manual_seed(hash((self.seed, place, self.global_step, batch)) % 2**63)
            yield

    def require_finite(self, step: Step, batch: Batch) -> None:
        """Stop a run that has gone astray, before the weights are spoilt.

        Raises:
            WSSSError: the total is not finite; names the losses and images.
        """
        if bool(torch.isfinite(step.total)):
            return
        terms = ", ".join(f"{name} {loss.item():.3g}" for name, loss in step.losses.items())
        raise WSSSError(
            f"step {self.global_step}: the loss is not finite ({terms}; images "
            f"{', '.join(batch['name'])}); lower method.lr, or look at these images"
        )

    def log_step(self, step: Step, batch_size: int) -> None:
        """Log losses, their total, scalars and every learning rate under ``train/``.

        Losses are the first process's, or means over processes where ``over_ranks`` is set. ``lr``
        is the first parameter group's rate, ``lr_NAME`` that of each further one.
        """
        losses = {**step.losses, "loss": step.total}
        if self.over_ranks:
            losses = mean_over_ranks(losses)
        for name, loss in losses.items():
            self.log(f"train/{name}", loss.detach(), prog_bar=True, batch_size=batch_size)
        for name, scalar in step.scalars.items():
            self.log(f"train/{name}", scalar.detach(), batch_size=batch_size)
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
            "files_sha256": dict(self.files_sha256),
        }
