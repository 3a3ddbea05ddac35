"""What ``wsss benchmark`` takes, read and checked without importing torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from wsss.core.arguments import parse_arguments
from wsss.core.errors import WSSSError
from wsss.core.places import choices
from wsss.maps.refine.dense_crf import CRF_PRESETS
from wsss.runs.line import with_folders

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
        config_dir: folder with groups of the user's, such as ``method/NAME.yaml``.
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
    config_dir: str | None = None


def with_paper_sizes(config: BenchmarkConfig) -> BenchmarkConfig:
    """Fill in the encoder and the image size of the method's paper where none is given."""
    backbone, image_size = PAPERS.get(config.method, DEFAULTS)
    config.backbone = config.backbone or backbone
    config.image_size = config.image_size or image_size
    return config


@dataclass
class LoadingArguments:
    """Arguments of ``wsss benchmark part=data``.

    Attributes:
        method: a method of ``conf/method``; null: all of them.
        image_size: side of the training crop in pixels.
        images: folder of images to load; null: MiniVOC's, enlarged to VOC's usual size.
        count: how many of them.
        repeats: rounds that count; one more goes before.
        seed: of all draws.
        out: JSON file to write.
        config_dir: folder with groups of the user's, such as ``method/NAME.yaml``.
    """

    method: str | None = None
    image_size: int = 448
    images: str | None = None
    count: int = 32
    repeats: int = 5
    seed: int = 0
    out: str | None = None
    config_dir: str | None = None


@dataclass
class PCEArguments:
    """Arguments of ``wsss benchmark part=pce``.

    Attributes:
        tokens: patches an image, ascending.
        width: width e of a patch.
        num_classes: K, foreground classes; the background comes on top.
        batch_size: images.
        repeats: timings of which the fastest counts.
        epsilon: probability above which a patch is confident.
        matrix: also time the matrix of all pairs.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: CPU threads; null: torch's default.
        seed: of patches and scores.
        out: JSON file to write.
    """

    tokens: list[int] = field(default_factory=lambda: [64, 256, 576, 1024, 2304, 4096])
    width: int = 768
    num_classes: int = 20
    batch_size: int = 1
    repeats: int = 5
    epsilon: float = 0.85
    matrix: bool = True
    device: str = "auto"
    threads: int | None = None
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


def parse(arguments: Sequence[str]) -> BenchmarkConfig:
    """Read arguments as a checked configuration.

    Raises:
        WSSSError: no KEY=VALUE, unknown key, wrong type, value out of range.
    """
    config, _ = parse_arguments(BenchmarkConfig, arguments)
    for key, allowed in CHOICES.items():
        if getattr(config, key) not in allowed:
            raise WSSSError(f"{key}={getattr(config, key)}: expected {' or '.join(allowed)}")
    known = known_methods(config.config_dir)
    if config.part == "step" and config.method not in known:
        given = f"method={config.method}" if config.method else "method is missing"
        raise WSSSError(f"{given}: expected {' or '.join(known)}")
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


def parse_loading(arguments: Sequence[str]) -> LoadingArguments:
    """Read the arguments of ``part=data``.

    Raises:
        WSSSError: no KEY=VALUE, unknown key, wrong type, no such method, a number below 1.
    """
    chosen, _ = parse_arguments(LoadingArguments, arguments)
    known = known_methods(chosen.config_dir)
    if chosen.method is not None and chosen.method not in known:
        raise WSSSError(f"method={chosen.method}: expected one of {', '.join(known)}")
    for key in ("image_size", "count", "repeats"):
        if getattr(chosen, key) < 1:
            raise WSSSError(f"{key}={getattr(chosen, key)}: must be at least 1")
    return chosen


def parse_pce(arguments: Sequence[str]) -> PCEArguments:
    """Read the arguments of ``part=pce``.

    Raises:
        WSSSError: no KEY=VALUE, unknown key, wrong type, value out of range.
    """
    config, _ = parse_arguments(PCEArguments, arguments)
    if len(config.tokens) < 2 or min(config.tokens) < 2 or sorted(config.tokens) != config.tokens:
        raise WSSSError(f"tokens={config.tokens}: expected two or more ascending counts from 2 on")
    if min(config.repeats, config.batch_size, config.width, config.num_classes) < 1:
        raise WSSSError("repeats, batch_size, width and num_classes must be at least 1")
    return config


def known_methods(config_dir: str | None) -> list[str]:
    """Give the names of the methods, those of a folder of the user's among them."""
    return choices("method", *([config_dir] if config_dir else []))


def with_config_dir(overrides: list[str], config_dir: str | None) -> list[str]:
    """Let a composition look into a folder of the user's."""
    return with_folders(overrides, [config_dir] if config_dir else [])
