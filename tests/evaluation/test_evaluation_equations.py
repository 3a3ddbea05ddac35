"""Scores by hand where a set, a side of a threshold or a normaliser decides."""

import numpy as np
import pytest
import torch

from wsss.core.errors import WSSSError
from wsss.evaluation.confusion import (
    ConfusionMatrix,
    Counts,
    ThresholdConfusion,
    coverage,
    score_pseudo_labels,
    scores,
)
from wsss.evaluation.label_maps import LabelMapCounts, Regions, label_map_scores
from wsss.evaluation.metrics import (
    ImageLevelScores,
    PixelAveragePrecision,
    average_precision,
    f1_per_axis,
)
from wsss.evaluation.per_image import co_occurrence, mean_iou, per_image_counts

# ---- confusion -----------------------------------------------------------------------------------


def test_scores_of_a_matrix_that_is_not_symmetric() -> None:
    """Rows are truth: class 1 has 10 pixels, 6 hit; it is predicted 8 times."""
    score = scores(torch.tensor([[80, 2, 0], [4, 6, 0], [0, 0, 0]]))
    assert score.iou[1].item() == pytest.approx(6 / 12)
    assert score.precision[1].item() == pytest.approx(6 / 8)
    assert score.recall[1].item() == pytest.approx(6 / 10)
    assert score.over[1].item() == pytest.approx(2 / 10)
    assert score.miou == pytest.approx((80 / 86 + 6 / 12) / 2)
    assert score.pixel_accuracy == pytest.approx(86 / 92)
    assert all(column[2].isnan() for column in (score.iou, score.recall, score.over))


def test_what_is_never_predicted_has_recall_without_precision() -> None:
    score = scores(torch.tensor([[5, 0], [3, 0]]))
    assert score.precision[1].isnan()
    assert (score.recall[1], score.iou[1], score.over[1]) == (0, 0, 0)
    invented = scores(torch.tensor([[5, 3, 0], [0, 0, 0], [0, 0, 1]]))
    assert invented.precision[1].isnan()
    assert invented.miou == pytest.approx((5 / 8 + 1) / 2)


def test_abstentions_are_not_covered_and_may_be_background() -> None:
    counts = Counts(torch.tensor([[4, 0], [1, 2]]), torch.tensor([2, 1]))
    assert coverage(counts) == pytest.approx(7 / 10)
    assert np.isnan(coverage(Counts(torch.zeros(2, 2).long(), torch.zeros(2).long())))
    excluded = score_pseudo_labels(counts, "excluded")
    assert excluded.iou.tolist() == pytest.approx([4 / 5, 2 / 3])
    background = score_pseudo_labels(counts, "ignored_as_background")
    assert background.iou.tolist() == pytest.approx([6 / 8, 2 / 4])


@pytest.mark.parametrize(("pred", "target"), [(3, 0), (0, 3), (-1, 0), (0, -1)])
def test_the_first_id_beyond_the_classes_is_refused(pred: int, target: int) -> None:
    with pytest.raises(WSSSError, match=rf"class id {pred or target}\b"):
        ConfusionMatrix(num_classes=3).update(torch.tensor([pred]), torch.tensor([target]))
    metric = ConfusionMatrix(num_classes=3)
    metric.update(torch.tensor([2, 3]), torch.tensor([2, 255]))  # void is not looked at
    assert metric.compute().matrix.sum() == 1


def test_a_score_at_the_threshold_is_background() -> None:
    metric = ThresholdConfusion(num_classes=3, thresholds=(0.0, 0.5, 1.0))
    cam = torch.tensor([[0.0, 0.5, 0.6, 1.0, 0.2], [0.0, 0.1, 0.2, 0.3, 0.4]]).view(1, 2, 1, 5)
    metric.update(cam, torch.tensor([[[0, 1, 2, 1, 255]]]))
    assert metric.compute().tolist() == [
        [[1, 0, 0], [0, 2, 0], [0, 1, 0]],
        [[1, 0, 0], [1, 1, 0], [0, 1, 0]],
        [[1, 0, 0], [2, 0, 0], [1, 0, 0]],
    ]


# ---- ranking -------------------------------------------------------------------------------------


