"""GETAM's parity cases of training: steps of both phases, optimiser and schedule, samples."""

import random
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wsss.data.views.getam import GETAMViews
from wsss.maps.pseudo_labels import inside_boxes
from wsss.methods.base import Step
from wsss.methods.getam.labels import Targets, saliency_loss
from wsss.methods.getam.maps import class_slots
from wsss.methods.getam.method import GETAM
from wsss.methods.getam.official import CORRECTED, official_name
from wsss.parity.cases import Case, Found, Produced
from wsss.parity.getam_network import (
    box_of,
    build_getam,
    completed_saliency,
    margin_of,
    of_pairs,
    pairs_of,
    pixels,
    tiny_getam,
)
from wsss.parity.inputs import as_tensor, network_images
from wsss.parity.networks import official_weights
from wsss.parity.tolerances import Array

# ---- cases: training steps -----------------------------------------------------------------------


def batch_of(case: Case) -> dict[str, Any]:
    """Make a training batch; the network input is zero outside the crop mask."""
    mask = as_tensor(case.inputs["crop_mask"])[:, None]
    batch: dict[str, Any] = {
        "image": network_images(case.inputs["img"]) * mask,
        "labels": as_tensor(case.inputs["cls_label"]),
        "box": box_of(case.inputs["crop_mask"]),
    }
    return batch


def _parameter_names(case: Case) -> list[str]:
    """List the official names of parameters, without buffers."""
    names = case.extra["param_names"].tolist()
    return [name for name in names if not _is_buffer(name)]


def _is_buffer(name: str) -> bool:
    return name.endswith((".running_mean", ".running_var", ".num_batches_tracked"))


Gradients = dict[str, Tensor | None]


def _gradients(model: GETAM, loss: Tensor) -> Gradients:
    """Compute gradients of a loss under the official names; None where there is none at all."""
    names = [official_name(name) for name, _ in model.named_parameters()]
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
    """Compute the L2 of every parameter's gradient, NaN where there is none."""
    found = [gradients.get(name) for name in _parameter_names(case)]
    return np.array([np.nan if g is None else float(g.double().norm()) for g in found])


def _single(prefix: str, gradients: Gradients) -> dict[str, Tensor]:
    return {f"{prefix}:{name}": g for name, g in gradients.items() if g is not None}


def _after_step(case: Case, model: GETAM, gradients: Gradients, name: str) -> dict[str, Any]:
    """Give the rate of the file's step, and every parameter after it."""
    optimizer = model.optimizer(model.param_groups())
    rate = model.settings.lr * model.lr_multiplier(case.settings["global_step"])
    optimizer.param_groups[0]["lr"] = rate
    for own, parameter in model.named_parameters():
        parameter.grad = gradients[official_name(own)]
    optimizer.step()
    state = _official_state(case, model)
    values = [state[official].double() for official in _parameter_names(case)]
    return {
        f"lr_{name}": rate,
        f"param_sum_after_{name}": np.array([float(value.sum()) for value in values]),
        f"param_l2_after_{name}": np.array([float(value.norm()) for value in values]),
    }


def _official_state(case: Case, model: GETAM) -> dict[str, Tensor]:
    """Give every official parameter and buffer: ours, and those that nothing uses as they were."""
    ours = {official_name(name): value for name, value in model.state_dict().items()}
    return official_weights(case) | {name: value.detach() for name, value in ours.items()}


def g_phase1(case: Case) -> Produced:
    """Make one step of the first phase."""
    model, produced = build_getam(case).train(), Found()
    # any step of the phase computes the same; the rate alone follows the step
    result = model.losses(batch_of(case), case.settings.get("global_step", 0))
    gradients = _gradients(model, result.total)
    produced |= {
        "grad_param_names": _parameter_names(case),
        "logits": result.outputs.class_logits,
        "loss": result.total,
        "gradnorm_phase1": _norms(case, gradients),
        **_single("grad_phase1", gradients),
    }
    with produced.given():
        produced |= _after_step(case, model, gradients, "phase1")
    return produced


