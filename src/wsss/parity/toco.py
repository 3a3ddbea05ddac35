"""ToCo's parity cases: the product's functions on the official run's inputs.

Every function takes its sizes and settings from the file. The networks load their weights through
the converter for official checkpoints. Here are labels, refinement and losses; ``toco_network.py``
has the network, ``toco_steps.py`` crops, optimiser and training step.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD
from wsss.maps.pseudo_labels import (
    cam_to_label,
    cam_to_label_with_ignore,
    ignore_outside_boxes,
    refine_cam_to_label,
    roi_mask,
)
from wsss.maps.refine.dense_crf import CRF_PRESETS, dense_crf
from wsss.maps.refine.par import PAR
from wsss.methods.losses import balanced_segmentation_loss
from wsss.methods.toco.contrast import ctc_loss, pair_masks, ptc_loss
from wsss.parity.cases import Case, Kind, Produced
from wsss.parity.energy import ENERGY_TOLERANCES, energy_outputs
from wsss.parity.inputs import as_tensor, loss_and_gradients, network_images, unit_images
from wsss.parity.toco_network import a_backbone, b_network, c_multiscale_cam, thresholds
from wsss.parity.toco_steps import g_crops, h_optim, i_train_step
from wsss.parity.tolerances import Tolerance

CRF_NAMES = {"seg": "toco", "cam": "toco_cam", "plain": "psa"}


# ---- labels and refinement -----------------------------------------------------------------------


def _pair_map(label: Tensor) -> Tensor:
    """Mark every pair of tokens: 1 same, 0 different, 255 ignored."""
    same, different = pair_masks(label)
    ignored = torch.full(same.shape, 255, dtype=torch.uint8)
    return ignored.masked_fill_(same, 1).masked_fill_(different, 0)


def d_labels(case: Case) -> Produced:
    """Apply thresholds and boxes, and make ROI and pair masks."""
    high, low, background = thresholds(case)
    cam, labels = (as_tensor(case.inputs[k]) for k in ("cam", "cls_label"))
    whole = np.array([[0, cam.shape[2], 0, cam.shape[3]]] * len(cam))
    boxes = as_tensor(case.inputs.get("box", whole))
    plain = cam_to_label(cam, labels, bg_threshold=background)
    ignored = partial(cam_to_label_with_ignore, labels=labels, high=high, low=low)
    produced = {
        "label_nobox": plain,
        "valid_cam": cam * labels[:, :, None, None],
        "label_mid_ignored": ignore_outside_boxes(ignored(cam), boxes),
        "label_mid_kept": ignore_outside_boxes(plain, boxes),
        "roi_mask": roi_mask(cam, labels, high=high, low=low),
    }
    if "label" in case.inputs:
        produced["ignore_box_label"] = ignore_outside_boxes(as_tensor(case.inputs["label"]), boxes)
    if "small_size" in case.inputs:
        size = case.inputs["small_size"].tolist()
        small = F.interpolate(cam, size=size, mode="bilinear", align_corners=False)
        label = ignore_outside_boxes(ignored(small), boxes)
        produced |= {"small_cam": small, "small_label_fullsize_box": label}
        produced["aff_mask_fullsize_box"] = _pair_map(label)
    if "small_label" in case.inputs:
        produced["aff_mask_given"] = _pair_map(as_tensor(case.inputs["small_label"]))
    return produced


def _par(case: Case) -> PAR:
    cfg = case.settings
    return PAR(
        num_iter=cfg.get("num_iter", 10), dilations=cfg.get("dilations", (1, 2, 4, 8, 12, 24))
    )


def e_par(case: Case) -> Produced:
    """Refine masks: ``in_masks`` gives ``refined``, ``in_masks_x`` gives ``refined_from_x``."""
    par, images = _par(case), unit_images(case.inputs["img"])
    return {
        name.replace("masks_", "refined_from_").replace("masks", "refined"): par(
            images, as_tensor(array)
        )
        for name, array in case.inputs.items()
        if name.startswith("masks")
    }


def e_refine(case: Case) -> Produced:
    """Refine the pseudo-label."""
    high, low, _ = thresholds(case)
    boxes = case.inputs.get("box")
    label = refine_cam_to_label(
        _par(case),
        unit_images(case.inputs["img"]),
        as_tensor(case.inputs["cam"]),
        as_tensor(case.inputs["cls_label"]),
        boxes=None if boxes is None else as_tensor(boxes),
        high=high,
        low=low,
        down_scale=case.settings.get("down_scale", 2),
    )
    return {"label": label}


# ---- losses --------------------------------------------------------------------------------------


def _labels_by_suffix(case: Case) -> Iterable[tuple[str, Tensor]]:
    """Yield ``in_label_x`` as (``_x``, map); a plain ``in_label`` has an empty suffix."""
    for name, array in case.inputs.items():
        if name.startswith("label"):
            yield name.removeprefix("label"), as_tensor(array)


def f_ptc(case: Case) -> Produced:
    """Compute patch-token contrast with its gradient and pair counts for every label map."""
    produced: dict[str, Any] = {}
    for suffix, label in _labels_by_suffix(case):
        tokens = as_tensor(case.inputs["tokens"]).requires_grad_()
        same, different = pair_masks(label)
        loss, gradient = loss_and_gradients(ptc_loss(tokens, same, different), tokens)
        counts = np.array([int(same.sum()), int(different.sum())])
        produced |= {f"loss{suffix}": loss, f"grad{suffix}": gradient}
        produced[f"npos_nneg{suffix}"] = counts
    return produced


def f_ctc(case: Case) -> Produced:
    """Compute class-token contrast at every temperature, both gradients and single images."""
    flags = as_tensor(case.inputs["flags"])
    batch = len(flags)
    produced: dict[str, Any] = {}
    for tau in case.settings.get("temps", [case.settings.get("temp", 0.5)]):
        student = as_tensor(case.inputs["student"]).requires_grad_()
        teacher = as_tensor(case.inputs["teacher"]).requires_grad_()
        loss, for_student, for_teacher = loss_and_gradients(
            ctc_loss(student, teacher, flags, tau), student, teacher
        )
        with torch.no_grad():
            single = [
                ctc_loss(student[i::batch], teacher[i::batch], flags[i : i + 1], tau).item()
                for i in range(batch)
            ]
        produced |= {
            f"loss_tau{tau}": loss,
            f"grad_student_tau{tau}": for_student,
            f"grad_teacher_tau{tau}": for_teacher,
            f"loss_per_image_tau{tau}": np.array(single),
        }
    return produced


def f_seg(case: Case) -> Produced:
    """Compute the balanced segmentation loss, unguarded as officially, with its gradient."""
    produced = {}
    for suffix, label in _labels_by_suffix(case):
        logits = as_tensor(case.inputs["logits"]).requires_grad_()
        loss = balanced_segmentation_loss(logits, label, guard=False)
        produced[f"loss{suffix}"], produced[f"grad{suffix}"] = loss_and_gradients(loss, logits)
    return produced


def f_energy(case: Case) -> Produced:
    """Compute the dense energy of a case with normalised images and real pixels in a box."""
    images, boxes = network_images(case.inputs["img"]), as_tensor(case.inputs["box"])
    return energy_outputs(case, images, boxes, mean=IMAGENET_MEAN, std=IMAGENET_STD)


# ---- dense CRF -----------------------------------------------------------------------------------


def j_crf(case: Case) -> Produced:
    """Compute posterior and label of every preset."""
    produced = {}
    for name, preset in CRF_NAMES.items():
        posterior = dense_crf(case.inputs["img"], case.inputs["prob"], CRF_PRESETS[preset])
        produced[f"prob_{name}"] = posterior
        produced[f"label_{name}"] = posterior.argmax(0)
    return produced


_NONE: dict[str, Tolerance] = {}
_RATE = Tolerance(relative=1e-12)
KINDS = {
    "a_backbone": Kind(a_backbone, _NONE),
    "b_network": Kind(b_network, _NONE),
    "c_multiscale_cam": Kind(c_multiscale_cam, _NONE),
    "d_labels": Kind(d_labels, _NONE),
    "e_par": Kind(e_par, _NONE),
    "e_refine": Kind(e_refine, _NONE),
    "f_ptc": Kind(f_ptc, _NONE),
    "f_ctc": Kind(
        f_ctc,
        # An image's loss may be near zero, a difference of float32 numbers around one.
        {"loss_per_image": Tolerance(absolute=1e-6, relative=1e-5, entrywise=True)},
    ),
    "f_seg": Kind(f_seg, _NONE),
    "f_energy": Kind(f_energy, ENERGY_TOLERANCES),
    "g_crops": Kind(g_crops, _NONE),
    "h_optim": Kind(h_optim, {"lr_": _RATE}),
    "i_train_step": Kind(i_train_step, _NONE),
    "j_crf": Kind(j_crf, {"prob_": Tolerance(absolute=1e-5)}),
}
