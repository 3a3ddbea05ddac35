"""ToCo's parity cases: the product's functions on the official run's inputs.

Every function takes its sizes and settings from the file. The networks load their weights through
the converter for official checkpoints.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.maps.cams import multiscale_cam
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
from wsss.methods.losses import (
    balanced_segmentation_loss,
    dense_energy_from_prob,
    dense_energy_loss,
    energy_features,
    energy_inputs,
    filter_maps,
)
from wsss.methods.official import load_official
from wsss.methods.schedules import poly_warmup
from wsss.methods.toco.contrast import NUM_LOCALS, crop_local_views, ctc_loss, pair_masks, ptc_loss
from wsss.methods.toco.method import StepResult, ToCo
from wsss.methods.toco.official import toco_name
from wsss.models.backbone import Backbone
from wsss.models.weights import load_encoder
from wsss.parity import GRADIENT, LOSS, Array, Case, Kind, Produced, Tolerance
from wsss.parity.inputs import (
    as_tensor,
    gradient_norm,
    loss_and_gradients,
    network_images,
    unit_images,
)

CRF_NAMES = {"seg": "toco", "cam": "toco_cam", "plain": "psa"}
CAM_ERROR = 5e-5  # what a CAM may be off: so near to a threshold, a score may lie on either side
ITERATIONS, GATED_ITERATIONS = 20_000, 2_000  # VOC's run, and its steps without segmentation loss


# ---- reading -------------------------------------------------------------------------------------


def _thresholds(case: Case) -> tuple[float, float, float]:
    """High, low and background threshold."""
    cfg = case.settings
    return cfg.get("high_thre", 0.7), cfg.get("low_thre", 0.25), cfg.get("bkg_thre", 0.5)


def _pair_map(label: Tensor) -> Tensor:
    """1 same, 0 different, 255 ignored."""
    same, different = pair_masks(label)
    ignored = torch.full(same.shape, 255, dtype=torch.uint8)
    return ignored.masked_fill_(same, 1).masked_fill_(different, 0)


# ---- the network ---------------------------------------------------------------------------------


def official_weights(case: Case) -> dict[str, Tensor]:
    """Weights under the official names, by the rule in the golden README."""
    shapes = json.loads(str(case.extra["param_shapes"]))
    state = {}
    for name, shape in zip(case.extra["param_names"].tolist(), shapes, strict=True):
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        z: Array = np.asarray(generator.standard_normal(shape), dtype=np.float32)
        if name.rpartition(".")[2] in ("cls_token", "dist_token", "pos_embed"):
            z = 0.2 * z
        elif name.endswith(".weight_g"):
            z = np.ones_like(z)
        elif name.endswith(".num_batches_tracked"):
            z = np.zeros_like(z)
        elif name.endswith((".running_mean", ".running_var")):
            z = 0.1 * z if name.endswith("mean") else 1 + 0.1 * np.abs(z)
        elif len(shape) >= 2:
            z = z / np.sqrt(np.prod(shape[1:]))
        else:
            z = 0.1 * z if name.endswith(".bias") else 1 + 0.1 * z
        state[name] = torch.from_numpy(np.asarray(z, dtype=np.float32))
    return state


def _network_settings(case: Case) -> dict[str, Any]:
    return case.settings | case.settings.get("net", {})


def build_backbone(case: Case, state: dict[str, Tensor]) -> Backbone:
    """A backbone of the file's shape, still with random weights."""
    cfg = _network_settings(case)
    state = {name.removeprefix("encoder."): value for name, value in state.items()}
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    overrides = {
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "num_heads": cfg.get("num_heads", 3),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "patch_size": patch,
        "img_size": side * patch,
        "norm_layer": partial(nn.LayerNorm, eps=cfg.get("ln_eps", 1e-6)),
    }
    return Backbone(name="vit_tiny_patch16_224", weights="random", overrides=overrides)


