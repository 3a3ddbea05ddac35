"""WeCLIP's parity cases of training and inference: optimiser, whole steps, protocol."""

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wsss.evaluation.inference import predict
from wsss.evaluation.protocol import Protocol
from wsss.maps.refine.par import PAR
from wsss.methods.base import Outputs, Step
from wsss.methods.weclip.affinity import near_pairs
from wsss.methods.weclip.decoder import affinity
from wsss.methods.weclip.gradcam import Slots, class_slots
from wsss.methods.weclip.maps import class_scores, label_maps, propagated
from wsss.methods.weclip.method import WeCLIP
from wsss.methods.weclip.official import first_rfm_iteration, official_name
from wsss.parity.cases import Case, Found, Produced
from wsss.parity.inputs import as_tensor, gradient_norm
from wsss.parity.networks import parameter_names
from wsss.parity.tolerances import Array
from wsss.parity.weclip_network import (
    GivenDrop,
    build_weclip,
    network_images,
    tiny_weclip,
    valid_rows,
)

#: short name of a stored gradient -> the official parameter
GRADIENTS = {
    "linear_pred": "decoder.linear_pred.weight",
    "fuse_bias": "decoder_fts_fuse.linear_fuse.bias",
    "mlp0_bias": "decoder_fts_fuse.linears_modulelist.0.proj.bias",
    "inproj0": "decoder.transformer.resblocks.0.attn.in_proj_bias",
}

INPUT_BIAS_ERROR = 3e-3  # relative


def least_margin(scores: Tensor) -> float:
    """Measure the smallest difference of the two best scores (B, C, H, W) of a pixel."""
    if scores.shape[1] < 2:
        return float("inf")
    best, second = scores.topk(2, dim=1).values.unbind(1)
    return float((best - second).min())


# ---- optimiser -----------------------------------------------------------------------------------


def _schedule(case: Case) -> dict[str, Any]:
    cfg = case.settings
    return {
        "lr": cfg["lr"],
        "head_lr_factor": cfg["head_lr_factor"],
        "weight_decay": cfg["weight_decay"],
        "warmup_steps": cfg["warmup_iter"],
        "max_steps": cfg["max_iter"],
    }


def h_optim(case: Case) -> Produced:
    """Compute rates, optimiser steps, and where the official counter switches RFM on."""
    cfg, produced = case.settings, Found()
    model = tiny_weclip(**_schedule(case))
    (group,) = model.param_groups()
    with produced.given():
        rates = [group["lr"] * model.lr_multiplier(int(step)) for step in case.inputs["steps"]]
        produced["lr_at_steps"] = np.array(rates)
    with produced.given():
        names = [name for name in case.inputs if name.startswith("param")]
        parameters = [nn.Parameter(as_tensor(case.inputs[name]).clone()) for name in names]
        gradients = [as_tensor(case.inputs[name.replace("param", "grads")]) for name in names]
        optimizer = model.optimizer([{**group, "params": parameters}])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, model.lr_multiplier)
        history: list[list[Tensor]] = []
        rates = []
        for step in range(len(gradients[0])):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient[step].clone()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
            history.append([parameter.detach().clone() for parameter in parameters])
        produced["lr"] = np.array(rates)
        produced |= {
            n: torch.stack(list(h)) for n, h in zip(names, zip(*history, strict=True), strict=True)
        }
    with produced.given():
        fields = cfg.get("counter_fields") or [
            "threshold", "validate_every", "validation_images", "max_iter",
        ]  # fmt: skip
        first = []
        for values in cfg["counter"].values():
            said = dict(zip(fields, values, strict=True))
            said["max_steps"] = said.pop("max_iter")
            first.append(first_rfm_iteration(said.pop("threshold"), **said))
        produced["first_rfm_iteration"] = np.array(first)
    return produced


# ---- two training steps --------------------------------------------------------------------------


def _named(model: WeCLIP) -> dict[str, nn.Parameter]:
    """Give the trained parameters under their official names."""
    return {official_name(n): p for n, p in model.named_parameters() if p.requires_grad}


def _step_outputs(case: Case, model: WeCLIP, step: Step, images: Tensor) -> dict[str, Any]:
    """Give what the first step computes beside its losses."""
    labels, seen = as_tensor(case.inputs["image_labels"]), step.seen
    slots, related, label = class_slots(labels), seen["affinity"].detach(), seen["pseudo_label"]
    parameters = _named(model)
    assert step.outputs.seg_logits is not None
    size, grid = (images.shape[-2], images.shape[-1]), step.outputs.seg_logits.shape[-2:]
    same, different = near_pairs(label, (grid[0], grid[1]), model.settings.radius)
    margins = []
    for b in range(len(images)):  # without the padded slots of the others
        own = seen["refined"][b : b + 1, slots[1][b]]
        scores = propagated(model.par, images[b : b + 1], class_scores(own, size))
        margins.append(least_margin(scores))
    produced: dict[str, Any] = {
        "seg": step.outputs.seg_logits,
        "affinity_mean": related.mean((1, 2)),
        "affinity_rows": related[:, :4],
        "refined_cam": valid_rows(seen["refined"], slots),
        "pseudo_label": label,
        "min_margin": np.array(min(margins)),
        "aff_counts": np.array([int(same.sum()) + 1, int(different.sum()) + 1]),
    }
    for short, name in GRADIENTS.items():
        produced[f"grad_{short}"] = parameters[name].grad
    return produced


