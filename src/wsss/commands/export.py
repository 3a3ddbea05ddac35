"""``wsss export``: a run's network as one file that runs without this package."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from wsss.core.arguments import parse_arguments
from wsss.core.ranges import Positive
from wsss.runs.line import check_run_line
from wsss.runs.output_forms import check_format, format_of


@dataclass
class ExportArguments:
    """Arguments of ``wsss export``.

    Attributes:
        run: run folder or ``.ckpt`` file.
        out: the file to write.
        format: ``onnx``, ``torchscript`` or ``pt2``; null: by the ending of ``out``, of which
            ``.pt`` is TorchScript.
        source: ``seg`` (the segmentation head) or ``cam`` (localisation maps); null: the head
            where there is one.
        size: of the input, ``SIDE``, ``HEIGHTxWIDTH`` or ``dynamic``; null: that of the run's
            evaluation.
        images: folder, pattern or file to compare outputs on; null: the validation split.
        tolerance: largest difference from the module's outputs.
        trust: packages beside ``wsss`` whose classes the checkpoint may name; their code is run.
    """

    run: str = MISSING
    out: str = MISSING
    format: str | None = None
    source: str | None = None
    size: str | None = None
    images: str | None = None
    tolerance: Positive = 1e-4
    trust: list[str] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Run the verb."""
    chosen, overrides = parse_arguments(ExportArguments, arguments, passed_on=("eval", "data"))
    kind = format_of(chosen.out, chosen.format)
    check_format(kind, chosen.size)
    check_run_line(chosen.run, overrides)
    from wsss.runs.export import export
    from wsss.runs.folder import load_run

    export(
        load_run(chosen.run, overrides, trust=chosen.trust),
        Path(chosen.out),
        kind=kind,
        source=chosen.source,
        size=chosen.size,
        images=chosen.images,
        tolerance=chosen.tolerance,
    )
    return 0
