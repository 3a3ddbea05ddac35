"""The forms in which verbs write their outputs, checked without torch."""

import re
from pathlib import Path

from wsss.core.errors import WSSSError
from wsss.core.schema import nearest

#: of localisation maps and probabilities: arrays, heat maps
FORMS = ("npy", "png", "both")
#: of an exported network
FORMATS = ("onnx", "torchscript", "pt2")
#: ending of a file -> the format that it stands for unless one is given
ENDINGS = {".onnx": "onnx", ".pt": "torchscript", ".ts": "torchscript", ".pt2": "pt2"}
#: of an exported network's input: ``SIDE`` or ``HEIGHTxWIDTH``
SIZE = re.compile(r"(\d{1,4})(?:x(\d{1,4}))?")


def check_form(key: str, form: str | None) -> None:
    """Raise WSSSError where maps cannot be written in a form; None: they are not written."""
    if form is not None and form not in FORMS:
        raise WSSSError(f"{key}={form}: expected one of {', '.join(FORMS)}, or null")


def format_of(out: str | Path, kind: str | None) -> str:
    """Give the format of an exported network: the one that is given, else that of the ending.

    Raises:
        WSSSError: none is given, and the ending names none.
    """
    if kind is not None:
        return kind
    ending = Path(out).suffix.lower()
    if ending not in ENDINGS:
        raise WSSSError(
            f"out={out}: expected an ending of {', '.join(ENDINGS)}, or give format= one of "
            f"{', '.join(FORMATS)}"
        )
    return ENDINGS[ending]


def check_format(kind: str, size: str | None) -> None:
    """Raise WSSSError where a network cannot be exported in a format and with an input of a size.

    Whether a side is at least a patch only the network can say.
    """
    if kind not in FORMATS:
        raise WSSSError(f"format={kind}: expected {', '.join(FORMATS)}{nearest(kind, FORMATS)}")
    if size not in (None, "dynamic") and not SIZE.fullmatch(str(size)):
        raise WSSSError(f"size={size}: expected SIDE, HEIGHTxWIDTH or dynamic")
    if kind == "torchscript" and size == "dynamic":
        raise WSSSError("size=dynamic: TorchScript keeps the size it was traced with; give onnx")
