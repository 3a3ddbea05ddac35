"""MoRe's parity cases: the product's functions on the official run's inputs.

Every function takes its sizes and settings from the file. The networks load their weights through
the converter for official checkpoints. Here are labels and losses; ``more_network.py`` has the
network, ``more_steps.py`` optimiser and training step.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.maps.pseudo_labels import cam_to_label_with_ignore, refine_cam_to_label
from wsss.maps.refine.par import PAR
from wsss.methods.losses import balanced_segmentation_loss
from wsss.methods.more.contrast import (
    cle_loss,
    distinct_loss,
    mean_logit_loss,
    select_tokens,
    uncertainty_map,
    une_loss,
)
from wsss.parity.cases import Case, Found, Kind, Produced
from wsss.parity.inputs import as_tensor, loss_and_gradients, unit_images
from wsss.parity.more_network import a_encoder, b_gcr, c_network, d_maps, i_inference, j_init
from wsss.parity.more_steps import g_optim, h_train_step, padded
from wsss.parity.tolerances import Tolerance


def e_labels(case: Case) -> Produced:
    """Cut the token masks out of given maps; refine the pseudo label."""
    cfg, produced = case.settings, Found()
    labels = as_tensor(case.inputs["cls_label"])
    high, low = cfg.get("high_thre", 0.7), cfg.get("low_thre", 0.25)
    early = {"ptc": (high, low), "une": (high, low), "cle": (cfg.get("cle_high", 0.5), low)}
    late = cfg.get("late_high", 0.6), cfg.get("late_low", 0.35)
    for name, rules in (("cam", {"late": late}), ("cam_aux", early)):
        with produced.given():
            full = as_tensor(case.inputs[name])
            small = F.interpolate(full, cfg["grid"], mode="bilinear", align_corners=False)
            produced[f"small_{name}"] = small
            for mask, (upper, lower) in rules.items():
                found = cam_to_label_with_ignore(small, labels, high=upper, low=lower)
                produced[f"mask_{mask}"] = found
                produced[f"uncertainty_{mask}"] = uncertainty_map(found)
    with produced.given():
        par = PAR(
            num_iter=cfg.get("par_iter", 10),
            dilations=cfg.get("par_dilations", (1, 2, 4, 8, 12, 24)),
        )
        produced["refined_label"] = refine_cam_to_label(
            par,
            unit_images(case.inputs["img"]),
            as_tensor(case.inputs["cam"]),
            labels,
            high=high,
            low=low,
            down_scale=cfg.get("down_scale", 2),
        )
    return produced


def f_cle(case: Case) -> Produced:
    """Compute CLE at every temperature with its gradient, and where the official form overflows."""
    mask, labels = (as_tensor(case.inputs[name]) for name in ("mask", "cls_label"))
    produced = Found()

    def both(patches: Tensor, temperature: float, suffix: str) -> dict[str, Tensor]:
        tokens = as_tensor(case.inputs["tokens"]).requires_grad_()
        loss = cle_loss(tokens, patches, mask, labels, temperature, overflowing=True)
        value, gradient = loss_and_gradients(loss, tokens)
        return {f"loss{suffix}": value, f"grad_tokens{suffix}": gradient}

    for tau in case.suffixes("tau", "loss_tau", "grad_tokens_tau"):
        produced |= both(as_tensor(case.inputs["patches"]), float(tau), f"_tau{tau}")
    with produced.given():
        hot = as_tensor(case.inputs["patches_hot"])
        produced |= both(hot, case.settings["hot_tau"], "_hot")
    return produced


def f_une(case: Case) -> Produced:
    """Compute UNE with its gradient and the tokens that it takes."""
    cfg = case.settings
    tokens, mask, labels = (as_tensor(case.inputs[n]) for n in ("tokens", "mask", "cls_label"))
    patches = as_tensor(case.inputs["patches"]).requires_grad_()
    wanted = cfg.get("wanted", 8)
    torch.manual_seed(cfg["seed"])
    selected = select_tokens(
        uncertainty_map(mask),
        [None] * len(mask),
        wanted=wanted,
        window=cfg.get("window", 6),
        ratio=cfg.get("ratio", 1.2),
        corner=True,
    )
    loss, gradient = loss_and_gradients(une_loss(tokens, patches, selected, labels), patches)
    return {"loss": loss, "grad_patches": gradient, "selected": padded(selected, wanted)}


def f_distinct(case: Case) -> Produced:
    """Compute distinctness with its gradient, and the variant of COCO's log."""
    tau, labels = case.settings.get("tau", 0.07), as_tensor(case.inputs["cls_label"])
    produced: dict[str, Any] = {}
    for suffix in case.suffixes("tokens", "loss", "grad"):
        share = 0.5 if suffix == "_with_mean_logits" else 0.0
        tokens = as_tensor(case.inputs["tokens" if share else f"tokens{suffix}"]).requires_grad_()
        loss = distinct_loss(tokens, tau)
        if share:
            loss = (1 - share) * loss + share * mean_logit_loss(tokens, labels)
        produced[f"loss{suffix}"], produced[f"grad{suffix}"] = loss_and_gradients(loss, tokens)
    return produced


def f_seg(case: Case) -> Produced:
    """Compute the balanced segmentation loss with its gradient."""
    produced = Found()
    for suffix in case.suffixes("label", "loss", "grad"):
        with produced.given():
            label = as_tensor(case.inputs[f"label{suffix}"])
            logits = as_tensor(case.inputs["logits"]).requires_grad_()
            loss = balanced_segmentation_loss(logits, label, eps=1e-6)
            produced[f"loss{suffix}"], produced[f"grad{suffix}"] = loss_and_gradients(loss, logits)
    return produced


_NONE: dict[str, Tolerance] = {}
_SMALL_LOSS = Tolerance(absolute=1e-6, relative=1e-5, entrywise=True)
KINDS = {
    "a_encoder": Kind(a_encoder, _NONE),
    "b_gcr": Kind(b_gcr, _NONE),
    "c_network": Kind(c_network, {"lam": Tolerance(absolute=1e-4)}),
    "d_maps": Kind(d_maps, _NONE),
    "e_labels": Kind(e_labels, _NONE),
    "f_cle": Kind(f_cle, {"loss": _SMALL_LOSS}),
    "f_une": Kind(f_une, {"loss": _SMALL_LOSS}),
    # with equal tokens the gradient is zero up to rounding
    "f_distinct": Kind(
        f_distinct, {"loss": _SMALL_LOSS, "grad_identical": Tolerance(absolute=1e-7)}
    ),
    "f_seg": Kind(f_seg, {"loss": _SMALL_LOSS}),
    "g_optim": Kind(g_optim, {"lr": Tolerance(relative=1e-12)}),
    "h_train_step": Kind(
        h_train_step,
        {
            "terms": _SMALL_LOSS,
            "total": _SMALL_LOSS,
            "terms_step2": Tolerance(relative=5e-5, absolute=1e-6, entrywise=True),
            "grad_after": Tolerance(relative=2e-4),
            "delta_l2": Tolerance(relative=1e-2, entrywise=True),
            "classifier_after_two_steps": Tolerance(absolute=2e-5),
            "graph_norm_after_two_steps": Tolerance(absolute=2e-5),
            "lr": Tolerance(relative=1e-12),
        },
    ),
    "i_inference": Kind(i_inference, _NONE),
    "j_init": Kind(j_init, _NONE),
}
