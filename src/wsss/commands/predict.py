"""``wsss predict``: masks and overlays for one's own images."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import MISSING
from PIL import Image
from rich.progress import track

from wsss.core.arguments import parse_arguments
from wsss.core.devices import choose_device
from wsss.core.errors import WSSSError
from wsss.core.files import make_writable, write_atomically
from wsss.core.modes import evaluating
from wsss.data.dataset import in_threads
from wsss.data.images import ImageFolderDataset, image_size, voc_palette, write_mask
from wsss.results.gallery import overlay
from wsss.runs.folder import load_run
from wsss.runs.masks import predict_mask


@dataclass
class PredictArguments:
    """Arguments of ``wsss predict``.

    Attributes:
        run: run folder or ``.ckpt`` file.
        images: folder of images.
        out: folder for masks and overlays.
        device: ``auto``, ``cpu``, ``cuda``, ...
    """

    run: str = MISSING
    images: str = MISSING
    out: str = MISSING
    device: str = "auto"


def main(arguments: list[str]) -> int:
    """The verb."""
    chosen, overrides = parse_arguments(PredictArguments, arguments, passed_on=("eval",))
    # no data set is opened here, so a run whose data lies elsewhere still predicts
    run = load_run(Path(chosen.run), overrides)
    images = ImageFolderDataset(Path(chosen.images))
    out = Path(chosen.out)
    if out.resolve() == Path(chosen.images).resolve():
        raise WSSSError(f"out={out}: masks would lie among the images; choose another folder")
    in_threads(image_size, images.paths)  # a broken file is told before a mask is written
    make_writable(out)
    device = choose_device(chosen.device)
    run.module.to(device)
    names = ["background", *run.data.class_names]
    with evaluating(run.module):
        for index in track(range(len(images)), description="predicting"):
            item = images[index]
            mask = predict_mask(run, item["image"].to(device), item["rgb"])
            _save(mask, item["rgb"], out / item["name"])
    (out / "classes.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names)))
    print(f"{len(images)} masks and overlays in {out}")
    return 0


def _save(mask: np.ndarray, rgb: np.ndarray, stem: Path) -> None:
    """Palette mask and overlay; each file appears whole or not at all."""
    write_mask(mask, stem.with_name(f"{stem.name}.png"))
    drawn = io.BytesIO()
    Image.fromarray(overlay(rgb, mask, voc_palette())).save(drawn, format="JPEG")
    write_atomically(stem.with_name(f"{stem.name}_overlay.jpg"), drawn.getvalue())
