"""``wsss pseudo``: label maps of a training list."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from wsss.core.arguments import parse_arguments
from wsss.core.devices import choose_device
from wsss.core.ranges import Count
from wsss.runs.folder import load_run
from wsss.runs.label_writer import check_source, write_pseudo_labels


@dataclass
class PseudoArguments:
    """Arguments of ``wsss pseudo``.

    Attributes:
        run: run folder or ``.ckpt`` file.
        split: list to label; null: the one that the run trained on.
        source: ``cam`` (localisation maps) or ``seg`` (the segmentation head).
        out: folder for the label maps; null: ``pseudo_labels/SPLIT-HASH`` inside the run folder.
        device: ``auto``, ``cpu``, ``cuda``, ...
        trust: packages beside ``wsss`` whose classes the checkpoint may name; their code is run.
        crf_jobs: processes of the dense CRF; null: one a core.
    """

    run: str = MISSING
    split: str | None = None
    source: str = "cam"
    out: str | None = None
    device: str = "auto"
    trust: list[str] = field(default_factory=list)
    crf_jobs: Count | None = None


def main(arguments: list[str]) -> int:
    """Run the verb."""
    chosen, overrides = parse_arguments(PseudoArguments, arguments, passed_on=("eval", "data"))
    device = choose_device(chosen.device)
    check_source(chosen.source)  # before the run is read
    run = load_run(chosen.run, overrides, trust=chosen.trust).to(device)
    folder = write_pseudo_labels(
        run, split=chosen.split, source=chosen.source, out=chosen.out, crf_jobs=chosen.crf_jobs
    )
    print(f"train on them: wsss train +experiments=segmenter/... data.train_masks={folder}")
    return 0
