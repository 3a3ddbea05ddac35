"""``wsss predict``: masks and overlays of images, and the maps behind them."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from wsss.core.arguments import parse_arguments
from wsss.data.image_files import find_images
from wsss.runs.line import check_run_line
from wsss.runs.output_forms import check_form


@dataclass
class PredictArguments:
    """Arguments of ``wsss predict``.

    Attributes:
        run: run folder or ``.ckpt`` file.
        images: folder of images, one image, or a pattern such as ``photos/**/*.jpg``.
        out: folder for masks and overlays.
        cams: also write localisation maps into ``out/cams``: ``npy``, ``png`` or ``both``.
        soft: also write the classes' probabilities into ``out/soft``: ``npy``, ``png`` or ``both``.
        device: ``auto``, ``cpu``, ``cuda``, ...
        trust: packages beside ``wsss`` whose classes the checkpoint may name; their code is run.
    """

    run: str = MISSING
    images: str = MISSING
    out: str = MISSING
    cams: str | None = None
    soft: str | None = None
    device: str = "auto"
    trust: list[str] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Run the verb."""
    chosen, overrides = parse_arguments(PredictArguments, arguments, passed_on=("eval",))
    check_form("cams", chosen.cams)
    check_form("soft", chosen.soft)
    check_run_line(chosen.run, overrides, chosen.device)
    images, out = find_images(chosen.images), Path(chosen.out)
    from wsss.runs.folder import load_run
    from wsss.runs.masks import write_masks

    # no data set is opened here, so a run whose data lies elsewhere still predicts
    run = load_run(chosen.run, overrides, trust=chosen.trust)
    write_masks(run, images, out, cams=chosen.cams, soft=chosen.soft, device=chosen.device)
    print(f"{len(images)} masks and overlays in {out}")
    return 0