def _without_noise(norms: Array, names: list[str], expected: Array | None) -> Array:
    """Leave out norms of attention's input biases that are near enough (golden README).

    Their third for the keys has no gradient, and Adam turns the rounding noise into full steps.
    """
    if expected is None or expected.shape != norms.shape:
        return norms
    noisy = np.array([name.endswith("attn.in_proj_bias") for name in names])
    near = np.abs(norms - expected) <= INPUT_BIAS_ERROR * np.abs(expected)
    return np.ma.array(norms, mask=noisy & near)


def i_train_step(case: Case) -> Produced:
    """Compute two training steps."""
    cfg = case.settings
    settings = {**_schedule(case), "aff_weight": cfg["aff_weight"], "radius": cfg["radius"]}
    start = cfg["global_step"] + 1 if cfg["rfm"] else None
    model = build_weclip(case, **settings, rfm_start=start).train()
    model.par = PAR(num_iter=cfg["par_iterations"], dilations=cfg["dilations"])
    images = network_images(case.inputs["img"])
    box = torch.tensor([0, images.shape[-2], 0, images.shape[-1]]).expand(len(images), 4)
    batch = {"image": images, "labels": as_tensor(case.inputs["image_labels"]), "box": box}
    parameters = _named(model)
    names = [name for name in parameter_names(case) if name in parameters]
    produced: dict[str, Any] = {"param_names": np.array(json.dumps(names))}
    optimizer = model.optimizer(model.param_groups())
    labels = []
    for number, drop in enumerate(as_tensor(case.inputs["drop"])):
        at = cfg["global_step"] + number
        (group,) = optimizer.param_groups
        group["lr"] = model.param_groups()[0]["lr"] * model.lr_multiplier(at)
        model.decoder.dropout = GivenDrop(drop)
        step = model.losses(batch, at)
        optimizer.zero_grad()
        step.total.backward()
        if number == 0:
            produced |= _step_outputs(case, model, step, images)
            produced["grad_norms"] = np.array([gradient_norm([parameters[n].grad]) for n in names])
        optimizer.step()
        losses = [step.losses["seg_loss"], step.losses["aff_loss"], step.total]
        produced[f"losses_{number + 1}"] = np.array([loss.item() for loss in losses])
        produced[f"lr_{number + 1}"] = group["lr"]
        norms = [gradient_norm([parameters[name].detach()]) for name in names]
        name = f"param_l2_{number + 1}"
        produced[name] = _without_noise(np.array(norms), names, case.outputs.get(f"out_{name}"))
        labels.append(step.seen["pseudo_label"])
    produced["label_changed_in_step_2"] = int((labels[0] != labels[1]).sum())
    return produced


# ---- inference -----------------------------------------------------------------------------------


class Recorder:
    """A module whose inputs and segmentation logits are kept."""

    def __init__(self, model: WeCLIP) -> None:
        self.model = model
        self.images: list[Tensor] = []
        self.logits: list[Tensor] = []

    def __call__(self, images: Tensor) -> Outputs:
        """Compute the logits of images (B, 3, H, W)."""
        outputs = self.model(images)
        assert outputs.seg_logits is not None
        self.images.append(images)
        self.logits.append(outputs.seg_logits)
        return outputs

    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the method's maps."""
        return self.model.cams(images, labels)


def protocol_of(case: Case) -> Protocol:
    """Make the file's protocol, as ``conf/method/weclip.yaml`` has it."""
    return Protocol(
        resize_long=case.settings["resize_long"],
        seg_scales=tuple(float(scale) for scale in case.settings["scales"]),
        flip=True,
        flip_merge="mean",
        scale_merge="mean",
        scale_by="factor",
        merge_at="logits",
        crf="weclip",
    )


@torch.no_grad()
def j_inference(case: Case) -> Produced:
    """Compute logits and labels by the evaluator's own way, and the label of the maps."""
    model, rgb, produced = build_weclip(case), case.inputs["img"], Found()
    recorder, protocol = Recorder(model), protocol_of(case)
    found = predict(recorder, network_images(rgb)[None], rgb.shape[:2], protocol)
    assert found.single is not None
    assert found.merged is not None
    images, grid = recorder.images[0], recorder.logits[0].shape[-2:]
    small = predict(model, network_images(rgb)[None], grid, protocol)
    assert small.merged is not None
    produced |= {
        "logits_single": recorder.logits[0][0],
        "logits_msc": small.merged[0],
        "label_single": found.single[0].argmax(0),
        "label_msc": found.merged[0].argmax(0),
        "min_margin": least_margin(found.merged),
        "input_resized_mean": images[0].mean((1, 2)),
    }
    if len(recorder.logits) > 3:
        produced["scale2_raw"] = torch.cat(recorder.logits[2:4])
    with produced.given():
        scores, slots = _map_scores(model, images, case, rgb.shape[:2])
        produced["cam_label"] = label_maps(scores, slots)[0]
        produced["cam_min_margin"] = least_margin(scores)
    return produced


def _map_scores(
    model: WeCLIP, images: Tensor, case: Case, size: tuple[int, int]
) -> tuple[Tensor, Slots]:
    """Compute refined and propagated scores of an image's classes with RFM, at its label's size."""
    slots = class_slots(as_tensor(case.inputs["image_labels"])[None])
    encoded = model.encode(images, layers=model.layers(learned=True))
    related = affinity(model.decoder.fused(encoded.taps, encoded.grid))
    refined = model.refined_maps(encoded, slots, related)
    return propagated(model.par, images, class_scores(refined, size)), slots
