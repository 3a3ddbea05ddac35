"""The proof that a search opens no mask but those of the declared holdout.

All other masks are no images, so reading one would fail, and an audit hook of the interpreter,
which sees every file that Python opens, refuses them.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
from voc_tree import CLASSES, make_voc

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.data.datamodule import ImageDataModule
from wsss.results.search import read_search
from wsss.results.store import RESULTS_FILE, read_results
from wsss.runs.compose import compose_run
from wsss.runs.folder import build_data
from wsss.runs.judging import judging_of
from wsss.training.run import train
from wsss.training.search import plan_search, run_search
from wsss.training.sweeps import Outcome

pytest.importorskip("optuna")
forbidden: set[str] = set()  # a hook cannot be taken off again, so it is emptied
read: set[str] = set()


class ForbiddenMaskError(Exception):
    pass


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if forbidden and event == "open" and isinstance(arguments[0], str):
        path = Path(arguments[0])
        if path.parent.name == "SegmentationClass":
            read.add(path.stem)
            if path.stem in forbidden:
                raise ForbiddenMaskError(path)


sys.addaudithook(watch)

SMALL = [
    "data=voc", "data.train_split=train", "data.train_mask_folder=null", "data.num_workers=0",
    f"data.class_names=[{','.join(CLASSES)}]", "backbone=vit_pico", "backbone.weights=random",
    "+backbone.overrides.embed_dim=48", "backbone.overrides.depth=4", "budget.crop_size=48",
    "budget.local_size=16", "budget.global_batch_size=2", "budget.max_steps=2",
    "budget.cam_size=48", "budget.warmup_steps=1", "budget.eval_every=1", "gallery=0",
    "eval.crf=null", "eval.refine=null", "eval.seg_scales=[1.0]", "trainer=cpu",
    "eval.holdout_per_class=2",
]  # fmt: skip
TOCO = ["method=toco", "method.decoder_channels=16", *SMALL]
FEW_SHOT = [
    "method=segmenter_vit", "objective=seg_miou", *SMALL, "data.train_masks=ground_truth",
    "data.train_split=train:holdout:3",
]  # fmt: skip


def here(overrides: list[str], folder: Path, number: int) -> Outcome:
    config = compose_run(overrides)
    splits = read_results(train(config) / RESULTS_FILE)["splits"]
    return Outcome(overrides, 0, value=splits[config["data"]["val_split"]][config["objective"]])


def names(data: ImageDataModule, split: str) -> set[str]:
    return {sample.name for sample in data.samples(split)}


@pytest.fixture
def root(tmp_path: Path) -> Any:
    yield make_voc(tmp_path, train=12, val=3)
    forbidden.clear()
    read.clear()


@pytest.mark.parametrize(
    ("line", "list_of_masks", "count"),
    [(TOCO, "train:holdout:2", 6), (FEW_SHOT, "train:holdout:3", 9)],
    ids=["image labels", "few shot"],
)
def test_a_search_reads_the_masks_of_its_holdout_alone(
    tmp_path: Path, root: Path, line: list[str], list_of_masks: str, count: int
) -> None:
    overrides = [*line, f"data.root={root}", f"runs_dir={tmp_path / 'runs'}"]
    data = build_data(compose_run(overrides))
    allowed = names(data, list_of_masks)
    assert len(allowed) == count
    for path in (root / "SegmentationClass").iterdir():
        if path.stem not in allowed:
            path.write_bytes(b"no image")
    forbidden.update({f"img{number:03}" for number in range(15)} - allowed)
    assert names(data, "val") < forbidden
    search = read_search(run_search(plan_search(overrides, trials=2, startup=2, seed=0), here))
    assert read == allowed
    judged = search.masks + (search.masks_trained_on or 0)
    assert judged == count
    with pytest.raises(Exception, match=r"SegmentationClass.*\.png"):  # the guard guards
        next(iter(data.eval_dataloader("val")))


def test_a_search_on_reported_images_is_refused_by_name(tmp_path: Path, root: Path) -> None:
    line = [*TOCO, f"data.root={root}"]
    with pytest.raises(WSSSError, match=r"eval.holdout_split=val: 3 of its images are in 'val'"):
        judging_of(compose_run([*line, "eval.holdout_split=val"]))
    lists = root / "ImageSets" / "Segmentation"
    (lists / "mixed.txt").write_text("img001\nimg012\n")
    with pytest.raises(WSSSError, match=r"data.train_split=mixed: 1 of its images.*'val'"):
        judging_of(compose_run([*line, "data.train_split=mixed"]))
    with pytest.raises(WSSSError, match=r"6 of its images are in 'train' .* scores are reported"):
        judging_of(compose_run([*line, "data.test_splits=[train]"]))
    with pytest.raises(WSSSError, match=r"eval\.holdout_per_class=0 declares no holdout"):
        judging_of(compose_run([*line, "eval.holdout_per_class=0"]))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["data.test_splits=[]", "eval.holdout_split=val_unseen"], "eval.holdout_split=val_unseen"),
        (["data.val_split=val_unseen", "eval.holdout_split=val"], "eval.holdout_split=val"),
        (["data.val_split=train", "data.train_split=val"], "data.train_split=val"),
    ],
)
def test_no_line_makes_a_reported_list_a_holdout(line: list[str], said: str) -> None:
    """What the data set declares as reported stays so where a line names other lists."""
    with pytest.raises(WSSSError, match=rf"{said}: .* of its images are in"):
        plan_search(["method=toco", "data=minivoc", *line], trials=1, startup=1, seed=0)


def test_masks_of_unknown_origin_are_not_judged_on(root: Path) -> None:
    """The ground truth by its path is the ground truth."""
    masks = f"data.train_masks={root}/SegmentationClass"
    line = ["method=segmenter_vit", *SMALL, f"data.root={root}", masks]
    judging = judging_of(compose_run(line))
    assert (judging.train_split, judging.masks, judging.trained_on) == ("train:without:2", 6, 6)


def test_full_supervision_is_not_judged_on_what_it_saw(root: Path) -> None:
    line = ["method=segmenter_vit", *SMALL, f"data.root={root}", "data.train_masks=ground_truth"]
    data, judging = build_data(compose_run(line)), judging_of(compose_run(line))
    judged, trained = names(data, judging.split), names(data, judging.train_split)
    assert judged | trained == names(data, "train")
    assert not judged & trained
    assert (judging.masks, judging.trained_on) == (6, 6)


def test_searches_of_one_command_are_on_equal_terms(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["tune", *TOCO, f"data.root={root}", f"runs_dir={tmp_path}/runs"]
    assert main([*line, "budget.max_steps=2,3"]) == 2
    said = "budget.max_steps is not the same for all (2 of toco, 3 of toco)"
    assert said in capsys.readouterr().err
    assert main([*line, "eval.holdout_split=val"]) == 2
    assert "in 'val' ('img012'), whose scores are reported" in capsys.readouterr().err
    assert main([*line, "trials=0"]) == 2
    assert "trials=0" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(["tune", "--show", str(root)]) == 2
    assert "no search.json there" in capsys.readouterr().err
