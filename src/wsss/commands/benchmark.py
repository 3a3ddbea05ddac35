"""``wsss benchmark``: time a training step by phases, dense CRFs, loading, a contrast."""

from dataclasses import asdict

from rich.console import Console

from wsss.benchmark.arguments import OFFICIAL, parse, parse_loading, parse_pce
from wsss.runs.line import take_folders


def main(arguments: list[str]) -> int:
    """Run the verb: time the sides, print the table, write ``out``.

    Raises:
        WSSSError: unknown key or choice, wrong type, unwritable file, a side out of memory.
    """
    arguments, folders = take_folders(arguments)
    arguments = [*arguments, *(f"config_dir={folder}" for folder in folders)]
    rest = [one for one in arguments if one not in ("part=data", "part=pce")]
    if "part=data" in arguments:
        parse_loading(rest)
        from wsss.benchmark import loading

        return loading.main(rest)
    if "part=pce" in arguments:
        parse_pce(rest)
        from wsss.benchmark import pce

        return pce.main(rest)
    config = parse(arguments)
    from wsss.benchmark.crf import compare_crfs, show_crfs
    from wsss.benchmark.report import figures_file, show, summarise, write_figures
    from wsss.benchmark.steps import groups, run_in_turn

    out = figures_file(config.out)
    console = Console()
    if config.part == "crf":
        summary = compare_crfs(asdict(config))
        show_crfs(summary, console)
    else:
        if config.method not in OFFICIAL and (config.official or config.ablate):
            console.print(
                f"method={config.method}: no official way of computing is written down, ours alone"
            )
        results = [run_in_turn(config, group) for group in groups(config)]
        summary = summarise(asdict(config), results)
        show(summary, console)
    if out:
        write_figures(out, summary)
    return 0
