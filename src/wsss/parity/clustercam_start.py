"""ClusterCAM's parity cases of the schedule and of the start: rates, decay, first values."""

import json
import re
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsss.methods.clustercam.method import ClusterCAM, ClusterCAMSettings
from wsss.methods.clustercam.official import (
    MIXING,
    OFFICIAL,
    official_draws,
    official_name,
    official_start,
)
from wsss.models.weights import load_encoder
from wsss.parity.cases import Case, Found, Produced
from wsss.parity.clustercam_network import build_backbone
from wsss.parity.tolerances import Array
from wsss.runs.compose import compose_run
from wsss.runs.folder import build_method, build_module

DEPTH = 12  # of DeiT, where a file does not name its blocks
EXPERIMENTS = {"voc": "voc_deits", "coco": "coco"}  # whose schedules the files ask for


# ---- schedule ------------------------------------------------------------------------------------


def schedule(case: Case) -> Produced:
    """Give rates and phases of both experiments, decay of every parameter, sizes of networks."""
    produced = Found()
    for name in EXPERIMENTS:
        if not any(key.endswith(f"_{name}") for key in case.outputs):
            continue
        settings = _experiment(name)["method"]
        model = _tiny(case, settings, official_compat=True)
        steps, lr = model.settings.max_steps, model.settings.lr
        starts = range(0, steps, steps // model.settings.epochs)
        produced[f"lr_{name}"] = np.array([lr * model.lr_multiplier(s) for s in starts])
        produced[f"skip_seg_{name}"] = np.array([not model.learns_segmentation(s) for s in starts])
        produced[f"base_lr_{name}"] = lr
    settings = _experiment("voc")["method"]
    for name, compat in (("weight_decay", True), ("weight_decay_unwrapped", False)):
        model = _tiny(case, settings, official_compat=compat)
        with produced.given():
            produced[name] = _decays(case, model)
    optimizer = model.optimizer(model.param_groups())
    stated = {key: optimizer.defaults[key] for key in ("betas", "eps", "amsgrad")}
    produced["optimizer"] = [json.dumps({"name": type(optimizer).__name__, **stated})]
    for name in case.outputs:
        if match := re.fullmatch(r"deit_small_K(\d+)_params", name):
            whole = build_module(_experiment("voc"), int(match[1]))
            produced[name] = sum(p.numel() for p in whole.parameters())
    return produced


def _experiment(name: str) -> dict[str, Any]:
    overrides = ["data.root=unset", "backbone=deit_small", "backbone.weights=random"]
    return compose_run([f"+experiments=clustercam/{EXPERIMENTS[name]}", *overrides])


def _tiny(case: Case, settings: dict[str, Any], *, official_compat: bool) -> ClusterCAM:
    """Put an experiment's settings on a small encoder with the file's number of blocks."""
    names = case.inputs["wd_param_names"].tolist() if "wd_param_names" in case.inputs else []
    depth = len({n.split(".")[1] for n in names if "blocks." in n}) or DEPTH
    backbone = build_backbone(dim=48, depth=depth, heads=6, hidden=192, patch=16, side=14)
    own = {"official_compat": official_compat, "decoder_channels": 16}
    model = build_method(settings | own, backbone, 4)
    assert isinstance(model, ClusterCAM)
    return model


def _decays(case: Case, model: ClusterCAM) -> Array:
    decay = {id(p): g["weight_decay"] for g in model.param_groups() for p in g["params"]}
    ours = {official_name(n): decay[id(p)] for n, p in model.named_parameters()}
    return np.array([ours[name] for name in case.inputs["wd_param_names"].tolist()])


# ---- start ---------------------------------------------------------------------------------------


def init_map(case: Case) -> Produced:
    """Say where every parameter comes from when a DeiT checkpoint is loaded, with seed 0."""
    cfg = case.settings
    sizes = {"dim": cfg["embed"], "depth": cfg["depth"], "heads": cfg["heads"]}
    backbone = build_backbone(**sizes, hidden=4 * cfg["embed"], patch=16, side=14)
    stand_in = {name: torch.randn_like(value) for name, value in backbone.vit.state_dict().items()}
    stand_in |= {"head.weight": torch.randn(1000, cfg["embed"]), "head.bias": torch.randn(1000)}
    load_encoder(backbone.vit, stand_in, case.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ClusterCAM(
            backbone=backbone,
            num_classes=cfg["classes"],
            settings=ClusterCAMSettings(max_steps=1),
            quirks=OFFICIAL,
        )
    values = {official_name(n): p.detach() for n, p in model.named_parameters()}
    sources = {name: _source(one, stand_in, cfg["classes"]) for name, one in values.items()}
    used = {source.partition(" ")[0] for source in sources.values()}
    produced = Found()
    produced["unused_deit"] = [name for name in stand_in if name not in used]
    with produced.given():
        produced |= _in_order(case.inputs["names"].tolist(), values, sources)
    return produced


def _in_order(
    listed: list[str], values: Mapping[str, Tensor], sources: Mapping[str, str]
) -> dict[str, Any]:
    """Give the parameters' sources in the file's order, and facts of those that are random."""
    names = [name for name in listed if name in values]
    names += sorted(values.keys() - set(names))
    random = [name for name in names if sources[name] == "random"]
    flat = [values[name].double() for name in random]
    return {
        "source": [sources[name] for name in names],
        "random_names": random,
        "random_mean_std_max": np.array(
            [
                [
                    float(v.mean()),
                    float(v.std(correction=min(1, v.numel() - 1))),
                    float(v.abs().max()),
                ]
                for v in flat
            ]
        ),
    }


def _source(value: Tensor, stand_in: Mapping[str, Tensor], classes: int) -> str:
    """Name the DeiT entry that a parameter starts from, in the file's words."""
    token, positions = stand_in["cls_token"], stand_in["pos_embed"]
    if torch.equal(value, token.expand(1, classes, -1)):
        return "cls_token (replicated K times)"
    row = positions[:, :1].expand(1, classes, -1)
    if torch.equal(value, torch.cat([row, positions[:, 1:]], dim=1)):
        return "pos_embed (class row replicated K times, grid kept)"
    return next((name for name, other in stand_in.items() if torch.equal(value, other)), "random")


def rng_mix(case: Case) -> Produced:
    """Give mixing scalars of seed 0, and the draws that lead to them."""
    produced = Found()
    for build in _builds(case):
        key = f"sequence{build}"
        if key not in case.outputs:  # its sizes say which network it is
            produced.absent.append(key)
            continue
        stored = json.loads(str(case.outputs[key]))
        counts = {name: count for _, count, name, *_ in stored}
        sizes = _sizes(counts)
        generator = torch.Generator().manual_seed(0)
        start = official_start(generator, **sizes)
        scalars = [value for name, value in start.items() if name.endswith(MIXING)]
        draws = list(official_draws(**sizes))
        before = np.cumsum([0, *(prod(draw.shape) for draw in draws)])[:-1]
        listed: list[list[Any]] = [
            ["rand", 1, draw.name]
            if draw.name.endswith(MIXING)
            else ["uniform_", prod(draw.shape), draw.name, draw.low, draw.high]
            for draw in draws
        ]
        produced |= {
            f"mix{build}": torch.cat(scalars),
            f"mix_offset{build}": before[[draw.name.endswith(MIXING) for draw in draws]],
            f"next_rand{build}": float(torch.rand(1, generator=generator)),
            key: [json.dumps(listed)],
        }
    return produced


def _builds(case: Case) -> list[str]:
    """List the networks that the file is about, each with the underscore before its name."""
    named = (re.fullmatch(r"(?:mix_offset|mix|next_rand|sequence)(_.+)", n) for n in case.outputs)
    return list(dict.fromkeys(match[1] for match in named if match))


def _sizes(counts: Mapping[str, int]) -> dict[str, int]:
    """Derive a network's sizes from the numbers of entries of its parameters."""
    dim = counts["patch_embed.proj.bias"]
    classes = counts["cls_token"] // dim
    features = counts["head.weight"] // (9 * classes)
    return {
        "dim": dim,
        "depth": sum(name.endswith(MIXING) for name in counts),
        "hidden": counts["blocks.0.mlp.fc1.weight"] // dim,
        "patch_size": round((counts["patch_embed.proj.weight"] / dim / 3) ** 0.5),
        "positions": counts["pos_embed"] // dim - classes,
        "num_classes": classes,
        "features": features,
        "channels": counts["decoder.conv6.weight"] // (9 * features),
    }
