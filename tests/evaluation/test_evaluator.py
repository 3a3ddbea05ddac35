import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.multiprocessing as mp
from tiny_module import CLASS_NAMES, Scenes, TinyModule, batches
from torch.utils.data import DataLoader

from wsss.core.errors import WSSSError
from wsss.evaluation.confusion import ConfusionMatrix, scores
from wsss.evaluation.evaluator import Evaluator, evaluate
from wsss.evaluation.inference import predict, predicted_labels
from wsss.evaluation.protocol import Protocol
from wsss.evaluation.tally import NO_CLASS_PIXELS, NO_SEGMENTATION
from wsss.maps.pseudo_labels import cam_to_label, refine_cam_to_label
from wsss.maps.refine.dense_crf import CRF_PRESETS, dense_crf
from wsss.maps.refine.par import PAR

PLAIN = Protocol(cam_threshold=0.5)
FULL = replace(
    PLAIN,
    seg_scales=(1.0, 1.5),
    flip=True,
    scale_merge="max",
    cam_high=0.7,
    cam_low=0.25,
    refine="par",
)


def run(protocol: Protocol, count: int = 5, **options: Any) -> dict[str, Any]:
    scenes = Scenes(count)
    module = TinyModule(**options)
    return evaluate(module, batches(scenes, range(count)), protocol, CLASS_NAMES)


def confusion(labels: list[torch.Tensor], scenes: Scenes, *, abstain: bool = False) -> Any:
    metric = ConfusionMatrix(num_classes=4, allow_ignored_prediction=abstain)
    for label, scene in zip(labels, scenes.items, strict=True):
        metric.update(label.squeeze(0), scene["mask"])
    return metric.compute()


def test_seed_numbers_equal_labels_made_one_threshold_at_a_time() -> None:
    scenes, module = Scenes(5), TinyModule().eval()
    result = run(PLAIN)
    by_threshold = {}
    for threshold in PLAIN.curve_thresholds:
        labels = [
            cam_to_label(
                module.cams(s["image"][None], s["labels"][None]),
                s["labels"][None],
                bg_threshold=threshold,
            )
            for s in scenes.items
        ]
        by_threshold[threshold] = scores(confusion(labels, scenes).matrix).miou
    assert result["seed_curve"]["thresholds"] == list(by_threshold)
    assert result["seed_curve"]["miou"] == pytest.approx(list(by_threshold.values()), abs=1e-12)
    assert result["seed_miou"] == by_threshold[0.5]
    assert result["seed_miou_oracle"] == max(by_threshold.values())
    assert by_threshold[result["seed_threshold_oracle"]] == result["seed_miou_oracle"]
    assert result["num_images"] == 5


def test_seeds_with_predicted_and_true_labels_stand_together() -> None:
    known, real = run(PLAIN), run(replace(PLAIN, use_image_labels=False))
    assert known["seed_miou_predicted_labels"] == real["seed_miou"]
    assert known["seed_miou"] != real["seed_miou"]
    assert real["seed_miou_predicted_labels"] is None


def test_predicted_labels_hold_at_least_the_strongest_class() -> None:
    logits = torch.tensor([[-3.0, -1.0, -2.0], [1.0, 2.0, -1.0]])
    assert predicted_labels(logits).tolist() == [[0, 1, 0], [1, 1, 0]]


def test_pseudo_labels_are_those_that_a_method_trains_on() -> None:
    scenes, module = Scenes(5), TinyModule().eval()
    result = run(FULL)
    labels = [
        refine_cam_to_label(
            PAR(),
            s["rgb"].permute(2, 0, 1)[None].float() / 255,
            module.cams(s["image"][None], s["labels"][None]).detach(),
            s["labels"][None],
            high=0.7,
            low=0.25,
        )
        for s in scenes.items
    ]
    counts = confusion(labels, scenes, abstain=True)
    assert result["confusion"]["pseudo_label"] == counts.matrix.tolist()
    assert result["confusion"]["pseudo_label_abstained"] == counts.abstained.tolist()
    assert result["pseudo_label_miou_excluded"] == scores(counts.matrix).miou
    assert 0 < result["pseudo_label_coverage"] < 1


