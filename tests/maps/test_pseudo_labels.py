import pytest
import torch
from series import refine_inputs

from wsss.benchmark.one_by_one import best_slots_one_by_one
from wsss.core.errors import WSSSError
from wsss.maps.pseudo_labels import (
    cam_to_label,
    cam_to_label_with_ignore,
    ignore_outside_boxes,
    refine_cam_to_label,
    roi_mask,
)
from wsss.maps.refine.par import PAR


def test_thresholds_and_equality() -> None:
    scores = torch.tensor([0.1, 0.25, 0.3, 0.5, 0.6, 0.7, 0.8])
    cam = torch.stack([scores, torch.ones(7)])[None, :, None]  # the second class is not labelled
    labels = torch.tensor([[1.0, 0.0]])
    assert cam_to_label(cam, labels, bg_threshold=0.5)[0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    label = cam_to_label_with_ignore(cam, labels, high=0.7, low=0.25)
    assert label[0, 0].tolist() == [0, 0, 255, 255, 255, 255, 1]
    roi = roi_mask(cam, labels, high=0.7, low=0.25)
    assert roi[0, 0].tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_image_without_labels_is_background() -> None:
    cam, labels = torch.rand(1, 3, 4, 6), torch.zeros(1, 3)
    assert not cam_to_label(cam, labels, bg_threshold=0.2).any()
    assert not cam_to_label_with_ignore(cam, labels, high=0.7, low=0.25).any()
    assert not roi_mask(cam, labels, high=0.7, low=0.25).any()


def test_boxes_exclude_their_ends() -> None:
    label = torch.ones(2, 4, 5, dtype=torch.long)
    boxes = torch.tensor([[1, 3, 2, 4], [0, 4, 0, 5]], dtype=torch.int16)
    masked = ignore_outside_boxes(label, boxes)
    expected = torch.full((4, 5), 255)
    expected[1:3, 2:4] = 1
    assert torch.equal(masked[0], expected)
    assert torch.equal(masked[1], label[1])
    assert (label == 1).all()


def counts(label: torch.Tensor) -> dict[int, int]:
    values, numbers = label.unique(return_counts=True)
    return dict(zip(values.tolist(), numbers.tolist(), strict=True))


def test_refined_label_of_the_specification() -> None:
    images, cam, labels, boxes = refine_inputs()
    label = refine_cam_to_label(PAR(), images, cam, labels, boxes=boxes, high=0.7, low=0.25)
    assert counts(label[0]) == {1: 575, 7: 1959, 255: 1562}
    assert counts(label[1]) == {15: 2157, 255: 1939}


@pytest.mark.parametrize(("height", "width"), [(64, 64), (45, 70)])
def test_batch_equals_image_by_image_and_score_by_score(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, height, width, generator=generator)
    cam = torch.rand(3, 6, height, width, generator=generator)
    # One class, no class, all classes: the packed batch has another width for each image.
    labels = torch.tensor([[0, 0, 1, 0, 0, 0], [0] * 6, [1] * 6]).float()
    par = PAR(num_iter=4)
    settings = {"high": 0.7, "low": 0.25}
    batch = refine_cam_to_label(par, images, cam, labels, **settings)
    alone = [
        refine_cam_to_label(par, images[i : i + 1], cam[i : i + 1], labels[i : i + 1], **settings)
        for i in range(3)
    ]
    assert torch.equal(batch, torch.cat(alone))
    official = refine_cam_to_label(
        par, images, cam, labels, refine=best_slots_one_by_one, **settings
    )
    assert torch.equal(batch, official)
    assert set(counts(batch[0])) <= {0, 3, 255}
    assert counts(batch[1]) == {0: height * width}
    assert len(counts(batch[2])) > 3


def test_sizes_are_checked() -> None:
    images, cam, labels, _ = refine_inputs()
    with pytest.raises(WSSSError, match="resize the CAMs"):
        refine_cam_to_label(PAR(), images, cam[..., :32], labels, high=0.7, low=0.25)
    with pytest.raises(WSSSError, match="down_scale 100"):
        refine_cam_to_label(PAR(), images, cam, labels, high=0.7, low=0.25, down_scale=100)
