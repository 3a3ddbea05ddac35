"""MCTformer+'s parity cases: the product's functions on the official run's inputs.

Every function takes its sizes and settings from the file. The networks load their weights through
the converter for official checkpoints. Here are what follows from maps and all tolerances;
``mctformer_network.py`` has the network and its maps, ``mctformer_steps.py`` losses, training
steps, the schedule and the start.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsss.evaluation.confusion import ThresholdConfusion
from wsss.maps.pseudo_labels import alpha_background, confident_labels
from wsss.maps.refine.dense_crf import CRF_PRESETS, dense_crf
from wsss.parity.cases import Case, Kind, Produced
from wsss.parity.inputs import as_tensor
from wsss.parity.mctformer_network import a_stem, b_network, c_maps, d_export, e_pool
from wsss.parity.mctformer_steps import f_loss, g_gradients, h_train, i_schedule, j_init
from wsss.parity.tolerances import Array, Tolerance

CRF = "psa"

# ---- labels from maps ----------------------------------------------------------------------------


def k_alpha(case: Case) -> Produced:
    """Let the CRF decide between maps and two levels of background, and join the two labels."""
    maps, cfg = as_tensor(case.inputs["maps"])[None], case.settings
    preset = replace(CRF_PRESETS[CRF], iterations=cfg["iterations"])
    ids = np.concatenate([[0], case.inputs["classes"] + 1]).astype(np.uint8)
    produced: dict[str, Any] = {}
    for alpha in cfg["alphas"]:
        scores = torch.cat([alpha_background(maps, alpha), maps], dim=1)[0].numpy()
        posterior = dense_crf(case.inputs["img"], scores, preset)
        produced[f"prob_alpha{alpha}"] = posterior
        produced[f"label_alpha{alpha}"] = ids[posterior.argmax(0)]
    # the smaller exponent leaves more to the background: what it gives a class is certain
    low, high = (
        as_tensor(produced[f"label_alpha{choose(cfg['alphas'])}"]).long() for choose in (max, min)
    )
    produced["affinity_label"] = confident_labels(high, low)
    return produced


# ---- threshold scan ------------------------------------------------------------------------------


def l_scan(case: Case) -> Produced:
    """Score maps at all thresholds at once; stop where the official scan does."""
    cfg, truth = case.settings, as_tensor(case.inputs["gt"].astype(np.int64))
    thresholds = [round(cfg["threshold_step"] * i, 10) for i in range(cfg["max_thresholds"])]
    maps = torch.zeros(len(truth), cfg["num_classes"], *truth.shape[1:])
    given = case.inputs["map_image"], case.inputs["map_class"], as_tensor(case.inputs["maps"])
    for image, class_index, one in zip(*given, strict=True):
        maps[int(image), int(class_index)] = one
    counts = ThresholdConfusion(num_classes=cfg["num_classes"] + 1, thresholds=thresholds)
    counts.update(maps, truth)
    curve = official_miou(counts.compute())
    seen = curve[: stop_of(curve)]
    return {
        "full_curve": curve,
        "miou": seen,
        "best_miou": float(seen.max()),
        "best_threshold": thresholds[int(seen.argmax())],
    }


def official_miou(matrices: Tensor) -> Array:
    """Give the official mIoU in percent of (T, C, C) counts: a class that is nowhere counts as 0.

    Ours leaves out what the ground truth does not show (Q12 of the page).
    """
    counts = matrices.double()
    hit = counts.diagonal(dim1=1, dim2=2)
    union = counts.sum(1) + counts.sum(2) - hit
    return (hit / (union + 1e-10)).mean(dim=1).numpy() * 100


def stop_of(curve: Array) -> int:
    """Count the thresholds up to the first that does not improve (Q12), all where each does."""
    rising = [later > best for best, later in pairwise(curve)]
    return len(curve) if all(rising) else rising.index(False) + 2


# ---- tolerances: the golden README's, kind by kind ----------------------------------------------


def _absolute(bound: float) -> Tolerance:
    return Tolerance(absolute=bound)


def _each(relative: float) -> Tolerance:
    return Tolerance(relative=relative, entrywise=True)


KINDS = {
    "a_stem": Kind(a_stem, {"tokens": _absolute(2e-5), "patch_positions": _absolute(1e-6)}),
    "b_network": Kind(b_network, {"": _absolute(2e-5)}),
    "c_maps": Kind(c_maps, {"": _absolute(2e-5), "fused_": _absolute(1e-4)}),
    "d_export": Kind(d_export, {"maps": _absolute(5e-5), "raw_pass": _absolute(2e-5)}),
    "e_pool": Kind(e_pool, {"logits": _absolute(1e-5)}),
    "f_loss": Kind(f_loss, {"grad_class_tokens_equal": _absolute(1e-7)}),
    "g_gradients": Kind(g_gradients, {"gradnorm": _each(1e-4), "losses": _each(1e-5)}),
    "h_train": Kind(
        h_train,
        {
            "losses": _each(1e-4),
            "change_l2": _absolute(5e-6),
            "sum": _absolute(1e-4),
            "param_": _absolute(1e-5),
        },
    ),
    "i_schedule": Kind(
        i_schedule, {"lr": _absolute(1e-15), "scaled_lr": _absolute(1e-15), "adamw": _each(1e-15)}
    ),
    "j_init": Kind(
        j_init,
        {
            **{name: Tolerance() for name in ("cls_token", "pos_embed")},
            "first_": _absolute(2e-5),
            "first_cct": _each(1e-5),
            "cct_gradnorm": _absolute(1e-7),
        },
    ),
    "k_alpha": Kind(k_alpha, {"prob": _absolute(5e-5)}),
    "l_scan": Kind(l_scan, {"": _absolute(1e-9)}),
}
