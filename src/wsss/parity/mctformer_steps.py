"""MCTformer+'s parity cases of training: losses, gradients, steps, rates, the start."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wsss.methods.base import Step
from wsss.methods.mctformer import MCTformerPlus, MCTformerPlusSettings
from wsss.methods.mctformer.official import OFFICIAL, POSITIONS, UNUSED, parted
from wsss.models.backbone import Backbone
from wsss.models.weights import load_encoder
from wsss.parity.cases import Case, Found, Produced
from wsss.parity.inputs import as_tensor, gradient_norm, loss_and_gradients, network_images
from wsss.parity.mctformer_network import (
    build_mctformer,
    heads_of,
    official_gradients,
    official_values,
    official_weights,
    rule_weights,
)
from wsss.parity.networks import build_backbone
from wsss.parity.tolerances import Array

LOSSES = {"cls": "cls_loss", "cct": "cct_loss", "patch": "patch_loss"}
RATE_OF = 512  # images, for which the official base rate is given
STEPS_AN_EPOCH = 3  # of the runs whose rates are compared; any number gives the same


def tiny_mctformer(num_classes: int = 2, *, depth: int = 2, **settings: Any) -> MCTformerPlus:
    """Build a small network of its own, for what does not depend on the network."""
    sizes = {"embed_dim": 48, "depth": depth, "num_heads": 3, "img_size": 32}
    backbone = Backbone(name="vit_tiny_patch16_224", weights="random", overrides=sizes)
    chosen = MCTformerPlusSettings(**({"max_steps": 1, "input_size": 64} | settings))
    return MCTformerPlus(
        backbone=backbone, num_classes=num_classes, settings=chosen, quirks=OFFICIAL
    )


def _terms(step: Step) -> Array:
    """Give class, contrastive (unweighted), patch and total loss."""
    terms = [step.losses[name] for name in LOSSES.values()]
    return np.array([float(term.detach()) for term in [*terms, step.total]])


# ---- losses --------------------------------------------------------------------------------------


def f_loss(case: Case) -> Produced:
    """Compute the losses of given outputs, and the total's gradients in them."""
    cfg, produced = case.settings, Found()
    model = tiny_mctformer(num_cct=cfg["num_cct"], cct_weight=cfg["loss_weight"])
    for suffix in ("", "_equal"):
        with produced.given():
            names = (f"class_tokens{suffix}", "cls_logits", "patch_logits")
            leaves = [as_tensor(case.inputs[name]).requires_grad_() for name in names]
            tokens, class_logits, patch_logits = leaves
            labels = as_tensor(case.inputs["label"])
            step = model.losses_of(tokens, class_logits, patch_logits, labels)
            total, gradient, *further = loss_and_gradients(step.total, *leaves)
            produced |= {
                f"loss_total{suffix}": total,
                f"loss_cct{suffix}": step.losses["cct_loss"],
                f"grad_class_tokens{suffix}": gradient,
            }
            if not suffix:
                produced["loss_cls"], produced["loss_patch"] = (
                    step.losses[name] for name in ("cls_loss", "patch_loss")
                )
                produced["grad_cls_logits"], produced["grad_patch_logits"] = further
    return produced


