"""``wsss convert``: an official checkpoint becomes a checkpoint of ours."""

from pathlib import Path

from wsss.core.errors import WSSSError
from wsss.runs.line import compose_line, take_folders, with_folders

#: methods whose official parameters have names of ours, :data:`wsss.methods.official.CONVERTERS`
METHODS = ("clustercam", "getam", "mctformer", "more", "toco", "weclip")


def main(arguments: list[str]) -> int:
    """Run the verb."""
    arguments, folders = take_folders(arguments)
    if len(arguments) < 3:
        raise WSSSError("usage: wsss convert METHOD OFFICIAL.pth OUT.ckpt [KEY=VALUE ...]")
    method, official, out, *overrides = arguments
    if method not in METHODS:
        raise WSSSError(f"no converter for {method!r}; known: {', '.join(METHODS)}")
    if not out.endswith(".ckpt"):
        raise WSSSError(f"{out}: expected an output that ends in .ckpt")
    if not Path(official).is_file():
        raise WSSSError(f"{official}: no such checkpoint")
    overrides = with_folders(overrides, folders)
    # no data is read; evaluation asks for its place
    compose_line([f"method={method}", "data.root=unset", *overrides])
    from wsss.runs.conversion import convert

    convert(method, official, out, overrides=overrides)
    return 0
