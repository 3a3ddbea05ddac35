from pathlib import Path

import numpy as np
import pytest
import torch

from wsss.core.errors import WSSSError
from wsss.evaluation.confusion import (
    ConfusionMatrix,
    ThresholdConfusion,
    coverage,
    score_pseudo_labels,
    scores,
)
from wsss.evaluation.protocol import ORACLE_THRESHOLDS
from wsss.maps.pseudo_labels import cam_to_label

GOLDEN = Path(__file__).parents[1] / "golden" / "toco"


def brute_miou(pred: np.ndarray, target: np.ndarray, num_classes: int) -> float:
    """mIoU with sets of pixels, class by class."""
    ious = []
    counted = target != 255
    for c in range(num_classes):
        truth, guess = (target == c) & counted, (pred == c) & counted
        if truth.any():
            ious.append((truth & guess).sum() / (truth | guess).sum())
    return float(np.mean(ious))


def test_hand_computed_scores() -> None:
    metric = ConfusionMatrix(num_classes=3)
    #                    hit hit miss miss void
    pred = torch.tensor([0, 1, 0, 2, 2])
    target = torch.tensor([0, 1, 1, 0, 255])
    metric.update(pred, target)
    matrix = metric.compute().matrix
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]
    score = scores(matrix)
    assert score.iou[:2].tolist() == pytest.approx([1 / 3, 1 / 2])
    assert score.precision[:2].tolist() == pytest.approx([1 / 2, 1])
    assert score.recall[:2].tolist() == pytest.approx([1 / 2, 1 / 2])
    assert score.over[:2].tolist() == pytest.approx([1 / 2, 0])
    assert score.pixel_accuracy == pytest.approx(1 / 2)
    # class 2 is predicted but never true: it has no IoU and does not enter the mean
    assert score.iou[2].isnan()
    assert score.precision[2].isnan()
    assert score.miou == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_batches_add_up_and_equal_brute_force() -> None:
    rng = np.random.default_rng(0)
    target = rng.choice([0, 1, 2, 4, 255], size=(6, 17, 13), p=[0.5, 0.2, 0.15, 0.1, 0.05])
    pred = np.where(rng.random(target.shape) < 0.6, target % 5, rng.integers(0, 5, target.shape))
    metric = ConfusionMatrix(num_classes=5)
    for one_pred, one_target in zip(pred, target, strict=True):
        metric.update(torch.from_numpy(one_pred), torch.from_numpy(one_target))
    matrix = metric.compute().matrix
    assert matrix.sum() == (target != 255).sum()
    assert scores(matrix).miou == pytest.approx(brute_miou(pred, target, 5), abs=1e-12)


def test_mean_iou_is_of_the_data_set_not_of_images() -> None:
    metric = ConfusionMatrix(num_classes=2)
    metric.update(torch.tensor([[1, 0, 0, 0]]), torch.tensor([[1, 0, 0, 0]]))
    metric.update(torch.tensor([[0, 0, 0, 0]]), torch.tensor([[1, 1, 1, 0]]))
    assert scores(metric.compute().matrix).iou.tolist() == pytest.approx([4 / 7, 1 / 4])


def test_abstentions_under_both_policies_with_coverage() -> None:
    metric = ConfusionMatrix(num_classes=2, allow_ignored_prediction=True)
    pred = torch.tensor([255, 255, 1, 0, 255])
    target = torch.tensor([1, 0, 1, 0, 255])
    metric.update(pred, target)
    counts = metric.compute()
    assert coverage(counts) == pytest.approx(2 / 4)
    assert score_pseudo_labels(counts, "excluded").miou == pytest.approx(1.0)
    as_background = score_pseudo_labels(counts, "ignored_as_background")
    assert as_background.iou.tolist() == pytest.approx([2 / 3, 1 / 2])
    assert counts.matrix.tolist() == [[1, 0], [0, 1]], "scoring must not change the counts"


@pytest.mark.parametrize(
    ("pred", "target", "message"),
    [
        ([0, 3], [0, 1], "prediction holds class id 3"),
        ([0, 255], [0, 1], "prediction holds class id 255"),
        ([0, 1], [0, 7], "ground truth holds class id 7"),
        ([0, 1], [0, -1], "ground truth holds class id -1"),
        ([0, 1], [0, 1, 1], "differ in size"),
    ],
)
def test_bad_ids_and_sizes_are_named(pred: list[int], target: list[int], message: str) -> None:
    with pytest.raises(WSSSError, match=message):
        ConfusionMatrix(num_classes=3).update(torch.tensor(pred), torch.tensor(target))


def test_every_threshold_equals_a_pass_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    cam = torch.rand(3, 4, 9, 11, generator=generator)
    cam[0, :, 0] = 0.0
    cam[1] = (cam[1] * 20).round() / 20  # many values exactly at a threshold
    labels = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).float()
    cam *= labels[:, :, None, None]
    target = torch.randint(0, 5, (3, 9, 11), generator=generator)
    target[:, 4] = 255
    metric = ThresholdConfusion(num_classes=5, thresholds=ORACLE_THRESHOLDS)
    metric.update(cam[:2], target[:2])
    metric.update(cam[2:], target[2:])
    matrices = metric.compute()
    assert matrices.shape == (20, 5, 5)
    assert matrices.dtype == torch.int64
    for matrix, threshold in zip(matrices, ORACLE_THRESHOLDS, strict=True):
        single = ConfusionMatrix(num_classes=5)
        single.update(cam_to_label(cam, labels, bg_threshold=threshold), target)
        assert torch.equal(matrix, single.compute().matrix), threshold


def test_scores_at_a_threshold_fall_as_in_the_official_code() -> None:
    case = np.load(GOLDEN / "d_labels.npz")
    cam = torch.from_numpy(case["in_cam"] * case["in_cls_label"][:, :, None, None])
    metric = ThresholdConfusion(num_classes=6, thresholds=(0.5,))
    metric.update(cam, torch.from_numpy(case["out_label_nobox"]))
    matrix = metric.compute()[0]
    assert matrix.sum() == case["out_label_nobox"].size
    assert torch.equal(matrix, matrix.diagonal().diag())


def test_bad_cams_and_thresholds_are_named() -> None:
    for thresholds in ((), (0.5, 0.2), (0.2, 0.2), (-0.1, 0.5), (0.5, 1.5)):
        with pytest.raises(WSSSError, match="thresholds"):
            ThresholdConfusion(num_classes=3, thresholds=thresholds)
    metric = ThresholdConfusion(num_classes=3, thresholds=(0.5,))
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(WSSSError, match="cams hold 3 classes, expected 2"):
        metric.update(torch.rand(1, 3, 4, 4), target)
    with pytest.raises(WSSSError, match="NaN"):
        metric.update(torch.full((1, 2, 4, 4), torch.nan), target)


def test_background_alone_has_no_score() -> None:
    metric = ConfusionMatrix(num_classes=3)
    metric.update(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 255]))
    score = scores(metric.compute().matrix)
    assert np.isnan(score.miou)
    assert score.iou[0] == 1
