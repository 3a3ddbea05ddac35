"""Maps and label maps by hand: normalisation, sides of thresholds, slots, the merged label."""

import pytest
import torch
from torch import Tensor

from wsss.maps.cams import class_activation, multiscale_cam, normalise_cam, normalise_maximum
from wsss.maps.pseudo_labels import (
    best_slots,
    cam_probabilities,
    cam_to_label,
    cam_to_label_with_ignore,
    ignore_outside_boxes,
    inside_boxes,
    packed_scores,
    present_slots,
    refine_cam_to_label,
    refined_scores,
    roi_mask,
)
from wsss.maps.refine.par import PAR

# ---- class activation maps -----------------------------------------------------------------------


def test_every_map_is_normalised_on_its_own() -> None:
    cam = torch.tensor([[[[1.0, 3], [2, 5]], [[-2, 0], [0, -1]]], [[[4e-5, 0], [0, 0]]] * 2])
    found = normalise_cam(cam)
    assert found[0, 0].flatten().tolist() == pytest.approx([0, 0.5, 0.25, 1], abs=1e-5)
    assert found[0, 1].flatten().tolist() == pytest.approx([0, 1, 1, 0.5], abs=1e-5)
    assert found[1, 0, 0, 0].item() == pytest.approx(4 / 5)  # of the 1e-5 beside it
    assert not normalise_cam(torch.full((1, 1, 2, 2), 7.0)).any()


def test_maxima_are_divided_out_without_a_minimum() -> None:
    maps = torch.tensor([[[[1.0, 4]], [[2e-5, 3e-5]]]])
    found = normalise_maximum(maps)
    assert found[0, 0].flatten().tolist() == pytest.approx([0.25, 1], abs=1e-5)
    assert found[0, 1].flatten().tolist() == pytest.approx([2 / 4, 3 / 4])


def test_activation_is_the_linear_map_at_every_position() -> None:
    features, weight = torch.randn(2, 5, 3, 4), torch.randn(6, 5)
    expected = torch.stack([(features * row.view(5, 1, 1)).sum(1) for row in weight], dim=1)
    torch.testing.assert_close(class_activation(features, weight), expected)


@pytest.mark.parametrize("cut", [True, False])
def test_mirrors_give_the_maximum_scales_the_sum(cut: bool) -> None:
    """A constant image at each scale; the map of the plain one is a step, of the mirrored none."""
    heights = {8: 1.0, 4: 10.0}

    def raw_cams(images: Tensor) -> list[Tensor]:
        plain, mirrored = images.shape[-1] * [0.0], images.shape[-1] * [-0.5]
        plain[0] = heights[images.shape[-1]]  # at the left of the plain image
        plain[1] = -1.0
        mirrored[0] = 2.0  # at the right of the image
        return [torch.tensor([plain, mirrored])[:, None, None].expand(-1, 1, 8, -1)]

    (found,) = multiscale_cam(
        raw_cams, torch.zeros(1, 3, 8, 8), scales=(1.0, 0.5), cut_negative=cut
    )
    total = torch.zeros(8)
    for count, height in heights.items():
        plain, mirrored = torch.zeros(count), torch.full((count,), -0.5)
        plain[0], plain[1], mirrored[-1] = height, -1.0, 2.0
        lines = (
            torch.nn.functional.interpolate(one[None, None], size=8, mode="linear")[0, 0]
            for one in (plain, mirrored)
        )
        best = torch.maximum(*lines)
        total += best.relu() if cut else best
    total -= total.min()
    torch.testing.assert_close(found[0, 0, 3], total / (total.max() + 1e-5))


# ---- labels --------------------------------------------------------------------------------------

SCORES = torch.tensor([[0.9, 0.5, 0.25, 0.75, 0.1], [0.95, 0.4, 0.2, 0.7, 0.6]]).view(1, 2, 1, 5)


def test_sides_of_the_thresholds() -> None:
    """The first class alone is present: 0.9, 0.5, 0.25, 0.75, 0.1."""
    labels = torch.tensor([[1, 0]])
    plain = cam_to_label(SCORES, labels, bg_threshold=0.5)
    assert plain.flatten().tolist() == [1, 0, 0, 1, 0]
    between = cam_to_label_with_ignore(SCORES, labels, high=0.75, low=0.25)
    assert between.flatten().tolist() == [1, 255, 0, 255, 0]
    regions = roi_mask(SCORES, labels, high=0.75, low=0.25)
    assert regions.flatten().tolist() == [2, 1, 0, 2, 0]


