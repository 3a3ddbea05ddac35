"""A training step beside the official way of computing it: the sides to run, in turn.

Each side runs in a process of its own, so that peak memory belongs to that side alone. Two sides
take their steps in turn (ours, official, ours, official), so that whatever else the machine does
meets both. Weights are random: time does not depend on them.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

from rich.progress import track

from wsss.benchmark.arguments import OFFICIAL, BenchmarkConfig
from wsss.benchmark.runner import Side, Worker, saving_names
from wsss.core.errors import WSSSError
from wsss.core.processes import serve


def groups(config: BenchmarkConfig) -> list[list[Side]]:
    """List what runs in turn: ours with the official way, then ours with each saving off.

    Of a method without an official way of computing, list ours alone.
    """
    ours, others = Side("ours", None, ()), []
    if target := OFFICIAL.get(config.method):
        every = saving_names(target)
        if config.official:
            others.append(Side("official way", target, every))
        if config.ablate:
            others += [Side(f"without {name}", target, (name,)) for name in every]
    return [[ours, other] for other in others] or [[ours]]


def run_in_turn(config: BenchmarkConfig, group: Sequence[Side]) -> list[dict[str, Any]]:
    """Time sides step by step in turn, each in a process of its own that stays warm.

    Returns:
        Of each side, see :meth:`wsss.benchmark.runner.TimedSide.result`; step i of one side ran
        right before step i of the next.

    Raises:
        WSSSError: as :class:`wsss.benchmark.runner.TimedSide`, or a process was killed.
    """
    title = " and ".join(side.name for side in group)
    with ExitStack() as stack:
        pools = [
            stack.enter_context(
                ProcessPoolExecutor(
                    max_workers=1,
                    mp_context=get_context("spawn"),
                    initializer=serve,
                    initargs=(os.getpid(),),
                )
            )
            for _ in group
        ]
        together = list(zip(group, pools, strict=True))
        for side, pool in together:
            _call(side, pool, Worker.open, asdict(config), side)
        for _ in track(range(config.warmup + config.repeats), description=title):
            for side, pool in together:
                _call(side, pool, Worker.step)
        return [_call(side, pool, Worker.result) for side, pool in together]


def _call(side: Side, pool: ProcessPoolExecutor, function: Callable[..., Any], *given: Any) -> Any:
    """Call a function in a side's process and wait for it."""
    try:
        return pool.submit(function, *given).result()
    except BrokenProcessPool as error:
        raise WSSSError(
            f"{side.name}: its process was killed, most likely out of memory; lower "
            "batch_size or image_size"
        ) from error
