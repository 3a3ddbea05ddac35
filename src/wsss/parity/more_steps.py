"""MoRe's parity cases of training: optimiser and schedule, a whole step, two optimiser steps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsss.maps.pseudo_labels import token_labels
from wsss.methods.base import Step
from wsss.methods.more import MoRe, MoReSettings
from wsss.methods.more.contrast import WANTED
from wsss.methods.more.official import OFFICIAL, official_name
from wsss.methods.schedules import poly_warmup
from wsss.models.backbone import Backbone
from wsss.parity.cases import Case, Found, Produced
from wsss.parity.inputs import as_tensor, gradient_norm, network_images, unit_images
from wsss.parity.more_network import MAX_STEPS, build_more, norms_of, official_names
from wsss.parity.networks import parameter_names
from wsss.parity.tolerances import Array

TERMS = ("cls", "cls_aux", "distinct", "ptc", "cle", "une", "seg", "reg")
MODULES = ("encoder", "classifier", "aux_classifier", "graph_layer", "decoder")


def padded(selected: Sequence[Tensor], wanted: int) -> Tensor:
    """Lay out the tokens (n, 2) of each image as (B, wanted, 2); -1 where there are fewer."""
    table = torch.full((len(selected), wanted, 2), -1)
    for row, chosen in zip(table, selected, strict=True):
        row[: len(chosen)] = chosen
    return table


# ---- optimiser -----------------------------------------------------------------------------------


def _multipliers(case: Case, steps: Iterable[int]) -> list[float]:
    cfg = case.settings
    multiplier = partial(
        poly_warmup,
        max_steps=cfg["max_iter"],
        warmup_steps=cfg["warmup_iter"],
        warmup_ratio=cfg.get("warmup_ratio", 1e-6),
        power=cfg.get("power", 0.9),
    )
    return [multiplier(int(step)) for step in steps]


def _network_of(names: Sequence[str], lr: float) -> MoRe:
    """Build a tiny network that has the named parameters."""
    blocks = {name.split(".")[2] for name in names if name.startswith("encoder.blocks.")}
    overrides = {"embed_dim": 48, "depth": len(blocks), "num_heads": 3, "img_size": 32}
    backbone = Backbone(name="vit_tiny_patch16_224", weights="random", overrides=overrides)
    settings = MoReSettings(max_steps=MAX_STEPS, aux_layer=-1, decoder_channels=8, lr=lr)
    return MoRe(backbone=backbone, num_classes=2, settings=settings, quirks=OFFICIAL)


def g_optim(case: Case) -> Produced:
    """Compute the rates of both factors, and the group of every parameter."""
    names, lr = case.outputs["out_param_names"].tolist(), case.settings.get("lr", 6e-5)
    model = _network_of(names, lr)
    groups = model.param_groups()
    official = {id(p): official_name(name) for name, p in model.named_parameters()}
    group_of = {official[id(p)]: i for i, group in enumerate(groups) for p in group["params"]}
    base = list(dict.fromkeys(group["lr"] for group in groups))
    produced = Found()
    produced |= {
        "param_names": list(group_of) if set(group_of) != set(names) else names,
        "group_of_param": np.array([group_of.get(name, -1) for name in names]),
        "group_lr_factor": np.array([group["lr"] / lr for group in groups]),
    }
    with produced.given():
        multipliers = _multipliers(case, case.inputs["steps"])
        produced["lr"] = np.array([[m * rate for rate in base] for m in multipliers])
    return produced


# ---- a training step -----------------------------------------------------------------------------


def _settings(case: Case) -> dict[str, Any]:
    """Give the settings of a step with all weights on, at the last step of a run."""
    weights = case.settings["weights"]
    settings = {f"{term}_weight": weights[term] for term in TERMS[2:]}
    # the last step is beyond a share of 0 and not beyond one of 1
    return settings | {
        "seg_after": 0.0,
        "late_masks_after": 0.0 if case.settings.get("late_masks", False) else 1.0,
        "lr": case.settings.get("lr", 6e-5),
        "weight_decay": case.settings.get("weight_decay", 0.01),
    }


def _model(case: Case) -> MoRe:
    model = build_more(case, **_settings(case)).train()
    if "img_denorm" in case.inputs:
        # truncation turns the last digit of a pixel into a whole grey level
        stored = unit_images(case.inputs["img_denorm"])
        model.guide = lambda images: stored  # type: ignore[method-assign]
    return model


@contextmanager
def _gated(case: Case, model: MoRe, gated: bool) -> Iterator[None]:
    """Give the gated terms no weight, where they are."""
    before = model.settings
    off: dict[str, Any] = (
        {f"{term}_weight": 0.0 for term in case.settings["gated"]} if gated else {}
    )
    model.settings = replace(before, **off)
    try:
        yield
    finally:
        model.settings = before


def _step(case: Case, model: MoRe, *, gated: bool, seed: int) -> Step:
    """Compute the losses of the stored batch."""
    batch = {
        "image": network_images(case.inputs["img"]),
        "labels": as_tensor(case.inputs["cls_label"]),
    }
    with _gated(case, model, gated):
        torch.manual_seed(seed)
        return model.losses(batch, model.settings.max_steps - 1)


def _terms(result: Step) -> Array:
    return np.array([result.losses[f"{term}_loss"].item() for term in TERMS])


def _official_gradients(case: Case, model: MoRe, loss: Tensor) -> dict[str, Tensor | None]:
    """Give the gradients of a loss under the official names; None where there is none at all."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    ours = dict(zip(named, found, strict=True))
    pairs = official_names(case).items()
    return {official: None if our is None else ours[our] for official, our in pairs}


