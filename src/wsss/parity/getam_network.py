"""GETAM's parity cases of the network and its maps, and what the other cases read with them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsss.maps.refine.pamr import PAMR
from wsss.methods.getam.labels import BACKGROUND_POWER, Labels, completion_thresholds
from wsss.methods.getam.maps import (
    attention_and_slope,
    attention_term,
    class_slots,
    enlarged,
    slot_maps,
)
from wsss.methods.getam.method import GETAM, GETAMSettings
from wsss.methods.getam.official import OFFICIAL, Quirks
from wsss.methods.official import load_official
from wsss.models.backbone import Backbone, Features
from wsss.models.vit import resize_positions
from wsss.parity.cases import Case, Found, Produced
from wsss.parity.inputs import as_tensor, network_images
from wsss.parity.networks import build_backbone, official_weights
from wsss.parity.tolerances import Array

# ---- reading and building ------------------------------------------------------------------------


def pixels(array: Array) -> Tensor:
    """Turn uint8 (..., H, W, 3) into float (..., 3, H, W) in 0..255."""
    return as_tensor(np.moveaxis(array, -1, -3)).float()


def box_of(mask: Array) -> Tensor:
    """Find rows and columns of the rectangle of ones in each mask (B, H, W): (B, 4)."""
    boxes = []
    for one in mask:
        rows, columns = (np.flatnonzero(one.any(axis)) for axis in (1, 0))
        box = [int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1]
        if int(one.sum()) != (box[1] - box[0]) * (box[3] - box[2]):
            raise ValueError("in_crop_mask is not a rectangle")
        boxes.append(box)
    return torch.tensor(boxes)


def build_getam(case: Case, **overrides: Any) -> GETAM:
    """Build the method as training builds it with every quirk, with the file's weights."""
    cfg, state = case.settings, official_weights(case)
    state["cls_head.weight"] = state["cls_head.weight"] * cfg.get("cls_head_scale", 1.0)
    prefix = "pretrained.model."
    encoder = {n.removeprefix(prefix): w for n, w in state.items() if n.startswith(prefix)}
    levels = [f"pretrained.act_postprocess{level}.3.weight" for level in (1, 2, 3, 4)]
    settings: dict[str, Any] = {
        "max_steps": cfg.get("max_step", 100),
        "lr": cfg.get("lr", 0.04),
        "tap_channels": tuple(len(state[name]) for name in levels),
        "decoder_channels": len(state["scratch.layer1_rn.weight"]),
    }
    model = GETAM(
        backbone=build_backbone(encoder, num_heads=cfg["num_heads"]),
        num_classes=len(state["cls_head.weight"]),
        settings=GETAMSettings(**(settings | overrides)),
        quirks=OFFICIAL,
    )
    load_official("getam", model, state, case.name)
    return model.eval()


