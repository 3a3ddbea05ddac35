"""What a run starts from beside its encoder's weights: another run's weights, or its whole state.

``init_from`` takes the weights of a run; ``ckpt_path`` goes on from a checkpoint with optimiser and
position in the data. A configuration names a file; what is stored with the run, and what its hash
is taken of, is the file's content.
"""

from collections.abc import Mapping
from typing import Any

from wsss.core.errors import WSSSError
from wsss.core.files import file_sha256
from wsss.methods.base import WSSSModule
from wsss.runs.checkpoint_paths import start_key, start_path
from wsss.runs.config import config_hash
from wsss.runs.folder import Run, load_run, restore_state
from wsss.runs.stored import trusted_packages
from wsss.runs.supervision import supervision_of_run


def with_start(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give a configuration whose ``init_from`` and ``ckpt_path`` say what the files hold.

    Args:
        config: resolved configuration.

    Raises:
        WSSSError: both are given; no such checkpoint, or one that cannot be used.
    """
    key = start_key(config)
    if key is None:
        return dict(config)
    path = start_path(config, key)
    origin = _read(key, path, config)
    start = {
        "path": path,
        "sha256": file_sha256(origin.checkpoint),
        "method": origin.module.title,
        "data": origin.data.name,
        "supervision": supervision_of_run(origin),
        "steps": origin.step,
        "train_list_sha256": origin.train_list,
        "config_hash": config_hash(origin.config),
    }
    if key == "ckpt_path":
        start |= _continued(origin, config)
    return {**config, key: start}


def _read(key: str, path: str, config: Mapping[str, Any]) -> Run:
    """Read a run of this configuration's method.

    Raises:
        WSSSError: there is none, or it is of another method.
    """
    name = str(config["method"]["_target_"])
    try:
        origin = load_run(path, trust=trusted_packages(config))
    except WSSSError as error:
        raise WSSSError(f"{key}: {error}") from error
    theirs = origin.config["method"]["_target_"]
    if theirs != name:
        raise WSSSError(
            f"{key}={path}: holds weights of {theirs}, this run trains {name}; give a run of the "
            "same method (the encoder alone is backbone.weights=)"
        )
    return origin


def _continued(origin: Run, config: Mapping[str, Any]) -> dict[str, int]:
    """Say whether a checkpoint is of this very run; then it is no other run by going on from it.

    Raises:
        WSSSError: nothing is left to train.
    """
    steps = config["budget"]["max_steps"]
    if origin.step >= steps:
        raise WSSSError(
            f"ckpt_path={origin.path}: has {origin.step} steps already, of "
            f"budget.max_steps={steps}; raise it, or start from its weights with init_from="
        )
    return {
        "same_run": int(config_hash({**config, "ckpt_path": None}) == config_hash(origin.config))
    }


def take_weights(module: WSSSModule, config: Mapping[str, Any]) -> None:
    """Load the weights that ``init_from`` names; the encoder says where they began.

    Args:
        module: changed in place.
        config: from :func:`with_start`.

    Raises:
        WSSSError: the parameters do not fit: other classes, or another encoder.
    """
    start = config["init_from"]
    origin = _read("init_from", start["path"], config)
    if file_sha256(origin.checkpoint) != start["sha256"]:
        raise WSSSError(f"init_from={start['path']}: changed while this run began; repeat it")
    restore_state(module, origin.module.state_dict(), f"init_from={start['path']}")
    module.backbone.weights_info = origin.module.backbone.weights_info
