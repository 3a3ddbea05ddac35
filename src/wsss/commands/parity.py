"""``wsss parity``: a method against numbers of its official code."""

from pathlib import Path

from wsss.core.errors import WSSSError
from wsss.parity import run_parity


def main(arguments: list[str]) -> int:
    """Run the verb."""
    if len(arguments) != 2:
        raise WSSSError("usage: wsss parity METHOD DIR")
    method, folder = arguments
    return run_parity(method, Path(folder))
