"""Inputs of multi-scale inference at sizes that scales do not divide."""

import pytest
import torch
from torch import Tensor

from wsss.evaluation.inference import predict
from wsss.evaluation.protocol import Protocol
from wsss.methods.base import Outputs

HEIGHT, WIDTH = 75, 61


class Recorder:
    """A module that keeps what it sees; its logits are its input's means over 16 x 16 squares."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> Outputs:
        self.seen.append(images)
        return Outputs(images.mean((2, 3))[:, 1:], torch.nn.functional.avg_pool2d(images, 16))


@pytest.mark.parametrize("align_corners", [False, True])
def test_scaled_images_are_floored_and_sampled_by_their_ratio(align_corners: bool) -> None:
    rows = torch.arange(float(HEIGHT))[:, None].expand(HEIGHT, WIDTH)
    columns = torch.arange(float(WIDTH)).expand(HEIGHT, WIDTH)
    module = Recorder()
    protocol = Protocol(seg_scales=(0.5, 1.25), flip=False, align_corners=align_corners)
    predict(module, torch.stack([rows, columns, rows])[None], (HEIGHT, WIDTH), protocol)
    scaled = {tuple(images.shape[-2:]): images for images in module.seen}
    for scale in (0.5, 1.25):
        height, width = int(scale * HEIGHT), int(scale * WIDTH)
        for count, total, plane, line in (
            (height, HEIGHT, 0, lambda image: image[:, 0]),
            (width, WIDTH, 1, lambda image: image[0]),
        ):
            if align_corners:
                expected = torch.arange(count) * (total - 1) / (count - 1)
            else:
                middle = (torch.arange(count) + 0.5) * total / count - 0.5
                expected = middle.clamp(0, total - 1)
            found = line(scaled[height, width][0, plane])
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
