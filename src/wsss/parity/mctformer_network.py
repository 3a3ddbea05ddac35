"""MCTformer+'s parity cases of the network and its maps, and the network that other cases use."""

import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wsss.methods.mctformer import MCTformerPlus, MCTformerPlusSettings
from wsss.methods.mctformer.network import Attention, ranking_pooling
from wsss.methods.mctformer.official import OFFICIAL, parted
from wsss.methods.official import load_official
from wsss.models.vit import resize_positions
from wsss.parity.cases import Case, Found, Produced
from wsss.parity.inputs import as_tensor, network_images
from wsss.parity.networks import build_backbone

HEADS = 3  # of a block, where a file does not say

# ---- building ------------------------------------------------------------------------------------


def rule_weights(names: Iterable[str], shapes: Iterable[Sequence[int]]) -> dict[str, Tensor]:
    """Make the weights under the official names, by the rule in the golden README."""
    state = {}
    for name, shape in zip(names, shapes, strict=True):
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        z = np.asarray(generator.standard_normal(shape), dtype=np.float32)
        if name.startswith(("cls_token", "pos_embed")):
            z = np.float32(0.2) * z
        elif z.ndim >= 2:
            # a multiplication: division would change the last bit
            z = z * np.float32(1 / np.sqrt(np.prod(z.shape[1:])))
        else:
            z = np.float32(0.1) * z if name.endswith(".bias") else 1 + np.float32(0.1) * z
        state[name] = torch.from_numpy(np.asarray(z, dtype=np.float32))
    return state


def official_weights(case: Case) -> dict[str, Tensor]:
    """Make all weights of a file's network."""
    shapes = json.loads(str(case.extra["param_shapes"]))
    return rule_weights(case.extra["param_names"].tolist(), shapes)


def heads_of(case: Case) -> int:
    """Give the heads of a block, which no weight's shape says."""
    cfg = case.settings
    return int(cfg.get("num_heads", cfg.get("heads", HEADS)))


def build_mctformer(case: Case, **settings: Any) -> MCTformerPlus:
    """Build the method as training builds it with every quirk, with the file's weights."""
    state, cfg = official_weights(case), case.settings
    _, classes, width = state["cls_token"].shape
    patch = state["patch_embed.proj.weight"].shape[-1]
    # the single-class encoder that it is made from, with positions of the training grid already
    grid = state["pos_embed_pat"].shape[1]
    encoder = state | {
        "cls_token": torch.empty(1, 1, width),
        "pos_embed": torch.empty(1, 1 + grid, width),
    }
    chosen: dict[str, Any] = {
        "max_steps": 1,
        "input_size": cfg.get("input_size", round(grid**0.5) * patch),
        "pooling_decay": cfg.get("decay", 0.996),
        "drop_path": cfg.get("drop_path", 0.0),
        "num_cct": cfg.get("num_cct", 12),
        "cct_weight": cfg.get("loss_weight", 1.0),
    }
    model = MCTformerPlus(
        backbone=build_backbone(encoder, num_heads=heads_of(case)),
        num_classes=classes,
        settings=MCTformerPlusSettings(**(chosen | settings)),
        quirks=OFFICIAL,
    )
    load_official("mctformer", model, state, case.name)
    return model.eval()


def official_values(model: MCTformerPlus) -> dict[str, Tensor]:
    """Give our parameters' values under their official names."""
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return parted(named, model.num_classes)