def test_average_precision_of_groups_of_equal_scores() -> None:
    """Scores 3 (hit), 2 2 (one hit), 1 (miss), 0 (hit): 1/3 (1 + 2/3 + 3/5)."""
    logits = torch.tensor([2.0, 3, 1, 2, 0])[:, None].repeat(1, 2)
    labels = torch.tensor([[0, 0], [1, 0], [0, 0], [1, 0], [1, 0]])
    found = average_precision(logits, labels)
    assert found[0].item() == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert found[1].isnan()


def test_f1_by_class_and_by_image() -> None:
    predicted = torch.tensor([[True, True, False], [True, False, True]])
    labels = torch.tensor([[True, False, False], [True, True, False]])
    by_class = f1_per_axis(predicted, labels, 0)
    assert by_class[:2].tolist() == [1, 0]
    assert by_class[2].isnan()
    assert f1_per_axis(predicted, labels, 1).tolist() == pytest.approx([2 / 3, 1 / 2])
    metric = ImageLevelScores(num_classes=3)
    metric.update(torch.where(predicted, 0.2, -0.2), labels.float())
    result = metric.compute()
    assert result.f1 == pytest.approx(1 / 2)
    assert result.f1_images == pytest.approx(7 / 12)
    metric.update(torch.zeros(1, 3), torch.eye(3)[:1])  # probability 0.5 is absent
    assert metric.compute().f1_images == pytest.approx(7 / 18)


def test_pixel_precision_takes_pixels_of_one_step_together() -> None:
    """Steps of 1/1000, rounded down: 0.5009 and 0.5001 are one step, 0.4999 the one below."""
    metric = PixelAveragePrecision(num_classes=1)
    cam = torch.tensor([0.5009, 0.5001, 0.4999, 0.9, 0.1]).view(1, 1, 1, 5)
    metric.update(cam, torch.ones(1, 1), torch.tensor([[[0, 1, 1, 255, 0]]]))
    assert metric.compute().item() == pytest.approx((1 / 2 + 2 / 3) / 2)
    metric.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1), torch.tensor([[[1, 0]]]))
    assert metric.compute().item() == pytest.approx((1 / 2 + 2 / 3 + 3 / 6) / 3)


# ---- single images -------------------------------------------------------------------------------


def rows(*cells: tuple[int, int, int, int]) -> np.ndarray:
    """Cells (image, truth, prediction, pixels) of three classes; a prediction of 3 is 255."""
    return np.array([(image, truth * 4 + guess, count) for image, truth, guess, count in cells])


def test_counts_of_single_images_under_both_policies() -> None:
    cells = rows((4, 1, 1, 6), (4, 1, 3, 2), (4, 0, 1, 3), (9, 0, 0, 5), (9, 0, 3, 1))
    counted = per_image_counts(cells, num_classes=3)
    assert counted.images.tolist() == [4, 9]
    assert counted.values[0].tolist() == [[0, 3, 2], [6, 8, 9], [0, 0, 0]]
    assert counted.values[1].tolist() == [[6, 6, 6], [0, 0, 0], [0, 0, 0]]
    left_out = per_image_counts(cells, num_classes=3, exclude_ignored=True)
    assert left_out.values[0].tolist() == [[0, 3, 0], [6, 6, 9], [0, 0, 0]]
    assert left_out.values[1, 0].tolist() == [5, 5, 5]


def test_mean_iou_is_over_the_classes_of_the_truth() -> None:
    counts = np.array([[[0, 3, 2], [6, 8, 9], [0, 0, 4]], [[0, 0, 0], [0, 0, 0], [0, 0, 4]]])
    found = mean_iou(counts)
    assert found[0] == pytest.approx((0 + 6 / 11) / 2)
    assert np.isnan(found[1])


def test_co_occurrence_is_of_the_image_that_holds_both() -> None:
    cells = rows((0, 1, 2, 3), (0, 1, 1, 1), (0, 2, 2, 4), (0, 0, 0, 9), (1, 1, 2, 5), (1, 0, 3, 7))
    found = co_occurrence(cells, num_classes=3)
    assert found.shares[1, 2] == pytest.approx(3 / 4)  # image 1 has no class 2
    assert found.shares[2, 1] == 0
    assert found.shares[1, 0] == 0  # of 9 pixels beside background
    assert found.shares[0, 1] == 0
    assert np.isnan(found.shares.diagonal()).all()
    # foreground was claimed 13 times; 5 of that in an image without the class
    assert found.hallucinated == pytest.approx(5 / 13)


