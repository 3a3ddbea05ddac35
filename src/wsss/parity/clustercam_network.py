"""ClusterCAM's parity cases of the network and its CAM, and the network that other cases use."""

import json
import zlib
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wsss.methods.clustercam.method import ClusterCAM, ClusterCAMSettings
from wsss.methods.clustercam.network import (
    BlockOutput,
    Encoded,
    assign,
    initial_centres,
    run_block,
)
from wsss.methods.clustercam.official import OFFICIAL, official_name
from wsss.methods.official import load_official
from wsss.models.backbone import Backbone
from wsss.models.vit import resize_positions
from wsss.parity.cases import Case, Found, Produced
from wsss.parity.inputs import as_tensor, network_images

EPOCHS = 80  # of the networks built here; a step is an epoch


# ---- building ------------------------------------------------------------------------------------


def official_weights(case: Case) -> dict[str, Tensor]:
    """Make the weights under the official names, by the rule in the golden README."""
    shapes = json.loads(str(case.extra["param_shapes"]))
    state = {}
    for name in case.extra["param_names"].tolist():
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        z = generator.standard_normal(shapes[name]).astype(np.float32)
        if name.endswith("mix_param"):
            z = np.float32(0.5) + np.float32(0.6) * z
        elif name in ("cls_token", "pos_embed"):
            z = np.float32(0.2) * z
        elif z.ndim >= 2:
            # a multiplication: division would change the last bit
            z = z * np.float32(1 / np.sqrt(np.prod(z.shape[1:])))
        else:
            z = np.float32(0.1) * z if name.endswith(".bias") else 1 + np.float32(0.1) * z
        state[name] = torch.from_numpy(np.asarray(z, dtype=np.float32))
    return state


def build_backbone(
    *, dim: int, depth: int, heads: int, hidden: int, patch: int, side: int
) -> Backbone:
    """Build a backbone of the given shape with random weights."""
    overrides = {
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": hidden / dim,
        "patch_size": patch,
        "img_size": side * patch,
    }
    return Backbone(name="vit_tiny_patch16_224", weights="random", overrides=overrides)


def build_clustercam(case: Case, **settings: Any) -> ClusterCAM:
    """Build the method as training builds it with every quirk, with the file's weights."""
    state, cfg = official_weights(case), case.settings
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    classes = state["cls_token"].shape[1]
    backbone = build_backbone(
        dim=dim,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        heads=cfg["heads"],
        hidden=len(state["blocks.0.mlp.fc1.bias"]),
        patch=patch,
        side=round((state["pos_embed"].shape[1] - classes) ** 0.5),
    )
    background, margin = cfg.get("bg", 0.4), cfg.get("delta", 0.1)
    chosen = ClusterCAMSettings(
        max_steps=EPOCHS,
        epochs=EPOCHS,
        drop_path=cfg.get("drop_path", 0.0),
        decoder_channels=len(state["decoder.conv7.weight"]),
        scales=cfg.get("scales", (1.0, 0.75, 1.25)),
        high_threshold=background + margin,
        low_threshold=background - margin,
        seg_weight=cfg.get("seg_weight", 0.1),
        **settings,
    )
    model = ClusterCAM(backbone=backbone, num_classes=classes, settings=chosen, quirks=OFFICIAL)
    load_official("clustercam", model, state, case.name)
    return model.eval()


def both_precisions(model: ClusterCAM) -> Iterator[tuple[str, ClusterCAM, torch.dtype]]:
    """Give the model as it is and in float64, each with the suffix of its arrays."""
    yield "", model, torch.float32
    yield "_fp64", deepcopy(model).double(), torch.float64


def official_parameters(case: Case, model: ClusterCAM) -> list[nn.Parameter]:
    """Give our parameters in the order of the file's names."""
    ours = {official_name(name): p for name, p in model.named_parameters()}
    return [ours[name] for name in case.inputs["grad_names"].tolist()]


# ---- cases ---------------------------------------------------------------------------------------


