"""``wsss compare``: runs side by side, where their protocols allow it."""

from pathlib import Path

from rich.console import Console

from wsss.comparison.compare import CompareArguments, compare
from wsss.comparison.grids import FORMATS, print_grids
from wsss.comparison.tables import tables
from wsss.core.arguments import check_folders, split_arguments
from wsss.core.errors import WSSSError
from wsss.core.files import write_atomically


def main(arguments: list[str]) -> int:
    """Run the verb."""
    paths, chosen = split_arguments(CompareArguments, arguments)
    if chosen.out and Path(chosen.out).suffix not in FORMATS:
        raise WSSSError(f"out={chosen.out}: expected a file ending in {', '.join(FORMATS)}")
    check_folders(paths)
    grids = [grid for c in compare(paths, chosen) for grid in tables(c)]
    print_grids(grids, Console())
    if chosen.out:
        out = Path(chosen.out)
        write_atomically(out, FORMATS[out.suffix](grids).encode())
        print(out)
    return 0
