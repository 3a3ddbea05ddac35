import hashlib
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from PIL import Image
from voc_tree import CLASSES, make_voc, write_image, write_mask, write_xml

from wsss.core.errors import WSSSError
from wsss.data.builtin import MINIVOC_CLASSES
from wsss.data.views.toco import ToCoViews
from wsss.data.voc_module import VOCDataModule


def small_view(rgb: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """A transform that is cheap and shows the stream it was given."""
    return {"image": torch.full((1,), float(rgb.mean())), "draw": torch.tensor(rng.random())}


def module(root: Path | str, **changes: Any) -> VOCDataModule:
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
    return VOCDataModule(**(settings | changes))


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


def fit(data: VOCDataModule, folder: Path, *, steps: int, **options: Any) -> Recorder:
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
def test_resuming_after_any_step_gives_a_straight_runs_samples(
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


def batches(data: VOCDataModule, epoch: int = 0) -> list[dict[str, Any]]:
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_samples_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    views = ToCoViews(crop_size=32)
    alone = batches(module(root, train_transform=views))
    helped = batches(module(root, train_transform=views, num_workers=2))
    assert len(alone) == len(helped) == 3
    for a, b in zip(alone, helped, strict=True):
        assert a["name"] == b["name"]
        for key in ("image", "local_view", "view2", "box", "labels", "index"):
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_epochs_differ_in_order_and_augmentation(tmp_path: Path, workers: int) -> None:
    data = module(make_voc(tmp_path), num_workers=workers)
    data.setup("fit")
    loader = data.train_dataloader()
    draws: list[dict[int, float]] = []
    orders: list[list[int]] = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        seen = [(i, d) for b in loader for i, d in zip(b["index"], b["draw"], strict=True)]
        orders.append([int(i) for i, _ in seen])
        draws.append({int(i): float(d) for i, d in seen})
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(6))
    assert orders[0] != orders[1]
    assert all(draws[0][i] != draws[1][i] for i in range(6))
    assert (orders[0], draws[0]) == (orders[2], draws[2])


def test_seed_changes_order_and_augmentation(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    first, second = batches(module(root)), batches(module(root, seed=4))
    assert [b["index"].tolist() for b in first] != [b["index"].tolist() for b in second]
    assert set(torch.cat([b["draw"] for b in first]).tolist()).isdisjoint(
        torch.cat([b["draw"] for b in second]).tolist()
    )


def test_training_batch_has_labels_and_no_mask(tmp_path: Path) -> None:
    batch = batches(module(make_voc(tmp_path)))[0]
    assert set(batch) == {"image", "draw", "labels", "name", "index"}
    assert batch["labels"].shape == (2, 3)
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].argmax(1).tolist() == [int(i) % 3 for i in batch["index"]]


def test_training_never_opens_a_mask(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    for path in (root / "SegmentationClass").glob("img00[0-5].png"):
        path.write_bytes(b"not an image")
    assert len(batches(module(root))) == 3


def test_evaluation_batches_are_native_and_complete(tmp_path: Path) -> None:
    data = module(make_voc(tmp_path))
    data.setup("validate")
    seen = list(data.val_dataloader())
    assert [b["name"] for b in seen] == [["img006"], ["img007"], ["img008"]]
    for i, batch in enumerate(seen, start=6):
        size = (1, 40, 50 + i)
        assert batch["mask"].shape == size
        assert batch["mask"].dtype == torch.int64
        assert batch["rgb"].shape == (*size, 3)
        assert batch["rgb"].dtype == torch.uint8
        assert batch["image"].shape == (1, 3, *size[1:])
        assert batch["mask"].unique().tolist() == [0, i % 3 + 1, 255]
    data.setup("test")
    assert len(data.test_dataloader()) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_by_size_are_those_images_singly(tmp_path: Path, workers: int) -> None:
    root = make_voc(tmp_path, train=6, val=4)
    for name in ("img008", "img009"):  # as large as img006
        write_image(root, name, height=40, width=56, seed=int(name[-1]))
        write_mask(root, name, np.full((40, 56), int(name[-1]) % 3 + 1))
    singly = {b["name"][0]: b for b in module(root).eval_dataloader("val")}
    data = module(root, eval_batch_size=2, num_workers=workers)
    together = list(data.eval_dataloader("val"))
    assert sorted(len(b["name"]) for b in together) == [1, 1, 2]
    assert sorted(name for b in together for name in b["name"]) == sorted(singly)
    for batch in together:
        for row, name in enumerate(batch["name"]):
            for key in ("image", "rgb", "mask", "labels"):
                assert torch.equal(batch[key][row], singly[name][key][0])
    with pytest.raises(WSSSError, match="eval_batch_size=0: expected a number greater than"):
        module(root, eval_batch_size=0)


def global_draws(rgb: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """A transform that, wrongly, draws from the generators that all share."""
    draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
    return {"image": torch.zeros(1), "draw": torch.tensor(draws, dtype=torch.float64)}


def test_workers_never_repeat_each_others_global_draws(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    settings: dict[str, Any] = {"train_transform": global_draws, "num_workers": 2}
    draws = torch.cat([batch["draw"] for batch in batches(module(root, **settings))])
    for column in draws.T:
        assert len(column.unique()) == 6
    again = torch.cat([batch["draw"] for batch in batches(module(root, **settings))])
    assert torch.equal(draws, again)
    other = torch.cat([batch["draw"] for batch in batches(module(root, **settings, seed=4))])
    assert not torch.isin(draws, other).any()


def test_fingerprint_tells_lists_labels_and_masks_apart(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    before = module(root).fingerprint()
    assert before["train"]["images"] == 6
    assert before["train"]["masks_sha256"] is None
    assert before["val"]["list_sha256"] == module(root).list_hash("val")
    with Image.open(root / "SegmentationClass" / "img006.png") as image:
        image.save(root / "SegmentationClass" / "img006.png", compress_level=0)
    assert module(root).fingerprint() == before  # only compressed anew
    write_mask(root, "img006", np.zeros((40, 56)))
    write_xml(root, "img001", ["bottle", "person"])
    after = module(root).fingerprint()
    assert after["val"]["masks_sha256"] != before["val"]["masks_sha256"]
    assert after["train"]["labels_sha256"] != before["train"]["labels_sha256"]
    assert after["val"]["labels_sha256"] == before["val"]["labels_sha256"]


def test_training_split_can_be_evaluated_with_its_own_masks(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    (root / "SegmentationClass").rename(root / "SegmentationClassAug")
    data = module(root, train_mask_folder="SegmentationClassAug")
    assert len(list(data.eval_dataloader("train"))) == 6
    with pytest.raises(WSSSError, match=f"mask folder {root}/SegmentationClass cannot be read"):
        data.eval_dataloader("val")


def test_limit_and_list_hash(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    whole, limited = module(root), module(root, limit=2)
    assert whole.list_hash("val") == hashlib.sha256(b"img006\nimg007\nimg008\n").hexdigest()
    assert limited.list_hash("val") == hashlib.sha256(b"img006\nimg007\n").hexdigest()
    assert len(limited.eval_dataset("val")) == 2
    with pytest.raises(
        WSSSError, match=r"data\.limit=0: expected a number greater than or equal to 1"
    ):
        module(root, limit=0)


def test_split_smaller_than_a_batch_is_refused_in_setup(tmp_path: Path) -> None:
    with pytest.raises(WSSSError, match=r"split 'train' .* 6 images.*global_batch_size=8"):
        module(make_voc(tmp_path), global_batch_size=8).setup("fit")


def test_indivisible_global_batch_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(WSSSError, match=r"global_batch_size=3 does not divide .*batches=2"):
        fit(
            module(make_voc(tmp_path), global_batch_size=3),
            tmp_path,
            steps=1,
            accumulate_grad_batches=2,
        )


def test_missing_data_is_named_in_setup(tmp_path: Path) -> None:
    with pytest.raises(WSSSError, match=f"data folder {tmp_path}/nowhere is missing"):
        module(tmp_path / "nowhere").setup("fit")


def test_builtin_root_is_minivoc_and_trains_with_toco_views() -> None:
    data = module(
        "builtin",
        class_names=MINIVOC_CLASSES,
        test_splits=["val_unseen"],
        train_transform=ToCoViews(crop_size=96),
        global_batch_size=8,
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert (
        batch["image"].shape == batch["view2"].shape == batch["local_view"].shape == (8, 3, 96, 96)
    )
    assert batch["box"].shape == (8, 4)
    assert batch["labels"].shape == (8, 8)
    assert batch["labels"].sum(1).min() >= 1
    assert next(iter(data.val_dataloader()))["mask"].shape == (1, 160, 160)
    assert len({data.list_hash(split) for split in ("train", "val", "val_unseen")}) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_one_line_also_from_a_worker(tmp_path: Path, workers: int) -> None:
    root = make_voc(tmp_path)
    bad = root / "JPEGImages" / "img002.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(WSSSError) as caught:
        batches(module(root, num_workers=workers))
    assert str(caught.value).startswith(f"{bad} cannot be decoded")
    assert "\n" not in str(caught.value)


def test_error_of_a_worker_crosses_the_trainer(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    bad = root / "JPEGImages" / "img004.jpg"
    bad.write_bytes(b"")
    with pytest.raises(WSSSError, match=f"^{bad} cannot be decoded"):
        fit(module(root, num_workers=1), tmp_path, steps=3)


def test_another_exception_of_a_worker_is_left_alone(tmp_path: Path) -> None:
    def broken(rgb: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="Traceback"):
        batches(module(make_voc(tmp_path), train_transform=broken, num_workers=1))


class TwoProcesses(Recorder):
    """Writes what each process saw into a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self) -> None:
        seen = {"train": self.seen, "val": self.validated}
        torch.save(seen, self.folder / f"rank{self.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_share_each_step_and_count_no_image_twice(tmp_path: Path) -> None:
    root = make_voc(tmp_path, train=8)
    alone = fit(module(root, global_batch_size=4), tmp_path, steps=4)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        max_steps=4,
        max_epochs=2,
        check_val_every_n_epoch=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(TwoProcesses(tmp_path), datamodule=module(root, global_batch_size=4))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for step, (indices, draws) in enumerate(alone.seen):
        together = [pair for r in ranks for pair in zip(*r["train"][step], strict=True)]
        assert sorted(together) == sorted(zip(indices, draws, strict=True))
    assert ranks[0]["val"] == ["img008", "img010"]
    assert ranks[1]["val"] == ["img009"]