@torch.no_grad()
def stem(case: Case) -> Produced:
    """Compute positions and input of block 0 at every size."""
    model, produced = build_clustercam(case), Found()
    for size in case.suffixes("image", "tokens", "pos"):
        with produced.given():
            images = network_images(case.inputs[f"image{size}"])
            tokens, grid = model.backbone.embed(images)
            produced[f"tokens{size}"] = tokens
            produced[f"pos{size}"] = resize_positions(
                model.backbone.vit.pos_embed,
                grid,
                model.num_classes,
                offset=model.backbone.position_offset,
                square=images.shape[-1] == images.shape[-2],
            )
    return produced


@torch.no_grad()
def cluster_block(case: Case) -> Produced:
    """Compute everything inside one block."""
    model = build_clustercam(case)
    tokens, index = as_tensor(case.inputs["X"]), case.settings.get("block", 0)
    grid = tuple(case.settings["grid"])
    produced: dict[str, Any] = {}
    for suffix, network, kind in both_precisions(model):
        output = _block(network, index, tokens.to(kind), grid)
        produced |= {f"{name}{suffix}": value for name, value in _block_outputs(output).items()}
    branch: Any = model.branches[index]
    space = branch.space(tokens[:, model.num_classes :])
    centres = produced["S0"] = initial_centres(space, grid)
    steps = []
    for _ in range(3):
        steps.append(assign(space, centres))
        centres = steps[-1][1]
    last = steps[-1][0]
    entropy = -(last * last.clamp_min(1e-38).log()).sum(-1).mean() / np.log(last.shape[-1])
    affinity = tokens.new_zeros(len(tokens), *[grid[0] * grid[1]] * 2)
    _block(model, index, tokens, grid, affinity)
    return produced | {
        "Z": space,
        "A": torch.stack([assignment for assignment, _ in steps]),
        "S": torch.stack([moved for _, moved in steps]),
        "X1": tokens + produced["a"] + produced["b"],
        "Ppp_mean": affinity,
        "A3_entropy": float(entropy),
    }


def _block(
    model: ClusterCAM,
    index: int,
    tokens: Tensor,
    grid: tuple[int, int],
    affinity: Tensor | None = None,
) -> BlockOutput:
    block, branch = model.backbone.vit.blocks[index], model.branches[index]
    return run_block(block, branch, tokens, grid, affinity)


def _block_outputs(output: BlockOutput) -> dict[str, Tensor]:
    return {
        "W_class_cluster": output.clustered.class_attention,
        "R": output.class_rows,
        "G": output.clustered.class_map,
        "c": output.class_map,
        "a": output.plain,
        "b": output.clustered.update,
        "out": output.tokens,
    }


@torch.no_grad()
def network(case: Case) -> Produced:
    """Compute the three logits, the features and the tokens after every block."""
    model, images = build_clustercam(case), network_images(case.inputs["image"])
    produced: dict[str, Any] = {}
    for suffix, network, kind in both_precisions(model):
        blocks: list[BlockOutput] = []
        encoded = network.encode(images.to(kind), keep=blocks)
        produced |= {
            f"cls_logits{suffix}": encoded.class_logits,
            f"pat_logits{suffix}": network.patch_logits(encoded.activation),
            f"seg_logits{suffix}": network.decoder(encoded.activation),
            f"F{suffix}": encoded.activation,
        }
        for image in range(len(images)):
            tokens = torch.stack([block.tokens[image] for block in blocks])
            produced[f"tokens_image{image}{suffix}"] = tokens
    return produced


@torch.no_grad()
def cam(case: Case) -> Produced:
    """Compute CAMs without and with refinement."""
    model, images = build_clustercam(case), network_images(case.inputs["image"])
    every = torch.arange(model.num_classes)
    produced: dict[str, Any] = {}
    for suffix, network, kind in both_precisions(model):
        inputs = images.to(kind)
        encoded: Encoded = network.encode(inputs, with_affinity=True)
        assert encoded.affinity is not None
        produced |= {
            f"E{suffix}": network.evidence(encoded.activation, every),
            f"omega_rowsum{suffix}": encoded.affinity.sum(-1),
            f"cam_raw{suffix}": network.raw_cam(inputs, every, refine=False),
            f"cam_refined{suffix}": network.raw_cam(inputs, every),
        }
    return produced
