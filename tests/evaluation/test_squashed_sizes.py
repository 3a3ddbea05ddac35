"""GETAM's inference protocol: squashed sizes, mean of logits, PAMR of pseudo labels."""

import sys

import numpy as np
import pytest
import torch
from tiny_module import TinyModule

from wsss.comparison.panels import _from_cams
from wsss.core.modes import evaluating
from wsss.evaluation.inference import predict, pseudo_label, refinement, resized, smoothed_label
from wsss.evaluation.protocol import Protocol
from wsss.maps.pixels import normalise, squash_pixels
from wsss.maps.refine.dense_crf import CRF_PRESETS, crf_label
from wsss.maps.refine.pamr import PAMR


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
    drawn = _from_cams("pseudo_label", cams, labels, rgb, protocol)
    np.testing.assert_array_equal(drawn, made[0].numpy(), "a report shows what was scored")


def test_a_single_image_is_smoothed_by_the_protocols_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = np.random.default_rng(0)
    rgb = stream.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    logits = torch.from_numpy(stream.normal(size=(3, 12, 16)).astype(np.float32))
    prob = logits.softmax(0).numpy()
    plain = smoothed_label(rgb, logits, Protocol())
    np.testing.assert_array_equal(plain, prob.argmax(0))
    reference = crf_label(rgb, prob, CRF_PRESETS["toco"], [2])
    theirs = smoothed_label(rgb, logits, Protocol(crf="toco"), [2])
    np.testing.assert_array_equal(theirs, reference)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)  # our own does without
    ours = smoothed_label(rgb, logits, Protocol(crf="toco", crf_backend="torch"), [2])
    assert set(np.unique(ours)) <= {0, 2}
    assert (ours == reference).mean() > 0.95
