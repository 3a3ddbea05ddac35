"""Studies of two stages: train, write pseudo labels, train a segmenter on them.

Each stage leaves a run folder of its own. Repeating the command skips what is finished and goes on
where it was interrupted, be it in the middle of a stage or between two.
"""

from pathlib import Path
from typing import Any

import torch

from wsss.core.devices import choose_device
from wsss.runs.config import second_stage_config
from wsss.runs.label_writer import write_pseudo_labels
from wsss.training.run import train


def train_stages(config: dict[str, Any]) -> Path:
    """Train a run and, where it has a ``second_stage``, that one on its pseudo labels.

    Args:
        config: resolved configuration.

    Returns:
        The folder of the last run.

    Raises:
        WSSSError: see :func:`wsss.training.run.train` and
            :func:`wsss.runs.label_writer.write_pseudo_labels`.
    """
    folder = train(config)
    if not config.get("second_stage"):
        return folder
    labels = write_pseudo_labels(
        folder,
        [],
        split=None,
        source=config["second_stage"].get("source", "cam"),
        out=None,
        device=_device(config),
    )
    return train(second_stage_config(config, str(labels)))


def _device(config: dict[str, Any]) -> torch.device:
    """The device that this process trains on."""
    if config["trainer"].get("accelerator") == "cpu":
        return torch.device("cpu")
    device = choose_device("auto")
    if device.type == "cuda" and torch.distributed.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return device
