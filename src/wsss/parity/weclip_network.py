"""WeCLIP's parity cases of the network, and the network that other cases use."""

import json
import re
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD
from wsss.methods.official import load_official
from wsss.methods.weclip.decoder import affinity
from wsss.methods.weclip.gradcam import LastBlock, Slots, class_slots, grad_cam
from wsss.methods.weclip.method import WeCLIP, WeCLIPSettings
from wsss.methods.weclip.official import OFFICIAL
from wsss.models.backbone import Backbone
from wsss.parity.cases import Case, Found, Produced
from wsss.parity.inputs import as_tensor
from wsss.parity.networks import parameter_names
from wsss.parity.tolerances import Array

GAINS = {"in_proj_weight": 2.0, "out_proj.weight": 0.4, "c_proj.weight": 0.4}
GAINS["linear_fuse.weight"] = 0.08
TABLES = ("class_embedding", "positional_embedding", "positional_embedding_new")


# ---- building ------------------------------------------------------------------------------------


def official_weights(case: Case) -> dict[str, Tensor]:
    """Make the weights under the official names, by the rule in WeCLIP's golden README."""
    shapes = json.loads(str(case.extra["param_shapes"]))
    state = {}
    for name, shape in zip(parameter_names(case), shapes, strict=True):
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        z: Array = np.asarray(generator.standard_normal(shape), dtype=np.float32)
        if name.endswith("logit_scale"):
            z = np.log(np.full_like(z, 20))
        elif name.endswith(TABLES):
            z = 0.5 * z
        elif len(shape) >= 2:
            gain = next((gain for tail, gain in GAINS.items() if name.endswith(tail)), 1.0)
            z = gain * z / np.sqrt(np.prod(shape[1:]))
        else:
            z = 0.1 * z if name.endswith("bias") else 1 + 0.1 * z
        state[name] = torch.from_numpy(np.asarray(z, dtype=np.float32))
    return state


def build_weclip(case: Case, **settings: Any) -> WeCLIP:
    """Build the method as training does with ``official_compat=true``, with the file's weights."""
    cfg, state = case.settings, official_weights(case)
    patch = state["encoder.visual.conv1.weight"].shape[-1]
    overrides = {
        "embed_dim": cfg["width"],
        "depth": cfg["depth"],
        "num_heads": cfg["heads"],
        "num_classes": cfg["text_dim"],
        "img_size": cfg["image_size"],
        "patch_size": patch,
    }
    name = "vit_base_patch16_clip_quickgelu_224"
    backbone = Backbone(name=name, weights="random", overrides=overrides, frozen=True)
    chosen: dict[str, Any] = {
        "max_steps": cfg.get("max_iter", 30_000),
        "text": "random",
        "decoder_channels": cfg["embedding_dim"],
        "decoder_layers": cfg["decoder_layers"],
        "decoder_heads": cfg["decoder_heads"],
        "box_threshold": cfg.get("box_threshold", 0.4),
        "static_layers": min(cfg.get("last_static", 8), cfg["depth"]),
        "rfm_layers": min(cfg.get("last_rfm", 6), cfg["depth"]),
    }
    model = WeCLIP(
        backbone=backbone,
        num_classes=cfg["num_classes"] - 1,
        settings=WeCLIPSettings(**(chosen | settings)),
        quirks=OFFICIAL,
    )
    load_official("weclip", model, state, case.name)
    if "text_fg" in case.inputs:
        model.texts.foreground = as_tensor(case.inputs["text_fg"])
        model.texts.background = as_tensor(case.inputs["text_bg"])
    return model.eval()


def tiny_weclip(**settings: Any) -> WeCLIP:
    """Build a small network of its own, for what does not depend on the network."""
    overrides = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 8, "img_size": 32}
    name = "vit_base_patch16_clip_quickgelu_224"
    backbone = Backbone(name=name, weights="random", overrides=overrides, frozen=True)
    small = {"decoder_channels": 8, "decoder_layers": 1, "static_layers": 2, "rfm_layers": 2}
    chosen = WeCLIPSettings(text="random", **{**small, **settings})
    return WeCLIP(backbone=backbone, num_classes=2, settings=chosen, quirks=OFFICIAL)