def test_merges_of_scales_and_flip_follow_the_protocol() -> None:
    module = TinyModule().eval()
    image = Scenes(1).items[0]["image"][None]
    size = image.shape[-2:]

    def logits(scale: float, flip: bool) -> torch.Tensor:
        scaled = image
        if scale != 1:
            target = (int(size[0] * scale), int(size[1] * scale))
            scaled = torch.nn.functional.interpolate(image, target, mode="bilinear")
        out = module(scaled.flip(-1) if flip else scaled).seg_logits
        out = torch.nn.functional.interpolate(out, size, mode="bilinear")
        return out.flip(-1) if flip else out

    with torch.no_grad():
        sum_then_max = predict(module, image, size, FULL)
        max_then_sum = predict(
            module, image, size, replace(FULL, flip_merge="max", scale_merge="sum")
        )
        sums = [logits(s, False) + logits(s, True) for s in (1.0, 1.5)]
        maxima = [torch.maximum(logits(s, False), logits(s, True)) for s in (1.0, 1.5)]
    assert sum_then_max.single is not None
    torch.testing.assert_close(sum_then_max.single, logits(1.0, False))
    torch.testing.assert_close(sum_then_max.merged, torch.maximum(*sums))
    torch.testing.assert_close(max_then_sum.merged, maxima[0] + maxima[1])


def test_probabilities_are_merged_where_the_protocol_says_so() -> None:
    """clustercam.md section 5: aligned input, maximum of probabilities over scales, no flip."""
    module = TinyModule().eval()
    image = Scenes(1).items[0]["image"][None]
    size = image.shape[-2:]
    protocol = Protocol(
        seg_scales=(0.5, 1.0, 1.5), scale_merge="max", merge_of="probabilities", align_corners=True
    )
    with torch.no_grad():
        merged = predict(module, image, size, protocol).merged
        parts = []
        for scale in protocol.seg_scales:
            target = (int(size[0] * scale), int(size[1] * scale))
            scaled = torch.nn.functional.interpolate(
                image, target, mode="bilinear", align_corners=True
            )
            out = module(scaled).seg_logits
            parts.append(torch.nn.functional.interpolate(out, size, mode="bilinear").softmax(1))
    expected = torch.stack(parts).amax(0)
    assert merged is not None
    torch.testing.assert_close(merged.exp(), expected)
    torch.testing.assert_close(merged.softmax(1), expected / expected.sum(1, keepdim=True))


def test_four_segmentation_numbers_with_the_crf_in_its_pool() -> None:
    result = run(replace(FULL, crf="toco"), count=3)
    scenes, module = Scenes(3), TinyModule().eval()
    labels = []
    for scene in scenes.items:
        with torch.no_grad():
            merged = predict(module, scene["image"][None], scene["mask"].shape, FULL).merged
        assert merged is not None
        prob = merged[0].softmax(0).numpy()
        posterior = dense_crf(scene["rgb"].numpy(), prob, CRF_PRESETS["toco"])
        labels.append(torch.from_numpy(posterior.argmax(0)))
    assert result["confusion"]["seg_ms_crf"] == confusion(labels, scenes).matrix.tolist()
    numbers = [result[f"seg_miou{suffix}"] for suffix in ("", "_crf", "_ms", "_ms_crf")]
    assert len(set(numbers)) == 4
    assert all(0 < number < 1 for number in numbers)


def test_pruned_crf_gives_only_labelled_classes() -> None:
    result = run(replace(PLAIN, crf="toco", crf_prune=True), count=3)
    matrix = torch.tensor(result["confusion"]["seg_crf"])
    # the first scene alone holds class 1; with its labels the others cannot show it
    unpruned = torch.tensor(run(replace(PLAIN, crf="toco"), count=3)["confusion"]["seg_crf"])
    assert matrix.sum() == unpruned.sum()
    wrong = matrix.sum() - matrix.diagonal().sum()
    assert wrong < unpruned.sum() - unpruned.diagonal().sum()


def test_without_a_segmentation_head_it_says_so() -> None:
    result = run(FULL, segments=False)
    assert all(result[f"seg_miou{suffix}"] is None for suffix in ("", "_crf", "_ms", "_ms_crf"))
    assert result["notes"] == [NO_SEGMENTATION]
    assert result["seed_miou"] > 0


def test_one_forward_pass_serves_all_single_scale_numbers() -> None:
    module = TinyModule()
    evaluate(module, batches(Scenes(4), range(4)), PLAIN, CLASS_NAMES)
    assert module.forwards == 4


def test_per_class_columns_are_complete() -> None:
    columns = run(FULL)["per_class"]
    assert columns["class"] == ["background", *CLASS_NAMES]
    assert {len(values) for values in columns.values()} == {4}
    assert math.isnan(columns["image_ap"][0])
    assert {"seed_iou", "seed_iou_oracle", "seg_iou", "seg_ms_iou"} <= set(columns)


