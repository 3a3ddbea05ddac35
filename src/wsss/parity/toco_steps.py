"""ToCo's parity cases of training: local crops, optimiser and schedule, a whole step."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.maps.pseudo_labels import roi_mask
from wsss.methods.base import Step
from wsss.methods.schedules import poly_warmup
from wsss.methods.toco.contrast import NUM_LOCALS, crop_local_views
from wsss.methods.toco.method import ToCo
from wsss.parity.cases import Case, Found, Produced
from wsss.parity.inputs import as_tensor, gradient_norm, network_images
from wsss.parity.toco_network import (
    GATED_ITERATIONS,
    build_toco,
    official_names,
    projections,
    teacher_parameters,
    teacher_summary,
    thresholds,
    tiny_toco,
)
from wsss.parity.tolerances import Array

CAM_ERROR = 5e-5  # what a CAM may be off: so near to a threshold, a score may lie on either side


# ---- crops ---------------------------------------------------------------------------------------


def _candidates(roi: Tensor, margin: int, count: int) -> tuple[Tensor, bool]:
    """Give the flat positions that a crop may be drawn from, and whether all had to be taken."""
    inner = roi[margin:-margin, margin:-margin].flatten()
    chosen = (inner <= 1).nonzero()[:, 0]
    return (torch.arange(len(inner)), True) if len(chosen) < count else (chosen, False)


def g_crops(case: Case) -> Produced:
    """Draw local crops of a seed, and compute everything that follows from them."""
    cfg = case.settings
    size, count = cfg.get("crop_size", 96), cfg.get("crop_num", 8)
    images = network_images(case.inputs["img"])
    roi = as_tensor(case.inputs["roi_mask"]).long()
    torch.manual_seed(cfg["seed"])
    local = crop_local_views(images, roi, size, count)
    pools = [_candidates(r, size // 2, count) for r in roi]
    width = roi.shape[2] - size // 2 * 2
    flat = local.corners[..., 0] * width + local.corners[..., 1]
    draws = [torch.searchsorted(pool, f) for (pool, _), f in zip(pools, flat, strict=True)]
    means = [
        [float(m[r : r + size, c : c + size].double().mean()) for r, c in corners.tolist()]
        for m, corners in zip(roi, local.corners, strict=True)
    ]
    crops = local.crops.transpose(0, 1)
    return {
        "draws": torch.stack(draws),
        "corner": local.corners,
        "candidate_count": np.array([len(pool) for pool, _ in pools]),
        "fell_back_to_all": np.array([fell_back for _, fell_back in pools]),
        "flags": local.flags,
        "roi_mean": np.array(means),
        "crop_channel_mean": crops.double().mean((-2, -1)),
        "crop_first_row": crops[..., 0, :8],
    }


# ---- optimiser -----------------------------------------------------------------------------------


def _rates(case: Case, steps: Iterable[int], max_steps: int, warmup_steps: int) -> Array:
    """Compute the rates (step, group) of a run of the method."""
    model = tiny_toco(lr=case.settings.get("lr", 6e-5))
    base = [group["lr"] for group in model.param_groups()]
    multiplier = _multiplier(case, max_steps, warmup_steps)
    return np.array([[lr * multiplier(int(s)) for lr in base] for s in steps])


def _multiplier(case: Case, max_steps: int, warmup_steps: int) -> Callable[[int], float]:
    return partial(
        poly_warmup,
        max_steps=max_steps,
        warmup_steps=warmup_steps,
        warmup_ratio=case.settings.get("warmup_ratio", 1e-6),
        power=case.settings.get("power", 0.9),
    )


def _toy_run(case: Case, multiplier: Callable[[int], float]) -> Array:
    """Train a toy parameter by the method's optimiser and schedule, at base and ten-fold rate."""
    model = tiny_toco()
    rate, gradients = case.settings["toy_lr"], as_tensor(case.inputs["toy_grads"])
    toys = [nn.Parameter(as_tensor(case.inputs["toy_param"]).clone()) for _ in range(2)]
    optimizer = model.optimizer(
        [{"params": [toy], "lr": lr} for toy, lr in zip(toys, (rate, 10 * rate), strict=True)]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
    history = []
    for gradient in gradients:
        for toy in toys:
            toy.grad = gradient.clone()
        optimizer.step()
        schedule.step()
        history.append(torch.stack([toy.detach().clone() for toy in toys]))
    return torch.stack(history).numpy()


def _group_names(case: Case, model: ToCo) -> dict[str, list[str]]:
    """Name the parameters of every group and the frozen ones, as the official code does."""
    official, unused = official_names(case)
    names = {id(p): official[n] for n, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in model.param_groups()]
    # The official encoder carries an ImageNet head that nothing uses and we do not have; it is in
    # the encoder's group and gets no gradient.
    groups[0] += unused
    grouped = {name for group in groups for name in group}
    return {f"group{i}": group for i, group in enumerate(groups)} | {
        "not_in_any_group": [n for n in names.values() if n not in grouped],
        "requires_grad_false": [names[id(p)] for p in model.parameters() if not p.requires_grad],
    }


def h_optim(case: Case) -> Produced:
    """Compute rates, optimiser steps, parameter groups and moving averages."""
    cfg, produced = case.settings, Found()
    with produced.given():
        short = cfg["short_max"], cfg["short_warmup"]
        produced["toy_param_after_step"] = _toy_run(case, _multiplier(case, *short))
    with produced.given():
        short = cfg["short_max"], cfg["short_warmup"]
        produced["lr_short"] = _rates(case, range(cfg["short_steps"]), *short)
    for name, length in (("voc", 20_000), ("coco", 80_000)):
        with produced.given():
            steps = case.inputs[f"{name}_iters"]
            produced[f"lr_{name}"] = _rates(case, steps, length, 1500)
    with produced.given():
        produced |= _groups_and_averages(case)
    return produced


def _groups_and_averages(case: Case) -> dict[str, Any]:
    """Give the names of every group, and the teacher head after up to ten moves."""
    # no group depends on the auxiliary layer, and a tiny network has fewer of them
    model = build_toco(case, aux_layer=-1)
    produced: dict[str, Any] = dict(_group_names(case, model))
    for moves in range(1, 11):
        model.update_teacher()
        summary = teacher_summary(model)
        produced["ema_names"] = summary["names"]
        produced |= {f"ema{moves}_{k}": v for k, v in summary.items() if k != "names"}
        for name, value in teacher_parameters(model).items():
            tail = name.removeprefix("proj_head_t.").replace("mlp.", "mlp").replace(".", "_")
            produced[f"ema{moves}_{tail}"] = value.clone()
    return produced


# ---- a training step -----------------------------------------------------------------------------


def _step(case: Case, step: int) -> tuple[ToCo, Step]:
    """Compute one training step's losses on a fresh model."""
    model = build_toco(case, local_size=case.settings["local_size"]).train()
    boxes = as_tensor(case.inputs["box"]).long()
    batch = {
        "image": network_images(case.inputs["img"]),
        "view2": network_images(case.inputs["view2"]),
        "local_view": network_images(case.inputs["local_img"]),
        "labels": as_tensor(case.inputs["cls_label"]),
        "box": boxes,
    }
    torch.manual_seed(case.settings.get("seed", 0))
    if "roi_mask" in case.inputs:
        # One score beside a threshold would move every later draw: the official mask and draws.
        roi = as_tensor(case.inputs["roi_mask"]).long()
        draws = as_tensor(case.inputs["draws"]) if "draws" in case.inputs else None
        count = NUM_LOCALS if draws is None else draws.shape[1]
        local = crop_local_views(batch["local_view"], roi, model.settings.local_size, count, draws)
        model.local_crops = lambda *_: local  # type: ignore[method-assign]
    return model, model.losses(batch, step)


def _official_gradients(case: Case, model: ToCo, loss: Tensor) -> dict[str, Tensor | None]:
    """Give the gradients of a loss under the official names; None where there is none at all."""
    official, unused = official_names(case)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(
        loss, [p for _, p in trained], retain_graph=True, allow_unused=True
    )
    found: dict[str, Tensor | None] = {
        official[name]: gradient for (name, _), gradient in zip(trained, gradients, strict=True)
    }
    return {name: found.get(name) for name in [*official.values(), *unused]}


MODULES = ("encoder", "proj_head", "proj_head_t", "decoder", "classifier", "aux_classifier")
TERMS = ("cls", "cls_aux", "ptc", "ctc", "seg", "reg")


def _module_norms(gradients: dict[str, Tensor | None]) -> Array:
    return np.array(
        [
            gradient_norm(g for name, g in gradients.items() if name.startswith(f"{module}."))
            for module in MODULES
        ]
    )


def _gradient_outputs(case: Case, stage: str, gradients: dict[str, Tensor | None]) -> Produced:
    """Give norms by parameter and module, and every gradient under its short name."""
    names = case.extra["param_names"].tolist()
    produced: dict[str, Any] = {
        f"gradnorm_param_{stage}": np.array(
            [np.nan if gradients[n] is None else gradient_norm([gradients[n]]) for n in names]
        ),
        f"gradnorm_module_{stage}": _module_norms(gradients),
    }
    for name, gradient in gradients.items():
        if gradient is not None:
            produced[f"grad_{stage}_{_short_name(name)}"] = gradient
    return produced


def _short_name(name: str) -> str:
    """Shorten ``decoder.conv8.weight`` to ``decoder_conv8``, as the files name gradients."""
    if name == "encoder.cls_token":
        return "cls_token"
    if name.startswith(("decoder.", "classifier.", "aux_classifier.")):
        name = name.removesuffix(".weight")
    return name.replace("mlp.", "mlp").replace(".", "_")


def _threshold_distance(cam: Tensor, labels: Tensor, values: Iterable[float]) -> float:
    value = (cam * labels[:, :, None, None]).amax(1)
    return min(float((value - t).abs().min()) for t in values)


def _step_outputs(case: Case, model: ToCo, result: Step) -> dict[str, Any]:
    """Give what a step computes beside its losses and gradients."""
    labels, batch = as_tensor(case.inputs["cls_label"]), len(case.inputs["cls_label"])
    seen = result.seen
    features, cam_aux, local = seen["features"], seen["cam_aux"], seen["local"]
    high, low, _ = thresholds(case)
    roi = roi_mask(cam_aux, labels, high=high, low=low)
    stored = as_tensor(case.inputs["roi_mask"]) if "roi_mask" in case.inputs else roi
    score = (cam_aux * labels[:, :, None, None]).amax(1)
    beside = ((score - high).abs() < CAM_ERROR) | ((score - low).abs() < CAM_ERROR)
    small = F.interpolate(cam_aux, size=features.grid, mode="bilinear", align_corners=False)
    # The step has moved the teacher already; the student stays until the optimiser's step.
    student, teacher = projections(model, features.cls_tokens[:, 0], local.crops.flatten(0, 1))
    return {
        "roi_equals_stored": bool(((roi == stored) | beside).all()),
        "corner": local.corners,
        "flags": local.flags,
        "cam": seen["cam"],
        "cam_aux": cam_aux,
        "cls": result.outputs.class_logits,
        "cls_aux": model.classify(model.aux_classifier, model.aux_map(features)[:batch]),
        "seg": result.outputs.seg_logits,
        "fmap": features.patch_map[:batch],
        "ctc_teacher": teacher,
        "ctc_student": student,
        "refined_label": seen["pseudo_label"],
        "ptc_label": seen["token_label"],
        "nearest_threshold_distance_roi": _threshold_distance(cam_aux, labels, (high, low)),
        "nearest_threshold_distance_ptc": _threshold_distance(small, labels, (high, low)),
    } | {f"ema_{k}": v for k, v in teacher_summary(model).items()}


def i_train_step(case: Case) -> Produced:
    """Compute one training step before and after the segmentation loss sets in."""
    produced: dict[str, Any] = {
        "module_names": list(MODULES),
        "term_names": list(TERMS),
        "grad_param_names": case.extra["param_names"].tolist(),
    }
    for stage, step in (("before", 0), ("after", GATED_ITERATIONS + 1)):
        model, result = _step(case, step)
        produced[f"total_{stage}"] = result.total
        gradients = _official_gradients(case, model, result.total)
        produced |= _gradient_outputs(case, stage, gradients)
    losses = [result.losses[f"{term}_loss"] for term in TERMS]
    produced["terms"] = np.array([loss.item() for loss in losses])
    for term, loss in zip(TERMS, losses, strict=True):
        gradients = _official_gradients(case, model, loss)
        produced[f"gradnorm_module_term_{term}"] = _module_norms(gradients)
    return produced | _step_outputs(case, model, result)
