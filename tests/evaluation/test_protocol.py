import json
from dataclasses import replace

import pytest

from wsss.core.errors import WSSSError
from wsss.evaluation.card import protocol_card
from wsss.evaluation.protocol import Protocol
from wsss.maps.refine.dense_crf import CRF_PRESETS

TOCO = Protocol(
    cam_resize=448,
    seg_scales=(1.0, 1.5, 1.25),
    flip=True,
    flip_merge="sum",
    scale_merge="max",
    crf="toco",
    cam_threshold=0.5,
    cam_high=0.7,
    cam_low=0.25,
    refine="par",
)


def test_card_says_everything_that_a_number_depends_on() -> None:
    card = protocol_card(
        protocol=TOCO,
        split="val",
        list_hash="ab" * 32,
        num_images=1449,
        backbone={"name": "vit", "source": "file:x", "pretraining": "IN-21k", "file_sha256": "0f"},
        crop_size=448,
        iterations=20000,
        global_batch_size=4,
        seed=0,
    )
    assert card["split"] == "val"
    assert card["list_sha256"] == "ab" * 32
    assert card["num_images"] == 1449
    assert (card["resize"], card["cam_resize"]) == (None, 448)
    assert card["seg_scales"] == (1.0, 1.5, 1.25)
    assert (card["flip"], card["flip_merge"], card["scale_merge"]) == (True, "sum", "max")
    preset = CRF_PRESETS["toco"]
    five = ("pos_xy", "pos_w", "bi_xy", "bi_rgb", "bi_w")
    assert [card["crf"][key] for key in five] == [getattr(preset, key) for key in five]
    assert card["cam_threshold"] == 0.5
    assert "declared" in card["cam_threshold_source"]
    assert "ground truth" in card["oracle_threshold_source"]
    assert card["use_image_labels"] is True
    assert card["segmentation_uses_image_labels"] is False
    assert card["backbone"]["pretraining"] == "IN-21k"
    assert (card["crop_size"], card["iterations"], card["global_batch_size"]) == (448, 20000, 4)
    assert card["seed"] == 0
    assert card["supervision"] == "image labels"
    assert "commit" in card
    for package in ("torch", "timm", "lightning", "torchmetrics", "albumentations", "wsss"):
        assert card["versions"][package]
    assert "pydensecrf2" in card["versions"]
    json.dumps(card, allow_nan=False)


def test_every_field_of_the_protocol_is_on_the_card() -> None:
    card = protocol_card(
        protocol=TOCO,
        split="val",
        list_hash="",
        num_images=1,
        backbone={},
        crop_size=1,
        iterations=1,
        global_batch_size=1,
        seed=0,
    )
    assert set(Protocol.__dataclass_fields__) <= set(card)


def test_lists_from_yaml_become_tuples() -> None:
    protocol = Protocol(seg_scales=[1, 1.5])  # type: ignore[arg-type]
    assert protocol.seg_scales == (1.0, 1.5)
    assert protocol == replace(protocol)
    hash(protocol)


def test_training_form_is_cheap_and_keeps_the_size() -> None:
    cheap = replace(TOCO, resize=448).during_training()
    assert cheap.crf is None
    assert not cheap.multi_scale
    assert cheap.cam_high is None
    assert (cheap.resize, cheap.cam_resize, cheap.cam_threshold) == (448, 448, 0.5)


def test_declared_threshold_joins_the_curve_once() -> None:
    assert Protocol(cam_threshold=0.45).curve_thresholds.count(0.45) == 1
    assert 0.37 in Protocol(cam_threshold=0.37).curve_thresholds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crf": "tocco"}, "eval.crf='tocco': expected one of toco"),
        ({"crf": "toco", "crf_prune": True, "use_image_labels": False}, "eval.crf_prune"),
        ({"cam_threshold": 1.5}, "eval.cam_threshold=1.5"),
        ({"cam_high": 0.7}, "eval.cam_high and eval.cam_low"),
        ({"cam_high": 0.2, "cam_low": 0.7}, "0 <= low <= high"),
        ({"resize": 0}, "eval.resize=0"),
        ({"seg_scales": ()}, "eval.seg_scales"),
        ({"seg_scales": (1.0, -1.0)}, "eval.seg_scales"),
        ({"seg_scales": (1.0, 0.001)}, "eval.seg_scales.*greater than or equal to 0.05"),
        ({"seg_sizes": (10**6,)}, "eval.seg_sizes.*less than or equal to 16384"),
        ({"flip_merge": "median"}, "eval.flip_merge='median': expected 'sum' or 'max' or 'mean'"),
        ({"merge_of": "labels"}, "eval.merge_of='labels': expected 'logits' or 'prob"),
        ({"refine": "crf"}, "eval.refine='crf': expected 'par' or 'pamr' or null"),
        ({"scale_merge": "median"}, "eval.scale_merge='median': expected 'sum' or 'max' or 'mean'"),
        ({"seg_sizes": ()}, "eval.seg_sizes"),
        ({"seg_sizes": (256, 0)}, "eval.seg_sizes"),
        ({"oracle_thresholds": (0.5, 2.0)}, "eval.oracle_thresholds"),
    ],
)
def test_a_protocol_that_makes_no_sense_is_refused(change: dict, message: str) -> None:
    with pytest.raises(WSSSError, match=message):
        Protocol(**change)
