"""``wsss pseudo``: label maps of a training list."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from wsss.core.arguments import parse_arguments
from wsss.core.errors import WSSSError
from wsss.core.ranges import Count
from wsss.runs.label_sources import check_source
from wsss.runs.line import check_run_line, compose_walk


@dataclass
class PseudoArguments:
    """Arguments of ``wsss pseudo``.

    Attributes:
        run: run folder or ``.ckpt`` file.
        split: list to label; null: the one that the run trained on.
        source: ``cam`` (localisation maps) or ``seg`` (the segmentation head).
        refine: ``random_walk`` lets the maps walk along learnt affinities; null: as ``eval`` says.
        out: folder for the label maps; null: ``pseudo_labels/SPLIT-HASH`` inside the run folder.
        device: ``auto``, ``cpu``, ``cuda``, ...
        trust: packages beside ``wsss`` whose classes the checkpoint may name; their code is run.
        crf_jobs: processes of the dense CRF; null: one a core.
    """

    run: str = MISSING
    split: str | None = None
    source: str = "cam"
    refine: str | None = None
    out: str | None = None
    device: str = "auto"
    trust: list[str] = field(default_factory=list)
    crf_jobs: Count | None = None


def parse(arguments: list[str]) -> tuple[PseudoArguments, list[str], list[str]]:
    """Read the arguments; give also those of the run's configuration and of the random walk.

    Raises:
        WSSSError: an unknown key, a wrong value, a random walk's key without one.
    """
    groups = ("eval", "data", "random_walk")
    chosen, given = parse_arguments(PseudoArguments, arguments, passed_on=groups)
    check_source(chosen.source, chosen.refine)  # before the run is read
    walking = [one for one in given if one.startswith("random_walk")]
    if walking and not chosen.refine:
        raise WSSSError(f"{walking[0]}: changes nothing without refine=random_walk")
    return chosen, [one for one in given if one not in walking], walking


def main(arguments: list[str]) -> int:
    """Run the verb."""
    chosen, overrides, walking = parse(arguments)
    settings = compose_walk(walking) if chosen.refine else None
    check_run_line(chosen.run, overrides, chosen.device)
    from wsss.core.devices import choose_device
    from wsss.runs.advice import second_stage_command
    from wsss.runs.folder import load_run
    from wsss.runs.label_writer import write_pseudo_labels
    from wsss.training.random_walk import trained_walk

    device = choose_device(chosen.device)
    run = load_run(chosen.run, overrides, trust=chosen.trust).to(device)
    walk = None
    if settings is not None:
        walk = trained_walk(run, settings, crf_jobs=chosen.crf_jobs, alone=True)
    folder = write_pseudo_labels(
        run,
        split=chosen.split,
        source=chosen.source,
        out=chosen.out,
        crf_jobs=chosen.crf_jobs,
        walk=walk,
    )
    print(f"train on them: {second_stage_command(run, folder)}")
    return 0