def _module_norms(gradients: dict[str, Tensor | None]) -> Array:
    return np.array(
        [
            gradient_norm(g for name, g in gradients.items() if name.startswith(f"{module}."))
            for module in MODULES
        ]
    )


def h_train_step(case: Case) -> Produced:
    """Compute a training step before and after the gated terms begin; make two optimiser steps."""
    cfg, names = case.settings, parameter_names(case)
    produced: dict[str, Any] = {
        "module_names": list(MODULES),
        "term_names": list(TERMS),
        "grad_param_names": names,
    }
    for stage in ("before", "after"):
        model = _model(case)
        result = _step(case, model, gated=stage == "before", seed=cfg["seed"])
        produced[f"total_{stage}"] = result.total
        gradients = _official_gradients(case, model, result.total)
        produced[f"gradnorm_param_{stage}"] = norms_of(names, gradients)
        produced[f"gradnorm_module_{stage}"] = _module_norms(gradients)
        for name, gradient in gradients.items():
            if gradient is not None:
                produced[f"grad_{stage}_{name.replace('.', '_')}"] = gradient
    produced["gradnorm_module_per_term"] = np.stack(
        [
            _module_norms(_official_gradients(case, model, result.losses[f"{term}_loss"]))
            for term in TERMS
        ]
    )
    return produced | _step_outputs(case, model, result) | _two_steps(case)


def _step_outputs(case: Case, model: MoRe, result: Step) -> dict[str, Any]:
    """Give what a step computes beside its losses and gradients."""
    seen = result.seen
    return _masks(case, model, seen) | {
        "refined_label": seen["pseudo_label"],
        "selected": padded(seen["selected"], WANTED),
        "cls": result.outputs.class_logits,
        "cls_aux": seen["aux_logits"],
        "seg": result.outputs.seg_logits,
        "tokens": seen["class_tokens"],
        "terms": _terms(result),
    }


def _masks(case: Case, model: MoRe, seen: Mapping[str, Any]) -> dict[str, Tensor]:
    """Give early and late token masks, whichever of them the step used."""
    labels = as_tensor(case.inputs["cls_label"])
    grid = seen["features"].grid
    whole = torch.tensor([[0, grid[0], 0, grid[1]]]).expand(len(labels), -1)
    last = model.settings.max_steps - 1
    early = replace(model.settings, late_masks_after=1.0).mask_rules(last)
    late = replace(model.settings, late_masks_after=0.0).mask_rules(last)
    rules = {"cle": early["cle_mask"], "une": early["une_mask"], "late": late["cle_mask"]}
    return {
        f"mask_{name}": token_labels(seen[source], labels, grid, whole, high=high, low=low)
        for name, (source, high, low) in rules.items()
    }


def _two_steps(case: Case) -> dict[str, Any]:
    """Make two optimiser steps, the first with the gated terms off; say where they lead."""
    cfg, model = case.settings, _model(case)
    start = {official_name(n): p.detach().clone() for n, p in model.named_parameters()}
    optimizer = model.optimizer(model.param_groups())
    base = [group["lr"] for group in optimizer.param_groups]
    names = case.outputs["out_delta_names"].tolist()
    produced: dict[str, Any] = {"delta_names": names}
    rates = []
    first = cfg["global_step_start"]
    for index, multiplier in enumerate(_multipliers(case, (first, first + 1))):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * multiplier
        rates.append([group["lr"] for group in optimizer.param_groups])
        result = _step(case, model, gated=index == 0, seed=cfg["seed"] + index)
        optimizer.zero_grad()
        result.total.backward()
        optimizer.step()
        now = {official_name(n): p.detach() for n, p in model.named_parameters()}
        produced[f"terms_step{index + 1}"] = _terms(result)
        produced[f"delta_l2_step{index + 1}"] = np.array(
            [gradient_norm([now[name] - start[name]]) for name in names]
        )
    produced["lr"] = np.array(rates)
    produced["selected_step2"] = padded(result.seen["selected"], WANTED)
    produced["classifier_after_two_steps"] = now["classifier.weight"]
    produced["graph_norm_after_two_steps"] = now["graph_layer.norm.weight"]
    return produced
