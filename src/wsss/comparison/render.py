"""Pages made of the templates beside this file; whatever is put into them is text, never HTML."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **content: Any) -> str:
    """Fill a template: every text is escaped unless it is ``Markup``.

    Args:
        template: name of a file in ``templates/``.
        content: what the template shows.
    """
    return _environment().get_template(template).render(**content)


def _encodable(value: Any) -> Any:
    """Replace halves of characters, which JSON may hold and UTF-8 may not."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return value.encode("utf-8", "replace").decode("utf-8")


@lru_cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_encodable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
