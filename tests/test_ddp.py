"""Two CPU processes (gloo) train and evaluate as one does; a run survives the death of either."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from small_runs import FORKED, SMALL, Command, processes_of
from small_runs import METHODS as SMALL_METHODS
from torch import Tensor, nn

from wsss.cli import main
from wsss.data.datamodule import ImageDataModule
from wsss.evaluation.evaluator import evaluate
from wsss.evaluation.protocol import Protocol
from wsss.methods.base import WSSSModule
from wsss.methods.more.contrast import une_loss
from wsss.models.weights import state_sha256
from wsss.runs.compose import compose_run
from wsss.runs.folder import Run, build_data, build_module
from wsss.training.parallel import average_gradients
from wsss.training.trainer import accelerate, build_trainer

STEPS = 6  # of which 0 to 3 are the first phase
METHODS = {
    "toco": ["method.seg_after=0.5", "method.decoder_channels=16"],
    "clustercam": [
        "method.epochs=3",
        "method.warmup_epochs=1",
        "method.seg_from_epoch=2",
        "method.decoder_channels=16",
    ],
    "tkp_pcl": ["budget.warmup_steps=4", "method.lstm_hidden=8", "method.trained_blocks=2"],
    "getam": ["method.decoder_channels=16"],
    # tokens that have parted, or all contrasts would be log K
    "mctformer": ["method.epochs=3", "method.warmup_epochs=1", "method.token_noise=1.0"],
    "weclip": SMALL_METHODS["weclip"],
    "more": SMALL_METHODS["more"],
}
# under which two processes are two passes of one
COUNTED_APART = {"more": ["+method.quirks.rank_denominators=true"]}
# in float64, or rounding moves a pixel's pseudo label
WHOLE = "trainer.precision=64-true"
TINY = [
    *SMALL,
    f"budget.max_steps={STEPS}",
    "budget.eval_every=100",
    "budget.cam_size=64",
    "eval.single_resize=64",
    "eval.seg_sizes=null",
    "eval.holdout_per_class=0",
    "eval.seg_scales=[1.0]",
    "eval.crf=null",
    "gallery=0",
    "trainer.deterministic=true",
]


class States(Callback):
    """Hashes of parameters and buffers after every optimiser step; at the phases' ends they too.

    Beside them the gradients of these steps, and what was logged of every pass.
    """

    def __init__(self) -> None:
        self.hashes: dict[int, str] = {}
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.gradients: dict[int, dict[str, Tensor]] = {}
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step + 1 in (4, STEPS):
            found = {
                n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None
            }
            self.gradients[trainer.global_step + 1] = found

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        metrics = trainer.callback_metrics.items()
        self.logged.append({k: v.item() for k, v in metrics if k.startswith("train/")})
        if trainer.global_step in (0, *self.hashes):  # between two passes of a step
            return
        state = pl_module.state_dict()
        self.hashes[trainer.global_step] = state_sha256(state)
        if trainer.global_step in (4, STEPS):
            self.kept[trainer.global_step] = {k: value.clone() for k, value in state.items()}


def prepare(
    method: str, folder: Path, *overrides: str
) -> tuple[lightning.Trainer, WSSSModule, ImageDataModule, Protocol]:
    config = compose_run([f"method={method}", *TINY, *METHODS[method], *overrides])
    lightning.seed_everything(0, verbose=False)
    data, protocol = build_data(config), Protocol(**config["eval"])
    module = build_module(config, data.num_classes)
    run = Run(module, data, protocol, config, folder)
    return build_trainer(run), module, data, protocol


def train(
    method: str, folder: Path, *overrides: str
) -> tuple[States, Callable[..., dict[str, Any]]]:
    """What one process sees of a training, and the evaluation that may follow."""
    trainer, module, data, protocol = prepare(method, folder, *overrides)
    states = States()
    trainer.callbacks.append(states)
    trainer.fit(module, datamodule=data)

    def evaluation(state: dict[str, Tensor] | None = None) -> dict[str, Any]:
        module.load_state_dict(state or module.state_dict())
        result = evaluate(module, data.eval_dataloader("val"), protocol, data.class_names)
        return counts(result)

    return states, evaluation


def counts(result: dict[str, Any]) -> dict[str, Any]:
    """All integers of an evaluation."""
    cells = {kind: cells.tolist() for kind, cells in result["cells"].items()}
    return {"confusion": result["confusion"], "cells": cells, "curve": result["seed_curve"]}


# tokens that UNE takes in each of four images, two a process
SELECTED = ((8, 3, 2, 5), (8, 3, 0, 0), (0, 0, 0, 0))


def une_gradient(counts: tuple[int, ...], own: slice = slice(4)) -> Tensor | None:
    """Give the gradient of UNE for a factor on the patches, of four images or a process's own."""
    torch.manual_seed(0)
    tokens, patches = torch.randn(4, 3, 5).double(), torch.randn(4, 5, 8, 8).double()
    labels = torch.eye(3)[[0, 1, 2, 0]]
    selected = [torch.randint(8, (count, 2)) for count in counts]
    factor = nn.Conv2d(5, 5, kernel_size=1, bias=False).double()
    several = own != slice(4)
    loss = une_loss(
        tokens[own], factor(patches[own]), selected[own], labels[own], over_ranks=several
    )
    if loss.requires_grad:
        loss.backward()
    if several:
        average_gradients(factor, torch.device("cpu"))
    return factor.weight.grad


