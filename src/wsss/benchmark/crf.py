"""``wsss benchmark part=crf``: our mean field beside pydensecrf, on the same images."""

import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from wsss.core.devices import choose_device
from wsss.core.stopwatch import device_name
from wsss.data.builtin import minivoc_root
from wsss.data.images import read_mask, read_rgb
from wsss.data.voc import find_voc_root, read_split
from wsss.maps.refine.dense_crf import CRF_PRESETS, dense_crf
from wsss.maps.refine.mean_field import mean_field

MINIVOC_CLASSES = 8
VOC_SIZE = (375, 500)


def scenes(num_classes: int, seed: int) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.float32]]]:
    """Make images with class probabilities: one of MiniVOC, and one of VOC's size.

    Args:
        num_classes: K of the large image; all K + 1 classes get some probability everywhere.
        seed: Of the probabilities, and of the large image.

    Returns:
        name -> (H, W, 3) uint8 and (C, H, W) float32 that sums to one.
    """
    rng = np.random.default_rng(seed)
    root = find_voc_root(minivoc_root())
    name = read_split(root, "val")[0]
    rgb = read_rgb(root / "JPEGImages" / f"{name}.jpg")
    mask = read_mask(root / "SegmentationClass" / f"{name}.png", num_classes=MINIVOC_CLASSES)
    truth = np.eye(256, dtype=np.float32)[mask][..., : MINIVOC_CLASSES + 1]
    near = cv2.GaussianBlur(3 * truth, (0, 0), 6)  # blurred as a network of stride 16 is
    small = (*VOC_SIZE[::-1],)
    patches = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    large = cv2.resize(patches, small, interpolation=cv2.INTER_CUBIC).astype(np.float32)
    large += rng.normal(0, 6, large.shape)
    far = cv2.resize(rng.normal(0, 2, (24, 32, num_classes + 1)).astype(np.float32), small)
    return {
        "MiniVOC": (rgb, _softmax(near + rng.normal(0, 0.3, near.shape))),
        "500 x 375": (large.clip(0, 255).astype(np.uint8), _softmax(far)),
    }


def _softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Turn (H, W, C) logits into (C, H, W) float32 probabilities."""
    power = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probability = power / power.sum(axis=-1, keepdims=True)
    return np.ascontiguousarray(probability.transpose(2, 0, 1), dtype=np.float32)


def compare_crfs(config: dict[str, Any]) -> dict[str, Any]:
    """Time both and count the pixels whose labels agree.

    Args:
        config: fields of ``BenchmarkConfig``: crf, num_classes, repeats, warmup, device, threads,
            batch_size (images a call of ours), seed.

    Returns:
        What ``out=`` gets; seconds are of one image, fastest repeat.
    """
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    device, preset = choose_device(config["device"]), CRF_PRESETS[config["crf"]]
    batch = config["batch_size"]
    rows = []
    for name, (image, prob) in scenes(config["num_classes"], config["seed"]).items():
        images = torch.from_numpy(image).to(device).expand(batch, -1, -1, -1)
        probs = torch.from_numpy(prob).to(device).expand(batch, -1, -1, -1)
        theirs, reference = _timed(lambda i=image, p=prob: dense_crf(i, p, preset), config)  # type: ignore[misc]
        ours, posterior = _timed(
            lambda i=images, p=probs: mean_field(i, p, preset).cpu().numpy(),  # type: ignore[misc]
            config,
        )
        rows.append(
            {
                "image": name,
                "classes": len(prob),
                "pydensecrf_seconds": theirs,
                "ours_seconds": ours / batch,
                "agreement": float((posterior[0].argmax(0) == reference.argmax(0)).mean()),
                "largest_difference": float(np.abs(posterior[0] - reference).max()),
            }
        )
    machine = {
        "device": device_name(device),
        "cpu": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return {"arguments": config, "machine": machine, "crfs": rows}


def _timed(
    run: Callable[[], NDArray[np.float32]], config: dict[str, Any]
) -> tuple[float, NDArray[np.float32]]:
    """Give the seconds of the fastest repeat, and the result."""
    seconds = []
    for _ in range(config["warmup"] + config["repeats"]):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[config["warmup"] :]), result


def show_crfs(summary: dict[str, Any], console: Console) -> None:
    """Print the comparison."""
    arguments, machine = summary["arguments"], summary["machine"]
    table = Table(
        title=f"dense CRF {arguments['crf']}, seconds an image",
        caption=f"pydensecrf: one core of {machine['cpu']}; ours: {machine['device']}, "
        f"{machine['threads']} threads, batch {arguments['batch_size']}",
    )
    headings = ("image", "classes", "pydensecrf, s", "ours, s", "ratio", "same labels")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "image" else "right")
    for row in summary["crfs"]:
        theirs, ours = row["pydensecrf_seconds"], row["ours_seconds"]
        table.add_row(
            row["image"],
            str(row["classes"]),
            f"{theirs:.3f}",
            f"{ours:.3f}",
            f"x {theirs / ours:.2f}",
            f"{row['agreement']:.2%}",
        )
    console.print(table)