def g_gradients(case: Case) -> Produced:
    """Compute gradients of the total, and of each term alone as it stands in the total."""
    model = build_mctformer(case).train(case.settings.get("train_mode", False))
    labels = as_tensor(case.inputs["label"])
    step = model.losses({"image": network_images(case.inputs["img"]), "labels": labels}, 0)
    weights = {"cct": model.settings.cct_weight}
    terms = {term: step.losses[name] * weights.get(term, 1.0) for term, name in LOSSES.items()}
    order = case.extra["param_names"].tolist()
    produced: dict[str, Any] = {"param_order": order, "losses": _terms(step)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for term, loss in {"total": step.total, **terms}.items():
        found = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        gradients = official_gradients(model, found, trained)
        produced[f"gradnorm_{term}"] = np.array(
            [gradient_norm([gradients[n]]) if n in gradients else np.nan for n in order]
        )
        if term == "total":
            produced |= {f"grad_{_plain(name)}": one for name, one in gradients.items()}
    return produced


def _plain(name: str) -> str:
    return name.replace(".", "_")


# ---- steps ---------------------------------------------------------------------------------------


class StoredDropPath(nn.Module):
    """Drop path with the decisions of a file."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.keep = rate, torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        """Keep the branches x (B, T, D) of the images that the file keeps, and enlarge them."""
        return x * self.keep / (1 - self.rate)


def _store_drop_paths(model: MCTformerPlus) -> list[StoredDropPath]:
    """Put stored decisions in the place of drawn ones; give them in the order of their use."""
    paths = []
    for block in model.backbone.vit.blocks:
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, StoredDropPath(getattr(block, name).drop_prob))
            paths.append(getattr(block, name))
    return paths


def h_train(case: Case) -> Produced:
    """Run training steps; say how far they move every parameter, and where to."""
    cfg, order = case.settings, case.extra["param_names"].tolist()
    model = build_mctformer(case, lr=cfg["lr"], weight_decay=cfg["weight_decay"])
    model.train(cfg.get("train_mode", True))
    optimizer = model.optimizer(model.param_groups())
    for group in optimizer.param_groups:
        group |= {"betas": tuple(cfg["betas"]), "eps": cfg["eps"]}
    paths = _store_drop_paths(model) if "drop_keep" in case.inputs else []
    start, losses, moved = official_weights(case), [], []
    for index in range(cfg["steps"]):
        if paths:
            # (calls, B) in the order of use; a path that is never dropped may be left out
            keep = as_tensor(case.inputs["drop_keep"][index]).float().flatten(0, -2)
            drawn = paths[len(paths) - len(keep) :]
            for path, one in zip(drawn, keep, strict=True):
                path.keep = one[:, None, None]
        images = network_images(case.inputs["img"][index])
        step = model.losses({"image": images, "labels": as_tensor(case.inputs["label"][index])}, 0)
        optimizer.zero_grad()
        step.total.backward()
        optimizer.step()
        losses.append(_terms(step))
        after = start | official_values(model)
        moved.append([gradient_norm([_counted(n, after[n] - start[n])]) for n in order])
    return {
        "param_order": order,
        "decayed": _decayed(model)[0],
        "losses": np.array(losses),
        "change_l2": np.array(moved),
        "sum": np.array([float(_counted(n, after[n]).double().sum()) for n in order]),
        **{f"param_{_plain(name)}": value for name, value in after.items()},
    }


def _counted(name: str, value: Tensor) -> Tensor:
    """Leave out the key third of a projection's bias: its gradient is rounding."""
    if not name.endswith("attn.qkv.bias"):
        return value
    queries, _, values = value.chunk(3)
    return torch.cat([queries, values])


def _decayed(model: MCTformerPlus) -> tuple[list[str], list[str]]:
    """List the official parameters with and without decay, those that nothing uses among these."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed: list[str] = []
    spared = [*UNUSED]
    for group in model.param_groups():
        own = {names[id(p)]: p.detach() for p in group["params"]}
        (decayed if group["weight_decay"] > 0 else spared).extend(parted(own, model.num_classes))
    return sorted(decayed), sorted(spared)


# ---- schedule ------------------------------------------------------------------------------------


def i_schedule(case: Case) -> Produced:
    """Give the rates of every epoch, the groups, and the optimiser's settings."""
    produced = Found()
    runs = case.settings["runs"]
    for index, run in enumerate(runs):
        model = _scheduled(case, run)
        rates = [
            model.settings.lr * model.lr_multiplier(epoch * STEPS_AN_EPOCH + within)
            for epoch in range(run["epochs"])
            for within in (0, STEPS_AN_EPOCH - 1)
        ]
        produced[f"lr_{index}"] = _of_both_ends(rates)
        produced[f"scaled_lr_{index}"] = model.settings.lr
    model = _scheduled(case, runs[0])
    produced["decayed"], produced["not_decayed"] = _decayed(model)
    groups = model.optimizer(model.param_groups()).param_groups
    decays = sorted({group["weight_decay"] for group in groups}, reverse=True)
    produced["adamw"] = np.array([groups[0]["eps"], *groups[0]["betas"], *decays])
    return produced


def _scheduled(case: Case, run: Mapping[str, Any]) -> MCTformerPlus:
    """Build a network with one of the file's schedules, as deep as the file's names say."""
    lists = [case.outputs.get(f"out_{name}", np.array([])) for name in ("decayed", "not_decayed")]
    listed = [name.split(".") for name in np.concatenate(lists).tolist()]
    return tiny_mctformer(
        run["num_classes"],
        depth=len({parts[1] for parts in listed if parts[0] == "blocks"}) or 2,
        max_steps=run["epochs"] * STEPS_AN_EPOCH,
        epochs=run["epochs"],
        lr=run["base_lr"] * run["batch"] / RATE_OF,
        warmup_epochs=run["warmup_epochs"],
        warmup_lr=run["warmup_lr"],
        min_lr=run["min_lr"],
    )


def _of_both_ends(rates: Sequence[float]) -> Array:
    """Give one rate an epoch; NaN where its first and its last step differ."""
    first, last = np.array(rates).reshape(-1, 2).T
    return np.where(first == last, first, np.nan)


# ---- start ---------------------------------------------------------------------------------------


def j_init(case: Case) -> Produced:
    """Start from a single-class checkpoint; make a first forward pass and its contrast."""
    cfg = case.settings
    shapes = json.loads(str(case.extra["pretrained_shapes"]))
    stored = rule_weights(case.extra["pretrained_names"].tolist(), shapes)
    backbone = build_backbone(stored, num_heads=heads_of(case))
    load_encoder(backbone.vit, stored, case.name)
    model = MCTformerPlus(
        backbone=backbone,
        num_classes=cfg["num_classes"],
        settings=MCTformerPlusSettings(max_steps=1, input_size=cfg["input_size"], drop_path=0.0),
        quirks=OFFICIAL,
    )
    values = official_values(model)
    same = [n for n, v in values.items() if n in stored and torch.equal(v, stored[n])]
    made = {"cls_token", *POSITIONS}
    produced = Found()
    produced |= {name: values[name] for name in made}
    # what nothing uses stays in the official network as it was
    produced["loaded_unchanged"] = sorted([*same, *UNUSED])
    produced["not_from_checkpoint"] = sorted(values.keys() - {*same} - made)
    head = model.patch_head
    rule = rule_weights(("head.weight", "head.bias"), (head.weight.shape, (cfg["num_classes"],)))
    head.load_state_dict({name.removeprefix("head."): value for name, value in rule.items()})
    with produced.given():
        encoded = model.train().encode(network_images(case.inputs["img"]))
        logits, patch_logits = encoded.class_logits, model.pooled(model.patch_map(encoded.features))
        produced |= {"first_cls_logits": logits, "first_patch_logits": patch_logits}
        labels = as_tensor(case.inputs["label"])
        step = model.losses_of(encoded.class_tokens, logits, patch_logits, labels)
        cct, token = step.losses["cct_loss"], model.backbone.vit.cls_token
        produced["first_cct"] = cct
        produced["cct_gradnorm_cls_token"] = gradient_norm(torch.autograd.grad(cct, token))
    return produced
