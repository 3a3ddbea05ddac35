"""The value Run: where it lies, how its parts are built, how it is read back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.core.files import first_line, write_atomically
from wsss.core.schema import arguments_of, target_class
from wsss.data.datamodule import TRAINING_LIST, ImageDataModule
from wsss.evaluation.protocol import Protocol
from wsss.methods.base import WSSSModule
from wsss.models.backbone import Backbone, WeightsInfo
from wsss.models.weights import fit_positions, load_state_dict_strictly, read_torch_file
from wsss.results.store import CONFIG_FILE
from wsss.runs.checkpoint_paths import LAST_CHECKPOINT, checkpoint_of
from wsss.runs.config import config_hash, override_config
from wsss.runs.costs import CostMeter, training_cost
from wsss.runs.stored import check_stored
from wsss.runs.targets import with_current_state_keys, with_current_targets
from wsss.runs.trainer_settings import ends, limits


def method_name(config: Mapping[str, Any]) -> str:
    """Give the short name of a resolved configuration's method: its class in lower case."""
    name: str = config["method"]["_target_"].rpartition(".")[2].lower()
    return name


def run_folder(config: dict[str, Any]) -> Path:
    """Give ``runs_dir/study/METHOD-DATA-sSEED-HASH`` of a resolved configuration."""
    method = method_name(config)
    name = f"{method}-{config['data']['name']}-s{config['seed']}-{config_hash(config)}"
    return Path(config["runs_dir"]) / config["study"] / name


def build(node: dict[str, Any], **supplied: Any) -> Any:
    """Make the object that a node with a ``_target_`` describes.

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


def build_data(config: Mapping[str, Any], *, for_training: bool = True) -> ImageDataModule:
    """Make the DataModule of a resolved configuration.

    Args:
        config: resolved configuration.
        for_training: False leaves out the training views, which then are no code that runs.
    """
    unused = {} if for_training else {"train_transform": None}
    data: ImageDataModule = build({**config["data"], **unused})
    return data


def build_method(node: Mapping[str, Any], backbone: Backbone, num_classes: int) -> WSSSModule:
    """Make the method that a node describes: its keys become the settings of its constructor.

    Raises:
        WSSSError: settings out of range, or a backbone that the method cannot use.
    """
    target = target_class(node["_target_"], "method")
    try:
        arguments = arguments_of(target, node)
        module: WSSSModule = target(backbone=backbone, num_classes=num_classes, **arguments)
    except TypeError as error:
        raise WSSSError(f"{node['_target_']}: {first_line(error)}") from error
    return module


def build_module(
    config: dict[str, Any],
    num_classes: int,
    *,
    with_weights: bool = True,
    with_files: bool = True,
) -> WSSSModule:
    """Make the method of a resolved configuration on its backbone.

    Args:
        config: resolved configuration.
        num_classes: K, foreground classes.
        with_weights: load the backbone's stated weights; False when a checkpoint follows.
        with_files: read the files that the method's settings name; False when a checkpoint of ours
            follows, which holds their content (``held_by_checkpoint``).
    """
    settings = dict(config["backbone"])
    if not with_weights:
        settings["weights"] = "random"
        settings.pop("declared_pretraining", None)
    backbone: Backbone = build(settings)
    method = dict(config["method"])
    if not with_files:
        target: type[WSSSModule] = target_class(method["_target_"], "method")
        method |= target.held_by_checkpoint
    module = build_method(method, backbone, num_classes)
    module.run_config = config
    return module


@dataclass(frozen=True)
class Run:
    """A module with all it is, or was, trained under: what fitting, scoring and predicting take.

    It is made by :func:`wsss.runs.prepare.prepare` from a configuration, untrained, and by
    :func:`load_run` from what a training left.

    Attributes:
        module: the method on its backbone.
        data: its DataModule.
        protocol: how it is evaluated.
        config: resolved configuration.
        path: its run folder, or the checkpoint file that it was read from.
        overrides: changes to the stored configuration; other results than the run's own follow.
        step: optimiser steps behind the weights.
        cost: what training it cost, where that is known.
        train_list: SHA-256 of the list that it was trained on, where that is known.
        unfinished: why it isn't a finished run; empty where it is.
        stopped: the declared rule that stopped it before its last step, where one did.
    """

    module: WSSSModule
    data: ImageDataModule
    protocol: Protocol
    config: dict[str, Any]
    path: Path
    overrides: tuple[str, ...] = ()
    step: int = 0
    cost: dict[str, Any] | None = None
    train_list: str | None = None
    unfinished: str = ""
    stopped: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        """Where results belong."""
        return self.path.with_suffix("") if self.path.is_file() else self.path

    @property
    def home(self) -> Path:
        """The run folder, also where a checkpoint inside it was named."""
        inside = self.path.is_file() and self.path.parent.name == LAST_CHECKPOINT.parent.name
        return self.path.parents[1] if inside else self.folder

    @property
    def checkpoint(self) -> Path:
        """The checkpoint file, which a run that has not begun lacks."""
        return self.path if self.path.is_file() else self.path / LAST_CHECKPOINT

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self.module.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Move the module; give this same run back."""
        self.module.to(device)
        return self


