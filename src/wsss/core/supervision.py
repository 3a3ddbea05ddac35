"""Names of kinds of supervision; runs are compared under equal ones only."""

import re
from collections.abc import Mapping
from typing import Any

from wsss.core.pretraining import stated_pretraining

IMAGE_LABELS = "image labels"
PIXEL_MASKS = "pixel masks"
CLIP = "CLIP"


def names_clip(*texts: object) -> bool:
    """Tell whether a text speaks of CLIP, a descendant such as MetaCLIP, or image-text pairs."""
    words = r"(clip|siglip)(?![a-z])|image-text pairs"
    return any(re.search(words, str(text).lower()) for text in texts)


def supervision_on(training: str, backbone: Mapping[str, Any]) -> str:
    """Name the supervision of a run: what training saw, and what its encoder was trained with.

    The weights decide, not the method: weights of CLIP saw image-text pairs, whatever learns on
    them. Random weights saw nothing, on whichever architecture. What a user declared of a file can
    add to what is known of it, never take away.

    Args:
        training: kind of the training signal, such as ``image labels``; that of pseudo labels may
            name CLIP already.
        backbone: where its weights came from, as ``WeightsInfo.as_dict()`` gives it.
    """
    suffix, pretraining = f" + {CLIP}", stated_pretraining(backbone)
    clip = training.endswith(suffix)
    if backbone.get("source") != "random":
        clip = clip or names_clip(backbone.get("name"), pretraining)
    kind = PIXEL_MASKS if PIXEL_MASKS in pretraining else training.removesuffix(suffix)
    return kind + suffix if clip else kind
