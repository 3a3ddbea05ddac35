"""The masks that a second stage trains on, and how it is said what they are."""

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Len
from pydantic import Field

from wsss.core.errors import WSSSError
from wsss.core.files import read_json
from wsss.core.records import Record, check_record
from wsss.core.supervision import IMAGE_LABELS, PIXEL_MASKS

GROUND_TRUTH = "ground_truth"
UNSTATED = "unstated masks"  # of a folder that nothing says about what made it
CARD_FILE = "pseudo_labels.json"  # lies among the masks that `wsss pseudo` writes


class Card(Record):
    """What ``pseudo_labels.json`` says of the masks beside it, as far as it is read."""

    made_from: dict[str, Any] = Field(default_factory=dict)
    supervision: Annotated[str, Len(1, 200)] = IMAGE_LABELS
    status: Literal["begun", "finished"] | None = None


def check_train_masks(train_masks: str | None, transform: Any) -> None:
    """Check that the training transform and the masks need each other.

    Args:
        train_masks: ``data.train_masks``.
        transform: of the training images; it takes masks if it has an argument ``mask``.

    Raises:
        WSSSError: masks for a method that learns from image labels, or none for one that needs
            them.
    """
    wanted = "mask" in inspect.signature(transform).parameters
    if wanted and train_masks is None:
        raise WSSSError(
            "data.train_masks is null, and this method trains on masks: give a folder of pseudo "
            f"labels (wsss pseudo writes one), or data.train_masks={GROUND_TRUTH}"
        )
    if train_masks is not None and not wanted:
        raise WSSSError(
            f"data.train_masks={train_masks}: {type(transform).__name__} takes no masks, the "
            "method learns from image labels; use method=segmenter, or leave it null"
        )
    if train_masks not in (None, GROUND_TRUTH) and not Path(str(train_masks)).is_dir():
        raise WSSSError(
            f"data.train_masks={train_masks}: no such folder; expected one index PNG for each "
            f"training image, or {GROUND_TRUTH}"
        )


def read_card(train_masks: str | None) -> dict[str, Any] | None:
    """Read what `wsss pseudo` wrote about a folder; None where it wrote nothing.

    Raises:
        WSSSError: the card is not readable, or holds something else.
    """
    if train_masks is None or train_masks == GROUND_TRUTH:
        return None
    path = Path(train_masks) / CARD_FILE
    if not path.is_file():
        return None
    # the card says what made the masks, so without it nobody knows
    mend = f"remove {path.parent}, and run wsss pseudo again"
    card = read_json(path, mend)
    if not isinstance(card, dict):
        raise WSSSError(f"{path}: expected a JSON object; {mend}")
    check_record(Card, card, str(path), mend)
    return card


def supervision_of(train_masks: str | None) -> str:
    """Name the kind of a training signal; runs are compared under equal supervision only."""
    if train_masks is None:
        return IMAGE_LABELS
    if train_masks == GROUND_TRUTH:
        return PIXEL_MASKS
    card = read_card(train_masks)
    return str(card["supervision"]) if card and "supervision" in card else UNSTATED