class StoredDropout(nn.Module):
    """Dropout with a keep mask from the file."""

    def __init__(self, keep: Tensor, rate: float) -> None:
        super().__init__()
        self.factor = keep / (1 - rate)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the entries of x (B, C, h, w) that the mask keeps, and enlarge them."""
        return x * self.factor


def _second_phase(case: Case, *, with_dropout: bool) -> tuple[GETAM, Step]:
    """Make a step of the second phase on a fresh model, in float64.

    In float32 one in a million ReLU inputs changes its sign with the order of a sum, and that moves
    gradients by 1e-4. The stored float32 numbers are within 1e-6 of float64 ones.
    """
    model = build_getam(case).double().train()
    for index, layer in enumerate(model.decoder.head):
        if isinstance(layer, nn.Dropout):
            keep = as_tensor(case.inputs["dropout_keep"]) if with_dropout else torch.ones(())
            model.decoder.head[index] = StoredDropout(keep, layer.p if with_dropout else 0.0)
    batch = batch_of(case)
    # the stored guide, or that of float32 images: one pixel on the other side of an integer would
    # be another image
    stored = case.inputs.get("guide")
    guide = (model.guide(batch["image"]) if stored is None else pixels(stored)).double()
    model.guide = lambda images: guide  # type: ignore[method-assign]
    batch["saliency"] = as_tensor(case.inputs["sal"]) > 0
    batch |= {name: batch[name].double() for name in ("image", "labels")}
    return model, model.losses(batch, case.settings["global_step"])


TERMS = {"ce": "seg_loss", "dense": "reg_loss", "cls": "cls_loss", "sal_coded": "sal_loss"}
TOTALS = {"nosal": (), "corrected": ("sal_corrected",), "coded": ("sal_coded",)}


def g_phase2(case: Case) -> Produced:
    """Make one step of the second phase, with each form of the saliency term."""
    model, result = _second_phase(case, with_dropout=False)
    assert result.outputs.seg_logits is not None
    losses = {term: result.losses[name] for term, name in TERMS.items()}
    losses["sal_corrected"] = saliency_loss(
        result.outputs.seg_logits, completed_saliency(result.seen["labels"])
    )
    values = {term: float(loss.detach()) for term, loss in losses.items()}
    gradients = {term: _gradients(model, loss) for term, loss in losses.items()}
    produced = Found()
    produced |= {
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
    with produced.given():
        model, result = _second_phase(case, with_dropout=True)
        produced["dropout_total_coded"] = result.total
        produced["dropout_gradnorm_coded"] = _norms(case, _gradients(model, result.total))
    return produced


def _step_outputs(case: Case, model: GETAM, result: Step) -> dict[str, Any]:
    """Give maps, labels and logits behind the losses of a step."""
    targets, seg_logits = Targets(**result.seen), result.outputs.seg_logits
    assert seg_logits is not None
    labels = as_tensor(case.inputs["cls_label"])
    ids, _ = class_slots(labels)
    pairs = pairs_of(labels)
    refined = of_pairs(targets.refined, ids, pairs)
    salient = as_tensor(case.inputs["sal"]) > 0
    return {
        "pairs": pairs,
        "logits": result.outputs.class_logits,
        "seg_stride4": seg_logits[:, :, ::4, ::4],
        "map": of_pairs(targets.maps, ids, pairs),
        "normalised_stride2": refined[:, ::2, ::2],
        "peak_normalised": refined.amax((1, 2)).double(),
        "label": targets.labels.label,
        "sal": completed_saliency(targets.labels),
        "label_margin": margin_of(targets.refined, salient, model.settings.quantile),
    }


# ---- cases: optimiser, data ----------------------------------------------------------------------


def _schedule(model: GETAM, steps: Iterable[int]) -> Array:
    """Make rows of iteration, phase, factor of the phase, learning rate."""
    lr = model.settings.lr
    return np.array(
        [
            (t, 1 + model.in_phase_two(t), model.lr_scale(t), lr * model.lr_multiplier(t))
            for t in map(int, steps)
        ]
    )


def _toy_run(case: Case, model: GETAM) -> Array:
    """Train a toy parameter by the method's optimiser and schedule; its value after each step."""
    toy = nn.Parameter(as_tensor(case.inputs["toy_param"]).clone())
    optimizer = model.optimizer([{"params": [toy], "lr": model.settings.lr}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, model.lr_multiplier)
    history = []
    for gradient in as_tensor(case.inputs["toy_grads"]):
        toy.grad = gradient.clone()
        optimizer.step()
        schedule.step()
        history.append(toy.detach().clone())
    return torch.stack(history).numpy()


def h_optim(case: Case) -> Produced:
    """Compute schedules, optimiser settings and a toy run."""
    cfg = case.settings
    phases = {"phase_one": cfg["cls_step"], "phase_two_lr_scale": cfg["seg_lr_scale"]}
    voc_steps = (10582 // 4) * 20
    produced = Found()
    produced["voc_T"] = voc_steps
    for suffix, decay in (("", False), ("_steplr", True)):
        build = partial(tiny_getam, lr=cfg["lr"], step_decay=decay, **phases)
        short, voc = build(max_steps=cfg["short_T"]), build(max_steps=voc_steps)
        produced[f"sched_short{suffix}"] = _schedule(short, range(cfg["short_T"] + 1))
        with produced.given():
            produced[f"sched_voc{suffix}"] = _schedule(voc, case.inputs["voc_iters"])
    second = sum(voc.in_phase_two(t) for t in range(voc_steps + 1))
    produced["voc_phase_counts"] = np.array([voc_steps + 1 - second, second])
    defaults = voc.optimizer(voc.param_groups()).defaults
    for name in ("momentum", "weight_decay", "dampening", "nesterov"):
        produced[f"sgd_{name}"] = float(defaults[name])
    half = voc.lr_multiplier(voc_steps // 4)
    produced["poly_power"] = float(np.log(half) / np.log(0.75))
    toy = partial(tiny_getam, max_steps=cfg["toy_T"], lr=cfg["toy_lr"], **phases)
    with produced.given():
        produced["toy_param_after_step"] = _toy_run(case, toy())
        wrong = _toy_run(case, toy(quirks=CORRECTED, momentum=0.9))
        produced["control_toy_momentum09_decay"] = wrong
    return produced


class OfficialDraws:
    """The two random streams of the official code behind the interface of numpy's Generator."""

    def __init__(self, seed: int) -> None:
        self.floats = np.random.RandomState(seed)
        self.integer_stream = random.Random(seed)
        # a scale that is drawn for every batch and never used
        self.uniform = [self.floats.uniform(0.7, 1.3)]
        self.drawn: list[int] = []

    def random(self) -> float:
        """Draw what decides about a flip."""
        self.uniform.append(self.floats.uniform(0, 1))
        return self.uniform[-1]

    def integers(self, low: int, high: int) -> int:
        """Draw long side, column, row."""
        self.drawn.append(self.integer_stream.randrange(low, high))
        return self.drawn[-1]


def j_data(case: Case) -> Produced:
    """Make the training samples of a seed."""
    draws, views = OfficialDraws(case.settings["seed"]), GETAMViews(crop_size=case.settings["crop"])
    samples: list[dict[str, Tensor]] = []
    draws_of = []
    for number in range(len(case.settings["shapes"])):
        rgb = np.ascontiguousarray(case.inputs[f"bgr{number}"][..., ::-1])
        samples.append(views(rgb, draws, case.inputs[f"sal{number}"]))
        draws_of.append(draws.drawn)
        draws.drawn = []
    batch = {name: torch.stack([one[name] for one in samples]) for name in samples[0]}
    guide = tiny_getam(max_steps=1).guide(batch["image"])
    inside = inside_boxes(batch["box"], *batch["image"].shape[-2:])
    return {
        "np_uniform": np.array(draws.uniform),
        "py_draws": np.array(draws_of),
        "image": batch["image"],
        "guide": guide.permute(0, 2, 3, 1),
        "crop_mask": inside.to(torch.uint8),
        "sal": batch["saliency"],
    }