def official_gradients(
    model: MCTformerPlus, gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """Give gradients under official names; those that do not exist are left out."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs = zip(parameters, gradients, strict=True)
    return parted({names[id(p)]: g for p, g in pairs if g is not None}, model.num_classes)


# ---- network -------------------------------------------------------------------------------------


@torch.no_grad()
def a_stem(case: Case) -> Produced:
    """Compute positions and input of block 0 at every size."""
    model, produced = build_mctformer(case), Found()
    for size in case.suffixes("img", "tokens", "patch_positions"):  # "_64x96"
        with produced.given():
            images = network_images(case.inputs[f"img{size}"])
            tokens, grid = model.backbone.embed(images)
            positions = resize_positions(model.backbone.vit.pos_embed, grid, model.num_classes)
            produced[f"tokens{size}"] = tokens
            produced[f"patch_positions{size}"] = positions[:, model.num_classes :]
    return produced


@torch.no_grad()
def b_network(case: Case) -> Produced:
    """Compute both logits, class tokens after every block, and both feature maps."""
    model = build_mctformer(case).train(case.settings.get("train_mode", False))
    encoded = model.encode(network_images(case.inputs["img"]))
    patch_map = model.patch_map(encoded.features)
    return {
        "cls_logits": encoded.class_logits,
        "patch_logits": model.pooled(patch_map),
        "class_tokens": encoded.class_tokens,
        "patch_map": patch_map,
        "patch_tokens_map": encoded.features,
    }


def e_pool(case: Case) -> Produced:
    """Pool every map by every decay, with the gradient in the map."""
    produced = Found()
    names = [*case.inputs, *(name.partition("_")[2] for name in case.outputs)]
    found = (re.match(r"(?:map|upstream|logits|grad)_(\d+)", name) for name in names)
    for index in dict.fromkeys(match[1] for match in found if match):
        for decay in case.settings["decay"]:
            with produced.given():
                maps = as_tensor(case.inputs[f"map_{index}"]).requires_grad_()
                logits = produced[f"logits_{index}_decay{decay}"] = ranking_pooling(maps, decay)
                upstream = as_tensor(case.inputs[f"upstream_{index}"])
                (gradient,) = torch.autograd.grad((logits * upstream).sum(), maps)
                produced[f"grad_{index}_decay{decay}"] = gradient
    return produced


# ---- maps ----------------------------------------------------------------------------------------


@torch.no_grad()
def c_maps(case: Case) -> Produced:
    """Compute every map of one pass, for all classes."""
    model, images = build_mctformer(case), network_images(case.inputs["img"])
    every, settings = torch.arange(model.num_classes), model.settings
    produced = Found()

    def one(**changes: Any) -> Tensor:
        model.settings = replace(settings, **changes)
        return model.raw_maps(images, every)

    for layers in case.settings["layers"]:
        for affinity, stem in ((False, ""), (True, "refined_")):
            own = {"cam_layers": layers, "affinity": affinity}
            produced[f"{stem}mct_last{layers}"] = one(map="mct", **own)
            produced[f"{stem or 'fused_'}last{layers}"] = one(map="fused", **own)
    produced["patchcam"] = one(map="patchcam", affinity=False)
    produced["refined_patchcam"] = one(map="patchcam")
    attention = Attention(every, 1, with_affinity=True)
    model.encode(images, attention)
    produced |= {"affinity": attention.affinity, "logits": model(images).class_logits}
    return produced


@torch.no_grad()
def d_export(case: Case) -> Produced:
    """Export one image's maps; give what every pass contributes, too."""
    cfg = case.settings
    model = build_mctformer(case, scales=cfg["scales"], cam_layers=cfg["last_layers"])
    picture = case.inputs["img"]
    classes = as_tensor(case.inputs["label"]).nonzero()[:, 0]
    passes: list[Tensor] = []
    sizes: list[torch.Size] = []
    raw_maps = model.raw_maps

    def watched(images: Tensor, classes: Tensor) -> Tensor:
        found = raw_maps(images, classes)
        passes.extend(found)
        sizes.extend([images.shape[-2:]] * len(images))
        return found

    model.raw_maps = watched  # type: ignore[method-assign]
    exported = model.export(picture[None], classes, like=model.patch_head.weight)
    return {
        "sizes": np.array(sizes),
        "classes": classes,
        "maps": exported[0],
        **{f"raw_pass{index}": one for index, one in enumerate(passes)},
    }
