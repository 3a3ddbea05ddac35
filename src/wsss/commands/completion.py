"""``wsss -sc install=SHELL``: completion of verbs, groups, choices and keys by Tab."""

import os
import sys
from collections.abc import Sequence

from hydra import main as hydra_main
from omegaconf import DictConfig

from wsss.commands.keys import ARGUMENTS
from wsss.core.declarations import declared, meanings
from wsss.core.places import config_root
from wsss.runs.line import search_path


def main(arguments: Sequence[str], verbs: Sequence[str]) -> int:
    """Do what Hydra's completion does, of the verb that the line begins with.

    Args:
        arguments: ``install=SHELL``, ``uninstall=SHELL``, or ``query=SHELL``, with which the
            installed script asks what may stand at the end of ``COMP_LINE``.
        verbs: of the program.
    """
    if any(one.startswith("query=") for one in arguments):
        line = os.environ.get("COMP_LINE", "")
        program, _, rest = line.partition(" ")
        verb, space, given = rest.lstrip().partition(" ")
        if not space:
            print(" ".join(name for name in verbs if name.startswith(verb)))
            return 0
        if verb in ARGUMENTS:
            known = declared(ARGUMENTS[verb][0])
            assert known is not None, verb
            word = given.rpartition(" ")[2]
            print(" ".join(f"{key}=" for key in meanings(known) if key.startswith(word)))
            return 0
        # Hydra knows no verbs; its groups lie where the search path says
        os.environ["COMP_LINE"] = f"{program} {search_path([])} {given}"
    sys.argv = ["wsss", "--shell-completion", *arguments]
    conf = str(config_root() / "conf")
    hydra_main(version_base="1.3", config_path=conf, config_name="train")(_nothing)()
    return 0


def _nothing(config: DictConfig) -> None:
    """Run nothing: Hydra prints what was asked for."""
