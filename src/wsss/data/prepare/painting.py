"""The masks of COCO's instances, and what is odd about those before the first is written."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsss.core.errors import WSSSError
from wsss.data.dataset import ids_in
from wsss.data.prepare.common import run_all
from wsss.data.prepare.instances import Instance, Instances, Picture
from wsss.data.prepare.regions import Region, looks_like_fractions, read_region, shown
from wsss.maps.pixels import IGNORE_INDEX

SPECK = 16  # pixels by which the area of a small instance differs from its drawing
GROSS = 3  # times: a box is up to twice what it surrounds, and many tools write the box's area
FEW = 10_000  # images; fewer are looked over sooner than worker processes start


class Source(NamedTuple):
    """A picture and the file that annotates it."""

    origin: Path
    picture: Picture


class Drawn(NamedTuple):
    """What an instance's segmentation is worth.

    Attributes:
        area: its pixels.
        slivers: polygons left out.
        visible: whether the mask of its image shows its class: neither covered nor left out.
    """

    area: int
    slivers: int
    visible: bool


Looked = list[tuple[Source, Instance, Drawn]]


def look_over(
    contents: Sequence[Instances],
    names: Sequence[str],
    *,
    overlap: str,
    crowd: str,
    jobs: int | None,
) -> list[str]:
    """Draw every instance and mask once, and give what is odd about them in lines for the user.

    Args:
        contents: the files.
        names: what to call them.
        overlap: see `paint`, as the next one.
        crowd: crowd policy.
        jobs: processes, where there are many images.

    Raises:
        WSSSError: a segmentation that cannot be read, or an image or class whose instances all
            paint no pixel, or a class that no mask shows: a mask without a pixel of its label
            would be silently wrong.
    """
    draw = partial(_draw, overlap=overlap, crowd=crowd)
    pairs: Looked = []
    empty_images: list[Source] = []
    for content, name in zip(contents, names, strict=True):
        sources = [Source(content.path, picture) for picture in content.pictures]
        own = 1 if len(sources) < FEW else jobs
        drawn = run_all(draw, sources, description=f"instances of {name}", jobs=own)
        for source, results in zip(sources, drawn, strict=True):
            instances = source.picture.instances
            pairs += [(source, *pair) for pair in zip(instances, results, strict=True)]
            if instances and not content.official and not any(result.area for result in results):
                empty_images.append(source)
    if empty_images:
        source = empty_images[0]
        first = source.picture.instances[0]
        raise WSSSError(
            f"{_place(source, first)} paints no pixel, and no other of this image does "
            f"({len(empty_images)} images are so): {_why(first, source)}"
        )
    _check_classes(pairs, contents[0].class_names, overlap, crowd)
    return _notes(pairs, crowd)


def _check_classes(pairs: Looked, class_names: Sequence[str], overlap: str, crowd: str) -> None:
    """Raise WSSSError for a class of which nothing is painted, or nothing can be seen."""
    every = {instance.class_id for _, instance, _ in pairs}
    painted = {instance.class_id for _, instance, drawn in pairs if drawn.area}
    visible = {instance.class_id for _, instance, drawn in pairs if drawn.visible}
    for source, instance, drawn in pairs:
        bare = instance.class_id not in painted
        if instance.class_id in every - visible and (bare or drawn.area):
            what = "paints no pixel" if bare else "shows no pixel in its mask"
            why = _why(instance, source) if bare else _hidden(instance, overlap, crowd)
            raise WSSSError(
                f"{_place(source, instance)} {what}, and no other of the class "
                f"{class_names[instance.class_id - 1]!r} does: {why}"
            )


def _notes(pairs: Looked, crowd: str) -> list[str]:
    """Count what is odd but no error, and name the first of each kind."""
    shown_in = {id(source) for source, _, drawn in pairs if drawn.visible}
    empty = [_place(source, instance) for source, instance, drawn in pairs if not drawn.area]
    slivers = [_place(source, instance) for source, instance, drawn in pairs if drawn.slivers]
    apart = [
        f"{_place(source, instance)} declares {shown(instance.area)} and paints {drawn.area:,}"
        for source, instance, drawn in pairs
        if _apart(instance.area, drawn.area)
    ]
    covered = [
        _place(source, instance)
        for source, instance, drawn in pairs
        if drawn.area and not drawn.visible and id(source) in shown_in
    ]
    crowds = [
        _place(source, instance)
        for source, instance, _ in pairs
        if id(source) not in shown_in
        and instance is source.picture.instances[0]
        and any(other.crowd for other in source.picture.instances)
    ]
    left = "their masks empty" if crowd == "skip" else "nothing to score in their masks"
    of_all = f"of {len(pairs):,} instances"
    kinds = (
        (empty, f"{of_all} paint no pixel", "their labels stay; redraw or remove them"),
        (slivers, f"{of_all} have polygons of fewer than three points", "those are left out"),
        (apart, f"{of_all} declare another area than they paint", "only the painted pixels count"),
        (covered, f"{of_all} are of a class that their mask does not show", "their labels stay"),
        (crowds, "images show only crowd regions", f"crowd={crowd} leaves {left}"),
    )
    return [
        f"note: {len(found):,} {what}, first {found[0]}; {mend}"
        for found, what, mend in kinds
        if found
    ]


def _place(source: Source, instance: Instance) -> str:
    return f"{source.origin}: annotation {shown(instance.key)} of {source.picture.file_name}"


def _why(instance: Instance, source: Source) -> str:
    if looks_like_fractions(instance.segmentation, source.picture.width):
        return "its coordinates lie in 0..1; multiply x by the image's width, y by its height"
    return "it lies outside the image or has no width; redraw or remove it"


def _hidden(instance: Instance, overlap: str, crowd: str) -> str:
    if instance.crowd and crowd != "paint":
        done = "leaves crowd regions out" if crowd == "skip" else "ignores crowd regions"
        return f"crowd={crowd} {done}; give crowd=paint, or remove the annotations of this class"
    other = " give overlap=smallest," if overlap == "last" else ""
    return f"others cover it (overlap={overlap});{other} redraw or remove it"


def _apart(declared: float | None, painted: int) -> bool:
    """Say whether an area cannot be that of an instance, by far."""
    if declared is None or not painted:
        return False
    if not 0 <= declared < math.inf:
        return True
    low, high = sorted((declared, painted))
    return high - low > SPECK and high > GROSS * low


def _draw(source: Source, *, overlap: str, crowd: str) -> list[Drawn]:
    picture = source.picture
    drawn = []
    real = []
    for instance in picture.instances:
        here = _read(instance, picture, source.origin)
        # in fractions of the image's size, an instance is the first pixel at most
        fractions = looks_like_fractions(instance.segmentation, picture.width)
        real += [] if fractions else [(instance, here)]
        drawn.append((0 if fractions else here.area, here.slivers))
    ids = ids_in(_compose(real, picture, overlap, crowd)) - {IGNORE_INDEX}
    return [
        Drawn(area, slivers, area > 0 and instance.class_id in ids)
        for instance, (area, slivers) in zip(picture.instances, drawn, strict=True)
    ]


def paint(
    picture: Picture, *, overlap: str, crowd: str, origin: Path | None = None
) -> NDArray[np.uint8]:
    """Give the class ids (H, W) of a picture's instances.

    Args:
        picture: size and instances.
        overlap: ``smallest`` (of fewest pixels; equal ones: the earlier) or ``last`` is on top.
        crowd: ``paint``, ``ignore`` or ``skip``.
        origin: the file, for messages.

    Raises:
        WSSSError: a segmentation that cannot be read.
    """
    regions = [(instance, _read(instance, picture, origin)) for instance in picture.instances]
    return _compose(regions, picture, overlap, crowd)


def _compose(
    regions: Sequence[tuple[Instance, Region]], picture: Picture, overlap: str, crowd: str
) -> NDArray[np.uint8]:
    size = (picture.height, picture.width)
    solid = [pair for pair in regions if crowd == "paint" or not pair[0].crowd]
    if overlap == "last":
        solid.reverse()
    else:
        solid.sort(key=lambda pair: pair[1].area)
    mask = np.zeros(size, np.uint8, order="F")
    if crowd == "ignore":
        for instance, here in regions:
            if instance.crowd:
                np.copyto(mask, IGNORE_INDEX, where=here.pixels())
    for instance, here in reversed(solid):  # the first one on a pixel is painted last
        np.copyto(mask, instance.class_id, where=here.pixels())
    return np.ascontiguousarray(mask)


def _read(instance: Instance, picture: Picture, origin: Path | None) -> Region:
    try:
        return read_region(instance.segmentation, picture.height, picture.width)
    except ValueError as error:
        where = f"{origin}: " if origin else ""
        name = f"annotation {shown(instance.key)} of {picture.file_name}"
        raise WSSSError(f"{where}{name} has {error}") from error
