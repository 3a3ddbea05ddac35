"""GETAM's parity cases: the product's functions on the official run's inputs.

Every function takes its sizes and settings from the file. The networks load their weights through
the converter for official checkpoints.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wsss.backbone import Backbone, Features, resize_positions
from wsss.checkpoints import GETAM_UNUSED, getam_name, getam_official_name, load_official
from wsss.methods.getam import (
    GETAM,
    Labels,
    StepResult,
    attention_and_slope,
    attention_term,
    class_slots,
    complete_labels,
    completion_thresholds,
    normalise_maps,
    saliency_loss,
    slot_maps,
    split_cross_entropy,
)
from wsss.parity import GRADIENT, LOSS, Array, Case, Kind, Produced, Tolerance
from wsss.parity.toco import (
    _loss_and_gradients,
    _network_images,
    _tensor,
    energy_outputs,
    official_weights,
)
from wsss.refine.pamr import PAMR

PIXEL_MEAN, PIXEL_STD = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # of images in 0..255


# ---- reading -------------------------------------------------------------------------------------


def _pixels(array: Array) -> Tensor:
    """uint8 (..., H, W, 3) to float (..., 3, H, W) in 0..255."""
    return _tensor(np.moveaxis(array, -1, -3)).float()


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
        features = model._encode(_network_images(array), levels=(1, 2, 3, 4))
        produced[f"pos{size}"] = resize_positions(
            backbone.vit.pos_embed,
            features.grid,
            backbone.num_prefix_tokens,
            backbone.position_mode,
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
    model, images = build_getam(case), _network_images(case.inputs["img"])
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
    images, labels = _network_images(case.inputs["img"]), _tensor(case.inputs["cls_label"])
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
        "normalised": _of_pairs(model.refine(maps, guide), ids, pairs),
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
        name.replace("masks", "refined"): pamr(images, _tensor(masks))
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
        labels = _tensor(case.inputs[name])[None]
        maps = _tensor(case.inputs[f"cam_{scenario}"])[None]
        salient = _tensor(case.inputs[f"sal_{scenario}"])[None] > 0
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
    """From maps on the patch grid to labels."""
    labels, guide = _tensor(case.inputs["cls_label"]), _pixels(case.inputs["img"])
    maps, ids = _slots_of(_tensor(case.inputs["cam_grid"]), labels)
    pairs, quantile = _pairs(labels), _quantile(case)
    upsampled = GETAM._enlarged(maps, guide.shape[-2:])
    after = PAMR()(guide, upsampled)
    refined = normalise_maps(after)
    salient = _tensor(case.inputs["sal"]) > 0
    complete = partial(complete_labels, refined, ids, quantile=quantile, official_compat=True)
    result = complete(salient)
    thresholds = completion_thresholds(refined, quantile)
    return {
        "upsampled": _of_pairs(upsampled, ids, pairs),
        "after_pamr": _of_pairs(after, ids, pairs),
        "normalised": _of_pairs(refined, ids, pairs),
        "label": result.label,
        "sal": result.saliency,
        "label_saliency_all_one": complete(torch.ones_like(salient)).label,
        "threshold": _by_class(thresholds, ids, labels),
    }


_NONE: dict[str, Tolerance] = {}
KINDS = {
    "a_encoder": Kind(a_encoder, _NONE),
    "b_network": Kind(b_network, _NONE),
    "c_cam": Kind(c_cam, _NONE),
    "d_pamr": Kind(d_pamr, _NONE),
    "e_complete": Kind(e_complete, _NONE),
    "e_pipeline": Kind(e_pipeline, _NONE),
}
