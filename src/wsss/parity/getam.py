"""GETAM's parity cases: the product's functions on the official run's inputs.

Every function takes its sizes and settings from the file. The networks load their weights through
the converter for official checkpoints. Here are labels, losses and inference; ``getam_network.py``
has the network and its maps, ``getam_steps.py`` training steps, optimiser and samples.
"""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsss.evaluation.confusion import ConfusionMatrix
from wsss.evaluation.inference import predict, resized
from wsss.evaluation.protocol import Protocol
from wsss.maps.cams import normalise_maximum
from wsss.maps.pixels import normalise, squash_pixels
from wsss.maps.refine.dense_crf import dense_crf
from wsss.maps.refine.pamr import PAMR
from wsss.methods.getam.labels import (
    Labels,
    complete_labels,
    completion_thresholds,
    saliency_loss,
    saliency_target,
    split_cross_entropy,
)
from wsss.methods.getam.maps import class_slots, enlarged
from wsss.methods.getam.method import GETAM
from wsss.parity.cases import Case, Found, Kind, Produced
from wsss.parity.energy import ENERGY_TOLERANCES, energy_outputs
from wsss.parity.getam_network import (
    a_encoder,
    b_network,
    box_of,
    build_getam,
    c_cam,
    completed_saliency,
    d_pamr,
    margin_of,
    of_pairs,
    pairs_of,
    pixels,
)
from wsss.parity.getam_steps import g_phase1, g_phase2, h_optim, j_data
from wsss.parity.inputs import as_tensor, loss_and_gradients
from wsss.parity.tolerances import EXACT, Array, Tolerance

PIXEL_MEAN, PIXEL_STD = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # of images in 0..255


# ---- cases: labels -------------------------------------------------------------------------------


def _quantile(case: Case) -> float:
    return 0.95 if case.settings.get("coco") else case.settings.get("q", 0.9)


