"""The ``wsss`` command: reads the verb, finds its help, calls ``commands/VERB.py``.

``wsss --help`` answers without importing torch or Hydra: a verb's code is imported when it is
called, and its help is a text file.
"""

import difflib
import importlib
import re
import sys
from pathlib import Path

from wsss import __version__
from wsss.core.errors import WSSSError
from wsss.core.failures import exit_status_of
from wsss.core.places import choices

HELP = Path(__file__).with_name("commands") / "help"
#: verb -> its file in ``commands/``, in the order of ``wsss --help``
VERBS = {
    "data": "data",
    "train": "train",
    "tune": "tune",
    "eval": "evaluate",
    "compare": "compare",
    "report": "report",
    "sync": "sync",
    "dashboard": "dashboard",
    "text": "text",
    "predict": "predict",
    "export": "export",
    "submit": "submit",
    "pseudo": "pseudo",
    "parity": "parity",
    "convert": "convert",
    "benchmark": "benchmark",
}
#: asks for the completion of a shell, before or behind a verb
COMPLETION = ("-sc", "--shell-completion")


def main(argv: list[str] | None = None) -> int:
    """Run a verb, and give its exit status (0 fine, 1 failed, 2 bad input, 130 interrupted)."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return exit_status_of("", lambda: show(overview()))
    if arguments[0] == "--version":
        return exit_status_of("", lambda: show(__version__))
    verb, rest = arguments[0], arguments[1:]
    if verb in COMPLETION or (rest[:1] and rest[0] in COMPLETION):
        given = [one for one in arguments if "=" in one]
        completion = importlib.import_module("wsss.commands.completion")
        return exit_status_of(verb, lambda: int(completion.main(given, list(VERBS))))
    return exit_status_of(verb, lambda: run_verb(verb, rest))


def run_verb(verb: str, arguments: list[str]) -> int:
    """Run one verb with its arguments, or print its help.

    Raises:
        WSSSError: there is no such verb.
    """
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise WSSSError(f"unknown verb {verb!r}{hint} (wsss --help lists them)")
    if "-h" in arguments or "--help" in arguments:
        return show(help_of(verb))
    if "--keys" in arguments:
        shown: int = importlib.import_module("wsss.commands.keys").main(verb, arguments)
        return shown
    status: int = importlib.import_module(f"wsss.commands.{VERBS[verb]}").main(arguments)
    return status


def show(text: str) -> int:
    """Print a text; give the exit status."""
    print(text)
    return 0


def overview() -> str:
    """Write the text of ``wsss --help``."""
    lines = [
        f"wsss {__version__}: weakly-supervised semantic segmentation methods on equal terms",
        "",
        "usage: wsss VERB [ARGUMENTS]     wsss VERB --help     wsss VERB --keys     wsss --version",
        "",
    ]
    # a usage may take several lines; the summary comes after it
    summaries = {verb: help_of(verb).split("\n\n")[1].splitlines()[0] for verb in VERBS}
    lines += [f"  {verb:10} {summary}" for verb, summary in summaries.items()]
    return "\n".join([*lines, "", "WSSS_DEBUG=1 shows tracebacks."])


def help_of(verb: str) -> str:
    """Write the text of ``wsss VERB --help``: usage, summary, details.

    ``method=<choices>`` in the file becomes what the group offers in this installation.
    """
    text = (HELP / f"{verb}.txt").read_text(encoding="utf-8").rstrip()
    return re.sub(
        r"(\w+)=<choices>", lambda match: f"{match[1]}={'|'.join(choices(match[1]))}", text
    )


if __name__ == "__main__":
    # after `python -m wsss.cli` Lightning would start further DDP processes as -m, without the verb
    sys.modules["__main__"].__spec__ = None
    sys.exit(main())
