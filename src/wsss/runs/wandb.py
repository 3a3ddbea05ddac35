"""Weights & Biases: one run folder is one W&B run, offline where there is no key.

What a run logs, beside what the methods log while they train (``train/...``, ``val/...``):
``final/SPLIT/...`` and ``final/cost/...`` (the numbers of ``results.json``, in the summary),
``tables/SPLIT/per_class``, ``curve/SPLIT/...`` (seed scores over ``curve/SPLIT/threshold``),
``confusion/SPLIT/KIND``, ``gallery/images`` with label maps as overlays and ``gallery/sheets``;
system metrics; code and resolved configuration as artifacts.
"""

import contextlib
import netrc
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from wsss.core.errors import WSSSError
from wsss.core.files import write_atomically
from wsss.core.places import PACKAGE
from wsss.core.supervision import IMAGE_LABELS
from wsss.results.gallery import Gallery
from wsss.results.store import CONFIG_FILE
from wsss.runs.checkpoint_paths import LAST_CHECKPOINT
from wsss.runs.config import LoggerConfig
from wsss.runs.folder import method_name
from wsss.runs.naming import group_name, run_name, settings_of, varied

ID_FILE = "wandb_id.txt"
LONGEST_TAG = 64  # characters
#: what W&B's confusion matrix chart calls its columns
CONFUSION_COLUMNS = ("Actual", "Predicted", "nPredictions")


def has_key() -> bool:
    """Tell whether W&B could log in: ``WANDB_API_KEY`` or an entry for its host in ``.netrc``."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = os.environ.get("NETRC") or str(Path.home() / ".netrc")
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(path).authenticators(host) is not None
    return False


def run_id(folder: Path) -> str:
    """Give the W&B id of a run folder, made at the first call and kept in it.

    An interrupted run that resumes in the same folder goes on in the same W&B run.

    Raises:
        WSSSError: the file holds something else, or cannot be written.
    """
    path = folder / ID_FILE
    if path.is_file():
        known = path.read_bytes().decode(errors="replace").strip()
        if known and not re.fullmatch(r"[\w-]{1,64}", known, re.ASCII):
            raise WSSSError(f"{path}: holds no W&B id; remove it, and a new run begins there")
        if known:
            return known
    new = uuid.uuid4().hex[:8]
    write_atomically(path, f"{new}\n".encode())
    return new


def import_wandb(what: str = "logger=wandb", mend: str = ", or give logger=csv") -> None:
    """Raise WSSSError unless W&B is installed.

    Args:
        what: what needs it.
        mend: what else helps than to install it.
    """
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise WSSSError(f"{what} needs the package wandb (pip install wandb){mend}") from error


def make_wandb_logger(
    config: Mapping[str, Any], folder: Path, supervision: str = IMAGE_LABELS, pretraining: str = ""
) -> WandbLogger:
    """Make the W&B logger of a run.

    Without a key it works offline; ``wsss sync`` uploads the folder later. ``WANDB_MODE`` of the
    environment has the last word.

    Args:
        config: resolved configuration; its ``logger`` names project, name, group, job type and
            tags (:class:`wsss.runs.config.LoggerConfig`), and all of it is stored with the run.
        folder: the run folder.
        supervision: what the run learns from; a tag, and a key to filter and group by.
        pretraining: what its encoder starts from; a key too.

    Returns:
        A Lightning logger.

    Raises:
        WSSSError: wandb is not installed.
    """
    import_wandb()
    mode = os.environ.get("WANDB_MODE")
    settings, method = LoggerConfig(**config["logger"]), method_name(config)
    stage = "second-stage" if config["data"].get("train_masks") else "train"
    described = [method, config["data"]["name"], config["backbone"]["name"]]
    described += [text[:LONGEST_TAG] for text in (supervision, *settings_of(config, folder))]
    return WandbLogger(
        project=settings.project,
        entity=settings.entity,
        name=settings.name or run_name(config, folder),
        group=settings.group or group_name(config, folder),
        job_type=settings.job_type or stage,
        tags=list(dict.fromkeys([*described, *settings.tags])),
        id=run_id(folder),
        save_dir=str(folder),
        offline=mode == "offline" or (mode is None and not has_key()),
        resume="allow",
        # a short name of the method, by which charts are grouped
        config={
            **config,
            "method_name": method,
            "supervision": supervision,
            "run_folder": folder.name,
            "varied": varied(config, folder),
            "pretraining": pretraining,
        },
    )


@contextlib.contextmanager
def wandb_run(
    config: Mapping[str, Any], folder: Path, supervision: str = IMAGE_LABELS, pretraining: str = ""
) -> Iterator[WandbLogger]:
    """Open the W&B run of a run folder: code and configuration go in first, the checkpoint last.

    It is finished on leaving, so that another run of the same process (a second stage) does not go
    on in it; marked as failed where an error is on its way.

    Args:
        config: resolved configuration, as of :func:`make_wandb_logger`.
        folder: the run folder, which holds the configuration.
        supervision: as of :func:`make_wandb_logger`.
        pretraining: as of :func:`make_wandb_logger`.
    """
    logger = make_wandb_logger(config, folder, supervision, pretraining)
    run = logger.experiment  # in further processes of a DDP run something that does nothing
    status = 1
    try:
        _log_file(run, f"config-{run_id(folder)}", "config", folder / CONFIG_FILE)
        run.log_code(str(PACKAGE))
        yield logger
        if config["logger"].get("checkpoints"):
            _log_file(run, f"model-{run_id(folder)}", "model", folder / LAST_CHECKPOINT)
        status = 0
    finally:
        run.finish(exit_code=status)


@rank_zero_only
def _log_file(run: Any, name: str, kind: str, path: Path) -> None:
    """Store a file as an artifact."""
    import wandb

    artifact = wandb.Artifact(name, type=kind)
    # read where it lies: W&B would copy it into the home folder, a gigabyte for a checkpoint
    artifact.add_file(str(path), policy="immutable", skip_cache=True)
    run.log_artifact(artifact)


def log_to_wandb(logger: WandbLogger, results: Mapping[str, Any], gallery: Gallery | None) -> None:
    """Send final numbers, tables, curves, confusion matrices and the gallery to W&B.

    Args:
        logger: from :func:`make_wandb_logger`.
        results: content of ``results.json``.
        gallery: what was drawn, or None.
    """
    run = logger.experiment
    run.summary.update({f"final/{key}": value for key, value in numbers(results["splits"])})
    run.summary.update({f"final/cost/{key}": value for key, value in numbers(results["cost"])})
    payload: dict[str, Any] = {}
    for split, metrics in results["splits"].items():
        payload |= _tables(split, metrics)
        _log_curve(run, split, metrics.get("seed_curve"))
    if gallery is not None:
        payload |= _pictures(gallery)
    run.log(payload)


def numbers(tree: Mapping[str, Any] | None) -> Iterator[tuple[str, float]]:
    """Give (path, value) of every number in nested mappings, but for those of protocols."""
    for key, value in (tree or {}).items():
        if isinstance(value, Mapping) and key != "protocol":
            yield from ((f"{key}/{rest}", number) for rest, number in numbers(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def _tables(split: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Make tables of per-class scores, and a confusion matrix of every kind of label map."""
    import wandb

    columns = metrics["per_class"]
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    payload: dict[str, Any] = {
        f"tables/{split}/per_class": wandb.Table(columns=list(columns), data=rows)
    }
    names = columns["class"]
    for kind, matrix in metrics["confusion"].items():
        if kind.endswith("_abstained"):  # a column, not a matrix
            continue
        pixels = [
            [truth, predicted, count]
            for truth, row in zip(names, matrix, strict=True)
            for predicted, count in zip(names, row, strict=True)
        ]
        # wandb.plot.confusion_matrix would want a list entry a pixel
        payload[f"confusion/{split}/{kind}"] = wandb.plot_table(
            "wandb/confusion_matrix/v1",
            wandb.Table(columns=list(CONFUSION_COLUMNS), data=pixels),
            {name: name for name in CONFUSION_COLUMNS},
            {"title": f"{split}: {kind}, pixels"},
        )
    return payload


