"""``wsss -sc install=SHELL``: completion of verbs, groups, choices and keys by Tab."""

import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from hydra import main as hydra_main
from omegaconf import DictConfig

from wsss.commands.keys import ARGUMENTS
from wsss.core.declarations import declared, meanings
from wsss.core.errors import WSSSError
from wsss.core.places import config_root, declared_folders
from wsss.runs.line import EXPERIMENT, choices_of, search_path
from wsss.runs.trainer_settings import trainer_keys

SHELLS = ("bash", "fish", "zsh")
#: words that follow those of a verb with several parts
PARTS = {"data": ["check", "prepare"], "data prepare": ["coco", "voc"]}


def main(arguments: Sequence[str], verbs: Sequence[str]) -> int:
    """Do what Hydra's completion does, of the verb that the line begins with.

    Args:
        arguments: ``install=SHELL``, ``uninstall=SHELL``, or ``query=SHELL``, with which the
            installed script asks what may stand at the end of ``COMP_LINE``.
        verbs: of the program.

    Raises:
        WSSSError: there is no such shell.
    """
    what, _, shell = (arguments or [""])[0].partition("=")
    if what not in ("install", "uninstall", "query") or shell not in SHELLS:
        given = f"{arguments[0]}: " if arguments else ""
        raise WSSSError(f"{given}expected install=SHELL of {', '.join(SHELLS)}")
    if what != "query":
        _ask_hydra(arguments)
        return 0
    found = _found(os.environ.get("COMP_LINE", ""), verbs, arguments)
    print(("\n" if shell == "fish" else " ").join(found))
    return 0


def _found(line: str, verbs: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """List what may stand at the end of a line."""
    program, _, rest = line.partition(" ")
    verb, space, given = rest.lstrip().partition(" ")
    if not space:
        return [name for name in verbs if name.startswith(verb)]
    before, _, word = given.rpartition(" ")
    part = " ".join([verb, *(one for one in before.split() if "=" not in one)])
    if part in PARTS:
        return [one for one in PARTS[part] if one.startswith(word)]
    name = part.removeprefix("data ") if verb == "data" else verb
    if name in ARGUMENTS:
        known = declared(ARGUMENTS[name][0])
        assert known is not None, name
        return [f"{key}=" for key in meanings(known) if key.startswith(word)]
    if match := EXPERIMENT.match(word):
        options = [f"{match[0]}{name}" for name in choices_of("experiments")]
    elif word.startswith("trainer.") and "=" not in word:
        options = [f"trainer.{key}=" for key in trainer_keys()]
    else:
        # Hydra knows no verbs and no flags before a word; its groups lie where the path says
        overrides = [one for one in before.split() if "=" in one or one.startswith("~")]
        os.environ["COMP_LINE"] = " ".join([program, search_path([]), *overrides, word])
        options = [one for one in _ask_hydra(arguments) if _is_ours(one)] + ["experiment="]
        if verb == "data":
            options = ["--fast", *(one for one in options if one.startswith("data"))]
    return sorted(one for one in options if one.startswith(word))


def _is_ours(word: str) -> bool:
    """Tell a key, a choice or a group from a folder that lies beside ``experiments/``."""
    if re.search(r"[=.]", word.lstrip(".")):
        return not word.startswith(".")
    folders = (config_root() / "conf", *declared_folders())
    group = word.lstrip("+~").partition("/")[0]
    return group in ("experiments", "hydra") or any((one / group).is_dir() for one in folders)


def _ask_hydra(arguments: Sequence[str]) -> list[str]:
    """Let Hydra print what an installation needs, or give what it finds for a query."""
    sys.argv = ["wsss", "--shell-completion", *arguments]
    conf, said = str(config_root() / "conf"), io.StringIO()
    run = hydra_main(version_base="1.3", config_path=conf, config_name="train")(_nothing)
    if not arguments[0].startswith("query="):
        run()
        return []
    with redirect_stdout(said):
        run()
    return said.getvalue().split()


def _nothing(config: DictConfig) -> None:
    """Run nothing: Hydra prints what was asked for."""
