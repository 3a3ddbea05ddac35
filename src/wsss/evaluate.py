"""``wsss eval``: the numbers of a run or of a checkpoint, under its protocol or another one."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from wsss.arguments import parse_arguments
from wsss.config import config_hash
from wsss.reporting import choose_device, evaluate_and_report
from wsss.runs import load_run


@dataclass
class EvalArguments:
    """Arguments of ``wsss eval``.

    Attributes:
        run: run folder or ``.ckpt`` file.
        splits: lists to evaluate; null: those of the data's configuration.
        out: where results go; null: the run folder, or ``eval/HASH`` inside it where splits or the
            protocol are not the run's own.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
    """

    run: str = MISSING
    splits: list[str] | None = None
    out: str | None = None
    device: str = "auto"


def main(arguments: list[str]) -> int:
    """The verb."""
    chosen, overrides = parse_arguments(
        EvalArguments, arguments, passed_on=("eval", "data", "gallery")
    )
    run = load_run(Path(chosen.run), overrides)
    folder = Path(chosen.out) if chosen.out else run.folder
    if not chosen.out and (overrides or chosen.splits):
        # other numbers than the run's own must not take their place
        folder = run.folder / "eval" / config_hash({**run.config, "splits": chosen.splits})
    evaluate_and_report(
        run.module,
        run.data,
        run.protocol,
        config=run.config,
        folder=folder,
        splits=chosen.splits or [run.data.val_split, *run.data.test_splits],
        step=run.step,
        device=choose_device(chosen.device),
    )
    return 0
