"""WeCLIP's parity cases: the product's functions on the official run's inputs.

Every function takes its sizes and settings from the file. The networks load their weights through
the converter for official checkpoints. Here are boxes, affinity, labels, losses and the CRF;
``weclip_network.py`` has the network and the CAM, ``weclip_steps.py`` training and inference.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.evaluation.inference import resized
from wsss.maps.refine.dense_crf import CRF_PRESETS, CRFPreset, dense_crf
from wsss.maps.refine.par import PAR
from wsss.methods.losses import balanced_segmentation_loss
from wsss.methods.weclip.affinity import (
    affinity_loss,
    box_mask,
    kept_maps,
    learned_base,
    near_pairs,
    refine,
    transition,
)
from wsss.methods.weclip.maps import class_scores, label_maps, propagated
from wsss.parity.cases import Case, Found, Kind, Produced
from wsss.parity.inputs import as_tensor, loss_and_gradients
from wsss.parity.tolerances import LOSS, Tolerance
from wsss.parity.weclip_network import a_encoder, b_gradcam, f_decoder, network_images
from wsss.parity.weclip_steps import h_optim, i_train_step, j_inference, least_margin

DILATIONS = (1, 2, 4, 8, 12, 24)


def _official_boxes(cam: Tensor, threshold: float) -> Tensor:
    return box_mask(cam, threshold, eight_bit=True, open_edge=True)


# ---- boxes and affinity --------------------------------------------------------------------------


def c_boxes(case: Case) -> Produced:
    """Find the boxes of every map at every threshold."""
    produced, names = Found(), case.settings["thresholds"]
    results = [f"mask_{name}" for name in names]
    for size in case.suffixes("cam", *results):
        for name, threshold in names.items():
            with produced.given():
                mask = _official_boxes(as_tensor(case.inputs[f"cam{size}"]), threshold)
                produced[f"mask_{name}{size}"] = mask
    return produced


def d_affinity(case: Case) -> Produced:
    """Refine maps along the attention, and along what RFM makes of it."""
    cfg, produced = case.settings, Found()
    attention = as_tensor(case.inputs["attn"])[None, :, 1:, 1:]  # (1, blocks, N, N)
    cam, depth = as_tensor(case.inputs["cam"]), attention.shape[1]
    static = attention[:, -cfg["last_static"] :].mean(1)
    step = transition(static)
    produced["trans_static"] = (step @ step)[0]

    def refined(base: Tensor, threshold: float) -> Tensor:
        boxed = cam * _official_boxes(cam, threshold)
        return refine(boxed[None].flatten(2), base)[0].view_as(cam)

    for name, threshold in cfg["box_threshold"].items():
        for key in {f"static_{name}", "static"} if name == "voc" else {f"static_{name}"}:
            produced[f"refined_{key}"] = refined(static, threshold)
        with produced.given():
            related = as_tensor(case.inputs["seg_attn"])[None]
            last = cfg["last_rfm"][name]
            candidates = attention[:, -last:]
            kept = kept_maps(candidates, related, "signed")[0].nonzero()[:, 0]
            produced[f"kept_{name}"] = kept + depth - candidates.shape[1]
            base = learned_base(candidates, related, "signed")
            produced[f"refined_rfm_{name}"] = refined(base, threshold)
    return produced


# ---- labels --------------------------------------------------------------------------------------


def e_label(case: Case) -> Produced:
    """Make a pseudo label of refined maps."""
    cfg = case.settings
    refined = as_tensor(case.inputs["refined"])[None]
    ids = as_tensor(case.inputs["class_ids"])[None]
    height, width = cfg["label_size"]
    par = PAR(num_iter=cfg["par_iterations"], dilations=cfg["dilations"])
    plain = class_scores(refined, (height, width))
    scores = propagated(par, network_images(case.inputs["img"])[None], plain)
    return {
        "cam": plain[0, 1:],
        "par": scores[0],
        "label": label_maps(scores, (ids, torch.ones_like(ids, dtype=torch.bool)))[0],
        "min_margin": least_margin(scores),
    }


def e_par(case: Case) -> Produced:
    """Refine masks of any size: ``in_masks_x`` gives ``refined_x``."""
    cfg, produced = case.settings, Found()
    par = PAR(num_iter=cfg.get("num_iter", 20), dilations=cfg.get("dilations", DILATIONS))
    images = network_images(case.inputs["img"])
    for suffix in case.suffixes("masks", "refined"):
        with produced.given():
            masks = as_tensor(case.inputs[f"masks{suffix}"])
            produced[f"refined{suffix}"] = propagated(par, images, masks)
    return produced


# ---- losses --------------------------------------------------------------------------------------


def g_losses(case: Case) -> Produced:
    """Compute pair labels, both losses and their gradients for every label map."""
    produced, radius = Found(), case.settings["radius"]
    for suffix in case.suffixes("label", "aff_label", "aff_loss", "seg_loss"):
        with produced.given():
            if suffix == "_bg_only":  # stated, not stored
                label = torch.zeros_like(as_tensor(case.inputs["label"]))
            else:
                label = as_tensor(case.inputs[f"label{suffix}"])
            logits = as_tensor(case.inputs["logits"]).requires_grad_()
            full = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=False)
            loss = balanced_segmentation_loss(full, label, guard=False)
            seg, seg_gradient = loss_and_gradients(loss, logits)
            produced |= {f"seg_loss{suffix}": seg, f"seg_grad{suffix}": seg_gradient}
            related = as_tensor(case.inputs["affinity"]).requires_grad_()
            grid = (logits.shape[2], logits.shape[3])
            same, different = near_pairs(label, grid, radius)
            labels = torch.full(same.shape, 255, dtype=torch.uint8)
            produced[f"aff_label{suffix}"] = labels.masked_fill(same, 1).masked_fill(different, 0)
            counts = [int(same.sum()) + 1, int(different.sum()) + 1]
            produced[f"aff_counts{suffix}"] = np.array(counts)
            loss, gradient = loss_and_gradients(affinity_loss(related, same, different), related)
            produced |= {f"aff_loss{suffix}": loss, f"aff_grad{suffix}": gradient}
    return produced


# ---- dense CRF -----------------------------------------------------------------------------------


def _preset(case: Case) -> CRFPreset:
    gaussian, bilateral = case.settings["gaussian"], case.settings["bilateral"]
    return replace(
        CRF_PRESETS["weclip"],
        iterations=case.settings["iterations"],
        pos_xy=gaussian["sxy"],
        pos_w=gaussian["weight"],
        bi_xy=bilateral["sxy"],
        bi_rgb=bilateral["srgb"],
        bi_w=bilateral["weight"],
    )


def k_crf(case: Case) -> Produced:
    """Smooth the softmax of enlarged logits."""
    rgb = case.inputs["img"]
    logits = resized(as_tensor(case.inputs["logits"])[None], rgb.shape[:2])[0]
    posterior = dense_crf(rgb, logits.softmax(0).numpy(), _preset(case))
    return {"prob": posterior, "label": posterior.argmax(0)}


_NONE: dict[str, Tolerance] = {}
_RATE = Tolerance(relative=1e-12)
KINDS = {
    "a_encoder": Kind(a_encoder, _NONE),
    "b_gradcam": Kind(b_gradcam, {"channel_weights": Tolerance(relative=1e-4)}),
    "c_boxes": Kind(c_boxes, _NONE),
    "d_affinity": Kind(d_affinity, _NONE),
    "e_label": Kind(e_label, _NONE),
    "e_par": Kind(e_par, _NONE),
    "f_decoder": Kind(f_decoder, _NONE),
    "g_losses": Kind(g_losses, _NONE),
    "h_optim": Kind(h_optim, {"lr": _RATE}),
    "i_train_step": Kind(i_train_step, {"lr": _RATE, "losses": LOSS, "param_l2": LOSS}),
    "j_inference": Kind(j_inference, _NONE),
    "k_crf": Kind(k_crf, {"prob": Tolerance(absolute=1e-5)}),
}