def tiny_getam(*, quirks: Quirks = OFFICIAL, **settings: Any) -> GETAM:
    """Build a small network of its own, for what does not depend on the network."""
    backbone = Backbone(
        name="vit_tiny_patch16_224",
        weights="random",
        overrides={"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 32},
    )
    chosen = GETAMSettings(decoder_channels=16, **settings)
    return GETAM(backbone=backbone, num_classes=2, settings=chosen, quirks=quirks)


# ---- maps of pairs, labels -----------------------------------------------------------------------


def pairs_of(labels: Tensor) -> Tensor:
    """List (image, class) of every present class, (pairs, 2)."""
    return (labels > 0).nonzero()


def of_pairs(slots: Tensor, ids: Tensor, pairs: Tensor) -> Tensor:
    """Take the rows (pairs, ...) of maps in slots (B, S, ...)."""
    return torch.stack([slots[i, int((ids[i] == c).nonzero()[0])] for i, c in pairs.tolist()])


def completed_saliency(labels: Labels) -> Tensor:
    """Give the saliency after completion, (B, H, W), of labels made with saliency."""
    assert labels.saliency is not None
    return labels.saliency


def margin_of(refined: Tensor, salient: Tensor, quantile: float | None) -> Array:
    """Find the smallest distance of any pixel of each image to any decision, (B,)."""
    maps = refined.double()
    background = (1 - maps.amax(1, keepdim=True)) ** BACKGROUND_POWER
    two = torch.cat([background, maps], dim=1).topk(2, dim=1).values
    between = (two[:, 0] - two[:, 1]).masked_fill(~salient, torch.inf).amin((1, 2))
    far = (maps - completion_thresholds(maps, quantile)[:, :, None, None]).abs()
    # the threshold is itself an entry of the map
    far = far.masked_fill((far == 0) | salient[:, None], torch.inf).amin((1, 2, 3))
    return torch.minimum(between, far).numpy()


# ---- cases: network ------------------------------------------------------------------------------


@torch.no_grad()
def a_encoder(case: Case) -> Produced:
    """Compute positions, taps, readouts and maps of all four levels at every size."""
    model = build_getam(case)
    backbone = model.backbone
    produced = Found()
    results = [f"{stem}{level}" for stem in ("hook", "readout", "layer") for level in model.taps]
    for size in case.suffixes("img", "pos", "cls", *results):  # "_64x96"
        with produced.given():
            images = network_images(case.inputs[f"img{size}"])
            features = model.encode(images, levels=(1, 2, 3, 4)).features
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
    """Compute every output of the network, and the decoder's stations."""
    model, images = build_getam(case), network_images(case.inputs["img"])
    outputs = model(images)
    features = model.encode(images, levels=(1, 2, 3, 4)).features
    maps = [model.level_map(features, level) for level in (1, 2, 3, 4)]
    paths = model.decoder.paths(maps)
    squeezed = model.decoder.squeeze(paths[-1])
    again = model.segment(features, maps[3])
    alone = model.encode(images, levels=(4,))
    return {
        "cls": outputs.class_logits,
        "seg": outputs.seg_logits,
        "cls_only": alone.class_logits,
        "seg_only_equals": torch.equal(again, outputs.seg_logits),
        **{f"path{4 - i}": path for i, path in enumerate(paths[:3])},
        "path1_image0": paths[3][0],
        "se_image0": squeezed[0],
        "low_logits": model.decoder.head(squeezed),
    }


# ---- cases: maps ---------------------------------------------------------------------------------


def _block_gradients(
    model: GETAM, features: Features, logit: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Compute attention and gradient of every block for a logit, each (B, heads, N, N)."""
    parts = list(features.parts.values())
    gradients = torch.autograd.grad(logit, [part.output for part in parts], retain_graph=True)
    tokens = parts[0].keys.shape[2]
    return [
        attention_and_slope(part, gradient, rows=tokens)
        for part, gradient in zip(parts, gradients, strict=True)
    ]


def c_cam(case: Case) -> Produced:
    """Make maps of every pair, block by block, and what becomes of them."""
    model = build_getam(case).train()
    images, labels = network_images(case.inputs["img"]), as_tensor(case.inputs["cls_label"])
    depth, first = model.backbone.depth, model.backbone.num_prefix_tokens
    features = model.backbone(images, taps=(model.taps[4],), parts=range(depth))
    logits = model.classify(model.level_map(features, 4))
    ids, valid = class_slots(labels)
    pairs = pairs_of(labels)
    every = slot_maps(logits, features.parts, ids, valid, num_prefix_tokens=first)
    every = of_pairs(every, ids, pairs)  # (pairs, depth, N)
    maps = model.maps_of_slots(model.encode(images, levels=(4,)), ids, valid).sum(2)
    guide = pixels(case.inputs["img"])
    upsampled = enlarged(maps, guide.shape[-2:])
    grid = of_pairs(maps, ids, pairs)
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
        "upsampled": of_pairs(upsampled, ids, pairs),
        "after_pamr": of_pairs(model.pamr(guide, upsampled), ids, pairs),
        "normalised": of_pairs(model.refine(maps, ids, guide), ids, pairs),
        "absent_classes_zero": not bool(absent.any()),
    }


def _squared_term(model: GETAM, features: Features, logit: Tensor, image: int) -> Tensor:
    """Make a wrong map on purpose: the head mean of ReLU(G)^2 * A over the last blocks, (h, w)."""
    both = _block_gradients(model, features, logit)
    first = model.backbone.num_prefix_tokens
    rows = [
        (both[block][1][image].relu().square() * both[block][0][image]).mean(0)[0, first:]
        for block in model.map_blocks
    ]
    return torch.stack(rows).sum(0).unflatten(0, features.grid)


def d_pamr(case: Case) -> Produced:
    """Refine masks: ``in_masks_x`` gives ``refined_x``."""
    pamr = PAMR(dilations=case.settings["dilations"], num_iter=case.settings["num_iter"])
    images = pixels(case.inputs["img"])
    produced = Found()
    for suffix in case.suffixes("masks", "refined"):
        with produced.given():
            produced[f"refined{suffix}"] = pamr(images, as_tensor(case.inputs[f"masks{suffix}"]))
    return produced
