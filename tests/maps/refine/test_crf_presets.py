"""The CRF's presets against the pages that state them, and the pruning to present classes."""

import numpy as np
import pytest

from wsss.maps.refine.dense_crf import CRF_PRESETS, prune

# width and weight of the position kernel, widths (pixels, grey levels) and weight of the other
STATED = {
    "toco": (1, 1, 121, 5, 4, 10),
    "toco_cam": (3, 3, 36, 3, 4, 10),
    "getam": (3, 3, 83, 5, 4, 20),
    "getam_bgr": (3, 3, 83, 5, 4, 20),
    "psa": (3, 3, 80, 13, 10, 10),
    "irn": (3, 3, 50, 5, 10, 10),
    "afa": (3, 3, 64, 5, 4, 10),
    "clip_es": (1, 3, 67, 3, 4, 10),
    "mctformer": (4, 3, 83, 5, 3, 10),
    "clustercam": (4, 3, 83, 5, 3, 10),
    "tkp_pcl": (1, 3, 67, 3, 4, 10),
    "weaktr": (3, 3, 83, 5, 3, 10),
    "weclip": (3, 3, 64, 5, 4, 10),
    "fma": (2, 2, 65, 3, 4, 10),
}


@pytest.mark.parametrize("name", CRF_PRESETS)
def test_presets_are_those_of_the_pages(name: str) -> None:
    p = CRF_PRESETS[name]
    assert (p.pos_xy, p.pos_w, p.bi_xy, p.bi_rgb, p.bi_w, p.iterations) == STATED[name]
    assert p.bgr == (name == "getam_bgr")


def test_pruning_keeps_background_and_renormalises() -> None:
    prob = np.array([0.1, 0.2, 0.3, 0.4], np.float32).reshape(4, 1, 1)
    kept, chosen = prune(prob, [3, 1, 0])
    assert kept == [0, 1, 3]
    assert chosen.ravel().tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    kept, chosen = prune(prob, [])
    assert (kept, chosen.ravel().tolist()) == ([0], [1.0])
