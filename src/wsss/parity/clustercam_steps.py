"""ClusterCAM's parity cases of training: pseudo labels, losses and their gradients, whole steps."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.maps.pseudo_labels import (
    packed_scores,
    present_slots,
    refine_cam_to_label,
    refined_scores,
)
from wsss.maps.refine.par import PAR
from wsss.methods.clustercam.method import ClusterCAM
from wsss.methods.clustercam.official import MIXING, official_name
from wsss.methods.losses import balanced_segmentation_loss
from wsss.parity.cases import Case, Found, Produced
from wsss.parity.clustercam_network import (
    EPOCHS,
    both_precisions,
    build_clustercam,
    official_parameters,
)
from wsss.parity.inputs import (
    as_tensor,
    gradient_norm,
    loss_and_gradients,
    network_images,
    unit_images,
)
from wsss.parity.tolerances import Array

# ---- CAMs and labels -----------------------------------------------------------------------------


def _par(case: Case, iterations: int) -> PAR:
    dilations = case.settings.get("dilations", (1, 2, 4, 8, 12, 24))
    return PAR(dilations=dilations, num_iter=iterations, eps=1e-5)


def par(case: Case) -> Produced:
    """Compute affinity and refined maps after every number of iterations in the file."""
    images, produced = unit_images(case.inputs["image"]), Found()
    iterations = case.settings.get("iterations", 10)
    rounds = {int(name[4:]) for name in case.outputs if re.fullmatch(r"out_\d+", name)}
    with produced.given():
        masks = as_tensor(case.inputs["masks"])
        produced |= {f"out_{count}": _par(case, count)(images, masks) for count in sorted(rounds)}
        refined = _par(case, iterations)(images, masks)
        before = F.interpolate(masks, refined.shape[-2:], mode="bilinear", align_corners=True)
        produced["growth"] = float(refined.double().sum() / before.double().sum())
    if "affinity_crop" in case.outputs:
        crop = as_tensor(case.outputs["affinity_crop"])
        whole = _par(case, 1).affinity(images)
        # the file does not say where its crop lies: where its first pixel fits best
        height, width = crop.shape[-2:]
        first = whole[:, :, : whole.shape[2] - height + 1, : whole.shape[3] - width + 1]
        distance = (first - crop[:, :, :1, :1]).abs().amax(dim=(0, 1))
        row, column = divmod(int(distance.argmin()), distance.shape[1])
        produced["affinity_crop"] = whole[:, :, row : row + height, column : column + width]
    return produced


def _labels(case: Case, images: Tensor, cam: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Make labels at both thresholds and the pseudo label."""
    cfg = case.settings
    high, low = cfg["bg"] + cfg["delta"], cfg["bg"] - cfg["delta"]
    refiner, scale = _par(case, cfg["iterations"]), cfg["down_scale"]
    pairs = {"label_high": (high, high), "label_low": (low, low), "pseudo_label": (high, low)}
    return {
        name: refine_cam_to_label(
            refiner, images, cam, targets, high=over, low=under, down_scale=scale
        )
        for name, (over, under) in pairs.items()
    }


def labels_from_cam(case: Case) -> Produced:
    """Make labels of given CAMs."""
    cam = as_tensor(case.inputs["cam_u8"]).float() / 255
    return _labels(case, unit_images(case.inputs["image"]), cam, as_tensor(case.inputs["targets"]))


