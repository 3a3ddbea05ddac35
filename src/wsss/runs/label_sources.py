"""What pseudo labels can be made from."""

from wsss.core.errors import WSSSError

SOURCES = ("cam", "seg")


def check_source(source: str, refine: str | None = None) -> None:
    """Raise WSSSError unless labels can be made from ``source``, and so refined."""
    if source not in SOURCES:
        raise WSSSError(f"source={source}: expected {' or '.join(SOURCES)}")
    if refine not in (None, "random_walk"):
        raise WSSSError(f"refine={refine}: expected random_walk, or null")
    if refine and source != "cam":
        raise WSSSError(f"refine={refine} lets localisation maps walk; give source=cam")
