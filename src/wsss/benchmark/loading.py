"""``wsss benchmark part=data``: images a second and core, beside plain Pillow and torchvision.

Both sides read the same JPEGs and make the same views; rounds alternate in one process with one
thread, so that whatever else the machine does meets both.
"""

import inspect
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from wsss.benchmark.arguments import LoadingArguments, known_methods, parse_loading, with_config_dir
from wsss.benchmark.plain_views import PLAIN
from wsss.benchmark.report import figures_file, write_figures
from wsss.benchmark.runner import REQUIRED
from wsss.core.errors import WSSSError
from wsss.data.builtin import minivoc_root
from wsss.data.dataset import ImageDataset, Sample
from wsss.data.image_files import find_images
from wsss.runs.compose import compose_run
from wsss.runs.folder import build

VOC_SIZE = (500, 375)  # width x height of most of VOC's images


def main(arguments: list[str]) -> int:
    """Run the part: time every method's pipeline, print, write ``out``."""
    chosen = parse_loading(arguments)
    known = known_methods(chosen.config_dir)
    out = figures_file(chosen.out)
    results = []
    with _pictures(chosen) as paths, _one_thread():
        for method in [chosen.method] if chosen.method else known:
            result = time_method(method, paths, chosen)
            if "skipped" not in result:
                results.append(result)
            elif chosen.method:
                raise WSSSError(f"method={method}: {result['skipped']}, its loading is not timed")
    summary = {"arguments": asdict(chosen), "machine": _machine(), "methods": results}
    show(summary, Console())
    if out:
        write_figures(out, summary)
    return 0


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch on one thread, since loaders run one process a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pictures(chosen: LoadingArguments) -> AbstractContextManager[list[Path]]:
    """Give a context that gives the files to load."""
    if chosen.images is not None:
        return nullcontext([*find_images(chosen.images).values()][: chosen.count])
    return enlarged_minivoc(chosen.count)


@contextmanager
def enlarged_minivoc(count: int) -> Iterator[list[Path]]:
    """Write MiniVOC's first images as JPEGs of VOC's usual size, into a folder that goes again."""
    sources = sorted((minivoc_root() / "VOC2012" / "JPEGImages").glob("*.jpg"))[:count]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / source.name for source in sources]
        for source, path in zip(sources, paths, strict=True):
            with Image.open(source) as image:
                image.resize(VOC_SIZE, Image.Resampling.BICUBIC).save(path, quality=90)
        yield paths


def time_method(method: str, paths: Sequence[Path], chosen: LoadingArguments) -> dict[str, Any]:
    """Time one method's pipeline and, where there is one, the plain one, in alternation.

    Returns:
        Images a second of the fastest and the median round of each side, and the ratios; or
        ``skipped`` where training needs more than images.
    """
    # local views keep their share of the crop, or small crops would be refused
    config = compose_run(
        with_config_dir(
            [
                f"method={method}",
                "data=voc",
                "data.root=unset",
                "backbone.weights=random",
                f"budget.crop_size={chosen.image_size}",
                f"budget.local_size={max(1, chosen.image_size * 96 // 448)}",
                *REQUIRED.get(method, []),
            ],
            chosen.config_dir,
        )
    )
    transform = build(config["data"]["train_transform"])
    if "mask" in inspect.signature(transform).parameters:
        return {"method": method, "skipped": "trains on masks"}
    dataset = ImageDataset(
        samples=[Sample(path.stem, path, None) for path in paths],
        labels=np.ones((len(paths), 1), np.float32),
        class_names=["any"],
        transform=transform,
        seed=chosen.seed,
    )
    sides: dict[str, Callable[[int, int], object]] = {
        "ours": lambda epoch, index: dataset[(epoch, index)]
    }
    if method in PLAIN:
        views = PLAIN[method](chosen.image_size)
        sides["plain"] = lambda _, index: views(Image.open(paths[index]).convert("RGB"))
    random.seed(chosen.seed)
    torch.manual_seed(chosen.seed)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for epoch in track(range(chosen.repeats + 1), description=method):
        for side, load in sides.items():
            started = time.perf_counter()
            for index in range(len(paths)):
                load(epoch, index)
            seconds[side].append(time.perf_counter() - started)
    return _rates(method, {side: rounds[1:] for side, rounds in seconds.items()}, len(paths))


def _rates(method: str, seconds: dict[str, list[float]], count: int) -> dict[str, Any]:
    result: dict[str, Any] = {"method": method, "seconds": seconds}
    for name, statistic in (("fastest", min), ("median", median)):
        rates = {side: count / statistic(rounds) for side, rounds in seconds.items()}
        result[f"images_per_second_{name}"] = rates
        result[f"ratio_{name}"] = rates["ours"] / rates["plain"] if "plain" in rates else None
    return result


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def show(summary: dict[str, Any], console: Console) -> None:
    """Print images a second and core of each method."""
    arguments = summary["arguments"]
    table = Table(
        title=f"loading at {arguments['image_size']} px, images/s and core (fastest round)",
        caption=f"{arguments['repeats']} rounds of {arguments['count']} images, one thread",
    )
    table.add_column("method")
    for heading in ("ours", "Pillow + torchvision", "ratio", "ratio of medians"):
        table.add_column(heading, justify="right")
    for result in summary["methods"]:
        rates = result["images_per_second_fastest"]
        cells = [f"{rates['ours']:.1f}", "-", "-", "-"]
        if "plain" in rates:
            cells[1:] = [
                f"{rates['plain']:.1f}",
                f"{result['ratio_fastest']:.2f}",
                f"{result['ratio_median']:.2f}",
            ]
        table.add_row(result["method"], *cells)
    console.print(table)
