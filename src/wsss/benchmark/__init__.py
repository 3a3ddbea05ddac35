"""``wsss benchmark``: a training step by phases, beside the official way of computing it.

Each side runs in a fresh process of its own, one after the other, so that peak memory belongs to
that side alone. Weights are random: time does not depend on them.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.console import Console

from wsss.arguments import parse_arguments
from wsss.benchmark.report import show, summarise
from wsss.benchmark.runner import Side, run_side
from wsss.benchmark.toco_official import Savings
from wsss.errors import WSSSError

#: method -> class that computes its step the official way
OFFICIAL = {"toco": "wsss.benchmark.toco_official.OfficialToCo"}


@dataclass
class BenchmarkConfig:
    """Arguments of ``wsss benchmark``, as KEY=VALUE.

    Attributes:
        method: a method of ``conf/method``.
        backbone: an encoder of ``conf/backbone``; its weights are random here.
        image_size: side of the images in pixels.
        batch_size: images a step.
        num_classes: K, foreground classes.
        repeats: steps that count.
        warmup: steps before them.
        device: ``auto``, ``cpu`` or ``cuda``.
        official: also run the step computed the official way.
        ablate: also run the step once per saving, with that one alone switched off.
        stage: ``after`` or ``before`` the start of segmentation.
        threads: CPU threads; null: torch's default.
        dtype: ``float32``, or ``bfloat16`` autocast.
        seed: of weights, batch and crops.
        out: JSON file to write.
    """

    method: str = MISSING
    backbone: str = "vit_base"
    image_size: int = 448
    batch_size: int = 2
    num_classes: int = 20
    repeats: int = 3
    warmup: int = 1
    device: str = "auto"
    official: bool = True
    ablate: bool = False
    stage: str = "after"
    threads: int | None = None
    dtype: str = "float32"
    seed: int = 0
    out: str | None = None


CHOICES = {
    "method": tuple(OFFICIAL),
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
    """The verb: run the sides, print the table, write ``out``.

    Raises:
        WSSSError: unknown key or choice, wrong type, unwritable file, a side out of memory.
    """
    if "part=pce" in arguments:
        from wsss.benchmark import pce

        return pce.main([argument for argument in arguments if argument != "part=pce"])
    config = parse(arguments)
    out = Path(config.out) if config.out else None
    if out and out.is_dir():
        raise WSSSError(f"out={out}: is a folder; name a .json file")
    if out and not os.access(out.parent, os.W_OK):
        raise WSSSError(f"out={out}: the folder {out.parent} is missing or not writable")
    console = Console()
    results = []
    for side in sides(config):
        console.print(f"[dim]running {side.name} ...[/dim]")
        results.append(_in_fresh_process(config, side))
    summary = summarise(asdict(config), results)
    show(summary, console)
    if out:
        temporary = out.with_name(f".{out.name}.tmp")
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
        os.replace(temporary, out)
        console.print(f"figures in {out}")
    return 0


def parse(arguments: Sequence[str]) -> BenchmarkConfig:
    """Arguments as a checked configuration.

    Raises:
        WSSSError: no KEY=VALUE, unknown key, wrong type, value out of range.
    """
    config, _ = parse_arguments(BenchmarkConfig, arguments)
    for key, choices in CHOICES.items():
        if getattr(config, key) not in choices:
            raise WSSSError(f"{key}={getattr(config, key)}: expected {' or '.join(choices)}")
    for key, least in LEAST.items():
        value = getattr(config, key)
        if value is not None and value < least:
            raise WSSSError(f"{key}={value}: must be at least {least}")
    return config


def sides(config: BenchmarkConfig) -> list[Side]:
    """What to run: ours, then the official way, then ours with one saving off at a time."""
    every = [field.name for field in fields(Savings)]
    listed = [Side("ours", None, ())]
    if config.official:
        listed.append(Side("official way", OFFICIAL[config.method], tuple(every)))
    if config.ablate:
        listed += [Side(f"without {name}", OFFICIAL[config.method], (name,)) for name in every]
    return listed


def _in_fresh_process(config: BenchmarkConfig, side: Side) -> dict[str, Any]:
    """One side in a process of its own; it ends with the process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(run_side, asdict(config), side).result()
        except BrokenProcessPool as error:
            raise WSSSError(
                f"{side.name}: its process was killed, most likely out of memory; lower "
                "batch_size or image_size"
            ) from error
