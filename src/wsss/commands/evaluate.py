"""``wsss eval``: the numbers of a run, of a checkpoint, or of maps that somebody else made."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from wsss.core.arguments import parse_arguments
from wsss.core.errors import WSSSError
from wsss.core.ranges import Seed
from wsss.evaluation.protocol import LABEL_MAPS
from wsss.runs.line import (
    check_device,
    check_root,
    check_run_line,
    compose_line,
    take_folders,
    with_folders,
)


@dataclass
class EvalArguments:
    """Arguments of ``wsss eval``: one of ``run``, ``cams`` and ``masks``.

    Attributes:
        run: run folder or ``.ckpt`` file.
        cams: folder of class maps (`wsss.evaluation.folders` lists the layouts).
        masks: folder of label maps.
        splits: lists to evaluate; null: those of the data's configuration (of a folder: the
            validation split, or every row with a mask of a table without splits).
        out: where results go. Of a run, null is the run folder, or ``eval/HASH`` inside it where
            splits or the protocol are not the run's own. Of a folder, null prints only.
        name: what ``wsss compare`` calls the folder's method; null: the folder's name.
        supervision: what the folder's method learnt from, such as ``image labels + saliency``.
        seed: the folder's seed, where it is one of several.
        kind: what the masks are: ``pseudo_label`` (255 allowed), ``seed``, ``seg``, ``seg_ms``,
            ``seg_crf`` or ``seg_ms_crf``.
        first_class: what the class maps call the first foreground class, 0 or 1.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        trust: packages beside ``wsss`` whose classes the checkpoint may name; their code is run.
    """

    run: str | None = None
    cams: str | None = None
    masks: str | None = None
    splits: list[str] | None = None
    out: str | None = None
    name: str | None = None
    supervision: str = "image labels"
    seed: Seed = 0
    kind: str = "pseudo_label"
    first_class: Annotated[int, Ge(0), Le(1)] = 0
    device: str = "auto"
    trust: list[str] = field(default_factory=list)


#: arguments that say of a folder what a run knows of itself
OF_FOLDERS = ("name", "supervision", "seed", "kind", "first_class")


def main(arguments: list[str]) -> int:
    """Run the verb."""
    arguments, folders = take_folders(arguments)
    chosen, overrides = parse_arguments(
        EvalArguments, arguments, passed_on=("eval", "data", "gallery", "hydra")
    )
    overrides = with_folders(overrides, folders)
    _check(chosen)
    if chosen.run is not None:
        check_run_line(chosen.run, overrides, chosen.device)
    else:
        check_device(chosen.device)
        check_root(compose_line([*overrides, f"seed={chosen.seed}"]).data)
        for key, folder in (("cams", chosen.cams), ("masks", chosen.masks)):
            if folder is not None and not Path(folder).expanduser().is_dir():
                raise WSSSError(f"{key}={folder}: no such folder")
    from wsss.core.devices import choose_device
    from wsss.runs.folder import load_run
    from wsss.runs.folder_scoring import MapFolder, score_folder
    from wsss.runs.scoring import score

    if chosen.run is not None:
        run = load_run(chosen.run, overrides, trust=chosen.trust).to(choose_device(chosen.device))
        score(run, chosen.splits, out=chosen.out, purpose="wsss eval")
        return 0
    maps = MapFolder(
        path=Path(chosen.cams or chosen.masks or ""),
        holds="cams" if chosen.cams else "masks",
        kind=chosen.kind,
        first_class=chosen.first_class,
        name=chosen.name,
        supervision=chosen.supervision,
        seed=chosen.seed,
    )
    score_folder(maps, overrides, splits=chosen.splits, out=chosen.out, device=chosen.device)
    return 0


def _check(chosen: EvalArguments) -> None:
    """Raise WSSSError unless there is one source, with arguments that belong to it."""
    sources = [key for key in ("run", "cams", "masks") if getattr(chosen, key) is not None]
    if len(sources) != 1:
        raise WSSSError(
            "give one of run=RUN_DIR, cams=FOLDER and masks=FOLDER"
            + (f", not {' and '.join(sources)}" if sources else "; run is missing")
        )
    if sources == ["run"]:
        for key in OF_FOLDERS:
            if getattr(chosen, key) != getattr(EvalArguments, key):
                raise WSSSError(
                    f"{key}={getattr(chosen, key)}: is for cams= and masks=; a run says it itself"
                )
    if chosen.kind not in LABEL_MAPS:
        raise WSSSError(f"kind={chosen.kind}: expected one of {', '.join(LABEL_MAPS)}")
