"""``wsss benchmark``: a training step by phases beside the official way; dense CRFs side by side.

Each side runs in a fresh process of its own, one after the other, so that peak memory belongs to
that side alone. Weights are random: time does not depend on them.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

from rich.console import Console

from wsss.benchmark.crf import compare_crfs, show_crfs
from wsss.benchmark.report import figures_file, show, summarise, write_figures
from wsss.benchmark.runner import Side, run_side, saving_names
from wsss.core.arguments import parse_arguments
from wsss.core.errors import WSSSError
from wsss.core.places import choices
from wsss.maps.refine.dense_crf import CRF_PRESETS

#: method -> class that computes its step the official way
OFFICIAL = {
    "toco": "wsss.benchmark.toco_official.OfficialToCo",
    "clustercam": "wsss.benchmark.clustercam_official.OfficialClusterCAM",
    "getam": "wsss.benchmark.getam_official.OfficialGETAM",
}
#: method -> its paper's encoder and the side of its crops
PAPERS = {
    "toco": ("vit_base", 448),
    "clustercam": ("deit_small", 448),
    "getam": ("vit_base", 256),
    "tkp_pcl": ("vit_base", 384),
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
    "part": ("step", "crf", "data", "pce"),
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
    """The verb: run the sides, print the table, write ``out``.

    Raises:
        WSSSError: unknown key or choice, wrong type, unwritable file, a side out of memory.
    """
    if "part=data" in arguments:
        from wsss.benchmark.loading import main as time_loading

        return time_loading([argument for argument in arguments if argument != "part=data"])
    if "part=pce" in arguments:
        from wsss.benchmark import pce

        return pce.main([argument for argument in arguments if argument != "part=pce"])
    config = parse(arguments)
    out = figures_file(config.out)
    console = Console()
    if config.part == "crf":
        summary = compare_crfs(asdict(config))
        show_crfs(summary, console)
    else:
        results = []
        if config.method not in OFFICIAL and (config.official or config.ablate):
            console.print(
                f"method={config.method}: no official way of computing is written down, ours alone"
            )
        for side in sides(config):
            console.print(f"[dim]running {side.name} ...[/dim]")
            results.append(_in_fresh_process(config, side))
        summary = summarise(asdict(config), results)
        show(summary, console)
    if out:
        write_figures(out, summary)
    return 0


def parse(arguments: Sequence[str]) -> BenchmarkConfig:
    """Arguments as a checked configuration.

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
    if config.part == "step":
        backbone, image_size = PAPERS.get(config.method, DEFAULTS)
        config.backbone = config.backbone or backbone
        config.image_size = config.image_size or image_size
    return config


def sides(config: BenchmarkConfig) -> list[Side]:
    """What to run: ours, then the official way, then ours with one saving off at a time.

    Of a method without an official way of computing, ours alone.
    """
    listed = [Side("ours", None, ())]
    target = OFFICIAL.get(config.method)
    if target is None:
        return listed
    every = saving_names(target)
    if config.official:
        listed.append(Side("official way", target, every))
    if config.ablate:
        listed += [Side(f"without {name}", target, (name,)) for name in every]
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
