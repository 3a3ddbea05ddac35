"""The trackers of a run beside ``metrics.csv``: W&B, TensorBoard, MLflow, several at once."""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from wsss.core.errors import WSSSError
from wsss.core.files import first_line, write_atomically
from wsss.core.ranks import is_first_process
from wsss.results.gallery import Gallery
from wsss.runs.config import LoggerConfig
from wsss.runs.naming import group_name, run_name
from wsss.runs.wandb import log_to_wandb, numbers, wandb_run

MLFLOW_ID = "mlflow_id.txt"


@contextmanager
def open_loggers(
    settings: LoggerConfig,
    config: Mapping[str, Any],
    folder: Path,
    supervision: str,
    pretraining: str,
) -> Iterator[list[Logger]]:
    """Open every tracker of a run; they are closed on leaving.

    Args:
        settings: which.
        config: resolved configuration.
        folder: the run folder, which holds the configuration.
        supervision: what the run learns from.
        pretraining: what its encoder starts from.
    """
    with ExitStack() as stack:
        loggers: list[Logger] = []
        if settings.wandb:
            loggers.append(stack.enter_context(wandb_run(config, folder, supervision, pretraining)))
        if settings.tensorboard:
            # resumed sessions write further files into the same folder
            loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
        if settings.mlflow:
            loggers.append(_mlflow(settings, config, folder, supervision))
        # W&B's run has the configuration already, and is closed by the stack
        others = [logger for logger in loggers if not isinstance(logger, WandbLogger)]
        for logger in others:
            said = {"supervision": supervision, "pretraining": pretraining}
            logger.log_hyperparams({**config, **said})
        status = "failed"
        try:
            yield loggers
            status = "success"
        finally:
            for logger in others:
                logger.finalize(status)


def _mlflow(
    settings: LoggerConfig, config: Mapping[str, Any], folder: Path, supervision: str
) -> MLFlowLogger:
    """Make the MLflow logger of a run; an interrupted one goes on in the same MLflow run."""
    path = folder / MLFLOW_ID
    database = (Path(config["runs_dir"]) / "mlflow.db").absolute()
    logger = MLFlowLogger(
        experiment_name=settings.project,
        run_name=settings.name or run_name(config, folder),
        tracking_uri=settings.tracking_uri or f"sqlite:///{database}",
        tags={
            "group": group_name(config, folder),
            "supervision": supervision,
            "run_folder": folder.name,
            **dict.fromkeys(settings.tags, ""),
        },
        run_id=_mlflow_id(path),
    )
    try:
        number = logger.run_id  # where the server is asked first
    except Exception as error:  # MLflow's own, SQL's and those of a connection
        raise WSSSError(
            f"logger=mlflow: {first_line(error)}; see logger.tracking_uri, or give logger=csv"
        ) from error
    if is_first_process() and not path.is_file():
        write_atomically(path, f"{number}\n".encode())
    return logger


def _mlflow_id(path: Path) -> str | None:
    """Read the MLflow id of a run folder; None where it has none yet.

    Raises:
        WSSSError: the file holds something else.
    """
    if not path.is_file():
        return None
    known = path.read_bytes().decode(errors="replace").strip()
    if not re.fullmatch(r"[0-9a-f]{32}", known):
        raise WSSSError(f"{path}: holds no MLflow id; remove it, and a new run begins there")
    return known


def log_results(logger: Logger, results: Mapping[str, Any], gallery: Gallery | None) -> None:
    """Send a run's final numbers to a tracker; W&B also takes tables, curves and the gallery.

    Args:
        logger: from :func:`open_loggers`.
        results: content of ``results.json``.
        gallery: what was drawn, or None.
    """
    if isinstance(logger, WandbLogger):
        log_to_wandb(logger, results, gallery)
        return
    final = {f"final/{key}": value for key, value in numbers(results["splits"])}
    final |= {f"final/cost/{key}": value for key, value in numbers(results["cost"])}
    logger.log_metrics(final)
