"""``wsss predict``: masks and overlays for one's own images."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from wsss.core.arguments import parse_arguments
from wsss.core.errors import WSSSError
from wsss.runs.line import check_run_line


@dataclass
class PredictArguments:
    """Arguments of ``wsss predict``.

    Attributes:
        run: run folder or ``.ckpt`` file.
        images: folder of images.
        out: folder for masks and overlays.
        device: ``auto``, ``cpu``, ``cuda``, ...
        trust: packages beside ``wsss`` whose classes the checkpoint may name; their code is run.
    """

    run: str = MISSING
    images: str = MISSING
    out: str = MISSING
    device: str = "auto"
    trust: list[str] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Run the verb."""
    chosen, overrides = parse_arguments(PredictArguments, arguments, passed_on=("eval",))
    check_run_line(chosen.run, overrides, chosen.device)
    if not Path(chosen.images).expanduser().exists():
        raise WSSSError(f"images={chosen.images}: no such file or folder")
    from wsss.data.images import ImageFolderDataset
    from wsss.runs.folder import load_run
    from wsss.runs.masks import write_masks

    # no data set is opened here, so a run whose data lies elsewhere still predicts
    run = load_run(chosen.run, overrides, trust=chosen.trust)
    images = ImageFolderDataset(Path(chosen.images))
    out = Path(chosen.out)
    if out.resolve() == Path(chosen.images).resolve():
        raise WSSSError(f"out={out}: masks would lie among the images; choose another folder")
    write_masks(run, images, out, chosen.device)
    print(f"{len(images)} masks and overlays in {out}")
    return 0
