"""A device is there, or one line says that it is not."""

import pytest
import torch

from wsss.core.devices import choose_device
from wsss.core.errors import WSSSError


@pytest.mark.parametrize("name", ["mps", "xla", "xpu", "hpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there(name: str) -> None:
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    with pytest.raises(
        WSSSError, match=f"device={name}: torch .*use device=auto or device=cpu"
    ) as e:
        choose_device(name)
    assert "\n" not in str(e.value)


def test_what_is_no_device() -> None:
    with pytest.raises(WSSSError, match="device=gpu: expected auto, cpu, cuda or cuda:N"):
        choose_device("gpu")
    assert choose_device("cpu") == torch.device("cpu")
