"""The device that a command runs on."""

import torch

from wsss.core.errors import WSSSError


def choose_device(name: str) -> torch.device:
    """Choose a device: ``auto`` is the first GPU where there is one, else the CPU.

    Raises:
        WSSSError: no device of that name here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WSSSError(f"device={name}: expected auto, cpu, cuda or cuda:N") from error
    try:
        if device.type not in ("cpu", "cuda"):
            torch.zeros(1, device=device).item()
    except (RuntimeError, ImportError, AssertionError) as error:  # each backend has its own way
        raise WSSSError(
            f"device={name}: torch has no such device here; use device=auto or device=cpu"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise WSSSError(f"device={name}: torch sees no such GPU; use device=auto or device=cpu")
    return device