def network_images(array: Array) -> Tensor:
    """Turn uint8 (..., H, W, 3) into network input (..., 3, H, W), computed in float64."""
    mean, std = (255 * np.array(values) for values in (IMAGENET_MEAN, IMAGENET_STD))
    normal = ((array.astype(np.float64) - mean) / std).astype(np.float32)
    return as_tensor(np.moveaxis(normal, -1, -3))


class GivenDrop(nn.Module):
    """Multiply channels by given factors (B, d) in place of drawing which are dropped."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, fused: Tensor) -> Tensor:
        """Multiply (B, d, h, w)."""
        return fused * self.factors[..., None, None]


def valid_rows(maps: Tensor, slots: Slots) -> Tensor:
    """Give what belongs to valid slots of (B, S, ...), image-major, classes ascending: (P, ...)."""
    return maps[slots[1]]


# ---- cases ---------------------------------------------------------------------------------------


@torch.no_grad()
def a_encoder(case: Case) -> Produced:
    """Compute tokens and mean attention of every block at every size."""
    model, produced = build_weclip(case), Found()
    named = [re.sub(r"^(tokens|attn)_block\d+", "", name[4:]) for name in case.outputs]
    for size in dict.fromkeys([*case.suffixes("img"), *named]):
        with produced.given():
            images = network_images(case.inputs[f"img{size}"])
            encoded = model.encode(images, layers=model.backbone.depth)
            assert encoded.last is not None
            every = [*encoded.attentions, encoded.last.attention.mean(1)]
            for kind, values in (("tokens", encoded.tokens), ("attn", every)):
                for index, value in enumerate(values):
                    produced[f"{kind}_block{index}{size}"] = value
    return produced


@torch.no_grad()
def b_gradcam(case: Case) -> Produced:
    """Compute probabilities, channel weights and CAMs from given tokens."""
    model = build_weclip(case)
    vit = model.backbone.vit
    tokens, labels = as_tensor(case.inputs["tokens"]), as_tensor(case.inputs["image_labels"])
    prefix = model.backbone.num_prefix_tokens
    last = LastBlock.run(vit.blocks[-1], vit.norm, model.backbone.projection, tokens, prefix)
    slots = class_slots(labels)
    own = model.quirks.vanishing_gradient
    found = grad_cam(last, model.texts(), slots, of_probability=own)
    probability, count = found.logits.softmax(1), slots[0].shape[1]
    every = torch.full((len(labels), labels.shape[1]), torch.nan)
    image, slot = slots[1].nonzero(as_tuple=True)
    classes = slots[0][image, slot]
    every[image, classes] = probability[image, slot]
    return {
        "prob": torch.cat([every, probability[:, count:]], dim=1),
        "attn_last": last.attention.mean(1),
        "map_index": torch.stack([image, classes], dim=1),
        "channel_weights": valid_rows(found.weights, slots),
        "cam": valid_rows(found.cam, slots).unflatten(1, case.settings["grid"]),
    }


@torch.no_grad()
def f_decoder(case: Case) -> Produced:
    """Compute fused features, logits and affinity, with each given dropout."""
    model, produced = build_weclip(case), Found()
    maps = as_tensor(case.inputs["feats"])  # (taps, B, D, h, w)
    taps, grid = list(maps.flatten(3).transpose(2, 3)), (maps.shape[3], maps.shape[4])
    named = [re.sub(r"^(fused|seg|affinity)", "", name[4:]) for name in case.outputs]
    for suffix in dict.fromkeys(["", *named]):  # "", "_drop"
        with produced.given():
            if suffix:
                factors = as_tensor(case.inputs[suffix.removeprefix("_")])
                model.decoder.dropout = GivenDrop(factors)
            fused = model.decoder.fused(taps, grid)
            produced[f"fused{suffix}"] = fused
            produced[f"seg{suffix}"] = model.decoder.segment(fused)
            produced[f"affinity{suffix}"] = affinity(fused)
    return produced
