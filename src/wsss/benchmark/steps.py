"""A training step beside the official way of computing it: the arguments, and the sides to run.

Each side runs in a process of its own, so that peak memory belongs to that side alone. Two sides
take their steps in turn (ours, official, ours, official), so that whatever else the machine does
meets both. Weights are random: time does not depend on them.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

from rich.progress import track

from wsss.benchmark.runner import Side, Worker, saving_names
from wsss.core.errors import WSSSError
from wsss.core.processes import serve

#: method -> class that computes its step the official way
OFFICIAL = {
    "toco": "wsss.benchmark.toco_official.OfficialToCo",
    "clustercam": "wsss.benchmark.clustercam_official.OfficialClusterCAM",
    "getam": "wsss.benchmark.getam_official.OfficialGETAM",
    "mctformer": "wsss.benchmark.mctformer_official.OfficialMCTformerPlus",
    "more": "wsss.benchmark.more_official.OfficialMoRe",
    "weclip": "wsss.benchmark.weclip_official.OfficialWeCLIP",
}
#: method -> its paper's encoder and the side of its crops
PAPERS = {
    "toco": ("vit_base", 448),
    "clustercam": ("deit_small", 448),
    "getam": ("vit_base", 256),
    "tkp_pcl": ("vit_base", 384),
    "mctformer": ("deit_small", 448),
    "more": ("vit_base", 448),
    "weclip": ("clip_base", 320),
}
#: the same of any other method: those of conf/train.yaml and conf/data/voc.yaml
DEFAULTS = ("deit_base", 448)


@dataclass
class BenchmarkConfig:
    """Arguments of ``wsss benchmark``, as KEY=VALUE.

    Attributes:
        part: ``step``, a training step, or ``crf``, our dense CRF beside pydensecrf; ``data`` and
            ``pce`` have arguments of their own (`wsss.benchmark.loading`, `wsss.benchmark.pce`).
        method: a method of ``conf/method``; only for a step.
        crf: preset of the dense CRF; only for ``part=crf``.
        backbone: an encoder of ``conf/backbone``, with random weights here; null: the method's own.
        image_size: side of the images in pixels; null: the method's own.
        batch_size: images a step.
        pairs: of image and class in a batch, spread evenly; null: one to three classes an image.
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

    part: str = "step"
    method: str = ""
    crf: str = "toco"
    backbone: str | None = None
    image_size: int | None = None
    batch_size: int = 2
    pairs: int | None = None
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


def with_paper_sizes(config: BenchmarkConfig) -> BenchmarkConfig:
    """Fill in the encoder and the image size of the method's paper where none is given."""
    backbone, image_size = PAPERS.get(config.method, DEFAULTS)
    config.backbone = config.backbone or backbone
    config.image_size = config.image_size or image_size
    return config


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
