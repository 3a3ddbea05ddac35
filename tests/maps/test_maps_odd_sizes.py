"""Resizing in the maps at sizes that scales do not divide: floor of the size, its own ratio."""

import pytest
import torch
from torch import Tensor

from wsss.maps.cams import multiscale_cam
from wsss.maps.pseudo_labels import refine_cam_to_label
from wsss.maps.refine.par import PAR

HEIGHT, WIDTH = 75, 61


def ramp(count: int, total: int) -> Tensor:
    """Where each of ``count`` samples of a line of ``total`` pixels lies, by the ratio of sizes."""
    return ((torch.arange(count) + 0.5) * total / count - 0.5).clamp(0, total - 1)


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.5])
def test_scaled_inputs_are_floored_and_sampled_by_their_ratio(scale: float) -> None:
    rows = torch.arange(float(HEIGHT))[:, None].expand(HEIGHT, WIDTH)
    columns = torch.arange(float(WIDTH)).expand(HEIGHT, WIDTH)
    seen: list[Tensor] = []

    def raw_cams(images: Tensor) -> list[Tensor]:
        seen.append(images)
        return [images[:, :1]]

    multiscale_cam(raw_cams, torch.stack([rows, columns, rows])[None], scales=[scale])
    height, width = int(scale * HEIGHT), int(scale * WIDTH)
    assert [tuple(images.shape) for images in seen] == [
        (2, 3, HEIGHT, WIDTH),
        (2, 3, height, width),
    ]
    plain, mirrored = seen[1]
    down, across = ramp(height, HEIGHT), ramp(width, WIDTH)
    torch.testing.assert_close(plain[0], down[:, None].expand(-1, width), atol=1e-4, rtol=0)
    torch.testing.assert_close(plain[1], across.expand(height, -1), atol=1e-4, rtol=0)
    torch.testing.assert_close(mirrored, plain.flip(-1))


def test_refinement_runs_at_the_floor_of_the_reduced_size() -> None:
    seen: list[Tensor] = []

    class Seen(PAR):
        def forward(self, images: Tensor, masks: Tensor) -> Tensor:
            seen.extend([images, masks])
            return masks

    columns = torch.arange(float(WIDTH)).expand(1, 1, HEIGHT, WIDTH) / WIDTH
    labels = torch.ones(1, 1)
    images = columns.expand(-1, 3, -1, -1)
    label = refine_cam_to_label(Seen(), images, columns, labels, high=0.7, low=0.25)
    assert seen[0].shape == (1, 3, 37, 30)
    across = ramp(30, WIDTH) / WIDTH
    torch.testing.assert_close(seen[0][0, 0, 0], across, atol=1e-6, rtol=0)
    # softmax over background score and class score, for each of the two thresholds
    for index, background in enumerate((0.7, 0.25)):
        pair = torch.stack([torch.full_like(across, background), across]).softmax(0)
        torch.testing.assert_close(seen[1][0, 2 * index : 2 * index + 2, 0], pair)
    assert label.shape == (1, HEIGHT, WIDTH)
    assert set(label[0, 0].tolist()) == {0, 1, 255}
    assert label[0, 0].tolist() == sorted(label[0, 0].tolist(), key=[0, 255, 1].index)
    first_undecided, first_class = (label[0, 0].tolist().index(value) for value in (255, 1))
    assert abs(first_undecided - 0.25 * WIDTH) <= 1
    assert abs(first_class - 0.7 * WIDTH) <= 1