def test_the_best_present_class_wins() -> None:
    both = cam_to_label(SCORES, torch.ones(1, 2), bg_threshold=0.3)
    assert both.flatten().tolist() == [2, 1, 0, 1, 2]
    second = cam_to_label(SCORES, torch.tensor([[0, 1]]), bg_threshold=0.3)
    assert second.flatten().tolist() == [2, 2, 0, 2, 2]
    assert not cam_to_label(SCORES, torch.zeros(1, 2), bg_threshold=0.3).any()


def test_scores_as_probabilities_have_the_odds_of_the_threshold() -> None:
    """Odds 3 and 1/3 against a threshold of odds 1/4: 0.75 and 0.25 against 0.2."""
    cam = torch.tensor([0.75, 0.25, 0.9]).view(1, 3, 1, 1)
    found = cam_probabilities(cam, torch.tensor([[1, 1, 0]]), bg_threshold=0.2).flatten()
    total = 1 / 4 + 3 + 1 / 3
    assert found.tolist() == pytest.approx([0.25 / total, 3 / total, 1 / 3 / total, 0])


def test_boxes_begin_within_and_end_before() -> None:
    boxes = torch.tensor([[1, 3, 0, 2]])
    inside = inside_boxes(boxes, 4, 3)[0].int()
    assert inside.tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 0]]
    label = ignore_outside_boxes(torch.full((1, 4, 3), 7), boxes, ignore_index=9)
    assert label[0].tolist() == [[9, 9, 9], [7, 7, 9], [7, 7, 9], [9, 9, 9]]


# ---- refined labels ------------------------------------------------------------------------------


def test_slots_are_background_then_present_classes() -> None:
    ids, valid = present_slots(torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]]))
    assert ids[valid].tolist() == [0, 2, 4, 0, 1]
    assert valid.tolist() == [[True, True, True], [True, True, False]]


def test_scores_compete_in_a_softmax_of_valid_slots() -> None:
    cam = torch.tensor([[0.3, 0.6], [0.8, 0.1]]).view(2, 2, 1, 1).expand(-1, -1, 2, 2)
    labels = torch.tensor([[1, 1], [1, 0]])
    ids, valid = present_slots(labels)
    scores = packed_scores(cam, labels, ids, (1, 1), (0.7, 0.25))
    assert scores[0, :, :, 0, 0].tolist() == [
        pytest.approx([0.7, 0.3, 0.6]),
        pytest.approx([0.25, 0.3, 0.6]),
    ]
    refined = refined_scores(PAR(num_iter=0), torch.zeros(2, 3, 1, 1), scores, valid)
    expected = torch.tensor([0.7, 0.8]).softmax(0)
    assert refined[1, 0, :2].flatten().tolist() == pytest.approx(expected.tolist())
    assert refined[1, 0, 2] == 0
    slots = best_slots(PAR(num_iter=0), torch.zeros(2, 3, 1, 1), scores, valid, (2, 2))
    assert slots[:, :, 0, 0].tolist() == [[0, 2], [1, 1]]


def test_absent_classes_weigh_nothing_in_the_scores() -> None:
    cam = torch.tensor([0.9, 0.4]).view(1, 2, 1, 1)
    labels = torch.tensor([[0, 1]])
    ids, _ = present_slots(labels)
    assert packed_scores(cam, labels, ids, (1, 1), (0.5,)).flatten().tolist() == pytest.approx(
        [0.5, 0.4]
    )


def test_the_label_merges_what_wins_against_either_background() -> None:
    """Slots against the high and the low score: 0 is background, 1 class 2, 2 class 3."""
    against = {"high": [1, 0, 0, 2, 1, 0, 2], "low": [1, 0, 1, 2, 2, 2, 0]}

    def refine(par: PAR, images: Tensor, scores: Tensor, *_: object) -> Tensor:
        assert scores[0, :, 0, 0, 0].tolist() == pytest.approx([0.7, 0.25])
        return torch.tensor([against["high"], against["low"]])[None, :, None]

    labels = torch.tensor([[0.0, 1, 1]])
    inputs = torch.zeros(1, 3, 1, 7), torch.zeros(1, 3, 1, 7), labels
    settings = {"high": 0.7, "low": 0.25, "down_scale": 1, "refine": refine}
    label = refine_cam_to_label(PAR(), *inputs, **settings)
    assert label.flatten().tolist() == [2, 0, 255, 3, 2, 255, 3]
    box = torch.tensor([[0, 1, 1, 5]])
    label = refine_cam_to_label(PAR(), *inputs, boxes=box, ignore_index=9, **settings)
    assert label.flatten().tolist() == [9, 0, 9, 3, 2, 9, 9]
