import math

import pytest
import torch
from torchmetrics.functional.classification import (
    multilabel_average_precision,
    multilabel_f1_score,
)

from wsss.core.errors import WSSSError
from wsss.evaluation.metrics import (
    ImageLevelScores,
    PixelAveragePrecision,
    average_precision,
)


def test_average_precision_by_hand() -> None:
    logits = torch.tensor([[3.0], [2.0], [1.0], [0.0]])
    labels = torch.tensor([[1], [0], [1], [0]])
    assert average_precision(logits, labels).item() == pytest.approx((1 + 2 / 3) / 2)


def test_equal_scores_do_not_depend_on_order() -> None:
    logits = torch.zeros(4, 1)
    labels = torch.tensor([[1], [0], [0], [1]])
    assert average_precision(logits, labels).item() == pytest.approx(0.5)
    assert average_precision(logits, labels.flip(0)).item() == pytest.approx(0.5)


def test_agrees_with_torchmetrics_and_skips_absent_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 5, generator=generator).mul(4).round().div(4)
    labels = (torch.rand(200, 5, generator=generator) < 0.3).float()
    labels[:, 4] = 0
    metric = ImageLevelScores(num_classes=5)
    for start in range(0, 200, 7):
        metric.update(logits[start : start + 7], labels[start : start + 7])
    result = metric.compute()
    prob = logits.double().sigmoid()
    expected = multilabel_average_precision(
        prob[:, :4], labels[:, :4].long(), num_labels=4, average="none", thresholds=None
    )
    assert result.average_precision[:4] == pytest.approx(expected.tolist(), abs=1e-6)
    assert math.isnan(result.average_precision[4])
    assert result.mean_average_precision == pytest.approx(expected.mean().item(), abs=1e-6)
    f1 = multilabel_f1_score(prob[:, :4], labels[:, :4].long(), num_labels=4, average="macro")
    # torchmetrics calls probability 0.5 absent as we do
    assert result.f1 == pytest.approx(f1.item(), abs=1e-6)
    assert result.num_images == 200


def test_f1_of_images() -> None:
    metric = ImageLevelScores(num_classes=3)
    metric.update(torch.tensor([[1.0, 1, -1], [1, -1, -1]]), torch.tensor([[1.0, 0, 1], [1, 0, 0]]))
    assert metric.compute().f1_images == pytest.approx((0.5 + 1.0) / 2)


def test_reset_forgets_and_shapes_are_checked() -> None:
    metric = ImageLevelScores(num_classes=2)
    metric.update(torch.ones(3, 2), torch.ones(3, 2))
    metric.reset()
    metric.update(torch.ones(1, 2), torch.ones(1, 2))
    assert metric.compute().num_images == 1
    with pytest.raises(WSSSError, match="must both be"):
        metric.update(torch.ones(1, 3), torch.ones(1, 3))


def test_pixel_average_precision_equals_sorting_all_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    cam = torch.rand(4, 3, 10, 12, generator=generator)
    target = torch.randint(0, 3, (4, 10, 12), generator=generator)  # class 3 never occurs
    target[:, 2] = 255
    active = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 0], [1, 1, 1]])
    cam *= active[:, :, None, None]
    metric = PixelAveragePrecision(num_classes=3)
    metric.update(cam[:3], active[:3], target[:3])
    metric.update(cam[3:], active[3:], target[3:])
    valid = target != 255
    steps = (cam * 1000).floor().permute(1, 0, 2, 3)[:, valid]
    labels = torch.stack([target[valid] == k + 1 for k in range(3)])
    expected = average_precision(steps.T, labels.T.float())
    found = metric.compute()
    assert found[:2].tolist() == pytest.approx(expected[:2].tolist(), abs=1e-12)
    assert found[2].isnan()
    assert metric.histogram.sum() == 3 * valid.sum()
