"""On a device: what every method launches and waits for, that it mixes no devices, gives the same.

The device is the pretended one (``pretended_device.py``), and a GPU where there is one.
"""

import json
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from device_work import ALL, FIGURES, figures, works
from pretended_device import (
    DEVICE,
    Autocast,
    DeviceMismatchError,
    PretendedDevice,
    real,
    tensors_in,
)
from torch import Tensor, nn

from wsss.maps.permutohedral import PermutohedralLattice

STORED = json.loads(FIGURES.read_text())
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Sums are added up in the same order on every machine, whatever ran before.

    A training with ``trainer.deterministic=true`` leaves torch so, which then also fills new memory
    and takes other ways.
    """
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_launches_and_waits_are_those_stored(name: str) -> None:
    """``python tests/device_work.py`` writes them anew; float32 also gives the CPU's numbers."""
    known = torch.__version__.startswith(STORED["versions"]["torch"])
    known &= timm.__version__ == STORED["versions"]["timm"]
    found = {}
    for what, work in works(name).items():
        found[what], there = figures(work)
        if "bfloat16" not in what:
            expected = real(tensors_in(work(CPU)))
            torch.testing.assert_close(tensors_in(there), expected, rtol=1e-4, atol=1e-6)
            assert tensors_in(there), what
        elif there:
            _assert_learns_as_much(there, works(name)["second phase"](CPU))
    assert {what: figure["waits"] for what, figure in found.items()} == {
        what: figure["waits"] for what, figure in STORED[name].items()
    }
    if known:  # another release may take another way through its own operations
        assert found == STORED[name]


def _assert_learns_as_much(half: dict[str, Any], full: dict[str, Any]) -> None:
    """Compare a step in bfloat16 with one in float32: the same parameters learn, in float32."""
    assert half["gradients"].keys() == full["gradients"].keys()
    assert {gradient.dtype for gradient in half["gradients"].values()} == {torch.float32}
    torch.testing.assert_close(half["total"], full["total"].detach(), rtol=0.1, atol=0.02)


def test_stored_figures_are_of_all_that_runs() -> None:
    assert set(STORED) == {"versions", *ALL}


def sound(tensor: Tensor) -> Tensor:
    """Compute without any fault."""
    return (tensor * torch.tensor(2.0)).softmax(-1)[..., :2]


def test_a_sound_function_launches_twice_and_waits_never() -> None:
    with PretendedDevice() as device:
        given = torch.rand(2, 3).to(DEVICE)
        device.forget()
        found = sound(given)
        assert found.device == DEVICE
    assert device.launched == {"mul": 1, "_softmax": 1}
    assert not device.waits
    torch.testing.assert_close(real(found), sound(real(given)))


FAULTS = {
    "another device": lambda x: x + torch.ones(3),
    "another device in a list": lambda x: torch.cat([x, torch.ones(1, 3)]),
    "a scalar where none may be": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "a mask of the host": lambda x: torch.where(torch.ones(2, 3, dtype=torch.bool), x, x),
    "an index of the device": lambda x: torch.ones(3)[x.argmax(1)],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_of_two_devices_are_refused(fault: str) -> None:
    FAULTS[fault](torch.rand(2, 3))
    with PretendedDevice() as device:
        given = torch.rand(2, 3).to(DEVICE)
        device.forget()
        with pytest.raises(DeviceMismatchError, match="tensors of two devices"):
            FAULTS[fault](given)


WAITS = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense"),
    "truth": (lambda x: bool((x > 2).any()), "_local_scalar_dense"),
    "list": (lambda x: x.tolist(), "copy to the host"),
    "copy to the host": (lambda x: x.cpu(), "copy to the host"),
    "copied into the host": (lambda x: torch.zeros(2, 3).copy_(x), "copy to the host"),
    "new tensor": (lambda x: x.new_tensor([1.0]), "copy to the device"),
    "tensor there": (lambda x: torch.tensor([1.0], device=x.device), "copy to the device"),
    "index of the host": (lambda x: x[torch.tensor([1, 0])], "copy to the device"),
    "boolean index": (lambda x: x[x > 0.5], "boolean index"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "unique": (lambda x: x.unique(), "_unique2"),
    "masked select": (lambda x: x.masked_select(x > 0.5), "masked_select"),
    "none by a masked fill": (lambda x: x.clone().__setitem__(x > 0.5, 0.0), None),
    "none by a copy that does not block": (
        lambda x: x + torch.ones(3).to(x.device, non_blocking=True),
        None,
    ),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_makes_the_host_wait_is_counted(name: str) -> None:
    function, kind = WAITS[name]
    with PretendedDevice() as device:
        given = torch.rand(2, 3).to(DEVICE)
        device.forget()
        function(given)
    assert device.waits == ({f"{kind}: outside": 1} if kind else {})


def test_a_wait_is_named_by_the_function_of_the_package() -> None:
    with PretendedDevice() as device:
        lattice = PermutohedralLattice(torch.rand(5, 2).to(DEVICE))
        assert real(lattice.filter(torch.rand(5, 1).to(DEVICE))).isfinite().all()
    where = "maps.permutohedral.PermutohedralLattice."
    assert device.waits == {
        "copy to the device: outside": 2,
        f"copy to the host: {where}_packed_keys": 1,
        f"unique_consecutive: {where}__init__": 1,
    }


def test_autocast_narrows_products_and_widens_sums() -> None:
    layer = nn.Linear(3, 2)
    with PretendedDevice() as device:
        layer.to(DEVICE)
        given = torch.rand(4, 3).to(DEVICE)
        device.forget()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            with torch.no_grad():
                layer(given)
            product = layer(given)
            assert product.dtype == torch.bfloat16
            assert product.softmax(1).dtype == product.sum().dtype == torch.float32
            assert F.layer_norm(product, (2,)).dtype == torch.float32
            with torch.autocast(DEVICE.type, enabled=False):
                assert layer(given).dtype == torch.float32
            # input twice, weight and bias once; then widened for softmax, sum and norm
            assert device.launched["_to_copy"] == 7
        product.sum().backward()
        assert layer(given).dtype == torch.float32
        assert layer.weight.grad is not None  # though the first cast was made without gradients
        assert layer.weight.grad.dtype == torch.float32
    assert torch.autocast is not Autocast


def test_nothing_works_outside_of_the_context() -> None:
    with PretendedDevice():
        given = torch.rand(2).to(DEVICE)
    with pytest.raises(RuntimeError, match="outside of PretendedDevice"):
        given + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ALL)
def test_the_gpu_gives_what_the_cpu_gives(name: str) -> None:
    for what, work in works(name).items():
        quiet = partial(work, training=False) if "phase" in what else work
        on_cpu, on_gpu = quiet(CPU), quiet(torch.device("cuda"))
        if "phase" in what:
            assert on_cpu["gradients"].keys() == on_gpu["gradients"].keys(), what
            on_cpu, on_gpu = on_cpu["losses"], on_gpu["losses"]
        for expected, value in zip(tensors_in(on_cpu), tensors_in(on_gpu), strict=True):
            close = torch.isclose(value.cpu().float(), expected.float(), rtol=2e-2, atol=2e-3)
            assert close.float().mean() >= 0.99, what  # few pixels lie on a threshold
