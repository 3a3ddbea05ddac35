"""Averaging over processes: what is averaged, bucket by bucket, and who talks by what."""

from pathlib import Path
from unittest.mock import patch

import lightning
import pytest
import torch
import torch.distributed as dist
from small_runs import FORKED, SMALL
from torch import nn

from wsss.evaluation.protocol import Protocol
from wsss.runs.compose import compose_run
from wsss.runs.folder import Run, build_data, build_module
from wsss.training import parallel
from wsss.training.trainer import build_trainer

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def average(rank: int, folder: str) -> None:
    """One of two processes that average gradients and statistics, 8 numbers a bucket."""
    parallel.BUCKET = 8
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    wide, norm, double = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1).double()
    module = nn.Sequential(wide, norm, double, nn.Linear(1, 1))
    wide.weight.grad = torch.full((4, 3), 1.0 + rank)
    if rank == 0:  # a parameter that only this one has used
        wide.bias.grad = torch.full((4,), 4.0)
    norm.weight.grad = torch.full((4,), 10.0 * rank)
    double.weight.grad = torch.full((1, 4), 2.0 * rank, dtype=torch.float64)
    norm.running_mean.fill_(6.0 * rank)
    norm.running_var.fill_(1.0 + 2 * rank)
    sent = []
    exchange = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *given: object) -> object:
        sent.append((str(tensor.dtype).removeprefix("torch."), tensor.numel()))
        return exchange(tensor, *given)

    with patch.object(dist, "all_reduce", all_reduce):
        parallel.average_gradients(module, torch.device("cpu"))
    found = {name: p.grad for name, p in module.named_parameters()}
    torch.save({**found, **dict(module.named_buffers()), "sent": sent}, f"{folder}/{rank}.pt")


def test_gradients_and_statistics_are_averaged_in_buckets(tmp_path: Path) -> None:
    processes = [FORKED.Process(target=average, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["0.weight"].unique().tolist() == [1.5]
        assert found["0.bias"].tolist() == [2.0] * 4  # zero where there was none
        assert found["1.weight"].tolist() == [5.0] * 4
        assert found["1.running_mean"].tolist() == [3.0] * 4
        assert found["1.running_var"].tolist() == [2.0] * 4
        assert found["2.weight"].tolist() == [[1.0] * 4]
        assert found["2.weight"].dtype == torch.float64
        unused = ("1.bias", "2.bias", "3.weight", "3.bias")
        assert all(found[name] is None for name in unused)  # the optimiser leaves them alone
        # which parameters have a gradient; a tensor larger than a bucket goes alone
        assert found["sent"] == [
            ("uint8", 8),
            ("float32", 12),
            ("float32", 8),
            ("float32", 8),
            ("float64", 4),
        ]


@pytest.mark.parametrize(
    ("settings", "backend", "synchronised"),
    [
        (["trainer=ddp"], "nccl", False),
        (["trainer=ddp", "+trainer.sync_batchnorm=true"], "nccl", True),
        (["trainer=ddp_cpu"], "gloo", False),
    ],
)
def test_gpus_talk_by_nccl_and_cpus_by_gloo(
    settings: list[str],
    backend: str,
    synchronised: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two GPUs are pretended while the trainer is built; nothing runs on them."""
    for module in ("fabric", "pytorch"):
        where = f"lightning.{module}.accelerators.cuda.num_cuda_devices"
        monkeypatch.setattr(where, lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    config = compose_run(["method=getam", *SMALL, *settings, "method.decoder_channels=16"])
    data = build_data(config)
    module = build_module(config, data.num_classes)
    trainer = build_trainer(Run(module, data, Protocol(**config["eval"]), config, tmp_path))
    assert isinstance(trainer, lightning.Trainer)
    strategy = trainer.strategy
    assert isinstance(strategy, parallel.GradientAveraging)
    assert strategy.root_device.type == ("cuda" if backend == "nccl" else "cpu")
    assert strategy._get_process_group_backend() == backend
    assert trainer.world_size == 2
    assert data.per_device_batch_size() == 2
    assert (strategy._layer_sync is not None) == synchronised


def test_only_getam_asks_for_batch_norms_that_are_synchronised() -> None:
    """Its page says so; the others have none that learn, or freeze them."""
    asking = {
        path.parent.name
        for path in EXPERIMENTS.rglob("*.yaml")
        if "sync_batchnorm: true" in path.read_text()
    }
    assert asking == {"getam"}
