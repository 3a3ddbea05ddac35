"""GETAM's parity cases: the product's functions on the official run's inputs.

Every function takes its sizes and settings from the file. The networks load their weights through
the converter for official checkpoints.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wsss.data.views.getam import GETAMViews
from wsss.evaluation.confusion import ConfusionMatrix
from wsss.evaluation.inference import predict, resized
from wsss.evaluation.protocol import Protocol
from wsss.maps.cams import normalise_maximum
from wsss.maps.pixels import normalise, squash_pixels
from wsss.maps.pseudo_labels import inside_boxes
from wsss.maps.refine.dense_crf import dense_crf
from wsss.maps.refine.pamr import PAMR
from wsss.methods.getam.labels import (
    BACKGROUND_POWER,
    Labels,
    complete_labels,
    completion_thresholds,
    saliency_loss,
    saliency_target,
    split_cross_entropy,
)
from wsss.methods.getam.maps import attention_and_slope, attention_term, class_slots, slot_maps
from wsss.methods.getam.method import GETAM, StepResult
from wsss.methods.getam.official import getam_official_name
from wsss.methods.official import load_official
from wsss.models.backbone import Backbone, Features
from wsss.models.vit import resize_positions
from wsss.parity import EXACT, Array, Case, Kind, Produced, Tolerance
from wsss.parity.inputs import as_tensor, loss_and_gradients, network_images
from wsss.parity.toco import ENERGY_TOLERANCES, energy_outputs, official_weights

PIXEL_MEAN, PIXEL_STD = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # of images in 0..255


# ---- reading -------------------------------------------------------------------------------------


def _pixels(array: Array) -> Tensor:
    """uint8 (..., H, W, 3) to float (..., 3, H, W) in 0..255."""
    return as_tensor(np.moveaxis(array, -1, -3)).float()


def _box_of(mask: Array) -> Tensor:
    """Rows and columns of the rectangle of ones in each mask (B, H, W): (B, 4)."""
    boxes = []
    for one in mask:
        rows, columns = (np.flatnonzero(one.any(axis)) for axis in (1, 0))
        box = [int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1]
        if int(one.sum()) != (box[1] - box[0]) * (box[3] - box[2]):
            raise ValueError("in_crop_mask is not a rectangle")
        boxes.append(box)
    return torch.tensor(boxes)


def build_getam(case: Case, **overrides: Any) -> GETAM:
    """The method as training builds it (``official_compat``), with the file's weights."""
    cfg, state = case.settings, official_weights(case)
    state["cls_head.weight"] = state["cls_head.weight"] * cfg.get("cls_head_scale", 1.0)
    prefix = "pretrained.model."
    width, _, patch, _ = state[f"{prefix}patch_embed.proj.weight"].shape
    distilled = f"{prefix}dist_token" in state
    side = round((state[f"{prefix}pos_embed"].shape[1] - 1 - distilled) ** 0.5)
    blocks = {name.split(".")[3] for name in state if name.startswith(f"{prefix}blocks.")}
    backbone = Backbone(
        name="deit_tiny_distilled_patch16_224" if distilled else "vit_tiny_patch16_224",
        weights="random",
        overrides={
            "embed_dim": width,
            "depth": len(blocks),
            "num_heads": cfg["num_heads"],
            "mlp_ratio": state[f"{prefix}blocks.0.mlp.fc1.weight"].shape[0] / width,
            "patch_size": patch,
            "img_size": side * patch,
            "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        },
    )
    settings: dict[str, Any] = {
        "num_classes": len(state["cls_head.weight"]),
        "max_steps": cfg.get("max_step", 100),
        "lr": cfg.get("lr", 0.04),
        "tap_channels": [
            len(state[f"pretrained.act_postprocess{level}.3.weight"]) for level in (1, 2, 3, 4)
        ],
        "decoder_channels": len(state["scratch.layer1_rn.weight"]),
        "official_compat": True,
    }
    model = GETAM(backbone=backbone, **(settings | overrides))
    load_official("getam", model, state, case.name)
    return model.eval()


# ---- cases: network ------------------------------------------------------------------------------


@torch.no_grad()
def a_encoder(case: Case) -> Produced:
    """Positions, taps, readouts and maps of all four levels at every size."""
    model = build_getam(case)
    backbone = model.backbone
    produced: dict[str, Any] = {}
    for name, array in case.inputs.items():
        size = name.removeprefix("img")  # "_64x96"
        features = model._encode(network_images(array), levels=(1, 2, 3, 4))
        produced[f"pos{size}"] = resize_positions(
            backbone.vit.pos_embed,
            features.grid,
            backbone.num_prefix_tokens,
            mode=backbone.position_mode,
        )
        for level, block in model.taps.items():
            prefix, patches = features.prefixes[block], features.intermediates[block]
            produced[f"hook{level}{size}"] = torch.cat([prefix, patches], dim=1)
            readout: Any = model.reassemble[str(level)]
            produced[f"readout{level}{size}"] = readout.read(patches, prefix[:, 0])
            produced[f"layer{level}{size}"] = model.level_map(features, level)
        produced[f"cls{size}"] = model.classify(model.level_map(features, 4))
    return produced


@torch.no_grad()
def b_network(case: Case) -> Produced:
    """Every output of the network, and the decoder's stations."""
    model, images = build_getam(case), network_images(case.inputs["img"])
    outputs = model(images)
    features = model._encode(images, levels=(1, 2, 3, 4))
    maps = [model.level_map(features, level) for level in (1, 2, 3, 4)]
    paths = model.decoder.paths(maps)
    squeezed = model.decoder.squeeze(paths[-1])
    again = model.segment(features, maps[3])
    alone = model._encode(images, levels=(4,))
    return {
        "cls": outputs.class_logits,
        "seg": outputs.seg_logits,
        "cls_only": model.classify(model.level_map(alone, 4)),
        "seg_only_equals": torch.equal(again, outputs.seg_logits),
        **{f"path{4 - i}": path for i, path in enumerate(paths[:3])},
        "path1_image0": paths[3][0],
        "se_image0": squeezed[0],
        "low_logits": model.decoder.head(squeezed),
    }


# ---- cases: maps ---------------------------------------------------------------------------------


def _pairs(labels: Tensor) -> Tensor:
    """(image, class) of every present class, (pairs, 2)."""
    return (labels > 0).nonzero()


def _of_pairs(slots: Tensor, ids: Tensor, pairs: Tensor) -> Tensor:
    """Rows (pairs, ...) of maps in slots (B, S, ...)."""
    return torch.stack([slots[i, int((ids[i] == c).nonzero()[0])] for i, c in pairs.tolist()])


def _block_gradients(
    model: GETAM, features: Features, logit: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Attention and gradient of every block and token for one logit, each (B, heads, N, N)."""
    parts = list(features.parts.values())
    gradients = torch.autograd.grad(logit, [part.output for part in parts], retain_graph=True)
    tokens = parts[0].keys.shape[2]
    return [
        attention_and_slope(part, gradient, rows=tokens)
        for part, gradient in zip(parts, gradients, strict=True)
    ]


def c_cam(case: Case) -> Produced:
    """Maps of every pair, block by block, and what becomes of them."""
    model = build_getam(case).train()
    images, labels = network_images(case.inputs["img"]), as_tensor(case.inputs["cls_label"])
    depth, first = model.backbone.depth, model.backbone.num_prefix_tokens
    features = model.backbone(images, taps=(model.taps[4],), parts=range(depth))
    logits = model.classify(model.level_map(features, 4))
    ids, valid = class_slots(labels)
    pairs = _pairs(labels)
    every = slot_maps(logits, features.parts, ids, valid, num_prefix_tokens=first)
    every = _of_pairs(every, ids, pairs)  # (pairs, depth, N)
    own = model._encode(images, levels=(4,))
    maps = model.maps_of_slots(own, model.classify(model.level_map(own, 4)), ids, valid).sum(2)
    guide = _pixels(case.inputs["img"])
    upsampled = model._enlarged(maps, guide.shape[-2:])
    grid = _of_pairs(maps, ids, pairs)
    image, class_index = pairs[0].tolist()
    both = _block_gradients(model, features, logits[image, class_index])
    absent = model.cams(images, labels)[labels <= 0]
    squared = [_squared_term(model, features, logits[i, c], i) for i, c in pairs.tolist()]
    return {
        "logits": logits,
        "pairs": pairs,
        "attn_pair0": torch.stack([attention[image] for attention, _ in both]),
        "grad_pair0": torch.stack([slope[image] for _, slope in both]),
        "term_pair0": torch.stack([attention_term(*one)[image] for one in both]),
        "term_cls_row": every,
        "map": grid,
        "control_map_all_blocks": every.sum(1).unflatten(1, features.grid),
        "control_map_grad_squared": torch.stack(squared),
        "peak_grid": grid.amax((1, 2)).double(),
        "upsampled": _of_pairs(upsampled, ids, pairs),
        "after_pamr": _of_pairs(model.pamr(guide, upsampled), ids, pairs),
        "normalised": _of_pairs(model.refine(maps, ids, guide), ids, pairs),
        "absent_classes_zero": not bool(absent.any()),
    }


def _squared_term(model: GETAM, features: Features, logit: Tensor, image: int) -> Tensor:
    """A wrong map on purpose: the head mean of ReLU(G)^2 * A over the last blocks, (h, w)."""
    both = _block_gradients(model, features, logit)
    first = model.backbone.num_prefix_tokens
    rows = [
        (both[block][1][image].relu().square() * both[block][0][image]).mean(0)[0, first:]
        for block in model.map_blocks
    ]
    return torch.stack(rows).sum(0).unflatten(0, features.grid)


def d_pamr(case: Case) -> Produced:
    """Refined masks: ``in_masks_x`` gives ``refined_x``."""
    pamr = PAMR(dilations=case.settings["dilations"], num_iter=case.settings["num_iter"])
    images = _pixels(case.inputs["img"])
    return {
        name.replace("masks", "refined"): pamr(images, as_tensor(masks))
        for name, masks in case.inputs.items()
        if name.startswith("masks")
    }


# ---- cases: labels -------------------------------------------------------------------------------


def _quantile(case: Case) -> float:
    return 0.95 if case.settings.get("coco") else case.settings.get("q", 0.9)


def _slots_of(maps: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (B, K, H, W) packed into slots (B, S, H, W), and the slots' classes."""
    ids, valid = class_slots(labels)
    chosen = ids[:, :, None, None].expand(-1, -1, *maps.shape[-2:])
    return maps.gather(1, chosen) * valid[:, :, None, None], ids


def _by_class(values: Tensor, ids: Tensor, labels: Tensor) -> Array:
    """Thresholds of the slots (B, S) as (B, K), NaN where there is none."""
    full = torch.full(labels.shape, torch.inf, dtype=torch.float64)
    full = full.scatter(1, ids, values.double())
    full[labels <= 0] = torch.inf
    return full.masked_fill(full.isinf(), torch.nan).numpy()


def e_complete(case: Case) -> Produced:
    """Labels, completed saliency and thresholds of every scenario."""
    produced: dict[str, Any] = {}
    quantile = _quantile(case)
    for name in case.inputs:
        if not name.startswith("label_"):
            continue
        scenario = name.removeprefix("label_")
        labels = as_tensor(case.inputs[name])[None]
        maps = as_tensor(case.inputs[f"cam_{scenario}"])[None]
        salient = as_tensor(case.inputs[f"sal_{scenario}"])[None] > 0
        slots, ids = _slots_of(maps, labels)
        result = complete_labels(slots, ids, salient, quantile=quantile, official_compat=True)
        thresholds = completion_thresholds(slots, quantile)
        count = (maps > 0).sum((2, 3)) * (labels > 0)
        index = (quantile * count.double()).long().masked_fill(labels <= 0, -1)
        above = (slots > thresholds[:, :, None, None]).sum(1)
        produced |= {
            f"label_{scenario}": result.label[0],
            f"sal_{scenario}": _saliency(result)[0],
            f"thr_{scenario}": _by_class(thresholds, ids, labels)[0],
            f"count_{scenario}": count[0],
            f"index_{scenario}": index[0],
            f"contested_{scenario}": int(((above > 1) & ~salient).sum()),
        }
    return produced


def _saliency(labels: Labels) -> Tensor:
    assert labels.saliency is not None
    return labels.saliency


def e_pipeline(case: Case) -> Produced:
    """From maps on the patch grid to labels, in float64: no pixel hangs on a rounding."""
    labels, guide = as_tensor(case.inputs["cls_label"]), _pixels(case.inputs["img"]).double()
    maps, ids = _slots_of(as_tensor(case.inputs["cam_grid"]).double(), labels)
    pairs, quantile = _pairs(labels), _quantile(case)
    upsampled = GETAM._enlarged(maps, guide.shape[-2:])
    after = PAMR()(guide, upsampled)
    refined = normalise_maximum(after)
    salient = as_tensor(case.inputs["sal"]) > 0
    complete = partial(complete_labels, refined, ids, quantile=quantile, official_compat=True)
    result = complete(salient)
    thresholds = completion_thresholds(refined, quantile)
    return {
        "upsampled": _of_pairs(upsampled, ids, pairs),
        "after_pamr": _of_pairs(after, ids, pairs),
        "normalised": _of_pairs(refined, ids, pairs),
        "label": result.label,
        "sal": _saliency(result),
        "label_saliency_all_one": complete(torch.ones_like(salient)).label,
        "threshold": _by_class(thresholds, ids, labels),
        "margin": _margin(refined, salient, quantile),
    }


# ---- cases: losses -------------------------------------------------------------------------------


def f_ce(case: Case) -> Produced:
    """Split cross-entropy with and without pixels of either kind."""
    produced: dict[str, Any] = {}
    for name, array in case.inputs.items():
        if name.startswith("label_"):
            logits = as_tensor(case.inputs["logits"]).requires_grad_()
            loss = split_cross_entropy(logits, as_tensor(array), guard=False)
            scenario = name.removeprefix("label_")
            value, gradient = loss_and_gradients(loss, logits)
            produced |= {f"loss_{scenario}": value, f"grad_{scenario}": gradient}
    return produced


def f_energy(case: Case) -> Produced:
    """Dense energy of a case whose images are pixels in 0..255."""
    boxes = _box_of(case.inputs["crop_mask"])
    images = _pixels(case.inputs["img"])
    return energy_outputs(case, images, boxes, mean=PIXEL_MEAN, std=PIXEL_STD)


def f_saliency(case: Case) -> Produced:
    """Saliency loss as coded and as corrected, and its target."""
    completed = as_tensor(case.inputs["sal_completed"])
    produced: dict[str, Any] = {}
    for name, compat in (("coded", True), ("corrected", False)):
        logits = as_tensor(case.inputs["logits"]).requires_grad_()
        loss = saliency_loss(logits, completed, official_compat=compat)
        value, gradient = loss_and_gradients(loss, logits)
        target = saliency_target(completed, official_compat=compat).to(torch.uint8)
        produced |= {f"target_{name}": target, f"loss_{name}": value, f"grad_{name}": gradient}
    return produced


# ---- cases: training steps -----------------------------------------------------------------------


def _batch(case: Case) -> dict[str, Any]:
    """A training batch; the network input is zero outside the crop mask."""
    mask = as_tensor(case.inputs["crop_mask"])[:, None]
    batch: dict[str, Any] = {
        "image": network_images(case.inputs["img"]) * mask,
        "labels": as_tensor(case.inputs["cls_label"]),
        "box": _box_of(case.inputs["crop_mask"]),
    }
    if "sal" in case.inputs:
        batch["saliency"] = as_tensor(case.inputs["sal"]) > 0
    return batch


def _parameter_names(case: Case) -> list[str]:
    """Official names of parameters, without buffers."""
    names = case.extra["param_names"].tolist()
    return [name for name in names if not _is_buffer(name)]


def _is_buffer(name: str) -> bool:
    return name.endswith((".running_mean", ".running_var", ".num_batches_tracked"))


Gradients = dict[str, Tensor | None]


def _gradients(model: GETAM, loss: Tensor) -> Gradients:
    """Gradients of a loss under the official names; None where there is none at all."""
    names = [getam_official_name(name) for name, _ in model.named_parameters()]
    found = torch.autograd.grad(
        loss, list(model.parameters()), retain_graph=True, allow_unused=True
    )
    return dict(zip(names, found, strict=True))


def _sum(terms: Iterable[Gradients]) -> Gradients:
    total: Gradients = {}
    for term in terms:
        for name, gradient in term.items():
            known = total.get(name)
            both = [one for one in (known, gradient) if one is not None]
            total[name] = torch.stack(both).sum(0) if both else None
    return total


def _norms(case: Case, gradients: Gradients) -> Array:
    """L2 of every parameter's gradient, NaN where there is none."""
    found = [gradients.get(name) for name in _parameter_names(case)]
    return np.array([np.nan if g is None else float(g.double().norm()) for g in found])


def _single(prefix: str, gradients: Gradients) -> dict[str, Tensor]:
    return {f"{prefix}:{name}": g for name, g in gradients.items() if g is not None}


def _after_step(case: Case, model: GETAM, gradients: Gradients, name: str) -> dict[str, Any]:
    """The rate of the file's step, and every parameter after it."""
    optimizer = model.optimizer(model.param_groups())
    rate = model.lr * model.lr_multiplier(case.settings["global_step"])
    optimizer.param_groups[0]["lr"] = rate
    for own, parameter in model.named_parameters():
        parameter.grad = gradients[getam_official_name(own)]
    optimizer.step()
    state = _official_state(case, model)
    values = [state[official].double() for official in _parameter_names(case)]
    return {
        f"lr_{name}": rate,
        f"param_sum_after_{name}": np.array([float(value.sum()) for value in values]),
        f"param_l2_after_{name}": np.array([float(value.norm()) for value in values]),
    }


def _official_state(case: Case, model: GETAM) -> dict[str, Tensor]:
    """Every official parameter and buffer: ours, and those that nothing uses as they were."""
    ours = {getam_official_name(name): value for name, value in model.state_dict().items()}
    return official_weights(case) | {name: value.detach() for name, value in ours.items()}


def g_phase1(case: Case) -> Produced:
    """One step of the first phase."""
    model = build_getam(case).train()
    result = model.compute_losses(_batch(case), case.settings["global_step"])
    gradients = _gradients(model, result.total)
    return {
        "grad_param_names": _parameter_names(case),
        "logits": result.outputs.class_logits,
        "loss": result.total,
        "gradnorm_phase1": _norms(case, gradients),
        **_single("grad_phase1", gradients),
        **_after_step(case, model, gradients, "phase1"),
    }


class StoredDropout(nn.Module):
    """Dropout with a keep mask from the file."""

    def __init__(self, keep: Tensor, rate: float) -> None:
        super().__init__()
        self.factor = keep / (1 - rate)

    def forward(self, x: Tensor) -> Tensor:
        """Entries of x (B, C, h, w) that the mask keeps, enlarged."""
        return x * self.factor


def _second_phase(case: Case, *, with_dropout: bool) -> tuple[GETAM, StepResult]:
    """A step of the second phase on a fresh model, in float64.

    In float32 one in a million ReLU inputs changes its sign with the order of a sum, and that moves
    gradients by 1e-4. The stored float32 numbers are within 1e-6 of float64 ones.
    """
    model = build_getam(case).double().train()
    for index, layer in enumerate(model.decoder.head):
        if isinstance(layer, nn.Dropout):
            keep = as_tensor(case.inputs["dropout_keep"]) if with_dropout else torch.ones(())
            model.decoder.head[index] = StoredDropout(keep, layer.p if with_dropout else 0.0)
    # the stored guide: one pixel on the other side of an integer would be another image
    guide = _pixels(case.inputs["guide"]).double()
    model.guide = lambda images: guide  # type: ignore[method-assign]
    batch = _batch(case)
    batch |= {name: batch[name].double() for name in ("image", "labels")}
    return model, model.compute_losses(batch, case.settings["global_step"])


TERMS = {"ce": "seg_loss", "dense": "reg_loss", "cls": "cls_loss", "sal_coded": "sal_loss"}
TOTALS = {"nosal": (), "corrected": ("sal_corrected",), "coded": ("sal_coded",)}


def g_phase2(case: Case) -> Produced:
    """One step of the second phase, with each form of the saliency term."""
    model, result = _second_phase(case, with_dropout=False)
    assert result.targets is not None
    assert result.outputs.seg_logits is not None
    losses = {term: result.losses[name] for term, name in TERMS.items()}
    losses["sal_corrected"] = saliency_loss(
        result.outputs.seg_logits, _saliency(result.targets.labels)
    )
    values = {term: float(loss.detach()) for term, loss in losses.items()}
    gradients = {term: _gradients(model, loss) for term, loss in losses.items()}
    produced: dict[str, Any] = {
        "grad_param_names": _parameter_names(case),
        "term_names": list(losses),
        "terms": np.array(list(values.values())),
        **_step_outputs(case, model, result),
    }
    for name, saliency in TOTALS.items():
        terms = ("ce", "dense", "cls", *saliency)
        summed = _sum(gradients[term] for term in terms)
        produced[f"total_{name}"] = sum(values[term] for term in terms)
        produced[f"gradnorm_{name}"] = _norms(case, summed)
        produced |= _single(f"grad_{name}", summed)
    for term, found in gradients.items():
        produced[f"gradnorm_total_term_{term}"] = np.sqrt(np.nansum(_norms(case, found) ** 2))
    state = _official_state(case, model)
    names = [n for n in state if n.endswith((".running_mean", ".running_var"))]
    produced["bn_names"] = names
    produced["bn_sum"] = np.array([float(state[n].double().sum()) for n in names])
    produced["bn_l2"] = np.array([float(state[n].double().norm()) for n in names])
    coded = _gradients(model, result.total)
    sgd = model.optimizer(model.param_groups()).defaults
    scale = model.lr_scale(case.settings["global_step"])
    produced["official_loop_sgd"] = np.array([scale, sgd["momentum"], sgd["weight_decay"]])
    # the method's own loop gave the stored total; ours agrees where it is the sum of the terms
    agrees = np.isclose(float(result.total.detach()), produced["total_coded"], rtol=1e-5)
    produced["official_loop_agrees"] = bool(agrees)
    produced |= _after_step(case, model, coded, "coded")
    model, result = _second_phase(case, with_dropout=True)
    produced["dropout_total_coded"] = result.total
    produced["dropout_gradnorm_coded"] = _norms(case, _gradients(model, result.total))
    return produced


def _step_outputs(case: Case, model: GETAM, result: StepResult) -> dict[str, Any]:
    """Maps, labels and logits behind the losses of a step."""
    targets, seg_logits = result.targets, result.outputs.seg_logits
    assert targets is not None
    assert seg_logits is not None
    labels = as_tensor(case.inputs["cls_label"])
    ids, _ = class_slots(labels)
    pairs = _pairs(labels)
    refined = _of_pairs(targets.refined, ids, pairs)
    salient = as_tensor(case.inputs["sal"]) > 0
    return {
        "pairs": pairs,
        "logits": result.outputs.class_logits,
        "seg_stride4": seg_logits[:, :, ::4, ::4],
        "map": _of_pairs(targets.maps, ids, pairs),
        "normalised_stride2": refined[:, ::2, ::2],
        "peak_normalised": refined.amax((1, 2)).double(),
        "label": targets.labels.label,
        "sal": _saliency(targets.labels),
        "label_margin": _margin(targets.refined, salient, model.quantile),
    }


def _margin(refined: Tensor, salient: Tensor, quantile: float | None) -> Array:
    """Smallest distance of any pixel of each image to any decision, (B,)."""
    maps = refined.double()
    background = (1 - maps.amax(1, keepdim=True)) ** BACKGROUND_POWER
    two = torch.cat([background, maps], dim=1).topk(2, dim=1).values
    between = (two[:, 0] - two[:, 1]).masked_fill(~salient, torch.inf).amin((1, 2))
    far = (maps - completion_thresholds(maps, quantile)[:, :, None, None]).abs()
    # the threshold is itself an entry of the map
    far = far.masked_fill((far == 0) | salient[:, None], torch.inf).amin((1, 2, 3))
    return torch.minimum(between, far).numpy()


# ---- cases: optimiser, inference, data -----------------------------------------------------------


def _tiny_getam(**settings: Any) -> GETAM:
    """A small network of its own, for what does not depend on the network."""
    backbone = Backbone(
        name="vit_tiny_patch16_224",
        weights="random",
        overrides={"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 32},
    )
    return GETAM(backbone=backbone, num_classes=2, decoder_channels=16, **settings)


def _schedule(model: GETAM, steps: Iterable[int]) -> Array:
    """Rows of iteration, phase, factor of the phase, learning rate."""
    return np.array(
        [
            (t, 1 + model.in_phase_two(t), model.lr_scale(t), model.lr * model.lr_multiplier(t))
            for t in map(int, steps)
        ]
    )


def _toy_run(case: Case, model: GETAM) -> Array:
    """A toy parameter after every step of the method's optimiser and schedule."""
    toy = nn.Parameter(as_tensor(case.inputs["toy_param"]).clone())
    optimizer = model.optimizer([{"params": [toy], "lr": model.lr}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, model.lr_multiplier)
    history = []
    for gradient in as_tensor(case.inputs["toy_grads"]):
        toy.grad = gradient.clone()
        optimizer.step()
        schedule.step()
        history.append(toy.detach().clone())
    return torch.stack(history).numpy()


def h_optim(case: Case) -> Produced:
    """Schedules, optimiser settings and a toy run."""
    cfg = case.settings
    phases = {"phase_one": cfg["cls_step"], "phase_two_lr_scale": cfg["seg_lr_scale"]}
    voc_steps = (10582 // 4) * 20
    produced: dict[str, Any] = {"voc_T": voc_steps}
    for suffix, decay in (("", False), ("_steplr", True)):
        build = partial(_tiny_getam, lr=cfg["lr"], step_decay=decay, official_compat=True, **phases)
        short, voc = build(max_steps=cfg["short_T"]), build(max_steps=voc_steps)
        produced[f"sched_short{suffix}"] = _schedule(short, range(cfg["short_T"] + 1))
        produced[f"sched_voc{suffix}"] = _schedule(voc, case.inputs["voc_iters"])
    second = sum(voc.in_phase_two(t) for t in range(voc_steps + 1))
    produced["voc_phase_counts"] = np.array([voc_steps + 1 - second, second])
    defaults = voc.optimizer(voc.param_groups()).defaults
    for name in ("momentum", "weight_decay", "dampening", "nesterov"):
        produced[f"sgd_{name}"] = float(defaults[name])
    half = voc.lr_multiplier(voc_steps // 4)
    produced["poly_power"] = float(np.log(half) / np.log(0.75))
    toy = partial(_tiny_getam, max_steps=cfg["toy_T"], lr=cfg["toy_lr"], **phases)
    produced["toy_param_after_step"] = _toy_run(case, toy(official_compat=True))
    produced["control_toy_momentum09_decay"] = _toy_run(case, toy(momentum=0.9))
    return produced


INFERENCE = Protocol(seg_sizes=(256, 320, 480), scale_merge="mean", crf="getam_bgr", refine=None)


def _seg_logits(model: GETAM, images: Tensor) -> Tensor:
    logits = model(images).seg_logits
    assert logits is not None
    return logits


@torch.no_grad()
def i_inference(case: Case) -> Produced:
    """The inference protocol from image to mIoU."""
    model = build_getam(case)
    rgb = np.ascontiguousarray(case.inputs["img_bgr"][..., ::-1])
    images, size = normalise(rgb)[None], rgb.shape[:2]
    assert INFERENCE.seg_sizes is not None
    assert INFERENCE.crf_preset is not None
    produced: dict[str, Any] = {"sizes": np.array(INFERENCE.seg_sizes)}
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
    confusion = ConfusionMatrix(num_classes=len(prob))
    confusion.update(torch.from_numpy(label)[None], as_tensor(case.inputs["gt"]).long()[None])
    matrix = confusion.compute().matrix
    hit = matrix.diagonal().double()
    iou = hit / (matrix.sum(0) + matrix.sum(1) - hit)  # NaN: neither there nor predicted
    other = dense_crf(rgb, prob, replace(preset, bgr=False)).argmax(0)
    return produced | {
        "mean_logits": merged[0],
        "label": merged[0].argmax(0),
        "crf_label": label,
        "crf_prob": posterior,
        "confusion": matrix,
        "miou": float(iou.nanmean()),
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


class OfficialDraws:
    """The two random streams of the official code behind the interface of numpy's Generator."""

    def __init__(self, seed: int) -> None:
        self.floats = np.random.RandomState(seed)
        self.integer_stream = random.Random(seed)
        # a scale that is drawn for every batch and never used
        self.uniform = [self.floats.uniform(0.7, 1.3)]
        self.drawn: list[int] = []

    def random(self) -> float:
        """Decides about a flip."""
        self.uniform.append(self.floats.uniform(0, 1))
        return self.uniform[-1]

    def integers(self, low: int, high: int) -> int:
        """Long side, column, row."""
        self.drawn.append(self.integer_stream.randrange(low, high))
        return self.drawn[-1]


def j_data(case: Case) -> Produced:
    """Training samples of a seed."""
    draws, views = OfficialDraws(case.settings["seed"]), GETAMViews(crop_size=case.settings["crop"])
    samples: list[dict[str, Tensor]] = []
    draws_of = []
    while f"bgr{len(samples)}" in case.inputs:
        number = len(samples)
        rgb = np.ascontiguousarray(case.inputs[f"bgr{number}"][..., ::-1])
        samples.append(views(rgb, draws, case.inputs[f"sal{number}"]))
        draws_of.append(draws.drawn)
        draws.drawn = []
    batch = {name: torch.stack([one[name] for one in samples]) for name in samples[0]}
    guide = _tiny_getam(max_steps=1, official_compat=True).guide(batch["image"])
    inside = inside_boxes(batch["box"], *batch["image"].shape[-2:])
    return {
        "np_uniform": np.array(draws.uniform),
        "py_draws": np.array(draws_of),
        "image": batch["image"],
        "guide": guide.permute(0, 2, 3, 1),
        "crop_mask": inside.to(torch.uint8),
        "sal": batch["saliency"],
    }


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
