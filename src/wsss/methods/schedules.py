"""Learning rates: of groups of parameters, and their schedules as multipliers of the base rate."""

from __future__ import annotations

import re
from collections.abc import Collection
from math import cos, pi
from typing import Any

from torch import nn


def encoder_and_heads(
    encoder: nn.Module, lr: float, head_lr: float, **heads: nn.Module
) -> list[dict[str, Any]]:
    """Give optimiser groups: encoder, its norms (same values, apart as officially), heads by name.

    Args:
        encoder: learns at ``lr``.
        lr: base rate.
        head_lr: rate of the heads.
        heads: name of a group -> its module.
    """
    named = list(encoder.named_parameters())
    return [
        {"name": "encoder", "params": [p for n, p in named if "norm" not in n], "lr": lr},
        {"name": "norms", "params": [p for n, p in named if "norm" in n], "lr": lr},
        *(
            {"name": name, "params": list(head.parameters()), "lr": head_lr}
            for name, head in heads.items()
        ),
    ]


def decayed_or_not(
    module: nn.Module,
    *,
    lr: float,
    head_lr_factor: float,
    weight_decay: float,
    spared: Collection[str],
    fresh: re.Pattern[str],
) -> list[dict[str, Any]]:
    """Give optimiser groups: weights of two and more dimensions are decayed, all else is not.

    Args:
        module: whose parameters learn.
        lr: base rate.
        head_lr_factor: times ``lr``, for what pretraining does not give.
        weight_decay: of what is decayed.
        spared: names of further parameters that are not decayed.
        fresh: finds in its name what pretraining does not give.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        decayed = parameter.ndim > 1 and name not in spared
        new = fresh.search(name) is not None
        key = ("" if decayed else "not ") + "decayed" + (", new" if new else "")
        rate = lr * (head_lr_factor if new else 1.0)
        decay = weight_decay if decayed else 0.0
        group = {"name": key, "params": [], "lr": rate, "weight_decay": decay}
        groups.setdefault(key, group)["params"].append(parameter)
    return list(groups.values())


def poly_warmup(
    step: int,
    *,
    max_steps: int,
    warmup_steps: int,
    warmup_ratio: float = 1e-6,
    power: float = 0.9,
) -> float:
    """Warm up linearly from ``warmup_ratio``, then decay by a polynomial (toco.md section 4).

    The decay is *not* rebased at the end of the warm-up: at ``warmup_steps`` the multiplier jumps
    from nearly 1 to ``(1 - warmup_steps / max_steps) ** power``. ``warmup_ratio`` is a ratio of the
    base rate, not a rate. Past the end the value of the last step is kept.

    Args:
        step: 0-based optimiser step.
        max_steps: Length of the whole run in steps.
        warmup_steps: Length of the warm-up in steps, 0 for none.
        warmup_ratio: Multiplier at step 0 of the warm-up.
        power: Exponent of the decay.

    Returns:
        The multiplier of the base learning rate in force during ``step``.
    """
    step = min(step, max_steps - 1)
    if step < warmup_steps:
        return 1 - (1 - step / warmup_steps) * (1 - warmup_ratio)
    return (1 - step / max_steps) ** power


def cosine_warmup(
    time: float, *, length: float, warmup: float, start: float, floor: float
) -> float:
    """Warm up linearly, then follow a cosine down to a floor, as in timm (clustercam.md section 4).

    The cosine counts from time 0 and not from the end of the warm-up, where the multiplier steps
    down a little. A floor above 1 makes the rate rise, as ClusterCAM's official settings do (Q6).

    Args:
        time: Epochs so far, whole or not.
        length: Epochs of the whole run.
        warmup: Epochs of the warm-up, 0 for none.
        start: Multiplier at time 0 of the warm-up.
        floor: Multiplier at the end.

    Returns:
        The multiplier of the base learning rate.
    """
    if time < warmup:
        return start + time * (1 - start) / warmup
    return floor + 0.5 * (1 - floor) * (1 + cos(pi * time / length))
