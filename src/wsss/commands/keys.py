"""``wsss VERB --keys``: what may stand on a verb's line, from the settings themselves."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from wsss.core.declarations import declared
from wsss.core.errors import WSSSError
from wsss.runs.keys import Key, keys_of_class, keys_of_run
from wsss.runs.line import compose_open, take_folders, with_folders

#: verb -> the dataclass of its arguments, and the groups of a run's configuration that it takes too
ARGUMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "eval": ("wsss.commands.evaluate.EvalArguments", ("eval", "data", "gallery")),
    "compare": ("wsss.comparison.compare.CompareArguments", ()),
    "report": ("wsss.commands.report.ReportArguments", ()),
    "dashboard": ("wsss.commands.dashboard.DashboardArguments", ()),
    "text": ("wsss.commands.text.TextArguments", ("data",)),
    "predict": ("wsss.commands.predict.PredictArguments", ("eval",)),
    "export": ("wsss.commands.export.ExportArguments", ("eval", "data")),
    "submit": ("wsss.commands.submit.SubmitArguments", ("eval", "data")),
    "pseudo": ("wsss.commands.pseudo.PseudoArguments", ("eval", "data")),
    "benchmark": ("wsss.benchmark.arguments.BenchmarkConfig", ()),
    "prepare voc": ("wsss.commands.data.VOCArguments", ()),
    "prepare coco": ("wsss.commands.data.COCOArguments", ()),
    "part=data": ("wsss.benchmark.arguments.LoadingArguments", ()),
    "part=pce": ("wsss.benchmark.arguments.PCEArguments", ()),
}
#: verbs whose line composes a run
COMPOSED = ("train", "tune", "data", "convert")
#: verb whose line composes a run -> the dataclass of the arguments that it takes besides
BESIDES = {"tune": "wsss.commands.tune.TuneArguments"}
#: columns beside the keys' names that a table needs: type, default, meaning
WIDTHS = (24, 20, 40)


def main(verb: str, arguments: Sequence[str]) -> int:
    """Print every key of a verb with its type, its default and its meaning.

    Args:
        verb: of the command line.
        arguments: what follows it; a word after ``--keys`` narrows the list to keys and meanings
            that hold it.

    Raises:
        WSSSError: the verb takes no keys, or none holds the word.
    """
    arguments, folders = take_folders(arguments)
    rest, word = _without_flag(arguments)
    keys = [
        key
        for key in _keys(verb, with_folders(rest, folders))
        if word in key.name or word in key.meaning.lower()
    ]
    if not keys:
        raise WSSSError(f"no key of wsss {verb} holds {word!r}")
    show(keys)
    return 0


def _without_flag(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Take ``--keys`` and the word behind it out of a line."""
    place = list(arguments).index("--keys")
    before, after = list(arguments[:place]), list(arguments[place + 1 :])
    if after and "=" not in after[0] and not after[0].startswith("-"):
        return [*before, *after[1:]], after[0].lower()
    return [*before, *after], ""


def _keys(verb: str, arguments: Sequence[str]) -> list[Key]:
    """List what a verb takes, as far as its line says which part of it is meant."""
    given = [one for one in arguments if "=" in one]
    words = [one for one in arguments if "=" not in one]
    part = next((one for one in given if one in ARGUMENTS), "")
    name = part or (" ".join(words[:2]) if verb == "data" else verb)
    if name not in ARGUMENTS and verb not in COMPOSED:
        raise WSSSError(f"wsss {verb} takes no keys; see wsss {verb} --help")
    if name not in ARGUMENTS:
        besides = _of_class(BESIDES[verb]) if verb in BESIDES else []
        own = {key.name for key in besides}
        line = [one for one in given if one.partition("=")[0] not in own]
        return [*besides, *keys_of_run(compose_open(line))]
    target, groups = ARGUMENTS[name]
    return [*_of_class(target), *_of_runs(groups)]


def _of_class(target: str) -> list[Key]:
    """List the keys of a verb's own arguments."""
    cls = declared(target)
    assert cls is not None, target
    return keys_of_class(cls)


def _of_runs(groups: Sequence[str]) -> Iterable[Key]:
    """List the keys of a run's configuration that a verb changes; their values are the run's."""
    for key in keys_of_run(compose_open([])) if groups else ():
        if key.name.partition(".")[0] in groups:
            yield Key(key.name, key.type, "as the run has it", key.meaning)


def show(keys: Sequence[Key]) -> None:
    """Print a table, or one key above the other where the terminal is too narrow for one.

    Where the output is piped, each key is one line with tabs between its parts.
    """
    console = Console()
    if not console.is_terminal:
        for key in keys:
            print("\t".join((key.name, key.type, key.value, key.meaning)))
        return
    longest = max(len(key.name) for key in keys)
    if longest + sum(WIDTHS) > console.width:
        for key in keys:
            # soft: a terminal that breaks a line still copies it whole
            console.print(Text.assemble((key.name, "bold"), f"  {key.value}"), soft_wrap=True)
            said = Text.assemble((key.type, "dim"), f"  {key.meaning}".rstrip())
            console.print(Padding(said, (0, 0, 0, 4)))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("key", style="bold", no_wrap=True, min_width=longest)
    for heading, style in (("type", "dim"), ("default", ""), ("meaning", "")):
        table.add_column(heading, style=style, overflow="fold")
    for key in keys:
        table.add_row(*(escape(text) for text in (key.name, key.type, key.value, key.meaning)))
    console.print(table)