def load_run(path: Path | str, overrides: Sequence[str] = (), *, trust: Sequence[str] = ()) -> Run:
    """Read a run folder's last checkpoint, or a checkpoint file.

    Args:
        path: folder or ``.ckpt`` file.
        overrides: ``eval.*``, ``data.*`` and other keys to change, as ``key=value``.
        trust: packages beside ``wsss`` whose classes the checkpoint may name; their code is run.

    Returns:
        The run, to evaluate and predict with; its module is on the CPU, in eval mode.

    Raises:
        WSSSError: missing or truncated checkpoint, one that is not ours, unknown keys.
    """
    path = Path(path)
    file = checkpoint_of(path)
    checkpoint = _read_checkpoint(file)
    meta = checkpoint["wsss"]
    stored = check_stored(with_current_targets(meta["config"]), str(file), trust)
    config = override_config(stored, list(overrides), str(file))
    data = build_data(config, for_training=False)
    module = build_module(config, data.num_classes, with_weights=False, with_files=False)
    restore_state(module, checkpoint["state_dict"], str(file))
    module.backbone.weights_info = WeightsInfo.stored(meta["backbone"])
    module.files_sha256 = meta.get("files_sha256", {})  # an earlier version wrote none
    callbacks = checkpoint.get("callbacks")
    callbacks = callbacks if isinstance(callbacks, dict) else {}
    meter, stopped = callbacks.get(CostMeter.state_key), stopped_by(callbacks)
    step = int(checkpoint.get("global_step", 0))
    return Run(
        module.eval(),
        data,
        Protocol(**config["eval"]),
        config,
        path,
        overrides=tuple(overrides),
        step=step,
        cost=training_cost(meter, str(file)) if meter else None,
        train_list=_training_list(checkpoint, data),
        # a converted checkpoint has no loops: its training was another program's
        unfinished=why_unfinished(stored, step, stopped) if "loops" in checkpoint else "",
        stopped=stopped,
    )


#: key of the state that says whether a declared rule stopped a run
STOPPING_RULE = "StoppingRule"


