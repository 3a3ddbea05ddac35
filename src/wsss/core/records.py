"""What our own files may hold, checked when they are read: a file may come from anybody."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from wsss.core.errors import WSSSError
from wsss.core.failures import one_line


class Record(BaseModel):
    """A group of keys; those that it does not name are anything, a later version may write more."""

    model_config = ConfigDict(extra="allow", strict=True)


def check_record(kind: type[Record], content: Any, origin: str, mend: str) -> None:
    """Check what was read from a file.

    Args:
        kind: what it may hold.
        content: as JSON gives it.
        origin: the file, for the error.
        mend: what to do where it holds something else.

    Raises:
        WSSSError: it names the first key that is missing or holds something else.
    """
    try:
        kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = one_line(".".join(map(str, first["loc"])), 200)
        said = first["msg"].removeprefix("Value error, ")
        found = first["input"]
        shown = "" if isinstance(found, Mapping | list) else f"={one_line(repr(found), 80)}"
        text = f"{where}{shown}: {said[:1].lower()}{said[1:]}".lstrip(":= ")
        raise WSSSError(f"{origin}: {text}; {mend}") from error
    except RecursionError as error:
        raise WSSSError(f"{origin}: has groups without end; {mend}") from error