@torch.no_grad()
def ms_cam_labels(case: Case) -> Produced:
    """Compute multi-scale CAMs, then labels and loss from the file's own CAMs and guide image."""
    model, images = build_clustercam(case), network_images(case.inputs["image"])
    targets = as_tensor(case.inputs["targets"])
    every = torch.ones_like(targets)
    guide, produced = model.guide(images), Found()
    produced |= {
        "cam_ms": model.cams(images, every),
        "denorm": (guide * 255).round().byte().permute(0, 2, 3, 1),
        "denorm_offby1": int(
            (guide * 255).round().ne(unit_images(case.inputs["image"]) * 255).sum()
        ),
    }
    for name in [name for name in case.outputs if name.startswith("cam_scale_")]:
        scale = float(name.removeprefix("cam_scale_"))
        size = [int(scale * side) for side in images.shape[-2:]]
        scaled = images if scale == 1 else F.interpolate(images, size, mode="bilinear")
        both = torch.cat([scaled, scaled.flip(-1)])
        produced[name] = model.raw_cam(both, torch.arange(model.num_classes))
    with produced.given():
        stored = as_tensor(case.outputs["cam_ms"])
        stored_guide = unit_images(case.outputs["denorm"])
        produced |= _labels(case, stored_guide, stored, targets)
        produced |= _refined_planes(case, stored_guide, stored, targets)
    with produced.given():
        label = as_tensor(case.outputs["pseudo_label"])
        produced["seg_loss"] = model.losses_of(
            model.encode(images), targets, {"pseudo_label": label}
        ).losses["seg_loss"]
    return produced


