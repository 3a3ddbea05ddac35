"""Learning-rate schedules, as multipliers of the base rate."""

from __future__ import annotations


def poly_warmup(
    step: int,
    *,
    max_steps: int,
    warmup_steps: int,
    warmup_ratio: float = 1e-6,
    power: float = 0.9,
) -> float:
    """Linear warm-up from ``warmup_ratio`` followed by a polynomial decay (toco.md section 4).

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
