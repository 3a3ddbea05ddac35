"""How the settings of a run were chosen, which `wsss compare` shows beside every number.

An overlay declares it for the settings it holds. A line that sets further ones no longer has the
settings that were chosen so, which is said too.
"""

from collections.abc import Sequence

#: groups and keys of settings; the rest of budget and evaluation is on the card of a number already
SINGLE = ("budget.warmup_steps", "eval.cam_threshold", "eval.cam_high", "eval.cam_low")
WHOLE = ("method", "backbone", "data", "data.train_transform", "second_stage", "random_walk")
#: of the budget, what augmentation takes; no search varies it
AUGMENTATION = ("budget.scale_range", "budget.blur_radius", "budget.local_size")
#: groups all of whose keys are settings: of a run, and of those that follow on it
OF_RUN = ("method.", "backbone.", "data.train_transform.")
OF_FOLLOWING = ("second_stage.", "random_walk.")
CHANGED = ", then changed"


def choice_of(declared: str | None, overrides: Sequence[str]) -> str | None:
    """Say how settings were chosen that a line of overrides gives.

    Args:
        declared: what the composed configuration says; None: nothing.
        overrides: the line.
    """
    said = any(each.startswith("choice=") for each in overrides)
    if declared is None or said or declared.endswith(CHANGED):
        return declared
    return f"{declared}{CHANGED}" if any(map(is_setting, overrides)) else declared


def is_setting(override: str) -> bool:
    """Say whether an override changes a setting; without a second stage the first stays as is."""
    key = override.lstrip("+~").partition("=")[0]
    if override == "second_stage=null":
        return False
    return key in (*SINGLE, *AUGMENTATION, *WHOLE) or key.startswith((*OF_RUN, *OF_FOLLOWING))
