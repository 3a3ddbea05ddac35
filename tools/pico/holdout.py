"""The evaluation during training: fixed scenes on photographs that the training does not use."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pico.composites import Composites, Pool, batches
from pico.network import Pupil
from pico.scores import average_precision
from pico.stages import Stage


def make_holdout(pool: Pool, photos: list[np.ndarray], seed: int) -> dict[str, Tensor]:
    """Make 240 scenes of training cut-outs on backgrounds the training does not use."""
    classed = pool.cutouts[: pool.num_classed]
    data = Composites(Pool(classed, photos), Stage("scenes", 240, 96, 240, 0, 1), seed)
    return next(batches(data, 240, 0, 0))


@torch.no_grad()
def evaluate(model: Pupil, holdout: dict[str, Tensor]) -> dict[str, float]:
    """Measure image mAP of each class head on the fixed ``holdout`` batch."""
    model.eval()
    parts = [model(chunk) for chunk in holdout["image"].split(64)]
    model.train()
    truth = holdout["classes"].flatten(0, 1).cpu().numpy()
    return {
        name: average_precision(torch.cat([p[name] for p in parts]).cpu().numpy(), truth)
        for name in ("classes_cls", "classes_mean", "classes_max", "classes_token")
    }