def _log_curve(run: Any, split: str, curve: Mapping[str, Sequence[float]] | None) -> None:
    """Log seed scores over the threshold, one history row each, so that W&B averages over runs."""
    if curve is None:
        return
    axis = f"curve/{split}/threshold"
    scores = {f"curve/{split}/seed_{key}": curve[key] for key in ("miou", "precision", "recall")}
    for name in scores:
        run.define_metric(name, step_metric=axis)
    for position, threshold in enumerate(curve["thresholds"]):
        run.log({axis: threshold, **{name: values[position] for name, values in scores.items()}})


def _pictures(gallery: Gallery) -> dict[str, Any]:
    """Give the gallery's sheets, and its images with their label maps as overlays to switch on."""
    import wandb

    classes = dict(enumerate(["background", *gallery.class_names])) | {255: "undecided"}
    images = []
    for name, panels in gallery.rows:
        masks = {
            panel.heading.replace(" ", "_"): {"mask_data": panel.mask, "class_labels": classes}
            for panel in panels
            if panel.mask is not None
        }
        images.append(wandb.Image(panels[0].pixels, caption=name, masks=masks))
    sheets = [wandb.Image(str(sheet), caption=sheet.stem) for sheet in gallery.sheets]
    return {"gallery/images": images, "gallery/sheets": sheets}


def offline_runs(folders: Iterable[Path]) -> list[Path]:
    """Find W&B's folders of offline sessions below run or study folders, but for those uploaded.

    Raises:
        WSSSError: a folder is missing.
    """
    found = set()
    for folder in folders:
        if not folder.is_dir():
            raise WSSSError(f"{folder}: no such folder; give run or study folders")
        # W&B leaves RUN.wandb.synced beside RUN.wandb
        found |= {
            path.parent
            for path in folder.rglob("offline-run-*/run-*.wandb")
            if not path.with_name(f"{path.name}.synced").exists()
        }
    return sorted(found)
