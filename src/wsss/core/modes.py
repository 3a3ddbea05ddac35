"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set eval mode without gradients; afterwards every submodule has its former mode again.

    It is ``no_grad`` and not ``inference_mode``, because a method may need gradients for its CAMs
    and can then ask for them with ``torch.enable_grad``.
    """
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode
