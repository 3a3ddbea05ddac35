"""Methods of two phases: runs resumed over the boundary end as they should."""

import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from small_runs import METHODS, SMALL
from torch import Tensor

from wsss.data.datamodule import ImageDataModule
from wsss.methods.base import WSSSModule
from wsss.methods.clustercam.method import ClusterCAM
from wsss.methods.getam.method import GETAM
from wsss.methods.more import MoRe
from wsss.methods.tkp_pcl.method import TKPPCL
from wsss.methods.weclip.method import WeCLIP
from wsss.runs.compose import compose_run
from wsss.runs.folder import build_data, build_module
from wsss.training.callbacks import SaveOnStop

STEPS = 6  # 0 to 3 are the first phase


def build(method: str) -> tuple[ImageDataModule, WSSSModule]:
    config = compose_run(
        [
            f"method={method}",
            *METHODS[method],
            *SMALL,
            f"budget.max_steps={STEPS}",
        ]
    )
    lightning.seed_everything(0, verbose=False)
    data = build_data(config)
    return data, build_module(config, data.num_classes)


def in_second_phase(module: WSSSModule, step: int) -> bool:
    if isinstance(module, ClusterCAM):
        return module.learns_segmentation(step)
    if isinstance(module, GETAM):
        return module.in_phase_two(step)
    if isinstance(module, WeCLIP):
        return module.refines_by_decoder(step)
    if isinstance(module, MoRe):
        weights = module.settings.loss_weights(step)
        return module.settings.masks_are_late(step) and weights["seg_loss"] > 0
    assert isinstance(module, TKPPCL)
    return step >= module.settings.warmup_steps


def make_trainer(callback: Callback, **settings: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[callback],
        **settings,
    )


class StopAfter(SaveOnStop):
    """Ctrl-C during a given step."""

    def __init__(self, path: Path, steps: int) -> None:
        super().__init__(path)
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        if trainer.global_step == self.steps < trainer.max_steps:
            self.stop_signal = signal.SIGINT
        super().on_train_batch_end(trainer, pl_module, *batch)


def fit(method: str, path: Path, *, stop: int = STEPS) -> dict[str, Tensor]:
    """Train to step ``stop``, from a checkpoint if there is one; the weights then."""
    data, module = build(method)
    assert [in_second_phase(module, t) for t in range(STEPS)] == [False] * 4 + [True] * 2
    data.setup("fit")
    trainer = make_trainer(StopAfter(path, stop))
    checkpoint = str(path) if path.is_file() else None
    with nullcontext() if stop == STEPS else pytest.raises(SystemExit):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == stop
    return module.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_resuming_over_the_boundary_ends_the_same(method: str, tmp_path: Path) -> None:
    """Both sides of the boundary, and the boundary itself."""
    straight = fit(method, tmp_path / "straight.ckpt")
    for stop in (3, 4, 5):
        path = tmp_path / f"{stop}.ckpt"
        fit(method, path, stop=stop)
        resumed = fit(method, path)
        for name, value in straight.items():
            assert torch.equal(value, resumed[name]), (stop, name)
