"""Lists cut from others: the declared holdout as a split, and few-shot training."""

from pathlib import Path

import numpy as np
import pytest
from trees import CLASSES_OF_PHOTOS, make_photos

from wsss.core.errors import WSSSError
from wsss.data.datamodule import ImageDataModule
from wsss.data.lists import choose_names, cut_of, is_few_shot, own_list
from wsss.data.table_module import TableDataModule
from wsss.evaluation.holdout import Holdout
from wsss.evaluation.protocol import Protocol
from wsss.runs.compose import compose_run
from wsss.runs.folder import build_data


def minivoc(*overrides: str) -> ImageDataModule:
    return build_data(compose_run(["method=segmenter_vit", "data=minivoc", *overrides]))


def names(data: ImageDataModule, split: str) -> list[str]:
    return [sample.name for sample in data.samples(split)]


def test_names_of_cut_lists_are_read() -> None:
    assert cut_of("train") is None
    outer = cut_of("a/list.txt:holdout:3:without:1")
    assert outer is not None
    assert (outer.source, outer.kept, outer.per_class) == ("a/list.txt:holdout:3", "without", 1)
    assert own_list("train:holdout:3:without:1") == "train"
    few = ("train:holdout:3", "train:holdout:3:without:1", "train:without:3:holdout:1")
    assert all(map(is_few_shot, few))
    assert not is_few_shot("train:without:3")
    for wrong in ("train:holdout:0", "train:holdout:", "train:without:-1", "train:holdout:1.5"):
        with pytest.raises(WSSSError, match="no number of images a class"):
            cut_of(wrong)


def test_a_holdout_of_a_holdout_is_itself() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 4)) < 0.3).astype(np.float32)
    listed = [f"image_{i}" for i in range(60)]
    chosen = choose_names(listed, labels, 3)
    again = choose_names([listed[i] for i in chosen], labels[chosen], 3)
    assert again.tolist() == list(range(len(chosen)))


def test_holdout_and_rest_share_the_training_list_out() -> None:
    data = minivoc("data.limit=60")
    holdout, rest = names(data, "train:holdout:3"), names(data, "train:without:3")
    assert sorted(holdout + rest) == sorted(names(data, "train"))
    declared = Holdout(data, Protocol(holdout_per_class=3))
    assert holdout == declared.names
    assert data.list_hash("train:holdout:3") == declared.list_hash
    dataset = data.eval_dataset("train:holdout:3")
    assert dataset.names == holdout
    assert (dataset.labels == declared.labels).all()
    judged, trained = ([*names(data, f"train:holdout:3:{k}:1")] for k in ("holdout", "without"))
    assert judged
    assert trained
    assert sorted(judged + trained) == sorted(holdout)
    with pytest.raises(WSSSError, match=r"list train:holdout:3:without:3 is empty"):
        data.samples("train:holdout:3:without:3")


def test_few_shot_supervision_counts_its_masks() -> None:
    masks = "data.train_masks=ground_truth"
    few = minivoc("data.limit=60", "data.train_split=train:holdout:3", masks)
    count = len(few.samples("train:holdout:3"))
    assert few.supervision == f"{count} pixel masks"
    assert len(few._make_train_dataset()) == count
    assert minivoc("data.train_split=train:without:3", masks).supervision == "pixel masks"
    weak = minivoc("data.train_split=train:holdout:3", "data.train_masks=null")
    assert weak.supervision == "image labels"


def test_a_table_without_splits_keeps_its_validation_out(tmp_path: Path) -> None:
    labels = make_photos(tmp_path, 20)
    rows = [f"photos/{number:03}.jpg,{label}" for number, label in enumerate(labels)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,labels", *rows]))

    def table(**splits: str) -> TableDataModule:
        return TableDataModule(
            name="photos",
            root=tmp_path,
            csv=Path("labels.csv"),
            class_names=tuple(CLASSES_OF_PHOTOS),
            train_transform=None,
            global_batch_size=1,
            **splits,
        )

    whole = table()
    cut = table(train_split="train:without:1", val_split="train:holdout:1")
    assert cut.left_out() == ""
    used = names(cut, cut.train_split) + names(cut, cut.val_split)
    assert sorted(used) == sorted(names(whole, "train"))
    assert not set(used) & set(names(whole, "val"))
