"""GETAM's inference protocol: squashed sizes, mean of logits, PAMR of pseudo labels."""

import torch
from tiny_module import TinyModule

from wsss.data.images import normalise, squash_pixels
from wsss.evaluation.inference import (
    evaluating,
    predict,
    pseudo_label,
    refinement,
    resized,
)
from wsss.evaluation.protocol import Protocol
from wsss.refine.pamr import PAMR


def test_merged_logits_are_the_mean_over_squashed_sizes() -> None:
    rgb = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(0)).byte()
    images = normalise(rgb.numpy())[None]
    module = TinyModule()
    protocol = Protocol(seg_sizes=(16, 24, 32), scale_merge="mean")
    assert protocol.multi_scale
    assert protocol.during_training().seg_sizes is None
    with evaluating(module):
        merged = predict(module, images, (40, 60), protocol).merged
        single = [
            resized(module(squash_pixels(images, side)).seg_logits, (40, 60))
            for side in (16, 24, 32)
        ]
    assert merged is not None
    torch.testing.assert_close(merged, torch.stack(single).mean(0))


def test_pamr_refines_maps_before_they_are_thresholded() -> None:
    protocol = Protocol(cam_high=0.6, cam_low=0.2, refine="pamr")
    refine = refinement(protocol)
    assert isinstance(refine, PAMR)
    assert refinement(Protocol()) is None
    rgb = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    rgb[:, :, 16:] = 255
    cams = torch.zeros(1, 3, 32, 32)
    cams[:, 1, :, 12:] = 0.5  # four columns over the edge, and a maximum of 0.5
    labels = torch.tensor([[0.0, 1, 0]])
    made = pseudo_label(refine, rgb, cams, labels, protocol)
    assert (made[0, :, 18:] == 2).all()
    assert (made[0, :, 12:14] != 2).all()
    assert (made[0, :, :4] == 0).all()
