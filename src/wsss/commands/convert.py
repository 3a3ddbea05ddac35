"""``wsss convert``: an official checkpoint becomes a checkpoint of ours."""

from wsss.core.errors import WSSSError
from wsss.runs.conversion import convert


def main(arguments: list[str]) -> int:
    """Run the verb."""
    if len(arguments) < 3:
        raise WSSSError("usage: wsss convert METHOD OFFICIAL.pth OUT.ckpt [KEY=VALUE ...]")
    convert(*arguments[:3], overrides=arguments[3:])
    return 0