def _slots_of(maps: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pack maps (B, K, H, W) into slots (B, S, H, W); those, and the slots' classes."""
    ids, valid = class_slots(labels)
    chosen = ids[:, :, None, None].expand(-1, -1, *maps.shape[-2:])
    return maps.gather(1, chosen) * valid[:, :, None, None], ids


def _by_class(values: Tensor, ids: Tensor, labels: Tensor) -> Array:
    """Give thresholds of the slots (B, S) as (B, K), NaN where there is none."""
    full = torch.full(labels.shape, torch.inf, dtype=torch.float64)
    full = full.scatter(1, ids, values.double())
    full[labels <= 0] = torch.inf
    return full.masked_fill(full.isinf(), torch.nan).numpy()


def _official_labels(maps: Tensor, ids: Tensor, salient: Tensor, quantile: float) -> Labels:
    """Complete labels as the official labeller does, with each of its quirks."""
    return complete_labels(
        maps,
        ids,
        salient,
        quantile=quantile,
        contested_to_lowest=True,
        shifted_opening=True,
        unopened_saliency=True,
    )


def e_complete(case: Case) -> Produced:
    """Make labels, completed saliency and thresholds of every scenario."""
    produced = Found()
    results = ("label_", "sal_", "thr_", "count_", "index_", "contested_")
    for scenario in case.suffixes("label_", *results):
        with produced.given():
            produced |= _scenario(case, scenario)
    return produced


def _scenario(case: Case, name: str) -> dict[str, Any]:
    """Make labels, completed saliency and thresholds of one scenario."""
    quantile = _quantile(case)
    labels = as_tensor(case.inputs[f"label_{name}"])[None]
    maps = as_tensor(case.inputs[f"cam_{name}"])[None]
    salient = as_tensor(case.inputs[f"sal_{name}"])[None] > 0
    slots, ids = _slots_of(maps, labels)
    result = _official_labels(slots, ids, salient, quantile)
    thresholds = completion_thresholds(slots, quantile)
    count = (maps > 0).sum((2, 3)) * (labels > 0)
    index = (quantile * count.double()).long().masked_fill(labels <= 0, -1)
    above = (slots > thresholds[:, :, None, None]).sum(1)
    return {
        f"label_{name}": result.label[0],
        f"sal_{name}": completed_saliency(result)[0],
        f"thr_{name}": _by_class(thresholds, ids, labels)[0],
        f"count_{name}": count[0],
        f"index_{name}": index[0],
        f"contested_{name}": int(((above > 1) & ~salient).sum()),
    }


def e_pipeline(case: Case) -> Produced:
    """Go from maps on the patch grid to labels, in float64: no pixel hangs on a rounding."""
    labels, guide = as_tensor(case.inputs["cls_label"]), pixels(case.inputs["img"]).double()
    maps, ids = _slots_of(as_tensor(case.inputs["cam_grid"]).double(), labels)
    pairs, quantile = pairs_of(labels), _quantile(case)
    upsampled = enlarged(maps, guide.shape[-2:])
    after = PAMR()(guide, upsampled)
    refined = normalise_maximum(after)
    whole = torch.ones(refined[:, 0].shape, dtype=torch.bool)
    thresholds = completion_thresholds(refined, quantile)
    produced = Found()
    produced |= {
        "upsampled": of_pairs(upsampled, ids, pairs),
        "after_pamr": of_pairs(after, ids, pairs),
        "normalised": of_pairs(refined, ids, pairs),
        "label_saliency_all_one": _official_labels(refined, ids, whole, quantile).label,
        "threshold": _by_class(thresholds, ids, labels),
    }
    with produced.given():
        salient = as_tensor(case.inputs["sal"]) > 0
        result = _official_labels(refined, ids, salient, quantile)
        produced |= {
            "label": result.label,
            "sal": completed_saliency(result),
            "margin": margin_of(refined, salient, quantile),
        }
    return produced


# ---- cases: losses -------------------------------------------------------------------------------


def f_ce(case: Case) -> Produced:
    """Compute the split cross-entropy with and without pixels of either kind."""
    produced = Found()
    for scenario in case.suffixes("label_", "loss_", "grad_"):
        with produced.given():
            label = as_tensor(case.inputs[f"label_{scenario}"])
            logits = as_tensor(case.inputs["logits"]).requires_grad_()
            loss = split_cross_entropy(logits, label, guard=False)
            value, gradient = loss_and_gradients(loss, logits)
            produced |= {f"loss_{scenario}": value, f"grad_{scenario}": gradient}
    return produced


def f_energy(case: Case) -> Produced:
    """Compute the dense energy of a case whose images are pixels in 0..255."""
    boxes = box_of(case.inputs["crop_mask"])
    images = pixels(case.inputs["img"])
    return energy_outputs(case, images, boxes, mean=PIXEL_MEAN, std=PIXEL_STD)


def f_saliency(case: Case) -> Produced:
    """Compute the saliency loss as coded and as corrected, and its target."""
    completed = as_tensor(case.inputs["sal_completed"])
    produced = Found()
    for name, inverted in (("coded", True), ("corrected", False)):
        target = saliency_target(completed, inverted=inverted)
        produced[f"target_{name}"] = target.to(torch.uint8)
        with produced.given():
            logits = as_tensor(case.inputs["logits"]).requires_grad_()
            loss = saliency_loss(logits, completed, inverted=inverted)
            value, gradient = loss_and_gradients(loss, logits)
            produced |= {f"loss_{name}": value, f"grad_{name}": gradient}
    return produced


# ---- cases: inference ----------------------------------------------------------------------------


INFERENCE = Protocol(seg_sizes=(256, 320, 480), scale_merge="mean", crf="getam_bgr", refine=None)


def _seg_logits(model: GETAM, images: Tensor) -> Tensor:
    logits = model(images).seg_logits
    assert logits is not None
    return logits


@torch.no_grad()
def i_inference(case: Case) -> Produced:
    """Follow the inference protocol from image to mIoU."""
    model = build_getam(case)
    rgb = np.ascontiguousarray(case.inputs["img_bgr"][..., ::-1])
    images, size = normalise(rgb)[None], rgb.shape[:2]
    assert INFERENCE.seg_sizes is not None
    assert INFERENCE.crf_preset is not None
    produced = Found()
    produced["sizes"] = np.array(INFERENCE.seg_sizes)
    for side in INFERENCE.seg_sizes:
        squashed = squash_pixels(images, side)
        produced[f"input_{side}_stride8"] = squashed[0, :, ::8, ::8]
        logits = resized(_seg_logits(model, squashed), size)
        produced[f"logits_{side}_stride3"] = logits[0, :, ::3, ::3]
    merged = predict(model, images, size, INFERENCE).merged
    assert merged is not None
    prob = merged[0].softmax(0).numpy()
    preset = INFERENCE.crf_preset
    posterior = dense_crf(rgb, prob, preset)
    label = posterior.argmax(0)
    with produced.given():
        truth = as_tensor(case.inputs["gt"]).long()
        confusion = ConfusionMatrix(num_classes=len(prob))
        confusion.update(torch.from_numpy(label)[None], truth[None])
        matrix = confusion.compute().matrix
        hit = matrix.diagonal().double()
        iou = hit / (matrix.sum(0) + matrix.sum(1) - hit)  # NaN: neither there nor predicted
        produced |= {"confusion": matrix, "miou": float(iou.nanmean())}
    other = dense_crf(rgb, prob, replace(preset, bgr=False)).argmax(0)
    produced |= {
        "mean_logits": merged[0],
        "label": merged[0].argmax(0),
        "crf_label": label,
        "crf_prob": posterior,
        "crf_params": json.dumps(
            {
                "iterations": preset.iterations,
                "gaussian_sxy": preset.pos_xy,
                "gaussian_compat": preset.pos_w,
                "bilateral_sxy": preset.bi_xy,
                "bilateral_srgb": preset.bi_rgb,
                "bilateral_compat": preset.bi_w,
                "image": "BGR uint8 original" if preset.bgr else "RGB uint8 original",
            }
        ),
        "control_crf_rgb_differs": float((label != other).mean()),
    }
    return produced


_NONE: dict[str, Tolerance] = {}
_RAW_MAP = Tolerance(relative=1e-4)
_NORMALISED = Tolerance(absolute=2e-5)
_RATE = Tolerance(relative=1e-12, entrywise=True)
_PHASE_TWO = {
    "map": _RAW_MAP,
    "normalised": _NORMALISED,
    "label_margin": _NORMALISED,
    "term_names": EXACT,
    "lr_": _RATE,
    "official_loop_sgd": _RATE,
}
KINDS = {
    "a_encoder": Kind(a_encoder, _NONE),
    "b_network": Kind(b_network, _NONE),
    "c_cam": Kind(
        c_cam,
        {
            "term_": _RAW_MAP,
            "map": _RAW_MAP,
            "control_map": _RAW_MAP,
            "peak_grid": _RAW_MAP,
            "upsampled": _RAW_MAP,
            "after_pamr": _RAW_MAP,
            "normalised": _NORMALISED,
        },
    ),
    "d_pamr": Kind(d_pamr, {"refined": Tolerance(absolute=2e-5, relative=1e-4)}),
    "e_complete": Kind(e_complete, _NONE),
    "e_pipeline": Kind(
        e_pipeline,
        {
            "upsampled": _RAW_MAP,
            "after_pamr": _RAW_MAP,
            "normalised": _NORMALISED,
            "threshold": _NORMALISED,
            "margin": _NORMALISED,
        },
    ),
    "f_ce": Kind(f_ce, _NONE),
    "f_energy": Kind(f_energy, ENERGY_TOLERANCES),
    "f_saliency": Kind(f_saliency, _NONE),
    "g_phase1": Kind(g_phase1, {"lr_": _RATE}),
    "g_phase2": Kind(g_phase2, _PHASE_TWO),
    "h_optim": Kind(h_optim, {"sched": _RATE, "sgd_": _RATE, "poly_power": _RATE}),
    "i_inference": Kind(i_inference, {"crf_prob": Tolerance(absolute=1e-3)}),  # stored as float16
    "j_data": Kind(j_data, _NONE),
}
