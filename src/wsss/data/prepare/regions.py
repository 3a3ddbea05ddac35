"""A COCO segmentation becomes pixels; nothing unchecked reaches pycocotools' compiled code.

That code believes its input: runs that do not fill the image leave uninitialised memory in a mask,
a NaN never returns, and far coordinates overflow. So run lengths of both spellings are read here,
and coordinates are checked here, before it draws a polygon.
"""

import reprlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: longest outline of one polygon in pixels; its drawing needs about 100 bytes a pixel
MAX_OUTLINE = 10_000_000
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60


class Region(NamedTuple):
    """The pixels of an instance.

    Attributes:
        runs: run lengths that pycocotools decodes.
        area: number of pixels.
        slivers: polygons of fewer than three points that were left out.
    """

    runs: dict[str, Any]
    area: int
    slivers: int

    def pixels(self) -> NDArray[np.bool_]:
        """Give the pixels (H, W), in Fortran's order."""
        from pycocotools import mask as coco_mask  # compiled; only preparing needs it

        inside: NDArray[np.bool_] = coco_mask.decode(self.runs).view(bool)
        return inside


def read_region(segmentation: Any, height: int, width: int) -> Region:
    """Read a segmentation: a list of polygons and run lengths, or run lengths alone.

    Args:
        segmentation: as the JSON has it.
        height: of the image, as the next one.
        width: in pixels.

    Raises:
        ValueError: it cannot be read; the text follows on "annotation N has" and says the mend.
    """
    from pycocotools import mask as coco_mask  # compiled; only preparing needs it

    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    if segmentation is None or not parts:
        raise ValueError("no segmentation, perhaps only a box; draw its outline or remove it")
    if all(isinstance(part, int | float) for part in parts):
        raise ValueError(
            f"a flat list of {len(parts)} coordinates; put each polygon into a list of its own: "
            "[[x1, y1, x2, y2, x3, y3]]"
        )
    polygons, runs = [], []
    for part in parts:
        if isinstance(part, dict):
            counts = read_runs(part, height, width)
            runs.append({"size": [height, width], "counts": counts})
        elif not isinstance(part, list):
            raise ValueError(f"the part {shown(part)}; expected a polygon or run lengths")
        elif is_area(part, height, width):
            polygons.append(part)
    if not polygons and not runs:
        raise ValueError("only a polygon of fewer than three points; redraw or remove it")
    drawn = [coco_mask.frPyObjects(shapes, height, width) for shapes in (polygons, runs) if shapes]
    merged = coco_mask.merge([shape for shapes in drawn for shape in shapes])
    slivers = len(parts) - len(polygons) - len(runs)
    return Region(merged, int(coco_mask.area(merged)), slivers)


def is_area(polygon: list[Any], height: int, width: int) -> bool:
    """Check a polygon's coordinates, and say whether it has three points or more.

    Coordinates may lie outside the image by as much as its longer side; what lies outside is cut
    off. An object that sticks out of a picture is seldom larger than the picture; what lies
    farther away was measured in another picture or in other units.

    Raises:
        ValueError: see `read_region`.
    """
    for value in polygon if {*map(type, polygon)} - {int, float} else ():
        if type(value) not in (int, float):
            raise ValueError(
                f"the coordinate {shown(value)}; expected numbers x1, y1, x2, y2, ... of a polygon"
            )
    if len(polygon) % 2:
        raise ValueError(f"a polygon of {len(polygon)} numbers; expected pairs of x and y")
    try:
        points = np.array(polygon, np.float64).reshape(-1, 2)
    except OverflowError:
        points = np.full((1, 2), np.inf)
    size, margin = np.array([width, height]), max(height, width)
    fitting = (points >= -margin) & (points <= size + margin)  # a NaN fits nowhere
    if not fitting.all():
        value = points[~fitting][0]
        raise ValueError(
            f"the coordinate {value:g}, image {width}x{height} (width x height); expected pixels "
            "of this image, mend or remove it"
        )
    outline = np.abs(points[1:] - points[:-1]).sum()
    if outline > min(4 * height * width + 100 * (height + width), MAX_OUTLINE):
        raise ValueError(
            f"a polygon whose outline is {outline:.0f} px long, more than passes by every pixel; "
            "redraw it"
        )
    return len(points) >= 3


def read_runs(shape: dict[str, Any], height: int, width: int) -> list[int]:
    """Read run lengths, compressed (a string) or not (a list): outside, inside, outside, ...

    Raises:
        ValueError: see `read_region`.
    """
    size, counts = shape.get("size"), shape.get("counts")
    if not isinstance(size, list) or [whole(value) for value in size] != [height, width]:
        raise ValueError(
            f"run lengths for {shown(size)}, image {[height, width]} ([height, width]); export "
            "them for this image"
        )
    if isinstance(counts, str):
        runs: list[int | None] = [*decompress(counts)]
    elif isinstance(counts, list):
        runs = [whole(value) for value in counts]
    else:
        raise ValueError(f"run lengths that read {shown(counts)}; expected a list or a string")
    checked = [run for run in runs if run is not None and run >= 0]
    if len(checked) < len(runs):
        position = next(n for n, run in enumerate(runs) if run is None or run < 0)
        read = counts[position] if isinstance(counts, list) else runs[position]
        raise ValueError(
            f"the run length {shown(read)}; expected whole numbers from 0, export anew"
        )
    if sum(checked) != height * width:
        raise ValueError(
            f"run lengths that do not fill the image (they sum to {shown(sum(checked))}, it has "
            f"{height * width} pixels); export them anew"
        )
    return checked


def decompress(text: str) -> list[int]:
    """Read a compressed string of run lengths (COCO's ``counts``).

    Each character carries six bits, as its code minus 48: five of the number, lowest first, and
    whether more follow; the number is signed. From the fourth on it is the difference to the run
    before the last. A string that was written as Python's ``b'...'`` is read without that.

    Raises:
        ValueError: another character, a number without its end, or one larger than any image.
    """
    if text[:2] in ("b'", 'b"') and text[-1] == text[1]:  # neither quote is one of the characters
        text = text[2:-1].replace("\\\\", "\\")
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise ValueError(f"the character {character!r} in run lengths; export them anew")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            if shift > 35:
                raise ValueError("a run length beyond any image; export them anew")
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("run lengths that break off; export them anew")
    return runs


def looks_like_fractions(segmentation: Any, width: int) -> bool:
    """Say whether all coordinates of a list of polygons lie in 0..1, with rounding and overshoot.

    Only where the image is wider than 2 px is what lies there no object: at most a pixel.
    """
    low, high = (-0.05, 1.1) if width > 2 else (0, 1)
    return isinstance(segmentation, list) and all(
        isinstance(part, list) and all(low <= value <= high for value in part)
        for part in segmentation
    )


def whole(value: Any) -> int | None:
    """Give a whole number, also one written as 40.0; None for everything else."""
    if type(value) is int:
        return value
    return int(value) if type(value) is float and value.is_integer() else None


def shown(value: Any) -> str:
    """Give a stranger's value for a message, cut where it is long or deep."""
    return SHORT.repr(value)
