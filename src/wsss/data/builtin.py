"""MiniVOC, the composite data set that travels inside the package (see its ATTRIBUTION.md).

It is a set of composed pictures in the VOC layout, read by the same code as VOC; it is not VOC.
"""

from importlib.resources import files
from pathlib import Path

from wsss.core.errors import WSSSError


def minivoc_root() -> Path:
    """Give the folder that holds MiniVOC's ``VOC2012``.

    Raises:
        WSSSError: the package was installed without its data files.
    """
    root = Path(str(files("wsss.data"))) / "minivoc"
    if not (root / "VOC2012" / "classes.txt").is_file():
        raise WSSSError(
            f"{root}/VOC2012/classes.txt is missing; expected the built-in data there, install "
            "the package again or run tools/build_minivoc.py"
        )
    return root


def _read_classes() -> tuple[str, ...]:
    text = (minivoc_root() / "VOC2012" / "classes.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


MINIVOC_CLASSES: tuple[str, ...] = _read_classes()
