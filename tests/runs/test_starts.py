"""Runs that start from another run's weights or go on from its checkpoint, and what they say of it.

Lightning's own ways are here too: ``load_from_checkpoint`` and ``trainer.predict``.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from small_runs import METHODS, PLAIN, SMALL

import wsss
from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.core.files import file_sha256
from wsss.models.weights import save_atomically
from wsss.runs.compose import compose_run
from wsss.runs.config import config_hash
from wsss.runs.folder import build_data, build_module
from wsss.runs.starts import with_start
from wsss.runs.supervision import start_of, supervision_of_run

TINY = [
    "method=toco",
    *SMALL,
    *PLAIN,
    "method.decoder_channels=16",
    "budget.warmup_steps=1",
    "budget.eval_every=9",
    "data.limit=4",
    "trainer.limit_val_batches=0",
    "trainer.enable_progress_bar=false",
]
STEPS = "budget.max_steps=2"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two steps."""
    runs = tmp_path_factory.mktemp("runs")
    return wsss.train([*TINY, STEPS, f"runs_dir={runs}"])


def card_of(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "results.json").read_text())
    card: dict[str, Any] = content["splits"]["val"]["protocol"]
    return card


def test_a_warm_start_takes_weights_and_says_whose(first: Path, tmp_path: Path) -> None:
    line = [*TINY, "budget.max_steps=1", "method.lr=1e-12", f"runs_dir={tmp_path}"]
    folder = wsss.train([*line, f"init_from={first}", "method.weight_decay=0"])
    card, checkpoint = card_of(folder), first / "checkpoints" / "last.ckpt"
    assert card["init_from"]["sha256"] == file_sha256(checkpoint)
    assert (card["init_from"]["taken_by"], card["init_from"]["steps"]) == ("init_from", 2)
    assert card["init_from"]["train_list_sha256"] == card_of(first)["train_list_sha256"]
    assert "init_from" not in card_of(first)
    theirs, own = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)
                   for path in (first, folder))  # fmt: skip
    name = "backbone.vit.blocks.0.attn.qkv.weight"
    assert torch.allclose(theirs["state_dict"][name], own["state_dict"][name], atol=1e-9)
    assert own["global_step"] == 1, "weights alone, not the position"
    assert main(["compare", str(first), str(folder), "by=run", "allow=[iterations]"]) == 2


def test_the_files_content_makes_the_run_not_its_place(first: Path, tmp_path: Path) -> None:
    config = compose_run([*TINY, STEPS])
    moved = shutil.copy(first / "checkpoints" / "last.ckpt", tmp_path / "moved.ckpt")
    hashes = [config_hash(with_start({**config, "init_from": str(p)})) for p in (first, moved)]
    assert hashes[0] == hashes[1] != config_hash(config)
    checkpoint = torch.load(moved, weights_only=True)
    checkpoint["state_dict"]["classifier.weight"] += 1
    torch.save(checkpoint, moved)
    assert config_hash(with_start({**config, "init_from": str(moved)})) != hashes[0]


def test_a_checkpoint_of_the_same_run_makes_no_other_run(first: Path) -> None:
    stored = compose_run([*TINY, STEPS])
    content = torch.load(first / "checkpoints" / "last.ckpt", weights_only=True)
    half = first.parents[1] / "half.ckpt"
    torch.save({**content, "global_step": 1}, half)
    same = with_start({**stored, "ckpt_path": str(half)})
    assert config_hash(same) == config_hash(stored)
    assert start_of(same) is None
    longer = compose_run([*TINY, "budget.max_steps=4"])
    other = with_start({**longer, "ckpt_path": str(half)})
    assert config_hash(other) != config_hash(longer)
    assert start_of(other)["steps"] == 1  # type: ignore[index]


def test_going_on_from_a_checkpoint_trains_the_rest(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*TINY, "budget.max_steps=3", f"ckpt_path={first}", f"runs_dir={tmp_path}"]
    folder = wsss.train(line)
    assert f"resuming from {first / 'checkpoints' / 'last.ckpt'}" in capsys.readouterr().out
    assert card_of(folder)["iterations"] == 3
    assert card_of(folder)["init_from"]["taken_by"] == "ckpt_path"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["init_from=nowhere"], "nowhere: no such checkpoint; init_from= takes"),
        (["init_from=RUN", "ckpt_path=RUN"], "exclude each other"),
        (["ckpt_path=RUN", STEPS], "has 2 steps already, of budget.max_steps=2"),
        (["init_from=RUN", "backbone.overrides.embed_dim=96"], "keys do not fit"),
        (
            ["init_from=RUN", "method=tkp_pcl", "~method.decoder_channels"],
            "holds weights of wsss.methods.toco.ToCo",
        ),
    ],
)
def test_what_cannot_be_started_from_is_named(
    line: list[str], message: str, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [part.replace("RUN", str(first)) for part in line]
    base = [part for part in TINY if not (part.startswith("method") and "method=tkp_pcl" in line)]
    given = [part for part in given if part[0] != "~"]
    assert main(["train", *base, *given, f"runs_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_weights_that_saw_masks_keep_having_seen_them(first: Path) -> None:
    run = wsss.load_run(first)
    assert supervision_of_run(run) == "image labels"
    for theirs, together in {
        "image labels": "image labels",
        "pixel masks": "pixel masks",
        "image labels + CLIP": "image labels, started from image labels + CLIP",
    }.items():
        run.config["init_from"] = {"sha256": "0", "supervision": theirs}
        assert supervision_of_run(run) == together


def checkpoint_of(method: str, path: Path) -> Path:
    """Write a checkpoint of a method with random weights."""
    small = ["method.decoder_channels=16"] if method == "toco" else METHODS[method]
    config = compose_run([f"method={method}", *SMALL, *small])
    module = build_module(config, build_data(config).num_classes)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 0}
    module.on_save_checkpoint(checkpoint)
    save_atomically(checkpoint, path)
    return path


@pytest.mark.parametrize("method", ["toco", *METHODS])
def test_lightnings_own_ways_load_and_predict(method: str, tmp_path: Path) -> None:
    path = checkpoint_of(method, tmp_path / "m.ckpt")
    run = wsss.load_run(path, ["data.limit=1"])
    module = type(run.module).load_from_checkpoint(path)
    assert not module.training
    for name, value in run.module.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    (found,) = trainer.predict(module, run.data.predict_dataloader())  # type: ignore[misc]
    (again,) = trainer.predict(module, datamodule=run.data)  # type: ignore[misc]
    assert found["name"] == again["name"] == run.data.eval_dataset("val").names
    height, width = run.data.eval_dataset("val")[0]["image"].shape[-2:]
    assert found["cams"].shape == (1, 8, height, width)
    assert found["cams"].flatten(2).amax(2).gt(0).any()
    if found["seg_logits"] is not None:
        assert found["seg_logits"].shape[:2] == (1, 9)


def test_another_method_is_named(first: Path) -> None:
    with pytest.raises(WSSSError, match=r"holds ToCo, not GETAM; give ToCo\.load_from"):
        wsss.GETAM.load_from_checkpoint(first)