def build_toco(case: Case, **overrides: Any) -> ToCo:
    """The method as training builds it (``official_compat``), with the file's weights."""
    cfg, state = _network_settings(case), official_weights(case)
    high, low, _ = _thresholds(case)
    settings: dict[str, Any] = {
        "max_steps": ITERATIONS,
        "aux_layer": cfg.get("aux_layer", -3),
        "decoder_channels": state["decoder.conv6.weight"].shape[0],
        "local_size": cfg.get("local_size", 96),
        "scales": cfg.get("scales", (1.0, 0.5, 1.5)),
        "high_threshold": high,
        "low_threshold": low,
        "temperature": cfg.get("temp", 0.5),
        "momentum": cfg.get("momentum", 0.9),
        "seg_after": GATED_ITERATIONS / ITERATIONS,
        "official_compat": True,
    }
    model = ToCo(
        backbone=build_backbone(case, state),
        num_classes=state["classifier.weight"].shape[0],
        **(settings | overrides),
    )
    load_official("toco", model, state, case.name)
    return model.eval()


@torch.no_grad()
def _projections(model: ToCo, class_tokens: Tensor, crops: Tensor) -> tuple[Tensor, Tensor]:
    """Student outputs for the global views and the crops, teacher outputs for the global views."""
    local_tokens = model._encode(crops).cls_tokens[:, 0]
    student = model.ctc_student(torch.cat([class_tokens, local_tokens]))
    return student, model.ctc_teacher(class_tokens)


def _teacher_summary(model: ToCo) -> dict[str, Array | list[str]]:
    """Names, sums, norms and first entries of the teacher head's parameters."""
    names = [f"proj_head_t.{_official_tail(n)}" for n, _ in model.ctc_teacher.named_parameters()]
    flat = [p.detach().numpy().ravel() for p in model.ctc_teacher.parameters()]
    wide = [f.astype(np.float64) for f in flat]
    return {
        "names": names,
        "sum": np.array([w.sum() for w in wide]),
        "l2": np.array([np.sqrt((w**2).sum()) for w in wide]),
        "first8": np.stack([f[:8] for f in flat]),
    }


def _official_tail(name: str) -> str:
    name = name.replace("parametrizations.weight.original0", "weight_g")
    return name.replace("parametrizations.weight.original1", "weight_v")


def _official_names(case: Case) -> tuple[dict[str, str], list[str]]:
    """Our parameter name -> official one, and the official ones that no method uses."""
    ours = {name: toco_name(name) for name in case.extra["param_names"].tolist()}
    used = {our: official for official, our in ours.items() if our is not None}
    return used, [official for official, our in ours.items() if our is None]


# ---- cases: network ------------------------------------------------------------------------------


@torch.no_grad()
def a_backbone(case: Case) -> Produced:
    """Class token, patch tokens and auxiliary tokens at every size."""
    state = official_weights(case)
    backbone = build_backbone(case, state).eval()
    load_encoder(backbone.vit, state, case.name)
    aux = case.settings.get("aux_layer", -3) % backbone.depth
    produced = {}
    for name, array in case.inputs.items():
        size = name.removeprefix("img")  # "_64x96"
        features = backbone(network_images(array), taps=(aux,))
        last = aux == backbone.depth - 1  # the last list entry is the normed output
        produced[f"cls{size}"] = features.cls_tokens[:, 0]
        produced[f"patch{size}"] = features.patch_tokens
        produced[f"aux{size}"] = features.patch_tokens if last else features.intermediates[aux]
    return produced


@torch.no_grad()
def b_network(case: Case) -> Produced:
    """Every output of the network, and the teacher's moving average."""
    model, images = build_toco(case), network_images(case.inputs["img"])
    outputs, features = model(images), model._encode(images)
    cam, cam_aux = model.raw_cams(images)
    token = features.cls_tokens[:, 0]
    produced: dict[str, Any] = {
        "cls": outputs.class_logits,
        "seg": outputs.seg_logits,
        "fmap": features.patch_map,
        "cls_aux": model._classify(model.aux_classifier, model._aux_map(features)),
        "cam": cam,
        "cam_aux": cam_aux,
        "cls_token": token,
        "head_student": model.ctc_student(token),
        "head_teacher": model.ctc_teacher(token),
    }
    if "locals" in case.inputs:
        views = torch.cat([network_images(case.inputs[v]) for v in ("view1", "view2")])
        crops = network_images(case.inputs["locals"]).flatten(0, 1)
        model.update_teacher()
        student, teacher = _projections(model, model._encode(views).cls_tokens[:, 0], crops)
        produced |= {"ctc_student": student, "ctc_teacher": teacher}
        produced["cls_with_crops"] = model(images).class_logits
        produced |= {f"ema_{k}": v for k, v in _teacher_summary(model).items()}
    return produced


