"""Score a run: ``results.json``, the table, the gallery, the same on W&B."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from wsss.core.errors import WSSSError
from wsss.core.files import make_writable
from wsss.core.lock import lock
from wsss.core.ranks import is_first_process
from wsss.data.datamodule import ImageDataModule
from wsss.data.train_masks import read_card
from wsss.evaluation.card import protocol_card
from wsss.evaluation.evaluator import evaluate
from wsss.evaluation.holdout import Holdout, choose_threshold
from wsss.evaluation.ledger import check_ledger, record_reading
from wsss.evaluation.watched import HOLDOUT
from wsss.results.gallery import Gallery, write_gallery
from wsss.results.store import CELLS_FILE, RESULTS_FILE, print_table, write_cells, write_results
from wsss.runs.callback_settings import selection
from wsss.runs.choice import choice_of
from wsss.runs.config import config_hash
from wsss.runs.folder import Run
from wsss.runs.loggers import log_results
from wsss.runs.origin import check_origin
from wsss.runs.supervision import start_of, supervision_of_run

GALLERY = "gallery"  # inside the folder of results


def score(
    run: Run,
    splits: Sequence[str] | None = None,
    *,
    out: Path | str | None = None,
    purpose: str = "report",
    loggers: Sequence[Logger] = (),
) -> dict[str, Any]:
    """Evaluate on every split, store numbers with their protocol, print and draw.

    It runs where the run's module is. Readings of ground truth are recorded in the ledger of the
    run folder, wherever their numbers go.

    Args:
        run: a trained run.
        splits: lists to evaluate; ``holdout`` is the declared holdout of the training data; None:
            those of the data's configuration.
        out: where ``results.json``, ``images.npz`` and ``gallery/`` go; None: the run folder, or
            ``eval/HASH`` inside it where splits or the configuration are not the run's own.
        purpose: of these readings.
        loggers: those that get the numbers too; W&B's gets tables and gallery.

    Returns:
        The content of ``results.json``.

    Raises:
        WSSSError: the data is not there, the holdout is named and not declared, another process
            works in the folder of results, or that cannot be written.
    """
    names = list(splits or [run.data.val_split, *run.data.test_splits])
    check_origin(run, [name for name in names if name != HOLDOUT])
    folder = Path(out) if out else _results_folder(run, splits)
    ledger = run.path if run.path.is_dir() else folder
    if is_first_process():
        make_writable(folder)
        check_ledger(ledger)
    results = results_header(run.module.title, run.data, run.config)
    results |= {"run": str(run.path), "cost": run.cost}
    if run.unfinished:
        results["status"] = f"unfinished: {run.unfinished}"
    if run.stopped:
        results["stopped_early"] = {**run.stopped, "step": run.step}
    holdout = Holdout(run.data, run.protocol) if run.protocol.holdout_per_class else None
    with lock(folder, "evaluating"):
        chosen = _choose_threshold(run, holdout, ledger)
        with shown_on_failure(results):
            cells = _measure_all(run, names, holdout, chosen, results, ledger, purpose)
        if not is_first_process():
            return results
        store_and_show(results, cells, folder)
        # drawn last, so that no number is lost where no picture can be made
        gallery = _draw(run, _open_split(names[0], run.data, holdout), folder)
        if gallery is not None:
            print(f"{folder / GALLERY}")
        for each in loggers:
            log_results(each, results, gallery)
    return results


def _measure_all(
    run: Run,
    names: Sequence[str],
    holdout: Holdout | None,
    chosen: dict[str, Any] | None,
    results: dict[str, Any],
    ledger: Path,
    purpose: str,
) -> dict[str, dict[str, Any]]:
    """Measure every split into ``results``, and record each reading; give the images' counts."""
    cells: dict[str, dict[str, Any]] = {}
    for name in names:
        split = _open_split(name, run.data, holdout)
        metrics = _measure(run, split)
        cells[name] = {"names": split.dataset.names, **metrics.pop("cells")}
        if chosen:
            apply_threshold(metrics, chosen)
        results["splits"][name] = metrics
        if is_first_process():
            metrics["readings"] = record_reading(
                ledger, split=name, purpose=purpose, step=run.step, list_sha256=split.list_hash
            )
    return cells


@contextmanager
def shown_on_failure(results: dict[str, Any]) -> Iterator[None]:
    """Print what has been measured where an error ends the block.

    Hours of work do not go with a disk that is full, or with a second split that is not there.
    """
    try:
        yield
    except (WSSSError, OSError):
        if is_first_process() and results["splits"]:
            print_table(results)
        raise


def _results_folder(run: Run, splits: Sequence[str] | None) -> Path:
    """Choose a place where other numbers than the run's own do not take their place."""
    if not (run.overrides or splits):
        return run.folder
    listed = None if splits is None else list(splits)
    return run.folder / "eval" / config_hash({**run.config, "splits": listed})


