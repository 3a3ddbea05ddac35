"""The Lightning Trainer of a configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from wsss.core.errors import WSSSError
from wsss.data.datamodule import ImageDataModule
from wsss.evaluation.evaluator import Evaluator
from wsss.evaluation.protocol import Protocol
from wsss.methods.base import WSSSModule
from wsss.runs.config import ACCELERATION
from wsss.runs.costs import CostMeter
from wsss.runs.folder import LAST_CHECKPOINT, build
from wsss.training.callbacks import AtomicCheckpointIO, NamedLosses, SaveOnStop
from wsss.training.parallel import choose_strategy


def build_trainer(
    config: dict[str, Any], folder: Path, data: ImageDataModule, protocol: Protocol
) -> lightning.Trainer:
    """The Trainer of a configuration with the callbacks that every run has.

    Raises:
        WSSSError: a GPU is asked for where torch sees none, or settings that do not go together.
    """
    accelerator = config["trainer"].get("accelerator")
    if accelerator in ("gpu", "cuda") and not torch.accelerator.is_available():
        raise WSSSError(
            f"trainer.accelerator={accelerator}: torch sees no GPU here; give trainer=cpu, or look "
            "at the driver, CUDA_VISIBLE_DEVICES and the build of torch"
        )
    every = config["budget"]["eval_every"]
    callbacks: list[Callback] = [
        SaveOnStop(folder / LAST_CHECKPOINT),
        ModelCheckpoint(
            dirpath=folder / LAST_CHECKPOINT.parent,
            filename=LAST_CHECKPOINT.stem,
            every_n_train_steps=every,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        ),
        Evaluator(
            protocol=protocol,
            class_names=data.class_names,
            split=data.val_split,
            ledger=folder,
        ),
        CostMeter(),
        NamedLosses(),
    ]
    settings = {k: v for k, v in config["trainer"].items() if k not in ACCELERATION}
    trainer: lightning.Trainer = build(
        settings,
        strategy=choose_strategy(settings),
        callbacks=callbacks,
        # a resumed run gets a folder of its own: CSVLogger would delete the first one's file
        logger=[CSVLogger(folder, name="logs")],
        default_root_dir=str(folder),
        val_check_interval=every * config["trainer"]["accumulate_grad_batches"],
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the data module's own samplers share images out
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
    )
    if settings.get("profiler"):
        profiler = trainer.profiler  # type: ignore[attr-defined]
        # without a file it would report through a logger that is silent here
        profiler.dirpath, profiler.filename = folder / "profile", "profile"
    return trainer


def accelerate(module: WSSSModule, settings: Mapping[str, Any]) -> None:
    """Compile a method's parts and lay out its convolutions as the trainer's configuration says.

    Args:
        module: changed in place; its parameters keep their names.
        settings: the trainer's configuration, see :class:`wsss.runs.config.Acceleration`.

    Raises:
        WSSSError: no such backend of ``torch.compile``.
    """
    if settings.get("channels_last"):
        module.to(memory_format=torch.channels_last)
    backend = settings.get("compile")
    if backend is None:
        return
    backends = torch.compiler.list_backends(exclude_tags=())
    if backend not in backends:
        raise WSSSError(f"trainer.compile={backend}: expected null or one of {', '.join(backends)}")
    for part in module.compiled_parts():
        part.compile(backend=backend)
