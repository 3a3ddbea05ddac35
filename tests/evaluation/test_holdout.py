import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_module import CLASS_NAMES, Scenes, TinyModule, batches

from wsss.core.schema import plain
from wsss.evaluation.evaluator import evaluate
from wsss.evaluation.holdout import Holdout, choose_names, choose_threshold
from wsss.evaluation.ledger import LEDGER_FILE, past_readings, record_reading
from wsss.evaluation.protocol import Protocol
from wsss.runs.compose import compose_config
from wsss.runs.folder import build_data


def test_every_class_gets_its_images_whatever_the_order() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 4)) < 0.3).astype(np.float32)
    labels[:, 3] = 0
    labels[5, 3] = 1  # rarer than wanted
    names = [f"image_{i}" for i in range(60)]
    chosen = choose_names(names, labels, 3)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert (labels[chosen].sum(0)[:3] >= 3).all()
    assert 5 in chosen
    assert len(chosen) <= 10
    turned = rng.permutation(60)
    again = choose_names([names[i] for i in turned], labels[turned], 3)
    assert {turned[i] for i in again} == set(chosen.tolist())


def test_the_holdout_is_of_the_training_list_alone() -> None:
    config = plain(compose_config(["method=toco", "data=minivoc"]))
    data = build_data(config)
    holdout = Holdout(data, Protocol(**config["eval"]))
    assert set(holdout.names) <= set(data.eval_dataset("train").names)
    assert not set(holdout.names) & set(data.eval_dataset("val").names)
    assert (holdout.labels.sum(0) >= 3).all()
    item = holdout[1]
    assert item["name"] == holdout.names[1]
    assert item["index"] == 1
    assert len(holdout.list_hash) == 64


class SceneHoldout(Holdout):
    """The holdout's loader over made-up scenes."""

    def __init__(self, scenes: Scenes) -> None:
        self.source, self.names, self.labels = "scenes", [i["name"] for i in scenes], scenes.labels
        self._subset = torch.utils.data.Subset(scenes, list(range(len(scenes))))


@pytest.mark.parametrize("given", [True, False])
def test_the_threshold_is_the_oracle_of_the_holdout(given: bool) -> None:
    scenes, module = Scenes(5), TinyModule()
    protocol = Protocol(cam_threshold=0.5, holdout_per_class=2, use_image_labels=given)
    chosen = choose_threshold(module, SceneHoldout(scenes), protocol, device=torch.device("cpu"))
    expected = evaluate(module, batches(scenes, range(5)), protocol, CLASS_NAMES)
    assert chosen["threshold"] == expected["seed_threshold_oracle"]
    assert chosen["miou"] == expected["seed_miou_oracle"]
    assert chosen["curve"] == expected["seed_curve"]["miou"]
    assert chosen["num_images"] == 5


def test_the_ledger_counts_readings_of_each_split(tmp_path: Path) -> None:
    assert past_readings(tmp_path) == []
    assert record_reading(tmp_path, split="val", purpose="report", step=4) == 1
    assert record_reading(tmp_path, split="holdout", purpose="choosing a threshold") == 1
    assert record_reading(tmp_path, split="val", purpose="wsss eval") == 2
    lines = (tmp_path / LEDGER_FILE).read_text().splitlines()
    assert [json.loads(line)["split"] for line in lines] == ["val", "holdout", "val"]
    assert past_readings(tmp_path)[0]["step"] == 4
    assert all("time" in entry for entry in past_readings(tmp_path))