def _choose_threshold(run: Run, holdout: Holdout | None, ledger: Path) -> dict[str, Any] | None:
    """Choose a CAM threshold on the holdout, where there is one, and record that reading."""
    if holdout is None:
        return None
    chosen = choose_threshold(run.module, holdout, run.protocol, device=run.device)
    if is_first_process():
        record_reading(ledger, split=HOLDOUT, purpose="choosing a threshold", step=run.step)
    return chosen


@dataclass(frozen=True)
class _Split:
    """A split, or the holdout under its name.

    Attributes:
        name: of the list.
        dataset: with masks.
        loader: of evaluation batches.
        list_hash: SHA-256 of the names.
    """

    name: str
    dataset: Any
    loader: Iterable[dict[str, Any]]
    list_hash: str


def _open_split(name: str, data: ImageDataModule, holdout: Holdout | None) -> _Split:
    """Open a split by its name.

    Raises:
        WSSSError: the holdout is named and not declared.
    """
    if name != HOLDOUT:
        hashed = data.list_hash(name)
        return _Split(name, data.eval_dataset(name), data.eval_dataloader(name), hashed)
    if holdout is None:
        raise WSSSError(
            "splits=[holdout]: no holdout is declared; give eval.holdout_per_class=5 (and "
            "eval.holdout_split where the training list has no masks)"
        )
    return _Split(name, holdout, holdout.loader(), holdout.list_hash)


def _measure(run: Run, split: _Split) -> dict[str, Any]:
    """Evaluate one split; give its numbers with their protocol, and ``cells``."""
    metrics = evaluate(
        run.module,
        split.loader,
        run.protocol,
        run.data.class_names,
        device=run.device,
        description=f"evaluating {split.name}" if is_first_process() else None,
    )
    metrics["protocol"] = protocol_card(
        protocol=run.protocol,
        split=split.name,
        list_hash=split.list_hash,
        num_images=int(metrics["num_images"]),
        backbone=run.module.backbone.weights_info.as_dict(),
        crop_size=run.config["budget"]["crop_size"],
        iterations=run.step,
        global_batch_size=run.config["budget"]["global_batch_size"],
        seed=run.config["seed"],
        supervision=supervision_of_run(run),
        selection=selection(run.config.get("callbacks") or {}),
    ) | {
        "label_source": run.data.label_source,
        "train_list_sha256": run.train_list,
        "train_masks": read_card(run.data.train_masks),
        # a run of an earlier version declares none
        "choice": choice_of(run.config.get("choice"), run.overrides),
    }
    if start := start_of(run.config):
        metrics["protocol"]["init_from"] = start
    if run.module.files_sha256:
        metrics["protocol"]["files_sha256"] = dict(run.module.files_sha256)
    if split.name != HOLDOUT:
        metrics["data_sha256"] = data_hashes(run.data, split.name)
    return metrics


def _draw(run: Run, split: _Split, folder: Path) -> Gallery | None:
    """Draw the gallery, where the configuration wants one."""
    if run.config["gallery"] <= 0:
        return None
    return write_gallery(
        run.module,
        split.dataset,
        folder / GALLERY,
        run.data.class_names,
        n=run.config["gallery"],
        protocol=run.protocol,
    )


def results_header(method: str, data: ImageDataModule, config: dict[str, Any]) -> dict[str, Any]:
    """Give what ``results.json`` says before its splits."""
    return {
        "method": method,
        "data": data.name,
        "seed": config["seed"],
        "study": config["study"],
        "config_hash": config_hash(config),
        "config": config,
        "status": "finished",
        "splits": {},
    }


def data_hashes(data: ImageDataModule, split: str) -> dict[str, str | None]:
    """Hash what two results must share to be of the same labels and masks."""
    dataset = data.eval_dataset(split)
    return {"labels": dataset.label_sha256(), "masks": dataset.mask_sha256()}


def store_and_show(results: dict[str, Any], cells: dict[str, dict[str, Any]], folder: Path) -> None:
    """Print the tables, which need no room on a disk, then write counts and results."""
    print_table(results)
    write_cells(folder / CELLS_FILE, cells)
    write_results(folder / RESULTS_FILE, results)
    print(f"{folder / RESULTS_FILE}")


def apply_threshold(metrics: dict[str, Any], chosen: dict[str, Any]) -> None:
    """Add the seed score at a threshold that a holdout chose; the curve has it already."""
    position = metrics["seed_curve"]["thresholds"].index(chosen["threshold"])
    metrics["seed_miou_holdout"] = metrics["seed_curve"]["miou"][position]
    metrics["seed_threshold_holdout"] = chosen["threshold"]
    metrics["protocol"]["holdout"] = {k: v for k, v in chosen.items() if k != "curve"}
