"""ToCo's parity cases: the product's functions on the official run's inputs.

Every function takes its sizes and settings from the file. The networks load their weights through
the converter for official checkpoints. Here are labels, refinement and losses; ``toco_network.py``
has the network, ``toco_steps.py`` crops, optimiser and training step.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.maps.pixels import IGNORE_INDEX, IMAGENET_MEAN, IMAGENET_STD
from wsss.maps.pseudo_labels import (
    cam_to_label,
    cam_to_label_with_ignore,
    ignore_outside_boxes,
    refine_cam_to_label,
    roi_mask,
)
from wsss.maps.refine.dense_crf import CRF_PRESETS, dense_crf
from wsss.maps.refine.par import PAR
from wsss.methods.losses import balanced_segmentation_loss, pair_masks, ptc_loss
from wsss.methods.toco.contrast import ctc_loss
from wsss.parity.cases import Case, Found, Kind, Produced
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
    plain = cam_to_label(cam, labels, bg_threshold=background)
    ignored = partial(cam_to_label_with_ignore, labels=labels, high=high, low=low)
    produced = Found()
    produced |= {
        "label_nobox": plain,
        "valid_cam": cam * labels[:, :, None, None],
        "roi_mask": roi_mask(cam, labels, high=high, low=low),
    }
    with produced.given():
        size = case.inputs["small_size"].tolist()
        small = F.interpolate(cam, size=size, mode="bilinear", align_corners=False)
        produced["small_cam"] = small
        label = ignore_outside_boxes(ignored(small), as_tensor(case.inputs["box"]))
        produced["small_label_fullsize_box"] = label
        produced["aff_mask_fullsize_box"] = _pair_map(label)
    with produced.given():
        produced["aff_mask_given"] = _pair_map(as_tensor(case.inputs["small_label"]))
    with produced.given():
        boxes = as_tensor(case.inputs["box"])
        produced["label_mid_ignored"] = ignore_outside_boxes(ignored(cam), boxes)
        produced["label_mid_kept"] = ignore_outside_boxes(plain, boxes)
        produced["ignore_box_label"] = ignore_outside_boxes(as_tensor(case.inputs["label"]), boxes)
    return produced


def _par(case: Case) -> PAR:
    cfg = case.settings
    return PAR(
        num_iter=cfg.get("num_iter", 10), dilations=cfg.get("dilations", (1, 2, 4, 8, 12, 24))
    )


def e_par(case: Case) -> Produced:
    """Refine masks: ``in_masks`` gives ``refined``, ``in_masks_x`` gives ``refined_from_x``."""
    par, images = _par(case), unit_images(case.inputs["img"])
    produced = Found()
    every = [n.replace("_from", "") for n in case.suffixes("masks", "refined")]
    for suffix in dict.fromkeys(every):
        with produced.given():
            masks = as_tensor(case.inputs[f"masks{suffix}"])
            produced[f"refined{suffix and '_from'}{suffix}"] = par(images, masks)
    return produced


def e_refine(case: Case) -> Produced:
    """Refine the pseudo-label."""
    high, low, _ = thresholds(case)
    boxes, stored = case.inputs.get("box"), case.outputs.get("out_label")
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
    if boxes is None and stored is not None:  # what is ignored may lie outside a box
        return {"label": np.ma.array(label.numpy(), mask=stored == IGNORE_INDEX)}
    return {"label": label}


# ---- losses --------------------------------------------------------------------------------------


def f_ptc(case: Case) -> Produced:
    """Compute patch-token contrast with its gradient and pair counts for every label map."""
    produced = Found()
    for suffix in case.suffixes("label", "loss", "grad", "npos_nneg"):
        with produced.given():
            same, different = pair_masks(as_tensor(case.inputs[f"label{suffix}"]))
            counts = np.array([int(same.sum()), int(different.sum())])
            produced[f"npos_nneg{suffix}"] = counts
            tokens = as_tensor(case.inputs["tokens"]).requires_grad_()
            loss, gradient = loss_and_gradients(ptc_loss(tokens, same, different), tokens)
            produced |= {f"loss{suffix}": loss, f"grad{suffix}": gradient}
    return produced


def f_ctc(case: Case) -> Produced:
    """Compute class-token contrast at every temperature, both gradients and single images."""
    flags = as_tensor(case.inputs["flags"])
    batch = len(flags)
    produced: dict[str, Any] = {}
    results = ("loss_tau", "grad_student_tau", "grad_teacher_tau", "loss_per_image_tau")
    for tau in case.suffixes("tau", *results):
        student = as_tensor(case.inputs["student"]).requires_grad_()
        teacher = as_tensor(case.inputs["teacher"]).requires_grad_()
        loss, for_student, for_teacher = loss_and_gradients(
            ctc_loss(student, teacher, flags, float(tau)), student, teacher
        )
        with torch.no_grad():
            single = [
                ctc_loss(student[i::batch], teacher[i::batch], flags[i : i + 1], float(tau)).item()
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
    produced = Found()
    for suffix in case.suffixes("label", "loss", "grad"):
        with produced.given():
            label = as_tensor(case.inputs[f"label{suffix}"])
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
        # A loss may be near zero, a difference of float32 numbers around one.
        {"loss": Tolerance(absolute=5e-6, relative=1e-5, entrywise=True)},
    ),
    "f_seg": Kind(f_seg, _NONE),
    "f_energy": Kind(f_energy, ENERGY_TOLERANCES),
    "g_crops": Kind(g_crops, _NONE),
    "h_optim": Kind(h_optim, {"lr_": _RATE}),
    "i_train_step": Kind(i_train_step, _NONE),
    "j_crf": Kind(j_crf, {"prob_": Tolerance(absolute=1e-5)}),
}
