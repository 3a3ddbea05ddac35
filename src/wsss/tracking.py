"""Weights & Biases: one run folder is one W&B run, offline where there is no key."""

import contextlib
import netrc
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger

from wsss.errors import WSSSError

ID_FILE = "wandb_id.txt"


def has_key() -> bool:
    """Whether W&B could log in: ``WANDB_API_KEY`` or an entry for its host in ``.netrc``."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = os.environ.get("NETRC") or str(Path.home() / ".netrc")
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(path).authenticators(host) is not None
    return False


def run_id(folder: Path) -> str:
    """The W&B id of a run folder, made at the first call and kept in it.

    An interrupted run that resumes in the same folder goes on in the same W&B run.
    """
    path = folder / ID_FILE
    if path.is_file() and (known := path.read_text().strip()):
        return known
    folder.mkdir(parents=True, exist_ok=True)
    new = uuid.uuid4().hex[:8]
    path.write_text(f"{new}\n")
    return new


def import_wandb() -> None:
    """Raises WSSSError unless W&B is installed."""
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise WSSSError(
            "logger=wandb needs the package wandb (pip install wandb), or give logger=csv"
        ) from error


def make_wandb_logger(config: Mapping[str, Any], folder: Path) -> WandbLogger:
    """The W&B logger of a run.

    Without a key it works offline; ``wandb sync`` uploads the folder later. ``WANDB_MODE`` of the
    environment has the last word.

    Args:
        config: Resolved configuration; ``logger.project`` names the project and all of it is
            stored with the run.
        folder: The run folder.

    Returns:
        A Lightning logger.

    Raises:
        WSSSError: If wandb is not installed.
    """
    import_wandb()
    mode = os.environ.get("WANDB_MODE")
    return WandbLogger(
        project=config["logger"]["project"],
        name=folder.name,
        group=config.get("study"),
        id=run_id(folder),
        save_dir=str(folder),
        offline=mode == "offline" or (mode is None and not has_key()),
        resume="allow",
        config=dict(config),
    )


def log_results(logger: WandbLogger, results: Mapping[str, Any], gallery: Path) -> None:
    """Sends final numbers, per-class tables and gallery sheets to W&B.

    Args:
        logger: From :func:`make_wandb_logger`.
        results: Content of ``results.json``.
        gallery: Folder of the sheets; may be missing.
    """
    import wandb

    run = logger.experiment
    payload: dict[str, Any] = {}
    for split, metrics in results["splits"].items():
        for key, value in metrics.items():
            if isinstance(value, int | float):
                run.summary[f"{split}/{key}"] = value
        columns = metrics["per_class"]
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        payload[f"{split}/per_class"] = wandb.Table(columns=list(columns), data=rows)
    sheets = sorted(gallery.glob("sheet_*.png"))
    if sheets:
        payload["gallery"] = [wandb.Image(str(sheet), caption=sheet.stem) for sheet in sheets]
    run.log(payload)