def _refined_planes(case: Case, guide: Tensor, cam: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Give PAR's output for every image and threshold: background, then present classes."""
    cfg = case.settings
    size = (guide.shape[-2] // cfg["down_scale"], guide.shape[-1] // cfg["down_scale"])
    small = F.interpolate(guide, size, mode="bilinear")
    ids, valid = present_slots(targets)
    thresholds = (cfg["bg"] + cfg["delta"], cfg["bg"] - cfg["delta"])
    scores = packed_scores(cam, targets, ids, size, thresholds)
    refined = refined_scores(_par(case, cfg["iterations"]), small, scores, valid)
    return {
        f"par_{name}_image{image}": refined[image, index][valid[image]]
        for image in range(len(targets))
        for index, name in enumerate(("high", "low"))
    }


# ---- losses and training -------------------------------------------------------------------------


def gradients(case: Case) -> Produced:
    """Compute gradients of each loss alone and of the total."""
    model, images = build_clustercam(case), network_images(case.inputs["image"])
    targets, produced = as_tensor(case.inputs["targets"]), Found()
    known = {}
    with produced.given():
        known["pseudo_label"] = as_tensor(case.inputs["seg_label"])
    for suffix, network, kind in both_precisions(model):
        result = network.losses_of(network.encode(images.to(kind)), targets.to(kind), known)
        losses = {"cls": result.losses["cls_loss"], "pat": result.losses["patch_loss"]}
        if known:
            losses |= {"seg": result.losses["seg_loss"], "total": result.total}
        produced |= {f"loss_{name}{suffix}": loss for name, loss in losses.items()}
        with produced.given():
            parameters = official_parameters(case, network)
            trained = [p for p in parameters if p.requires_grad]
            for name, loss in losses.items():
                found = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
                by_id = {id(p): gradient for p, gradient in zip(trained, found, strict=True)}
                own = [by_id.get(id(p)) for p in parameters]
                produced[f"gradnorm_{name}{suffix}"] = np.array([gradient_norm([g]) for g in own])
                if kind == torch.float64:
                    produced |= _gradient_facts(case, name, own, parameters)
                    with produced.given():
                        produced[f"groupnorm_{name}"] = _group_norms(case, own)
    return produced


def _gradient_facts(
    case: Case, loss: str, own: list[Tensor | None], parameters: list[torch.nn.Parameter]
) -> dict[str, Any]:
    """Say which gradients are missing or zero; give the gradients that are in the file."""
    absent = np.array([gradient_norm([g]) == 0 for g in own])
    # None and zero both mean no gradient; which of them it is depends on autograd's layout
    stored_zero = case.outputs.get(f"zero_{loss}")
    names = case.inputs["grad_names"].tolist()
    produced: dict[str, Any] = (
        {f"none_{loss}": np.ma.array(absent, mask=absent)}
        if stored_zero is None
        else {f"none_{loss}": absent & ~stored_zero, f"zero_{loss}": absent & stored_zero}
    )
    full = [torch.zeros_like(p) if g is None else g for g, p in zip(own, parameters, strict=True)]
    for name, gradient in zip(names, full, strict=True):
        if f"grad_{loss}/{name}" in case.outputs:
            produced[f"grad_{loss}/{name}"] = gradient
    produced[f"grad_{loss}/mix_param_all"] = torch.cat(
        [g for name, g in zip(names, full, strict=True) if name.endswith(MIXING)]
    )
    return produced


def _group_norms(case: Case, own: list[Tensor | None]) -> Array:
    """Compute the norm of each group of parameters' gradients."""
    groups = case.inputs["group_of_param"]
    return np.array(
        [
            gradient_norm(g for g, group in zip(own, groups, strict=True) if group == index)
            for index in range(len(case.inputs["group_names"]))
        ]
    )


def seg_loss(case: Case) -> Produced:
    """Compute the segmentation loss of every label map, with its gradient."""
    losses, slopes = [], []
    labels = as_tensor(case.inputs["labels"])
    for label in labels:
        logits = as_tensor(case.inputs["pred"]).requires_grad_()
        full = F.interpolate(logits, label.shape[-2:], mode="bilinear")
        loss, slope = loss_and_gradients(balanced_segmentation_loss(full, label), logits)
        losses.append(loss.item())
        slopes.append(slope)
    return {
        "loss": np.array(losses),
        "grad": torch.stack(slopes),
        "official_is_plain_float": (labels == 255).flatten(1).all(1),
    }


def train_phase(case: Case) -> Produced:
    """Run training steps; give their gradients, and where they leave the parameters."""
    cfg = case.settings
    model = build_clustercam(case, lr=cfg["lr"], weight_decay=cfg["weight_decay"])
    model.train(cfg["training_mode"])
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = model.optimizer(model.param_groups())
    targets = as_tensor(case.inputs["targets"])
    step = EPOCHS - 1 if cfg["phase"] == 2 else 0
    produced = Found()
    for index in range(cfg["steps"]):
        if f"image_step{index}" not in case.inputs:
            produced.absent.append(f"image_step{index}")
            break
        images = network_images(case.inputs[f"image_step{index}"])
        result = model.losses({"image": images, "labels": targets}, step)
        optimizer.zero_grad()
        result.total.backward()
        produced |= {
            f"losses_step{index}": _four_losses(result.losses, result.total),
            f"cls_logits_step{index}": result.outputs.class_logits,
            f"pat_logits_step{index}": result.seen["patch_logits"],
            f"mixgrad_step{index}": _mixing_gradients(model),
        }
        with produced.given():
            gradients = [p.grad for p in official_parameters(case, model)]
            produced[f"gradnorm_step{index}"] = np.array([gradient_norm([g]) for g in gradients])
            produced[f"gradnone_step{index}"] = np.array([g is None for g in gradients])
        if "cam" in result.seen:
            # the file's means are of all classes, ours are computed for the present ones alone
            produced[f"cam_ms_mean_step{index}"] = _present_means(result.seen["cam"], targets)
            produced[f"pseudo_label_step{index}"] = result.seen["pseudo_label"]
        optimizer.step()
        moved = {
            official_name(name): gradient_norm([p - start[name]])
            for name, p in model.named_parameters()
        }
        with produced.given():
            names = case.inputs["grad_names"].tolist()
            # softmax ignores the key third of these biases: its gradient is rounding, which Adam
            # brings to full size
            noise = [name.endswith(("qkv.bias", "qkv_stsa.bias")) for name in names]
            norms = np.array([moved[name] for name in names])
            produced[f"deltanorm_step{index}"] = np.ma.array(norms, mask=noise)
    return produced


def _four_losses(losses: Mapping[str, Tensor], total: Tensor) -> Array:
    zero = total.new_zeros(())
    terms = [losses.get(f"{name}_loss", zero) for name in ("cls", "patch", "seg")]
    return np.array([term.item() for term in [*terms, total]])


def _mixing_gradients(model: ClusterCAM) -> Tensor:
    return torch.cat([torch.zeros(1) if s.grad is None else s.grad for s in model.mixing()])


def _present_means(cam: Tensor, targets: Tensor) -> Any:
    return np.ma.array(cam.double().mean((-2, -1)).numpy(), mask=(targets == 0).numpy())
