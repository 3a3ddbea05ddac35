"""The optimiser of the blocks' matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Give roughly the nearest orthogonal matrix ``(r, c)``, by Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for the matrices of the blocks, in float32.

    PyTorch's own Muon iterates in bfloat16, which is slow on processors without that arithmetic.
    Updates are scaled to the size of AdamW's so that one learning rate serves both.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, decay: float) -> None:
        """Take the matrices ``(r, c)`` to optimise."""
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Make one update."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])
                # qkv holds three matrices, each with directions of its own.
                parts = update.chunk(3) if p.shape[0] == 3 * p.shape[1] else (update,)
                update = torch.cat([orthogonalise(part) for part in parts])
                size = 0.2 * math.sqrt(max(parts[0].shape))
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update, alpha=-group["lr"] * size)