def train_rank(rank: int, port: int, out: str) -> None:
    """One of two processes that train every method in turn, as those of torchrun would."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }
    torch.set_num_threads(1)
    seen = {}
    for method in METHODS:
        apart = COUNTED_APART.get(method, [])
        states, evaluation = train(method, Path(out) / method, "trainer=ddp_cpu", *apart)
        seen[method] = {"hashes": states.hashes, "states": states.kept, "counts": evaluation()}
    for method in COUNTED_APART:
        states, _ = train(method, Path(out) / f"{method} whole", "trainer=ddp_cpu", WHOLE)
        seen[f"{method} whole"] = {
            "hashes": states.hashes,
            "states": states.kept,
            "gradients": states.gradients,
            "logged": states.logged,
        }
    own = slice(2 * rank, 2 * rank + 2)
    seen["une"] = {counts: une_gradient(counts, own) for counts in SELECTED}
    torch.save(seen, Path(out) / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes saw: method -> states, counts."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [FORKED.Process(target=train_rank, args=(rank, port, str(out))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_both_ranks_have_the_same_weights_after_every_step(
    method: str, ranks: list[dict[str, Any]]
) -> None:
    first, second = (rank[method]["hashes"] for rank in ranks)
    assert list(first) == list(range(1, STEPS + 1))
    assert first == second
    assert len(set(first.values())) == STEPS


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the two processes: another number of threads adds up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_learn_as_one_that_accumulates(
    method: str, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    """To the bit: images, random draws and normalisers are those of a place in the global batch.

    MoRe's normalisers are so under a quirk. Not compared are the statistics of batch norms, which
    one process moves pass by pass, two both at once.
    """
    passes = ["trainer.accumulate_grad_batches=2", *COUNTED_APART.get(method, [])]
    one, evaluation = train(method, tmp_path, "trainer=cpu", *passes)
    for step, state in ranks[0][method]["states"].items():
        for name, value in state.items():
            if "running" not in name and "num_batches" not in name:
                assert torch.equal(value, one.kept[step][name]), (step, name)
    alone = evaluation(ranks[0][method]["states"][STEPS])
    assert alone == ranks[0][method]["counts"] == ranks[1][method]["counts"]
    assert sum(map(sum, alone["confusion"]["seed"])) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", COUNTED_APART)
def test_two_processes_that_count_together_are_one(
    method: str, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Gradients, weights and what is logged are those of one process with the undivided batch."""
    one, _ = train(method, tmp_path, "trainer=cpu", WHOLE)
    for rank in ranks:
        found = rank[f"{method} whole"]
        assert found["hashes"] == ranks[0][f"{method} whole"]["hashes"]
        torch.testing.assert_close(found["gradients"], one.gradients, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found["states"], one.kept, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found["logged"], one.logged, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("counts", SELECTED)
def test_uncertain_tokens_of_both_processes_count(
    counts: tuple[int, ...], ranks: list[dict[str, Any]]
) -> None:
    """Also where one has none, or neither."""
    for rank in ranks:
        torch.testing.assert_close(rank["une"][counts], une_gradient(counts))


# what the docstrings say below "Several processes"
PER_IMAGE = {
    "toco": {"cls_loss", "cls_aux_loss", "ctc_loss", "reg_loss"},
    "clustercam": {"cls_loss", "patch_loss"},
    "tkp_pcl": {"mce_loss", "pce_loss", "l2_loss"},
    "getam": {"cls_loss", "reg_loss"},
    "mctformer": {"cls_loss", "cct_loss", "patch_loss"},
    "more": {"cls_loss", "cls_aux_loss", "distinct_loss", "cle_loss", "reg_loss"},
}
PER_PASS = {
    "toco": {"ptc_loss", "seg_loss"},
    "clustercam": {"seg_loss"},
    "getam": {"seg_loss"},
    "weclip": {"seg_loss", "aff_loss"},
    "more": {"ptc_loss", "une_loss", "seg_loss"},
}


@pytest.mark.parametrize("official_compat", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_means_of_halves_where_stated(
    method: str, official_compat: bool, tmp_path: Path
) -> None:
    if official_compat and method == "tkp_pcl":
        pytest.skip("has no official code")
    compat = ["method.official_compat=true"] if official_compat else []
    _, module, data, _ = prepare(method, tmp_path, *compat)
    module.eval()  # random draws and batch norms aside
    if method == "tkp_pcl":  # patches sure enough to be contrasted
        module.classifier.weight.data *= 50
    if method == "getam":  # pixels whose losses differ
        module.decoder.head[-1].weight.data *= 50
    batch = next(iter(data.train_dataloader()))

    def losses(part: slice) -> dict[str, Tensor]:
        step: dict[str, Tensor] = module.losses(
            {name: values[part] for name, values in batch.items()}, STEPS - 1
        ).losses
        return step

    torch.manual_seed(0)
    whole = losses(slice(4))
    torch.manual_seed(0)
    first, second = losses(slice(2)), losses(slice(2, 4))
    assert set(whole) == PER_IMAGE.get(method, set()) | PER_PASS.get(method, set())
    for name, value in whole.items():
        mean = (first[name] + second[name]) / 2
        assert (name in PER_IMAGE.get(method, set())) == torch.allclose(
            value, mean, rtol=1e-4, atol=0
        ), name


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["trainer=ddp_cpu", "trainer.devices=3"], "3 process(es)"),
        (["trainer=cpu", "trainer.devices=2", "trainer.strategy=ddp"], "trainer.strategy=ddp"),
        (["trainer=cpu", "trainer.devices=2", "+trainer.sync_batchnorm=true"], "sync_batchnorm"),
        (["trainer=cpu", "trainer.compile=fast"], "trainer.compile=fast"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is_written(
    settings: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    command = ["train", "method=getam", *TINY, *METHODS["getam"], *settings, f"runs_dir={runs}"]
    assert main(command) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert len(error.splitlines()) == 1
    assert not runs.exists()


def test_several_cpus_are_several_averaging_processes(tmp_path: Path) -> None:
    for settings in (["trainer=cpu", "trainer.devices=2"], ["trainer=ddp_cpu"]):
        trainer, _, data, _ = prepare("toco", tmp_path, *settings)
        data.trainer = trainer
        assert type(trainer.strategy).__name__ == "GradientAveraging"
        assert data.per_device_batch_size() == 2


def start(runs: Path, log: Path) -> Command:
    command = ["train", "method=tkp_pcl", *TINY, *METHODS["tkp_pcl"], "trainer=ddp_cpu"]
    command += ["budget.max_steps=8", "budget.eval_every=2", f"runs_dir={runs}"]
    return Command(command, log)


def when_trained_on(runs: Path, running: Command) -> None:
    """Wait for its next checkpoint."""
    began = time.time()
    running.until(lambda: any(p.stat().st_mtime > began for p in runs.rglob("last.ckpt")))


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_resumes(tmp_path: Path) -> None:
    """First the second process dies, then the first one; then the run ends as it should.

    Each end waits a minute at most for all processes of the run.
    """
    runs = tmp_path / "runs"
    first = start(runs, tmp_path / "1.log")
    when_trained_on(runs, first)
    (other,) = set(processes_of(first.process.pid)) - {first.process.pid}
    os.kill(other, signal.SIGKILL)
    assert first.end() == 1
    lost = "process 1 of this run was killed (signal 9); the same command resumes"
    assert lost in first.text()

    second = start(runs, tmp_path / "2.log")
    when_trained_on(runs, second)
    second.send(signal.SIGKILL)
    assert second.end() == -signal.SIGKILL
    assert "resuming from" in second.text()
    assert "the first process of this run has died; the same command resumes" in second.text()

    last = start(runs, tmp_path / "3.log")
    assert last.end() == 0, last.text()
    assert "resuming from" in last.text()
    (results,) = runs.rglob("results.json")
    assert json.loads(results.read_text())["splits"]["val"]["protocol"]["iterations"] == 8


@pytest.mark.parametrize("method", METHODS)
def test_compiled_parts_and_another_layout_change_no_loss(method: str, tmp_path: Path) -> None:
    """Captured by dynamo and run as they are; what inductor makes of them is torch's affair."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    totals, gradients = [], []
    for settings in ({}, {"compile": "eager", "channels_last": True}):
        _, module, data, _ = prepare(method, tmp_path)
        accelerate(module.eval().double(), settings)  # or rounding moves a pixel's pseudo label
        batch = next(iter(data.train_dataloader()))
        floats = {key: value.double() for key, value in batch.items() if _is_float(value)}
        torch.manual_seed(0)
        total = module.losses({**batch, **floats}, STEPS - 1).total
        total.backward()
        totals.append(total.detach())
        gradients.append([p.grad for p in module.parameters() if p.grad is not None])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(*totals, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.parametrize("method", METHODS)
def test_the_precision_of_gpus_trains_both_phases(method: str, tmp_path: Path) -> None:
    """bf16 autocast, here on a CPU: every operation has it, and weights stay float32."""
    precision = compose_run(["data=minivoc", "trainer=gpu"])["trainer"]["precision"]
    assert precision == "bf16-mixed"
    with torch.backends.mkldnn.flags(enabled=False):  # whose LSTM wants another CPU for bf16
        states, _ = train(method, tmp_path, "trainer=cpu", f"trainer.precision={precision}")
    assert len(set(states.hashes.values())) == STEPS
    weights = [value for value in states.kept[STEPS].values() if value.is_floating_point()]
    assert {value.dtype for value in weights} == {torch.float32}
    assert all(value.isfinite().all() for value in weights)


@pytest.mark.slow
def test_debugging_leaves_a_profile(tmp_path: Path) -> None:
    tiny = [setting for setting in TINY if not setting.startswith("trainer")]
    command = ["train", "method=tkp_pcl", *tiny, *METHODS["tkp_pcl"], "trainer=debug"]
    assert main([*command, "trainer.accelerator=cpu", f"runs_dir={tmp_path}"]) == 0
    (profile,) = tmp_path.rglob("profile/*")
    assert "optimizer_step" in profile.read_text()
