"""``wsss submit``: masks of VOC's test images in the archive that its evaluation server takes."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from wsss.core.arguments import parse_arguments
from wsss.core.errors import WSSSError
from wsss.runs.line import check_run_line


@dataclass
class SubmitArguments:
    """Arguments of ``wsss submit``.

    Attributes:
        run: run folder or ``.ckpt`` file, of VOC's 20 classes.
        split: list of the images.
        competition: ``comp6`` (trained on more than VOC's own images, as with SBD or ImageNet) or
            ``comp5``.
        out: folder; null: ``submission`` in the run folder.
        device: ``auto``, ``cpu``, ``cuda``, ...
        trust: packages beside ``wsss`` whose classes the checkpoint may name; their code is run.
    """

    run: str = MISSING
    split: str = "test"
    competition: str = "comp6"
    out: str | None = None
    device: str = "auto"
    trust: list[str] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Run the verb."""
    chosen, overrides = parse_arguments(SubmitArguments, arguments, passed_on=("eval", "data"))
    if chosen.competition not in ("comp5", "comp6"):
        raise WSSSError(f"competition={chosen.competition}: expected comp5 or comp6")
    check_run_line(chosen.run, overrides, chosen.device)
    from wsss.runs.folder import load_run
    from wsss.runs.submission import submit

    submit(
        load_run(chosen.run, overrides, trust=chosen.trust),
        split=chosen.split,
        competition=chosen.competition,
        out=Path(chosen.out) if chosen.out else None,
        device=chosen.device,
    )
    return 0
