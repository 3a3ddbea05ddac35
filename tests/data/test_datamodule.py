import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from voc_tree import CLASSES, make_voc, write_image
from wsss.data.datamodule import WSSSDataModule, make_loader
from wsss.data.samplers import TrainSampler, UnpaddedDistributedSampler
from wsss.data.transforms import ToCoViews
from wsss.data.voc import VOCDataset
from wsss.errors import WSSSError


def small_view(rgb: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """A transform that is cheap and shows the stream it was given."""
    return {"image": torch.full((1,), float(rgb.mean())), "draw": torch.tensor(rng.random())}


def module(root: Path, **changes: Any) -> WSSSDataModule:
    settings: dict[str, Any] = {
        "name": "small",
        "root": root,
        "class_names": CLASSES,
        "train_split": "train",
        "val_split": "val",
        "test_splits": ["val"],
        "train_transform": small_view,
        "global_batch_size": 2,
        "seed": 3,
    }
    return WSSSDataModule(**(settings | changes))


class Recorder(L.LightningModule):
    """Remembers, per optimiser step, which samples it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[list[int], list[float]]] = []
        self.validated: list[str] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append((batch["index"].tolist(), batch["draw"].tolist()))
        return self.weight * batch["image"].mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated += batch["name"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: WSSSDataModule, folder: Path, *, steps: int, **options: Any) -> Recorder:
    resume = options.pop("ckpt_path", None)
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"num_sanity_val_steps": 0, "enable_checkpointing": False} | options),
    )
    trainer.fit(recorder, datamodule=data, ckpt_path=resume, weights_only=True)
    return recorder


class StopBy(Callback):
    """Interrupts in the middle of a step, as Ctrl-C does, and saves as the command line does."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("every", [1, 2])
def test_resuming_after_any_step_gives_the_samples_of_a_straight_run(
    tmp_path: Path, workers: int, every: int
) -> None:
    root = make_voc(tmp_path, train=7)
    steps = 8  # 3 batches an epoch
    straight = fit(module(root), tmp_path, steps=steps).seen
    assert len(straight) == steps
    for stop in range(1, steps) if workers == 0 else (2, 3, 4):
        keep = ModelCheckpoint(
            dirpath=tmp_path / f"{every}-{stop}", every_n_train_steps=every, save_top_k=-1
        )
        options: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [keep]}
        fit(module(root, num_workers=workers), tmp_path, steps=stop, **options)
        saved = stop // every * every
        if not saved:
            continue
        path = next((tmp_path / f"{every}-{stop}").glob(f"*step={saved}.ckpt"))
        rest = fit(module(root, num_workers=workers), tmp_path, steps=steps, ckpt_path=path).seen
        assert rest == straight[saved:], f"stopped at {stop}"


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resuming_after_an_interrupt_inside_a_step(tmp_path: Path, stop: int) -> None:
    root = make_voc(tmp_path, train=6)
    straight = fit(module(root), tmp_path, steps=6).seen
    path = tmp_path / "interrupted.ckpt"
    with pytest.raises(SystemExit):
        fit(module(root), tmp_path, steps=6, callbacks=[StopBy(stop, path)])
    assert fit(module(root), tmp_path, steps=6, ckpt_path=path).seen == straight[stop:]


@pytest.mark.parametrize("val_every", [1, 2, 3, 4])
def test_resuming_from_a_checkpoint_written_after_validation(
    tmp_path: Path, val_every: int
) -> None:
    root = make_voc(tmp_path, train=6)
    validation = {"check_val_every_n_epoch": None, "val_check_interval": val_every}
    straight = fit(module(root), tmp_path, steps=8, **validation).seen
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", save_top_k=-1)
    fit(module(root), tmp_path, steps=7, enable_checkpointing=True, callbacks=[keep], **validation)
    checkpoints = sorted((tmp_path / "kept").glob("*.ckpt"))
    assert checkpoints
    for path in checkpoints:
        done = int(path.stem.rsplit("=", 1)[1])
        rest = fit(module(root), tmp_path, steps=8, ckpt_path=path, **validation).seen
        assert rest == straight[done:], path.name


def test_resuming_with_gradient_accumulation(tmp_path: Path) -> None:
    root = make_voc(tmp_path, train=9)
    accumulate = {"accumulate_grad_batches": 2}
    data = {"global_batch_size": 4}
    straight = fit(module(root, **data), tmp_path, steps=5, **accumulate).seen
    assert len(straight) == 10  # every step is a whole global batch, the ninth image waits
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=1, save_top_k=-1)
    options = {"enable_checkpointing": True, "callbacks": [keep], **accumulate}
    fit(module(root, **data), tmp_path, steps=3, **options)
    path = next((tmp_path / "kept").glob("*step=3.ckpt"))
    rest = fit(module(root, **data), tmp_path, steps=5, ckpt_path=path, **accumulate).seen
    assert rest == straight[6:]


def test_resuming_with_another_list_is_refused(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=1)
    fit(module(root), tmp_path, steps=1, enable_checkpointing=True, callbacks=[keep])
    path = next((tmp_path / "kept").glob("*.ckpt"))
    with pytest.raises(WSSSError, match=r"cannot resume: training list .*\bwas\b.*\bis\b"):
        fit(module(root, limit=4), tmp_path, steps=2, ckpt_path=path)
    with pytest.raises(WSSSError, match="cannot resume: seed was 3 in the checkpoint and is 4"):
        fit(module(root, seed=4), tmp_path, steps=2, ckpt_path=path)