@pytest.mark.parametrize("values", [(0,), (0, 255)])
def test_masks_without_a_class_give_no_score(values: tuple[int, ...]) -> None:
    scenes = Scenes(3)
    for item in scenes.items:
        mask = item["mask"]
        mask[mask < 255] = 0
        mask[:2] = values[-1]
    result = evaluate(TinyModule(), batches(scenes, range(3)), FULL, CLASS_NAMES)
    for key, value in result.items():
        if key.startswith(("seed", "seg", "pseudo")):
            assert value is None, key
    assert result["image_map"] is not None
    assert result["maps"] == result["confusion"] == result["cells"] == {}
    assert list(result["per_class"]) == ["class", "image_ap"]
    assert result["notes"] == [NO_CLASS_PIXELS]


def test_one_class_has_all_numbers() -> None:
    scenes = Scenes(3)
    for item in scenes.items:
        item["mask"][(item["mask"] > 0) & (item["mask"] < 255)] = 1
        item["labels"] = item["labels"].max(0, keepdim=True).values
    module = TinyModule()
    module.conv = torch.nn.Conv2d(3, 2, 4, stride=4)
    result = evaluate(module, batches(scenes, range(3)), FULL, ["thing"])
    assert len(result["per_class"]["seed_pixel_ap"]) == 2
    assert result["seed_pixel_map"] is not None
    assert result["seg_miou"] is not None


def test_modes_are_restored_one_by_one() -> None:
    module = TinyModule().train()
    module.conv.eval()  # as a frozen teacher would be
    evaluate(module, batches(Scenes(2), range(2)), PLAIN, CLASS_NAMES)
    assert module.training
    assert module.dropout.training
    assert not module.conv.training


def test_no_image_and_wrong_classes_are_errors() -> None:
    with pytest.raises(WSSSError, match="no image"):
        evaluate(TinyModule(), [], PLAIN, CLASS_NAMES)
    with pytest.raises(WSSSError, match="disagree"):
        evaluate(TinyModule(), batches(Scenes(1), range(1)), PLAIN, ("cat", "dog"))


def _comparable(result: dict[str, Any]) -> dict[str, Any]:
    """All but the time, with each image's cells as lists."""
    del result["cost"]
    return result | {"cells": {kind: cells.tolist() for kind, cells in result["cells"].items()}}


def _evaluate_share(rank: int, shares: list[range], protocol: Protocol, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(shares)
    )
    result = evaluate(
        TinyModule(), batches(Scenes(5), shares[rank]), protocol, CLASS_NAMES, crf_jobs=1
    )
    (folder / f"{rank}.json").write_text(json.dumps(_comparable(result)))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shares", [[range(0, 5, 2), range(1, 5, 2)], [range(5), range(0)]])
def test_two_processes_equal_one_to_the_last_integer(shares: list[range], tmp_path: Path) -> None:
    protocol = replace(FULL, crf="toco" if len(shares[1]) else None)
    mp.spawn(_evaluate_share, (shares, protocol, tmp_path), nprocs=2)
    one = json.dumps(_comparable(run(protocol)))
    for rank in range(2):
        assert (tmp_path / f"{rank}.json").read_text() == one


def test_callback_logs_what_evaluation_gives_but_no_sanity_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes, module = Scenes(4), TinyModule()
    loader = DataLoader(scenes, batch_size=1)
    evaluator = Evaluator(protocol=FULL, class_names=CLASS_NAMES)
    trainer = lightning.Trainer(
        max_steps=4,
        max_epochs=-1,
        val_check_interval=2,
        num_sanity_val_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[evaluator],
    )
    trainer.fit(module, loader, loader)
    expected = evaluate(module, loader, FULL.during_training(), CLASS_NAMES)
    assert [step for step, _ in evaluator.history] == [2, 4]
    assert evaluator.last["num_images"] == 4
    for key in ("seed", "seg"):
        assert evaluator.last["confusion"][key] == expected["confusion"][key]
    logged = trainer.callback_metrics
    assert logged["val/seed_miou"].item() == pytest.approx(expected["seed_miou"])
    assert logged["val/seg_miou"].item() == pytest.approx(expected["seg_miou"])
    assert logged["val/image_map"].item() == pytest.approx(expected["image_map"])
    assert "val/seed_miou_oracle" in logged
    assert "validation during training" in capsys.readouterr().out
