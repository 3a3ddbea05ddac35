"""Runs on disk: where they lie, how a module is built from one, how it is read back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.core.files import first_line, write_atomically
from wsss.data.datamodule import TRAINING_LIST, ImageDataModule
from wsss.evaluation.protocol import Protocol
from wsss.methods.base import WSSSModule
from wsss.models.backbone import Backbone, WeightsInfo
from wsss.models.weights import fit_positions, load_state_dict_strictly
from wsss.runs.config import config_hash, override_config
from wsss.runs.costs import CostMeter, training_cost
from wsss.runs.targets import with_current_targets

CONFIG_FILE = "config.yaml"
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"


def method_name(config: Mapping[str, Any]) -> str:
    """Short name of a resolved configuration's method: its class in lower case."""
    name: str = config["method"]["_target_"].rpartition(".")[2].lower()
    return name


def run_folder(config: dict[str, Any]) -> Path:
    """``runs_dir/study/METHOD-DATA-sSEED-HASH`` of a resolved configuration."""
    method = method_name(config)
    name = f"{method}-{config['data']['name']}-s{config['seed']}-{config_hash(config)}"
    return Path(config["runs_dir"]) / config["study"] / name


def build(node: dict[str, Any], **supplied: Any) -> Any:
    """The object that a node with a ``_target_`` describes.

    Raises:
        WSSSError: the constructor refused its arguments; in its own words where it was ours.
    """
    try:
        return instantiate(node, _convert_="all", **supplied)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, WSSSError):
            raise cause from error
        raise WSSSError(f"{node['_target_']}: {first_line(cause or error)}") from error


def build_data(config: dict[str, Any]) -> ImageDataModule:
    """The DataModule of a resolved configuration."""
    data: ImageDataModule = build(config["data"])
    return data


def build_module(
    config: dict[str, Any], num_classes: int, *, with_weights: bool = True
) -> WSSSModule:
    """The method of a resolved configuration on its backbone.

    Args:
        config: resolved configuration.
        num_classes: K, foreground classes.
        with_weights: load the backbone's stated weights; False when a checkpoint follows.
    """
    settings = (
        dict(config["backbone"]) if with_weights else {**config["backbone"], "weights": "random"}
    )
    backbone: Backbone = build(settings)
    module: WSSSModule = build(config["method"], backbone=backbone, num_classes=num_classes)
    module.run_config = config
    return module


@dataclass(frozen=True)
class Run:
    """A trained module with all it was trained under.

    Attributes:
        module: on the CPU, in eval mode.
        data: its DataModule.
        protocol: how it is evaluated.
        config: resolved configuration.
        folder: where results belong.
        step: optimiser steps of the checkpoint.
        cost: what training it cost, where the checkpoint says so.
        train_list: SHA-256 of the list that it was trained on, where the checkpoint says so.
    """

    module: WSSSModule
    data: ImageDataModule
    protocol: Protocol
    config: dict[str, Any]
    folder: Path
    step: int
    cost: dict[str, Any] | None = None
    train_list: str | None = None


def load_run(run: Path, overrides: list[str]) -> Run:
    """Read a run folder's last checkpoint, or a checkpoint file.

    Args:
        run: folder or ``.ckpt`` file.
        overrides: ``eval.*``, ``data.*`` and other keys to change, as ``key=value``.

    Raises:
        WSSSError: missing or truncated checkpoint, one that is not ours, unknown keys.
    """
    path = run / LAST_CHECKPOINT if run.is_dir() else run
    if not path.is_file():
        raise WSSSError(f"{path}: no such checkpoint; run= takes a run folder or a .ckpt file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        meta, state = checkpoint["wsss"], checkpoint["state_dict"]
    except Exception as error:  # zip, pickle and key errors share no base class
        raise WSSSError(
            f"{path}: not a wsss checkpoint ({str(error).splitlines()[0][:100]}); an official one "
            "must go through `wsss convert` first"
        ) from error
    config = override_config(with_current_targets(meta["config"]), overrides)
    data = build_data(config)
    module = build_module(config, data.num_classes, with_weights=False)
    restore_state(module, state, str(path))
    module.backbone.weights_info = WeightsInfo(**meta["backbone"])
    folder = run if run.is_dir() else run.with_suffix("")
    meter = checkpoint.get("callbacks", {}).get(CostMeter.state_key)
    return Run(
        module.eval(),
        data,
        Protocol(**config["eval"]),
        config,
        folder,
        int(checkpoint.get("global_step", 0)),
        training_cost(meter) if meter else None,
        _training_list(checkpoint, data),
    )


def _training_list(checkpoint: dict[str, Any], data: ImageDataModule) -> str | None:
    """From what the data module left in a checkpoint to resume by."""
    order = checkpoint.get(type(data).__qualname__, {}).get("order", {})
    found: str | None = order.get(TRAINING_LIST)
    return found


def restore_state(module: WSSSModule, state: dict[str, Tensor], origin: str) -> None:
    """Load a checkpoint's parameters, position grid included.

    Raises:
        WSSSError: keys that do not fit.
    """
    if "backbone.vit.pos_embed" in state:  # convolutional encoders have none
        fit_positions(module.backbone.vit, state["backbone.vit.pos_embed"])
    load_state_dict_strictly(module, state, origin)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the resolved configuration beside the run's results, atomically."""
    write_atomically(folder / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(config)).encode())
