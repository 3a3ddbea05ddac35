"""A training step beside the official way of computing it: the arguments, and the sides to run.

Each side runs in a fresh process of its own, one after the other, so that peak memory belongs to
that side alone. Weights are random: time does not depend on them.
"""

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

from wsss.benchmark.runner import Side, run_side, saving_names
from wsss.core.errors import WSSSError

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


def with_paper_sizes(config: BenchmarkConfig) -> BenchmarkConfig:
    """Fill in the encoder and the image size of the method's paper where none is given."""
    backbone, image_size = PAPERS.get(config.method, DEFAULTS)
    config.backbone = config.backbone or backbone
    config.image_size = config.image_size or image_size
    return config


def sides(config: BenchmarkConfig) -> list[Side]:
    """List what to run: ours, then the official way, then ours with one saving off at a time.

    Of a method without an official way of computing, list ours alone.
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


def run_in_fresh_process(config: BenchmarkConfig, side: Side) -> dict[str, Any]:
    """Time one side in a process of its own, which ends with it.

    Returns:
        See :func:`wsss.benchmark.runner.run_side`.

    Raises:
        WSSSError: as there, or the process was killed.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(run_side, asdict(config), side).result()
        except BrokenProcessPool as error:
            raise WSSSError(
                f"{side.name}: its process was killed, most likely out of memory; lower "
                "batch_size or image_size"
            ) from error
