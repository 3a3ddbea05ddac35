"""``wsss train``: compose, train, evaluate, and leave a run folder that says how it was made."""

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra import main as hydra_main
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from omegaconf import DictConfig

from wsss.config import check_config, compose_config, config_hash, config_root, plain, search_path
from wsss.data.datamodule import WSSSDataModule
from wsss.errors import WSSSError
from wsss.evaluation.evaluator import Evaluator
from wsss.evaluation.protocol import Protocol
from wsss.methods.base import WSSSModule
from wsss.reporting import evaluate_and_report
from wsss.results.store import RESULTS_FILE, read_results
from wsss.runs import LAST_CHECKPOINT, build_data, build_module, run_folder, write_config
from wsss.tracking import make_wandb_logger


def main(arguments: list[str]) -> int:
    """The verb: Hydra's own command line, with bad overrides told in one line first."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    if not {"-m", "--multirun"} & set(flags):
        compose_config(overrides)
    root = config_root()
    sys.argv = ["wsss train", *arguments, search_path(root)]
    decorate = hydra_main(version_base="1.3", config_path=str(root / "conf"), config_name="train")
    decorate(_job)()
    return 0


def _job(config: DictConfig) -> None:
    """One job of Hydra; a sweep runs several."""
    try:
        check_config(config)
        train(plain(config))
    except WSSSError as error:
        print(f"wsss train: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def train(config: dict[str, Any]) -> Path:
    """Train, evaluate and report one run; a finished run is left as it is.

    Args:
        config: resolved configuration.

    Returns:
        The run folder.

    Raises:
        WSSSError: bad configuration or data, before anything is written.
        SystemExit: 130 after Ctrl-C, with a checkpoint that resumes.
    """
    folder = run_folder(config)
    results = folder / RESULTS_FILE
    if results.is_file() and read_results(results).get("status") == "finished":
        print(f"{folder} is finished; change the configuration, or remove the folder")
        return folder
    _quiet()
    lightning.seed_everything(config["seed"], workers=True, verbose=False)
    data = build_data(config)
    data.setup("fit")  # bad data is told before a backbone is loaded or anything is written
    module = build_module(config, data.num_classes)
    protocol = Protocol(**config["eval"])
    write_config(folder, config)
    trainer = build_trainer(config, folder, data, protocol)
    checkpoint = folder / LAST_CHECKPOINT
    if checkpoint.is_file():
        print(f"resuming {folder}")
    print(f"run folder: {folder}")
    trainer.fit(
        module,
        datamodule=data,
        ckpt_path=str(checkpoint) if checkpoint.is_file() else None,
        weights_only=True,
    )
    if trainer.interrupted:
        print(f"interrupted at step {trainer.global_step}; the same command resumes", file=sys.stderr)
        raise SystemExit(130)
    evaluate_and_report(
        module,
        data,
        protocol,
        config=config,
        folder=folder,
        splits=[data.val_split, *data.test_splits],
        step=trainer.global_step,
        logger=_wandb(trainer),
    )
    return folder


def build_trainer(
    config: dict[str, Any], folder: Path, data: WSSSDataModule, protocol: Protocol
) -> lightning.Trainer:
    """The Trainer of a configuration with the callbacks that every run has."""
    every = config["budget"]["eval_every"]
    per_epoch = max(len(data.train_dataloader()) // config["trainer"]["accumulate_grad_batches"], 1)
    callbacks: list[Callback] = [
        SaveOnInterrupt(folder / LAST_CHECKPOINT),
        ModelCheckpoint(
            dirpath=folder / LAST_CHECKPOINT.parent,
            filename=LAST_CHECKPOINT.stem,
            every_n_train_steps=every,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        ),
        Evaluator(protocol=protocol, class_names=data.class_names),
        NamedLosses(),
    ]
    loggers: list[Logger] = [CSVLogger(folder, name="logs", version="")]
    if config["logger"]["wandb"]:
        loggers.append(make_wandb_logger(config, folder))
    del per_epoch
    return instantiate(
        config["trainer"],
        callbacks=callbacks,
        logger=loggers,
        default_root_dir=str(folder),
        val_check_interval=every * config["trainer"]["accumulate_grad_batches"],
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        _convert_="all",
    )


class SaveOnInterrupt(Callback):
    """Leaves a checkpoint that resumes when a run is stopped by Ctrl-C or an error."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Save where training stood, unless the weights themselves are what broke."""
        finite = all(bool(torch.isfinite(p).all()) for p in pl_module.parameters())
        if trainer.global_step > 0 and finite:
            trainer.save_checkpoint(self.path)


class NamedLosses(TQDMProgressBar):
    """Progress bar with the named losses, without Lightning's version number."""

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Losses without their ``train/`` prefix."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {
            name.removeprefix("train/").removesuffix("_loss"): value
            for name, value in metrics.items()
        }


def _quiet() -> None:
    """Silence library notices that are about us, not about the user's run."""
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")


def _wandb(trainer: lightning.Trainer) -> Logger | None:
    return next((log for log in trainer.loggers if not isinstance(log, CSVLogger)), None)
