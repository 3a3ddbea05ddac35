"""``wsss benchmark``: time a training step by phases, dense CRFs, loading, a contrast."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

from rich.console import Console

from wsss.benchmark import loading, pce
from wsss.benchmark.crf import compare_crfs, show_crfs
from wsss.benchmark.report import figures_file, show, summarise, write_figures
from wsss.benchmark.steps import (
    OFFICIAL,
    BenchmarkConfig,
    groups,
    run_in_turn,
    with_paper_sizes,
)
from wsss.core.arguments import parse_arguments
from wsss.core.errors import WSSSError
from wsss.core.places import choices
from wsss.maps.refine.dense_crf import CRF_PRESETS

#: part with arguments of its own -> what runs it
APART: dict[str, Callable[[list[str]], int]] = {"data": loading.main, "pce": pce.main}
CHOICES = {
    "part": ("step", "crf", *APART),
    "crf": tuple(CRF_PRESETS),
    "device": ("auto", "cpu", "cuda"),
    "stage": ("after", "before"),
    "dtype": ("float32", "bfloat16"),
}
LEAST = {
    "image_size": 32,
    "batch_size": 1,
    "num_classes": 1,
    "repeats": 1,
    "warmup": 0,
    "threads": 1,
}


def main(arguments: list[str]) -> int:
    """Run the verb: time the sides, print the table, write ``out``.

    Raises:
        WSSSError: unknown key or choice, wrong type, unwritable file, a side out of memory.
    """
    for part, run in APART.items():
        if f"part={part}" in arguments:
            return run([argument for argument in arguments if argument != f"part={part}"])
    config = parse(arguments)
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


def parse(arguments: Sequence[str]) -> BenchmarkConfig:
    """Read arguments as a checked configuration.

    Raises:
        WSSSError: no KEY=VALUE, unknown key, wrong type, value out of range.
    """
    config, _ = parse_arguments(BenchmarkConfig, arguments)
    for key, allowed in CHOICES.items():
        if getattr(config, key) not in allowed:
            raise WSSSError(f"{key}={getattr(config, key)}: expected {' or '.join(allowed)}")
    if config.part == "step" and config.method not in choices("method"):
        given = f"method={config.method}" if config.method else "method is missing"
        raise WSSSError(f"{given}: expected {' or '.join(choices('method'))}")
    for key, least in LEAST.items():
        value = getattr(config, key)
        if value is not None and value < least:
            raise WSSSError(f"{key}={value}: must be at least {least}")
    least, most = config.batch_size, config.batch_size * config.num_classes
    if config.pairs is not None and not least <= config.pairs <= most:
        raise WSSSError(
            f"pairs={config.pairs}: expected {least} to {most}, one to all classes an image"
        )
    return with_paper_sizes(config) if config.part == "step" else config
