"""What a run learned from, with what it started from."""

from collections.abc import Mapping
from typing import Any

from wsss.core.supervision import IMAGE_LABELS, PIXEL_MASKS, supervision_on
from wsss.runs.checkpoint_paths import STARTS
from wsss.runs.folder import Run


def start_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Give what a run started from, for the card beside its numbers; None: its own beginning.

    Args:
        config: resolved configuration of a run that was prepared.
    """
    for key in STARTS:
        start = config.get(key)
        if isinstance(start, Mapping) and not start.get("same_run"):
            known = {k: v for k, v in start.items() if k not in ("path", "same_run")}
            return {"taken_by": key, **known}
    return None


def supervision_of_run(run: Run) -> str:
    """Name the supervision: what training sees, and what the weights were trained with before.

    Weights that saw masks keep having seen them, in whichever run they go on.
    """
    own = supervision_on(run.data.supervision, run.module.backbone.weights_info.as_dict())
    start = start_of(run.config)
    theirs = str(start["supervision"]) if start else own
    if theirs in (own, IMAGE_LABELS) or own.startswith(PIXEL_MASKS):
        return own
    return theirs if theirs.startswith(PIXEL_MASKS) else f"{own}, started from {theirs}"