def c_multiscale_cam(case: Case) -> Produced:
    """Normalised multi-scale CAMs of both token sets."""
    model = build_toco(case)
    cam, cam_aux = multiscale_cam(
        model.raw_cams, network_images(case.inputs["img"]), scales=case.settings["scales"]
    )
    return {"cam": cam, "cam_aux": cam_aux}


# ---- cases: labels and refinement ----------------------------------------------------------------


def d_labels(case: Case) -> Produced:
    """Thresholding, boxes, ROI and pair masks."""
    high, low, background = _thresholds(case)
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
    """Refined masks: ``in_masks`` gives ``refined``, ``in_masks_x`` gives ``refined_from_x``."""
    par, images = _par(case), unit_images(case.inputs["img"])
    return {
        name.replace("masks_", "refined_from_").replace("masks", "refined"): par(
            images, as_tensor(array)
        )
        for name, array in case.inputs.items()
        if name.startswith("masks")
    }


def e_refine(case: Case) -> Produced:
    """The refined pseudo-label."""
    high, low, _ = _thresholds(case)
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


# ---- cases: losses -------------------------------------------------------------------------------


def _labels_by_suffix(case: Case) -> Iterable[tuple[str, Tensor]]:
    """``in_label_x`` as (``_x``, map); a plain ``in_label`` has an empty suffix."""
    for name, array in case.inputs.items():
        if name.startswith("label"):
            yield name.removeprefix("label"), as_tensor(array)


def f_ptc(case: Case) -> Produced:
    """Patch-token contrast with its gradient and pair counts for every label map."""
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
    """Class-token contrast at every temperature, with both gradients and the single images."""
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
    """Balanced segmentation loss, unguarded as officially, with its gradient."""
    produced = {}
    for suffix, label in _labels_by_suffix(case):
        logits = as_tensor(case.inputs["logits"]).requires_grad_()
        loss = balanced_segmentation_loss(logits, label, guard=False)
        produced[f"loss{suffix}"], produced[f"grad{suffix}"] = loss_and_gradients(loss, logits)
    return produced


def _correlation(first: Tensor, second: Tensor) -> float:
    pair = torch.stack([first.flatten(), second.flatten()]).double()
    return float(torch.corrcoef(pair)[0, 1])