def stopped_by(callbacks: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read which declared rule stopped a run, from the states of its callbacks.

    Args:
        callbacks: of a checkpoint.
    """
    state = callbacks.get(STOPPING_RULE)
    found = state.get("stopped") if isinstance(state, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("monitor"), str):
        return None
    return {"monitor": found["monitor"]}


def why_unfinished(config: Mapping[str, Any], step: int, stopped: Any) -> str:
    """Say why a run's weights are not those that its configuration ends with; empty where they are.

    Args:
        config: resolved configuration.
        step: optimiser steps behind the weights.
        stopped: the declared rule that ended training, or None.
    """
    trainer, steps = config["trainer"], config["trainer"]["max_steps"]
    if limited := limits(trainer):
        return f"{step} of {steps} steps under {', '.join(limited)}"
    if step >= steps or stopped:
        return ""
    ended = f" under {', '.join(ends(trainer))}" if ends(trainer) else ""
    return f"{step} of {steps} steps{ended}"


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file that holds our own ``wsss`` entry and a state dict."""
    if not path.is_file():
        raise WSSSError(f"{path}: no such checkpoint; run= takes a run folder or a .ckpt file")
    return check_checkpoint(read_torch_file(path), path)


def check_checkpoint(content: Any, path: Path, *, to_resume: bool = False) -> dict[str, Any]:
    """Give a checkpoint's content back if all parts that are read of it are of their kind.

    Args:
        content: of the file.
        path: the file, for the error.
        to_resume: also look for what training goes on by.

    Raises:
        WSSSError: it names the first part that is missing or of another kind.
    """
    parts: dict[str, type | tuple[type, ...]] = {"wsss": dict, "state_dict": dict}
    if to_resume:
        parts |= {"global_step": int, "loops": dict, "optimizer_states": list}
        parts |= {"lr_schedulers": list, "callbacks": dict, "epoch": int}
    if not isinstance(content, dict) or "wsss" not in content:
        raise WSSSError(
            f"{path}: not a wsss checkpoint; an official one must go through `wsss convert` first"
        )
    content = with_current_state_keys(content)
    for name, kind in parts.items():
        if not isinstance(content.get(name), kind):
            raise WSSSError(f"{path}: its {name} is missing or damaged; copy it again")
    meta, state = content["wsss"], content["state_dict"]
    backbone = meta.get("backbone")
    groups = (meta.get("config"), backbone, meta.get("files_sha256", {}))
    if not all(isinstance(group, dict) for group in groups):
        raise WSSSError(f"{path}: its configuration is missing or damaged; copy it again")
    if backbone.keys() != {field.name for field in fields(WeightsInfo)}:
        raise WSSSError(f"{path}: what it says of its encoder's weights is damaged; copy it again")
    texts = {key: str | None if key == "file_sha256" else str for key in backbone}
    if not all(isinstance(backbone[key], kind) for key, kind in texts.items()):
        raise WSSSError(f"{path}: what it says of its encoder's weights is damaged; copy it again")
    files = meta.get("files_sha256", {})
    if not all(isinstance(text, str) for pair in files.items() for text in pair):
        raise WSSSError(f"{path}: its files_sha256 is damaged; copy it again")
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise WSSSError(f"{path}: its state_dict holds more than tensors by name; copy it again")
    step = content.get("global_step", 0)
    if not isinstance(step, int) or not 0 <= step < 2**53:
        raise WSSSError(f"{path}: its global_step={step!r} is no number of steps; copy it again")
    return content


def _training_list(checkpoint: dict[str, Any], data: ImageDataModule) -> str | None:
    """Read the hash from what the data module left in a checkpoint to resume by."""
    state = checkpoint.get(type(data).__qualname__)
    order = state.get("order") if isinstance(state, dict) else None
    found = order.get(TRAINING_LIST) if isinstance(order, dict) else None
    return found if isinstance(found, str) else None


def restore_state(module: WSSSModule, state: dict[str, Tensor], origin: str) -> None:
    """Load a checkpoint's parameters, position grid included.

    Raises:
        WSSSError: keys that do not fit.
    """
    if "backbone.vit.pos_embed" in state:  # convolutional encoders have none
        fit_positions(module.backbone.vit, state["backbone.vit.pos_embed"])
    module.fit_to(state)
    load_state_dict_strictly(module, state, origin)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the resolved configuration beside the run's results, atomically."""
    write_atomically(folder / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(config)).encode())
