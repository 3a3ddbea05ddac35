"""What must be equal for two numbers to be ranked."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from wsss.comparison.entries import Entry, changes_of_encoder

#: what must be equal for any number
IDENTITY = ("data", "split", "list_sha256", "num_images", "label_source", "masks_sha256", "metric",
            "label_map_definitions")  # fmt: skip
_SEEDS = ("cam_resize", "resize_long", "use_image_labels", "cam_threshold_source", "labels_sha256")
_SEARCHED = (*_SEEDS, "oracle_thresholds")
_HELD_OUT = (*_SEARCHED, "holdout_list_sha256")
_PSEUDO = ("cam_resize", "resize_long", "refine", "labels_sha256")
_SINGLE = ("single_resize", "resize_long")
_MERGED = ("resize", "resize_long", "seg_scales", "seg_sizes", "flip", "flip_merge", "scale_merge",
           "merge_of", "align_corners", "scale_by", "scale_from", "merge_at")  # fmt: skip
_CRF = ("crf", "crf_prune", "crf_backend")
#: number -> what else decides it
MEASURING: dict[str, tuple[str, ...]] = {
    "seed_miou": _SEEDS,
    "seed_miou_predicted_labels": (*_SEEDS, "single_resize"),
    "seed_miou_holdout": _HELD_OUT,
    "seed_threshold_holdout": _HELD_OUT,
    "seed_miou_oracle": _SEARCHED,
    "seed_threshold_oracle": _SEARCHED,
    "seed_pixel_map": _SEEDS,
    "lam_miou": _SEEDS,
    "lam_miou_oracle": _SEARCHED,
    "lam_threshold_oracle": _SEARCHED,
    "pseudo_label_miou_ignored_as_background": _PSEUDO,
    "pseudo_label_miou_excluded": _PSEUDO,
    "pseudo_label_coverage": _PSEUDO,
    "seg_miou": _SINGLE,
    "seg_miou_crf": (*_SINGLE, *_CRF),
    "seg_miou_ms": _MERGED,
    "seg_miou_ms_crf": (*_MERGED, *_CRF),
    "image_map": (*_SINGLE, "labels_sha256"),
    "image_f1": (*_SINGLE, "labels_sha256"),
}
#: what cards say that were written before there was a choice
BEFORE = {"scale_by": "size", "scale_from": "resized", "merge_at": "mask"}
#: what a fair comparison of methods holds fixed; a study of one of them says so with allow=
TRAINING = ("backbone", "crop_size", "iterations", "global_batch_size", "selection",
            "train_list_sha256", "init_from", "choice")  # fmt: skip


def relevant_fields(entries: Sequence[Entry], metrics: Sequence[str]) -> list[str]:
    """Give the fields of a protocol that decide whether these numbers can be compared."""
    fields = [*IDENTITY, *(name for key in metrics for name in MEASURING[key])]
    cards = [entry.card for entry in entries]
    if any(key.startswith(("seed", "lam")) for key in metrics) and not all(
        card.get("use_image_labels", True) for card in cards
    ):
        fields.append("single_resize")  # whence the labels are predicted
    if any("crf" in key for key in metrics) and any(card.get("crf_prune") for card in cards):
        fields.append("labels_sha256")
    return [*dict.fromkeys(fields), *TRAINING]


def differing_fields(
    entries: Sequence[Entry], metrics: Sequence[str]
) -> dict[str, dict[str, list[str]]]:
    """Give the protocol fields that are not equal: field -> value -> groups that have it."""
    result: dict[str, dict[str, list[str]]] = {}
    for name in relevant_fields(entries, metrics):
        values: dict[str, list[str]] = {}
        for entry in entries:
            holders = values.setdefault(_readable(entry.card.get(name, BEFORE.get(name))), [])
            if entry.group not in holders:
                holders.append(entry.group)
        if len(values) > 1:
            result[name] = values
    return result


def _readable(value: Any) -> str:
    """Put a field's value in few words."""
    if isinstance(value, Mapping):
        if "taken_by" in value:  # what a run started from
            return f"{value['taken_by']} {str(value.get('sha256'))[:8]}"
        label = value.get("name")
        if value.get("source") == "random":  # every seed draws its own
            return f"{label} ({', '.join(['random', *changes_of_encoder(value)])})"
        digest = value.get("state_sha256") or value.get("file_sha256")
        if label:
            return f"{label} ({str(digest)[:8]})" if digest else str(label)
        return json.dumps(value, sort_keys=True)
    text = json.dumps(value)
    return f"{text[1:9]}..." if re.fullmatch('"[0-9a-f]{64}"', text) else text  # a hash