def f_energy(case: Case) -> Produced:
    """Dense energy of a case whose images are normalised and whose real pixels are a box."""
    images, boxes = network_images(case.inputs["img"]), as_tensor(case.inputs["box"])
    return energy_outputs(case, images, boxes, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def energy_outputs(
    case: Case, images: Tensor, boxes: Tensor, *, mean: Sequence[float], std: Sequence[float]
) -> Produced:
    """Dense energy through the lattice and through the exact Gaussian, and their inputs.

    Args:
        case: gives ``in_logits``, ``in_label`` and the settings.
        images: (B, 3, H, W), normalised with ``mean`` and ``std``.
        boxes: (B, 4) real pixels.
        mean: of the normalisation.
        std: of the normalisation.
    """
    cfg, label = case.settings, as_tensor(case.inputs["label"])
    scale = cfg.get("scale_factor", 0.5)
    sigma_rgb, sigma_xy = cfg.get("sigma_rgb", 15.0), cfg.get("sigma_xy", 100.0)
    settings: dict[str, Any] = {
        "mean": mean,
        "std": std,
        "weight": cfg.get("weight", 1e-7),
        "sigma_rgb": sigma_rgb,
        "sigma_xy": sigma_xy,
        "scale_factor": scale,
    }
    logits = as_tensor(case.inputs["logits"]).requires_grad_()
    results = [
        loss_and_gradients(
            dense_energy_loss(images, logits, label, boxes, kernel=kernel, **settings), logits
        )
        for kernel in ("lattice", "gaussian")
    ]
    (loss, gradient), (exact_loss, exact_gradient) = results
    prob = logits.detach().softmax(1).requires_grad_()
    from_prob, grad_prob = loss_and_gradients(
        dense_energy_from_prob(images, prob, label, boxes, **settings), prob
    )
    colours, reduced, roi, gate = energy_inputs(
        images,
        prob.detach(),
        label,
        boxes,
        scale_factor=scale,
        mean=mean,
        std=std,
    )
    features = energy_features(colours, sigma_rgb=sigma_rgb, sigma_xy=sigma_xy * scale)
    masked = reduced * roi
    lattice, exact = (filter_maps(features, masked, k) for k in ("lattice", "gaussian"))
    return {
        "loss": loss,
        "grad_logits": gradient,
        "loss_from_prob": from_prob,
        "grad_prob": grad_prob,
        "small_img": colours,
        "small_S": masked,
        "small_gate": gate[:, 0],
        "lattice_AS": lattice,
        "exact_AS": exact,
        "exact_loss": exact_loss,
        "exact_grad_logits": exact_gradient,
        "lattice_over_exact": float(loss / exact_loss),
        "relative_difference": float((loss - exact_loss) / exact_loss),
        "grad_correlation": _correlation(gradient, exact_gradient),
        "AS_correlation": _correlation(lattice, exact),
    }


# ---- cases: crops, optimiser, training step ------------------------------------------------------


def _candidates(roi: Tensor, margin: int, count: int) -> tuple[Tensor, bool]:
    """Flat positions that a crop may be drawn from, and whether all had to be taken."""
    inner = roi[margin:-margin, margin:-margin].flatten()
    chosen = (inner <= 1).nonzero()[:, 0]
    return (torch.arange(len(inner)), True) if len(chosen) < count else (chosen, False)


def g_crops(case: Case) -> Produced:
    """Local crops of a seed, and everything that follows from them."""
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


def _rates(case: Case, steps: Iterable[int], max_steps: int, warmup_steps: int) -> Array:
    """Rates (step, group) of a run of the method."""
    model = build_toco(case, lr=case.settings.get("lr", 6e-5))
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


def _toy_run(case: Case, model: ToCo, multiplier: Callable[[int], float]) -> Array:
    """A toy parameter through the method's optimiser and schedule, at base and ten-fold rate."""
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
    """Which parameter is in which group, and which one is frozen, under the official names."""
    official, unused = _official_names(case)
    names = {id(p): official[n] for n, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in model.param_groups()]
    # The official encoder carries an ImageNet head that nothing uses and we do not have; it is in
    # the encoder's group and gets no gradient.
    groups[0] += unused
    held = {name for group in groups for name in group}
    return {f"group{i}": group for i, group in enumerate(groups)} | {
        "not_in_any_group": [n for n in names.values() if n not in held],
        "requires_grad_false": [names[id(p)] for p in model.parameters() if not p.requires_grad],
    }


def h_optim(case: Case) -> Produced:
    """Rates, optimiser, parameter groups and moving averages."""
    cfg = case.settings
    model = build_toco(case)
    produced: dict[str, Any] = {}
    if "short_max" in cfg:
        short = cfg["short_max"], cfg["short_warmup"]
        produced["lr_short"] = _rates(case, range(cfg["short_steps"]), *short)
        if "toy_param" in case.inputs:
            toy = _toy_run(case, model, _multiplier(case, *short))
            produced["toy_param_after_step"] = toy
    for name, length in (("voc", 20_000), ("coco", 80_000)):
        if f"{name}_iters" in case.inputs:
            steps = case.inputs[f"{name}_iters"]
            produced[f"lr_{name}"] = _rates(case, steps, length, 1500)
    produced |= _group_names(case, model)
    for moves in range(1, 11):
        model.update_teacher()
        summary = _teacher_summary(model)
        produced["ema_names"] = summary["names"]
        produced |= {f"ema{moves}_{k}": v for k, v in summary.items() if k != "names"}
        for name, value in model.ctc_teacher.named_parameters():
            tail = _official_tail(name).replace("mlp.", "mlp").replace(".", "_")
            produced[f"ema{moves}_{tail}"] = value.detach().clone()
    return produced


def _step(case: Case, step: int) -> tuple[ToCo, StepResult]:
    """One training step's losses on a fresh model."""
    model = build_toco(case).train()
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
        local = crop_local_views(batch["local_view"], roi, model.local_size, count, draws)
        model.local_crops = lambda *_: local  # type: ignore[method-assign]
    return model, model.compute_losses(batch, step)


def _official_gradients(case: Case, model: ToCo, loss: Tensor) -> dict[str, Tensor | None]:
    """Gradients of a loss under the official names; None where there is none at all."""
    official, unused = _official_names(case)
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
    """Norms per parameter and module, and every single gradient under its short name."""
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
    """``decoder.conv8.weight`` -> ``decoder_conv8`` and the like, as the files name gradients."""
    if name == "encoder.cls_token":
        return "cls_token"
    if name.startswith(("decoder.", "classifier.", "aux_classifier.")):
        name = name.removesuffix(".weight")
    return name.replace("mlp.", "mlp").replace(".", "_")


def _threshold_distance(cam: Tensor, labels: Tensor, thresholds: Iterable[float]) -> float:
    value = (cam * labels[:, :, None, None]).amax(1)
    return min(float((value - t).abs().min()) for t in thresholds)


def _step_outputs(case: Case, model: ToCo, result: StepResult) -> dict[str, Any]:
    """What a step computes beside its losses and gradients."""
    assert result.cam_aux is not None
    assert result.local is not None
    labels, batch = as_tensor(case.inputs["cls_label"]), len(case.inputs["cls_label"])
    high, low, _ = _thresholds(case)
    roi = roi_mask(result.cam_aux, labels, high=high, low=low)
    stored = as_tensor(case.inputs["roi_mask"]) if "roi_mask" in case.inputs else roi
    score = (result.cam_aux * labels[:, :, None, None]).amax(1)
    beside = ((score - high).abs() < CAM_ERROR) | ((score - low).abs() < CAM_ERROR)
    small = F.interpolate(
        result.cam_aux, size=result.features.grid, mode="bilinear", align_corners=False
    )
    # The step has moved the teacher already; the student stays until the optimiser's step.
    class_tokens = result.features.cls_tokens[:, 0]
    student, teacher = _projections(model, class_tokens, result.local.crops.flatten(0, 1))
    return {
        "roi_equals_stored": bool(((roi == stored) | beside).all()),
        "corner": result.local.corners,
        "flags": result.local.flags,
        "cam": result.cam,
        "cam_aux": result.cam_aux,
        "cls": result.outputs.class_logits,
        "cls_aux": model._classify(model.aux_classifier, model._aux_map(result.features)[:batch]),
        "seg": result.outputs.seg_logits,
        "fmap": result.features.patch_map[:batch],
        "ctc_teacher": teacher,
        "ctc_student": student,
        "refined_label": result.pseudo_label,
        "ptc_label": result.token_label,
        "nearest_threshold_distance_roi": _threshold_distance(result.cam_aux, labels, (high, low)),
        "nearest_threshold_distance_ptc": _threshold_distance(small, labels, (high, low)),
    } | {f"ema_{k}": v for k, v in _teacher_summary(model).items()}


def i_train_step(case: Case) -> Produced:
    """One training step before and after the segmentation loss sets in."""
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


# ---- case: dense CRF -----------------------------------------------------------------------------


def j_crf(case: Case) -> Produced:
    """Posterior and label of every preset."""
    produced = {}
    for name, preset in CRF_NAMES.items():
        posterior = dense_crf(case.inputs["img"], case.inputs["prob"], CRF_PRESETS[preset])
        produced[f"prob_{name}"] = posterior
        produced[f"label_{name}"] = posterior.argmax(0)
    return produced


_NONE: dict[str, Tolerance] = {}
_RATE = Tolerance(relative=1e-12)
ENERGY_TOLERANCES = {
    # The C++ filter itself moves by 3e-7 with the compiler's settings.
    "lattice_AS": Tolerance(relative=1e-6),
    "exact_AS": Tolerance(relative=1e-5),
    "exact_grad_logits": GRADIENT,
    "lattice_over_exact": LOSS,
    "relative_difference": LOSS,
    "grad_correlation": LOSS,
    "AS_correlation": LOSS,
}
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
