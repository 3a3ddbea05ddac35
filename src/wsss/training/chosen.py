"""The overlay that a search leaves: what ``experiment=`` takes to have the chosen settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf

from wsss.runs.choice import is_setting
from wsss.runs.line import choices_of

#: what a line says of where things lie, which an overlay leaves to the next line
PLACES = ("runs_dir", "study", "logger", "gallery", "hydra")
#: what training sees or starts from, without which the settings would be another supervision's
SEEN = ("data.train_split", "data.train_masks", "data.label_source", "init_from")
SEEN_GROUP = "maps."
#: what trials ran under too, though it is no setting: the card of a number has it
CONDITIONS = ("budget.global_batch_size", "budget.crop_size", "budget.cam_size")


def overlay(
    overrides: Sequence[str],
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    choice: str,
    record: Path,
) -> str:
    """Write the overlay of a search: its base, groups and settings of its line, the chosen ones.

    Batch and sides of images are kept too. What else the line says (steps, devices, places)
    belonged to the search and is only named in a comment.

    Args:
        overrides: the line that the search began from, with the folders where it finds groups.
        config: its resolved configuration.
        settings: the chosen values by dotted key.
        choice: how they were chosen, as it is declared.
        record: of the search.
    """
    resolved = OmegaConf.create(dict(config))
    begun: list[str | dict[str, str]] = []
    replaced, fixed, others = [], {}, []
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        place = key.rpartition("@")[2]  # of a group that is laid elsewhere, random_walk@maps.x
        if key in ("experiments", "experiments@_global_"):
            # with the group, for what they begin from in turn is looked for beside them otherwise
            begun += [f"/experiments/{base}" for base in _listed(value)]
        elif not key.startswith("hydra/") and value in choices_of(key, overrides):
            if override.startswith("+"):  # a group of the user's own, which has no choice before
                begun.append({f"/{key}": value})
            else:
                replaced.append({f"override /{key}": value})
        elif place in SEEN or place.startswith(SEEN_GROUP):
            fixed[place] = OmegaConf.select(resolved, place)
        elif (is_setting(override) or key in CONDITIONS) and key not in settings:
            fixed[key] = OmegaConf.select(resolved, key)
        elif key.partition(".")[0] not in PLACES and key not in ("data.root", "objective"):
            others.append(override)
    study = config["study"] if config["study"] != "default" else config["data"]["name"]
    said = {"study": f"{study}-tuned", "choice": choice, "objective": config["objective"]}
    node = OmegaConf.create(said)
    for key, value in {**fixed, **settings}.items():
        OmegaConf.update(node, key, value, force_add=True)
    defaults = {"defaults": [*begun, "_self_", *replaced]}
    head = [
        "# @package _global_",
        f"# {choice}; the whole record: {record.parent.name}/{record.name}",
        "# Copied into experiments/, it is an overlay as any other.",
    ]
    if others:
        head.append(f"# Of the search alone: {' '.join(others)}")
    body = yaml.safe_dump(defaults) + yaml.safe_dump(OmegaConf.to_container(node), sort_keys=False)
    return "\n".join(head) + "\n" + body


def _listed(value: str) -> list[str]:
    """List the experiments that an override names, ``a/b`` or ``[a/b,c/d]``."""
    return [one.strip() for one in value.removeprefix("[").removesuffix("]").split(",")]