def test_nothing_claimed_or_beside_is_not_a_number() -> None:
    found = co_occurrence(rows((0, 1, 0, 3)), num_classes=3)
    assert np.isnan(found.hallucinated)
    assert np.isnan(found.shares).all()
    # background where an image has none is not a claim
    assert co_occurrence(rows((0, 1, 0, 3), (0, 1, 2, 1)), num_classes=3).hallucinated == 1
    # an abstention is background, also where the image has none
    assert co_occurrence(rows((0, 0, 3, 1), (0, 1, 3, 3)), num_classes=3).shares[1, 0] == 1


# ---- whole label maps ----------------------------------------------------------------------------


def totals_of(truth: np.ndarray, guess: np.ndarray, num_classes: int = 3) -> LabelMapCounts:
    metric = LabelMapCounts(num_classes=num_classes)
    metric.update(torch.from_numpy(guess), Regions.of(torch.from_numpy(truth), num_classes), 0)
    return metric


def test_sizes_begin_at_one_and_ten_percent() -> None:
    truth = np.zeros((40, 50), np.uint8)  # 2000 pixels
    truth[0, :19] = 1  # 0.95 %
    truth[2, :20] = 1  # 1 %
    truth[4:8, :49] = 1  # 9.8 %
    truth[10:14] = 1  # 10 %
    size = totals_of(truth, truth).compute().size
    assert size[:, 1, 1].tolist() == [19, 20 + 196, 200, 0]
    assert size[:, 0].sum() == 0  # background has no size
    values, _ = label_map_scores(totals_of(truth, truth).compute())
    assert values["size_pixels"] == [19, 216, 200]
    assert values["size_iou"] == {"small": 1.0, "medium": 1.0, "large": 1.0}


def test_the_band_of_an_image_of_30_pixels_is_one_wide() -> None:
    """2 % of the diagonal, rounded, and at least 1: of 50 x 50 pixels 1.41."""
    for side, reach in ((8, 1), (30, 1), (50, 1), (54, 2), (106, 3)):
        assert Regions.of(torch.zeros(side, side), 2).reach == reach
    truth = np.zeros((30, 30), np.uint8)
    truth[10:20, 10:20] = 1
    band = Regions.of(torch.from_numpy(truth), 2).band
    assert band[10:20, 10:20].sum() == 100 - 64
    assert band[0].all()
    assert band[:, -1].all()
    assert not band[2:8, 2:8].any()
    assert band[9, 9:21].all()


def test_a_class_without_truth_has_no_boundary_score() -> None:
    truth, guess = np.zeros((2, 20, 20), np.uint8)
    truth[5:10, 5:10] = 1
    guess[5:10, 5:11] = 1
    guess[15:18, 15:18] = 2
    values, columns = label_map_scores(totals_of(truth, guess).compute())
    assert np.isnan(columns["boundary_iou"][2])
    # contours of 16 and of 18 pixels share 16 minus the 3 that lie inside the wider one
    assert columns["boundary_iou"][1] == pytest.approx(13 / (16 + 18 - 13))
    assert values["hallucinated"] == pytest.approx(9 / 39)
    # of a class that the image lacks, pixels are counted apart
    assert totals_of(truth, guess).compute().size[3, 2].tolist() == [0, 0, 9]


def test_ids_in_void_are_not_looked_at() -> None:
    truth = np.zeros((8, 8), np.uint8)
    truth[0, 0] = 255
    guess = np.zeros((8, 8), np.int64)
    guess[0, 0] = 7
    assert totals_of(truth, guess).compute().counts.matrix.sum() == 63
    guess[0, 1] = 3  # the first id beyond the classes
    with pytest.raises(WSSSError, match="class id 3"):
        totals_of(truth, guess)


def test_cells_are_sorted_by_image_then_by_cell() -> None:
    metric = LabelMapCounts(num_classes=2)
    truth = torch.zeros(8, 8)
    truth[:4] = 1
    for index in (5, 2):
        metric.update(torch.eye(8).long(), Regions.of(truth, 2), index)
    cells = metric.compute().cells.tolist()
    assert [(image, cell) for image, cell, _ in cells] == [
        (image, cell) for image in (2, 5) for cell in (0, 1, 3, 4)
    ]
    assert [count for *_, count in cells[:4]] == [28, 4, 28, 4]
