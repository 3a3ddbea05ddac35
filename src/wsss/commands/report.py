"""``wsss report``: one page that opens anywhere and shows methods, and searches, side by side."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from wsss.comparison.compare import CompareArguments, compare
from wsss.comparison.entries import unfinished_runs
from wsss.comparison.grids import FORMATS
from wsss.core.arguments import check_folders, split_arguments
from wsss.core.errors import WSSSError
from wsss.core.files import make_writable, write_atomically
from wsss.core.ranges import Pictures


@dataclass
class ReportArguments(CompareArguments):
    """Arguments of ``wsss report``: those of ``wsss compare``, but ``out`` is a folder.

    Attributes:
        gallery: images of each kind (best, median, worst, largest disagreement); 0: no pictures.
        trust: packages beside ``wsss`` whose classes a run may name; their code is run.
    """

    gallery: Pictures = 3
    trust: list[str] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Run the verb."""
    paths, chosen = split_arguments(ReportArguments, arguments)
    if not chosen.out:
        raise WSSSError("out is missing; give the folder of the report: out=report")
    out = Path(chosen.out)
    check_folders(paths)
    from wsss.comparison.page import PAGE, page_of
    from wsss.comparison.searches import part_searches, read_searches, search_grids
    from wsss.comparison.tables import tables
    from wsss.core.lock import lock

    runs, folders = part_searches(paths)  # before anything is written
    searches = read_searches(folders)
    comparisons = compare(runs, chosen) if runs else []
    others = [path for path in paths if path not in runs and path not in folders]
    if left := unfinished_runs(others):
        names = ", ".join(folder.name for folder in left)
        print(f"left out, not finished ({len(left)}): {names}", file=sys.stderr)
    make_writable(out)
    grids = [grid for comparison in comparisons for grid in tables(comparison)]
    grids += search_grids(searches) if searches else []
    with lock(out, "writing a report"):
        # tables first: they are made in no time, pictures in minutes
        for suffix in (".md", ".csv", ".tex"):
            write_atomically(out / f"table{suffix}", FORMATS[suffix](grids).encode())
        page = page_of(comparisons, searches, gallery=chosen.gallery, trust=chosen.trust)
        write_atomically(out / PAGE, page.encode())
    print(out / PAGE)
    return 0
