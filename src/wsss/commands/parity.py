"""``wsss parity``: a method against numbers of its official code."""

from pathlib import Path

from wsss.core.errors import WSSSError
from wsss.parity import check_method


def main(arguments: list[str]) -> int:
    """Run the verb."""
    if len(arguments) != 2:
        raise WSSSError("usage: wsss parity METHOD DIR")
    method, folder = arguments
    check_method(method)
    if not Path(folder).is_dir():
        raise WSSSError(f"{folder} is not a folder; pass the folder that holds the *.npz cases")
    from wsss.parity.run import run_parity

    return run_parity(method, Path(folder))
