"""``wsss pseudo``: label maps of a training list."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from wsss.core.arguments import parse_arguments
from wsss.core.devices import choose_device
from wsss.runs.label_writer import write_pseudo_labels


@dataclass
class PseudoArguments:
    """Arguments of ``wsss pseudo``.

    Attributes:
        run: run folder or ``.ckpt`` file.
        split: list to label; null: the one that the run trained on.
        source: ``cam`` (localisation maps) or ``seg`` (the segmentation head).
        out: folder for the label maps; null: ``pseudo_labels/SPLIT-HASH`` inside the run folder.
        device: ``auto``, ``cpu``, ``cuda``, ...
        crf_jobs: processes of the dense CRF; null: one a core.
    """

    run: str = MISSING
    split: str | None = None
    source: str = "cam"
    out: str | None = None
    device: str = "auto"
    crf_jobs: int | None = None


def main(arguments: list[str]) -> int:
    """The verb."""
    chosen, overrides = parse_arguments(PseudoArguments, arguments, passed_on=("eval", "data"))
    folder = write_pseudo_labels(
        Path(chosen.run),
        overrides,
        split=chosen.split,
        source=chosen.source,
        out=Path(chosen.out) if chosen.out else None,
        device=choose_device(chosen.device),
        crf_jobs=chosen.crf_jobs,
    )
    print(f"train on them: wsss train +experiments=segmenter/... data.train_masks={folder}")
    return 0
