"""Networks of a golden file: weights by the golden README's rule, and a backbone of their shape."""

import json
import zlib
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from wsss.models.backbone import Backbone
from wsss.parity.cases import Case
from wsss.parity.tolerances import Array


def parameter_names(case: Case) -> list[str]:
    """List the official parameters of a file: an array of text, or JSON."""
    names = case.extra["param_names"]
    return list(json.loads(str(names)) if names.ndim == 0 else names.tolist())


def official_weights(case: Case) -> dict[str, Tensor]:
    """Make the weights under the official names, by the rule in the golden README.

    Args:
        case: gives ``param_names`` and ``param_shapes``.
    """
    shapes = json.loads(str(case.extra["param_shapes"]))
    state = {}
    for name, shape in zip(parameter_names(case), shapes, strict=True):
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


def build_backbone(state: dict[str, Tensor], *, num_heads: int, norm_eps: float = 1e-6) -> Backbone:
    """Build a ViT of the weights' shape, still with random weights.

    Args:
        state: the encoder's weights under timm's names.
        num_heads: heads of a block; no weight's shape tells them.
        norm_eps: of every layer norm.
    """
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    distilled = "dist_token" in state
    prefix = state["cls_token"].shape[1] + distilled
    side = round((state["pos_embed"].shape[1] - prefix) ** 0.5)
    overrides = {
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "num_heads": num_heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "patch_size": patch,
        "img_size": side * patch,
        "norm_layer": partial(nn.LayerNorm, eps=norm_eps),
    }
    name = "deit_tiny_distilled_patch16_224" if distilled else "vit_tiny_patch16_224"
    return Backbone(name=name, weights="random", overrides=overrides)
