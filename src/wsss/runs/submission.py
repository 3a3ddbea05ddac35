"""``wsss submit``: masks of VOC's test images in the archive that its evaluation server takes.

The ground truth of VOC 2012 test is only on the server (host.robots.ox.ac.uk:8080); it wants
``results/VOC2012/Segmentation/comp6_test_cls/NAME.png``, index PNGs of the images' own sizes, in a
tar.gz (field.md, C).
"""

import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from rich.progress import track

from wsss.core.devices import choose_device
from wsss.core.errors import WSSSError
from wsss.core.files import file_sha256, make_writable, whole_file, write_atomically
from wsss.data.dataset import Sample, check_files, in_threads
from wsss.data.images import image_size, mask_png, read_rgb
from wsss.data.voc import VOC_CLASSES, find_voc_root, list_path, voc_samples
from wsss.runs.folder import Run
from wsss.runs.masks import predict_mask
from wsss.runs.origin import check_origin

ORIGIN_FILE = "made_from.json"  # beside the archive, not in it


def submit(
    run: Run, *, split: str, competition: str, out: Path | None = None, device: str = "auto"
) -> Path:
    """Predict VOC's test images and pack them as the server takes them.

    A stopped call goes on where it was.

    Args:
        run: of VOC's 20 classes.
        split: list of the images.
        competition: ``comp5`` or ``comp6``.
        out: folder; None: ``submission`` in the run folder.
        device: where to predict, if anything is left to predict.

    Returns:
        The archive.

    Raises:
        WSSSError: other classes, missing data, ``out`` belongs to another run or protocol.
    """
    if run.data.class_names != VOC_CLASSES:
        raise WSSSError(
            f"{run.path}: its classes are not VOC's 20 in their order; the server scores only those"
        )
    place = choose_device(device)
    root = find_voc_root(run.data.root)
    samples = voc_samples(root, split, "")[: run.data.limit]
    check_files("image", [sample.image for sample in samples], list_path(root, split))
    check_origin(run, [split], with_masks=False)
    out = out or run.folder / "submission"
    make_writable(out)
    inner = PurePosixPath("results/VOC2012/Segmentation") / f"{competition}_test_cls"
    _settle_origin(out, run)
    _predict_all(run, samples, out / inner, place)
    archive = out / f"{competition}_test_cls.tar.gz"
    write_archive(archive, out, [inner / f"{sample.name}.png" for sample in samples])
    validate_archive(archive, inner, samples)
    print(f"{archive}: {len(samples)} masks, valid")
    return archive


def _settle_origin(out: Path, run: Run) -> None:
    """Write down whose masks lie in a folder, so that those of two runs cannot mix."""
    origin = {"checkpoint_sha256": file_sha256(run.checkpoint), "protocol": asdict(run.protocol)}
    text = json.dumps(origin, indent=2) + "\n"
    path = out / ORIGIN_FILE
    if path.is_file() and path.read_bytes() != text.encode():
        raise WSSSError(f"{out} holds masks of another run or protocol; give another out=")
    write_atomically(path, text.encode())


def _predict_all(run: Run, samples: Sequence[Sample], folder: Path, device: torch.device) -> None:
    """Predict what is not there yet, or is damaged; a stopped call goes on where it was."""

    def fault(sample: Sample) -> str | None:
        path = folder / f"{sample.name}.png"
        return _fault(path.read_bytes(), image_size(sample.image)) if path.is_file() else ""

    faults = in_threads(fault, samples)
    todo = [sample for sample, found in zip(samples, faults, strict=True) if found is not None]
    damaged = [(s.name, found) for s, found in zip(samples, faults, strict=True) if found]
    if damaged:
        name, found = damaged[0]
        print(f"warning: {len(damaged)} damaged masks are made again: {folder}/{name}.png {found}")
    if not todo:
        return
    run.to(device)
    for sample in track(todo, description="predicting"):
        mask = predict_mask(run, read_rgb(sample.image))
        write_atomically(folder / f"{sample.name}.png", mask_png(mask))


def write_archive(archive: Path, base: Path, members: Sequence[PurePosixPath]) -> None:
    """Pack files; the same masks give the same bytes."""
    with (
        whole_file(archive) as temporary,
        temporary.open("wb") as stream,
        gzip.GzipFile(filename="", fileobj=stream, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for member in members:
            content = (base / member).read_bytes()
            info = tarfile.TarInfo(str(member))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def validate_archive(archive: Path, inner: PurePosixPath, samples: Sequence[Sample]) -> None:
    """Read an archive back as the server would.

    Args:
        archive: the tar.gz.
        inner: folder that its masks must lie in.
        samples: the images, each of which needs one mask.

    Raises:
        WSSSError: unreadable, a missing or surplus file, a mask of another size, mode or class.
    """
    expected = {str(inner / f"{sample.name}.png"): sample for sample in samples}
    seen: set[str] = set()
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.name not in expected or member.name in seen:
                    raise WSSSError(
                        f"{archive} holds {member.name!r}, expected each of {len(expected)} masks "
                        f"once, in {inner}"
                    )
                seen.add(member.name)
                stream = tar.extractfile(member)
                content = stream.read() if stream else b""
                _validate_mask(archive, member.name, content, expected)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise WSSSError(f"{archive} cannot be read ({error}); remove it and repeat") from error
    missing = sorted({*expected} - seen)
    if missing:
        raise WSSSError(f"{archive} lacks {len(missing)} masks, {missing[0]} first; repeat")


def _validate_mask(archive: Path, name: str, content: bytes, expected: dict[str, Sample]) -> None:
    if found := _fault(content, image_size(expected[name].image)):
        raise WSSSError(f"{archive}: {name} {found}; remove it and repeat")


def _fault(content: bytes, size: tuple[int, int]) -> str | None:
    """Say what of a mask the server would not take; None where it is as expected.

    Args:
        content: of its file.
        size: (height, width) of the image.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            mode, ids = image.mode, np.asarray(image)
    except Exception:  # as Pillow raises
        return "is no image"
    if mode == "P" and ids.shape == size and ids.max(initial=0) <= len(VOC_CLASSES):
        return None
    return (
        f"has mode {mode}, shape {ids.shape} and ids up to {ids.max()}; "
        f"expected an index PNG of {size} with 0..{len(VOC_CLASSES)}"
    )
