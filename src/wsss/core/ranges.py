"""Types of numbers with a range and of names, checked wherever a configuration takes them."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import AfterValidator, AllowInfNan
from pydantic_core import PydanticCustomError

T = TypeVar("T")
# names that Windows keeps for devices, with any ending
DEVICES = re.compile(r"(CON|PRN|AUX|NUL|(COM|LPT)\d)(\..*)?", re.IGNORECASE)
Finite = Annotated[float, AllowInfNan(False)]
Positive = Annotated[float, Gt(0), AllowInfNan(False)]
NotNegative = Annotated[float, Ge(0), AllowInfNan(False)]
Fraction = Annotated[float, Ge(0), Le(1), AllowInfNan(False)]  # both ends included
BelowOne = Annotated[float, Ge(0), Lt(1), AllowInfNan(False)]
Share = Annotated[float, Gt(0), Le(1), AllowInfNan(False)]  # of something, more than nothing
Part = Annotated[float, Gt(0), Lt(1), AllowInfNan(False)]  # of something, neither nothing nor all
# a configuration may be a stranger's: every number ends where no machine could follow
Count = Annotated[int, Ge(1), Le(10**9)]
Layers = Annotated[int, Ge(1), Le(1000)]  # of a network, one after another
Width = Annotated[int, Ge(1), Le(2**16)]  # of a layer in channels, or the side of a kernel
Tokens = Annotated[int, Ge(0), Le(1000)]  # that a network adds to those of an image
Together = Annotated[int, Ge(1), Le(4096)]  # images that are evaluated at once
Workers = Annotated[int, Ge(0), Le(1024)]  # processes that read images
Side = Annotated[int, Ge(1), Le(2**14)]  # of an image or a crop in pixels
Pictures = Annotated[int, Ge(0), Le(1000)]  # that are drawn, and kept in memory until they are
Scale = Annotated[float, Ge(0.05), Le(16), AllowInfNan(False)]  # of images, of a few pixels too
Seed = Annotated[int, Ge(0), Lt(2**32)]
Number = Annotated[int, Ge(0), Le(10**9)]
GreyLevel = Annotated[int, Ge(0), Le(254)]  # a threshold below which 255 never lies
Some = Annotated[tuple[T, ...], MinLen(1), MaxLen(1000)]  # one at least
Scales = Annotated[tuple[Scale, ...], MinLen(1), MaxLen(100)]  # an image is seen at each


def folder_name(text: str) -> str:
    """Give a text back if a folder may be called so, and lies where it is made.

    Raises:
        PydanticCustomError: it is empty, a path, hidden, too long, the name of a device, or has
            characters that a shell, a terminal or another file system reads otherwise.
    """
    plain = re.fullmatch(r"\w([\w .,+=-]*[\w,+=-])?", text) and len(text.encode()) <= 200
    if not plain or "\n" in text or DEVICES.fullmatch(text):
        raise PydanticCustomError(
            "folder_name",
            "the name of one folder: 1 to 200 bytes of letters, digits, _ - . , + = and blanks, "
            "a letter or digit first, no blank or dot last, no device such as CON",
        )
    return text


FolderName = Annotated[str, AfterValidator(folder_name)]


def _words(text: str) -> str:
    if not text.isprintable() or text != text.strip():
        raise PydanticCustomError("words", "1 to 200 characters on one line, no blank at its ends")
    return text


Words = Annotated[str, MinLen(1), MaxLen(200), AfterValidator(_words)]  # shown in tables


def one_of(names: Sequence[str]) -> Any:
    """Make the type of a text that is one of some names."""

    def check(text: str) -> str:
        if text not in names:
            raise PydanticCustomError("one_of", "one of " + ", ".join(names))
        return text

    return Annotated[str, AfterValidator(check)]


def _devices(value: int | str | list[int]) -> int | str | list[int]:
    if isinstance(value, str):
        right = re.fullmatch(r"auto|-1|[1-9]\d*|\d+(,\d+)+", value) is not None
    elif isinstance(value, list):
        right = bool(value) and min(value) >= 0 and len(set(value)) == len(value)
    else:
        right = value == -1 or value >= 1
    if not right:
        raise PydanticCustomError(
            "devices",
            "a number of processes, -1 or auto for all devices, or a list of their numbers",
        )
    return value


#: processes of a run on one machine
Devices = Annotated[int | str | list[int], AfterValidator(_devices)]


def _duration(value: str | Mapping[str, int]) -> str | Mapping[str, int]:
    units = ("weeks", "days", "hours", "minutes", "seconds")
    if isinstance(value, str):
        right = re.fullmatch(r"\d{1,4}(:\d{2}){3}", value) is not None
    else:
        right = bool(value) and all(k in units and 0 <= n <= 10**9 for k, n in value.items())
    if not right:
        raise PydanticCustomError("duration", "written as DD:HH:MM:SS, or as {hours: 2}")
    return value


Duration = Annotated[str | dict[str, int], AfterValidator(_duration)]
