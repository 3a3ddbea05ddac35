"""Pages made of the templates beside this file; whatever is put into them is text, never HTML."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **content: Any) -> str:
    """Fill a template: every text is escaped unless it is ``Markup``.

    Args:
        template: name of a file in ``templates/``.
        content: what the template shows.
    """
    return _environment().get_template(template).render(**content)


@lru_cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
