"""ClusterCAM's parity cases: the product's functions on the official run's inputs.

Every function takes its sizes and settings from the file. The networks load their weights through
the converter for official checkpoints; the schedule is that of ``experiments/clustercam``.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.evaluation.confusion import ConfusionMatrix
from wsss.evaluation.inference import ModuleLike, predict
from wsss.evaluation.protocol import Protocol
from wsss.maps.pseudo_labels import (
    packed_scores,
    present_slots,
    refine_cam_to_label,
    refined_scores,
)
from wsss.maps.refine.dense_crf import CRF_PRESETS, dense_crf
from wsss.maps.refine.par import PAR
from wsss.methods.base import Outputs
from wsss.methods.clustercam.method import ClusterCAM
from wsss.methods.clustercam.network import BlockOutput, Encoded, assign, initial_centres
from wsss.methods.clustercam.official import (
    MIXING,
    clustercam_official_name,
    official_draws,
    official_start,
)
from wsss.methods.losses import balanced_segmentation_loss
from wsss.methods.official import load_official
from wsss.models.backbone import Backbone
from wsss.models.vit import resize_positions
from wsss.models.weights import load_encoder
from wsss.parity import EXACT, Array, Case, Kind, Produced, Tolerance
from wsss.parity.inputs import (
    as_tensor,
    gradient_norm,
    loss_and_gradients,
    network_images,
    unit_images,
)
from wsss.runs.compose import compose_run
from wsss.runs.folder import build_module

EXPERIMENTS = {"voc": "voc_deits", "coco": "coco"}  # whose schedules the files ask for
EPOCHS = 80  # of the networks built here; a step is an epoch
CRF = "mctformer"


# ---- building ------------------------------------------------------------------------------------


def official_weights(case: Case) -> dict[str, Tensor]:
    """Weights under the official names, by the rule in the golden README."""
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
    """A backbone of the given shape with random weights."""
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
    """The method as training builds it (``official_compat``), with the file's weights."""
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
    model = ClusterCAM(
        backbone=backbone,
        num_classes=classes,
        max_steps=EPOCHS,
        epochs=EPOCHS,
        drop_path=cfg.get("drop_path", 0.0),
        decoder_channels=len(state["decoder.conv7.weight"]),
        scales=cfg.get("scales", (1.0, 0.75, 1.25)),
        high_threshold=background + margin,
        low_threshold=background - margin,
        seg_weight=cfg.get("seg_weight", 0.1),
        official_compat=True,
        **settings,
    )
    load_official("clustercam", model, state, case.name)
    return model.eval()


def _both_precisions(model: ClusterCAM) -> Iterator[tuple[str, ClusterCAM, torch.dtype]]:
    """The model as it is and in float64, each with the suffix of its arrays."""
    yield "", model, torch.float32
    yield "_fp64", deepcopy(model).double(), torch.float64


def _official_parameters(case: Case, model: ClusterCAM) -> list[torch.nn.Parameter]:
    """Our parameters in the order of the file's names."""
    ours = {clustercam_official_name(name): p for name, p in model.named_parameters()}
    return [ours[name] for name in case.inputs["grad_names"].tolist()]


# ---- cases: network ------------------------------------------------------------------------------


@torch.no_grad()
def stem(case: Case) -> Produced:
    """Positions and input of block 0 at every size."""
    model = build_clustercam(case)
    produced = {}
    for name, array in case.inputs.items():
        images, size = network_images(array), name.removeprefix("image")
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
    """Everything inside one block."""
    model = build_clustercam(case)
    tokens, index = as_tensor(case.inputs["X"]), case.settings.get("block", 0)
    grid = tuple(case.settings["grid"])
    produced: dict[str, Any] = {}
    for suffix, network, kind in _both_precisions(model):
        output = network.block(index, tokens.to(kind), grid)
        produced |= {f"{name}{suffix}": value for name, value in _block_outputs(output).items()}
    space = model.branch(index).space(tokens[:, model.num_classes :])
    centres = produced["S0"] = initial_centres(space, grid)
    steps = []
    for _ in range(3):
        steps.append(assign(space, centres))
        centres = steps[-1][1]
    last = steps[-1][0]
    entropy = -(last * last.clamp_min(1e-38).log()).sum(-1).mean() / np.log(last.shape[-1])
    affinity = tokens.new_zeros(len(tokens), *[grid[0] * grid[1]] * 2)
    model.block(index, tokens, grid, affinity)
    return produced | {
        "Z": space,
        "A": torch.stack([assignment for assignment, _ in steps]),
        "S": torch.stack([moved for _, moved in steps]),
        "X1": tokens + produced["a"] + produced["b"],
        "Ppp_mean": affinity,
        "A3_entropy": float(entropy),
    }


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
    """The three logits, the features and the tokens after every block."""
    model, images = build_clustercam(case), network_images(case.inputs["image"])
    produced: dict[str, Any] = {}
    for suffix, network, kind in _both_precisions(model):
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
    """CAMs without and with refinement."""
    model, images = build_clustercam(case), network_images(case.inputs["image"])
    every = torch.arange(model.num_classes)
    produced: dict[str, Any] = {}
    for suffix, network, kind in _both_precisions(model):
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


# ---- cases: losses and training ------------------------------------------------------------------


def gradients(case: Case) -> Produced:
    """Gradients of each loss alone and of the total."""
    model, images = build_clustercam(case), network_images(case.inputs["image"])
    targets, label = as_tensor(case.inputs["targets"]), as_tensor(case.inputs["seg_label"])
    produced: dict[str, Any] = {}
    for suffix, network, kind in _both_precisions(model):
        result = network.losses_of(network.encode(images.to(kind)), targets.to(kind), label)
        losses = {
            "cls": result.losses["cls_loss"],
            "pat": result.losses["patch_loss"],
            "seg": result.losses["seg_loss"],
            "total": result.total,
        }
        parameters = _official_parameters(case, network)
        trained = [p for p in parameters if p.requires_grad]
        for name, loss in losses.items():
            found = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
            by_id = {id(p): gradient for p, gradient in zip(trained, found, strict=True)}
            own = [by_id.get(id(p)) for p in parameters]
            produced[f"loss_{name}{suffix}"] = loss
            produced[f"gradnorm_{name}{suffix}"] = np.array([gradient_norm([g]) for g in own])
            if kind == torch.float64:
                produced |= _gradient_facts(case, name, own, parameters)
    return produced


def _gradient_facts(
    case: Case, loss: str, own: list[Tensor | None], parameters: list[torch.nn.Parameter]
) -> dict[str, Any]:
    """Which gradients are missing or zero, group norms, and the gradients the file holds."""
    absent = np.array([gradient_norm([g]) == 0 for g in own])
    # None and zero both mean no gradient; which of them it is depends on autograd's layout
    stored_zero = case.outputs.get(f"zero_{loss}", np.zeros_like(absent))
    names = case.inputs["grad_names"].tolist()
    groups = case.inputs["group_of_param"]
    produced: dict[str, Any] = {
        f"none_{loss}": absent & ~stored_zero,
        f"zero_{loss}": absent & stored_zero,
        f"groupnorm_{loss}": np.array(
            [
                gradient_norm(g for g, group in zip(own, groups, strict=True) if group == index)
                for index in range(len(case.inputs["group_names"]))
            ]
        ),
    }
    full = [torch.zeros_like(p) if g is None else g for g, p in zip(own, parameters, strict=True)]
    for name, gradient in zip(names, full, strict=True):
        if f"grad_{loss}/{name}" in case.outputs:
            produced[f"grad_{loss}/{name}"] = gradient
    produced[f"grad_{loss}/mix_param_all"] = torch.cat(
        [g for name, g in zip(names, full, strict=True) if name.endswith(MIXING)]
    )
    return produced


def seg_loss(case: Case) -> Produced:
    """The segmentation loss of every label map, with its gradient."""
    losses, slopes = [], []
    labels = as_tensor(case.inputs["labels"])
    for label in labels:
        logits = as_tensor(case.inputs["pred"]).requires_grad_()
        full = F.interpolate(logits, label.shape[-2:], mode="bilinear")
        loss, slope = loss_and_gradients(balanced_segmentation_loss(full, label), logits)
        losses.append(loss.item())
        slopes.append(slope)
    return {
        "loss": np.array(losses),
        "grad": torch.stack(slopes),
        "official_is_plain_float": (labels == 255).flatten(1).all(1),
    }


def train_phase(case: Case) -> Produced:
    """Training steps with their gradients, and where they leave the parameters."""
    cfg = case.settings
    model = build_clustercam(case, lr=cfg["lr"], weight_decay=cfg["weight_decay"])
    model.train(cfg["training_mode"])
    parameters = _official_parameters(case, model)
    start = [p.detach().clone() for p in parameters]
    optimizer = model.optimizer(model.param_groups())
    targets = as_tensor(case.inputs["targets"])
    step = EPOCHS - 1 if cfg["phase"] == 2 else 0
    produced: dict[str, Any] = {}
    for index in range(cfg["steps"]):
        images = network_images(case.inputs[f"image_step{index}"])
        result = model.compute_losses({"image": images, "labels": targets}, step)
        optimizer.zero_grad()
        result.total.backward()
        gradients = [p.grad for p in parameters]
        produced |= {
            f"losses_step{index}": _four_losses(result.losses, result.total),
            f"cls_logits_step{index}": result.outputs.class_logits,
            f"pat_logits_step{index}": result.patch_logits,
            f"gradnorm_step{index}": np.array([gradient_norm([g]) for g in gradients]),
            f"gradnone_step{index}": np.array([g is None for g in gradients]),
            f"mixgrad_step{index}": _mixing_gradients(model),
        }
        if result.cam is not None:
            # the file's means are of all classes, ours are computed for the present ones alone
            produced[f"cam_ms_mean_step{index}"] = _present_means(case, index, result.cam, targets)
            produced[f"pseudo_label_step{index}"] = result.pseudo_label
        optimizer.step()
        moved = [gradient_norm([p - q]) for p, q in zip(parameters, start, strict=True)]
        # softmax ignores the key third of these biases: its gradient is rounding, which Adam
        # brings to full size
        noise = [name.endswith(("qkv.bias", "qkv_stsa.bias")) for name in _names(case)]
        produced[f"deltanorm_step{index}"] = np.ma.array(np.array(moved), mask=noise)
    return produced


def _names(case: Case) -> list[str]:
    names: list[str] = case.inputs["grad_names"].tolist()
    return names


def _four_losses(losses: Mapping[str, Tensor], total: Tensor) -> Array:
    zero = total.new_zeros(())
    terms = [losses.get(f"{name}_loss", zero) for name in ("cls", "patch", "seg")]
    return np.array([term.item() for term in [*terms, total]])


def _mixing_gradients(model: ClusterCAM) -> Tensor:
    scalars = [model.branch(index).mixing for index in range(model.backbone.depth)]
    return torch.cat([torch.zeros(1) if s.grad is None else s.grad for s in scalars])


def _present_means(case: Case, index: int, cam: Tensor, targets: Tensor) -> Any:
    return np.ma.array(cam.double().mean((-2, -1)).numpy(), mask=(targets == 0).numpy())


# ---- cases: CAMs and labels ----------------------------------------------------------------------


def _par(case: Case, iterations: int) -> PAR:
    dilations = case.settings.get("dilations", (1, 2, 4, 8, 12, 24))
    return PAR(dilations=dilations, num_iter=iterations, eps=1e-5)


def par(case: Case) -> Produced:
    """Affinity and refined maps after every number of iterations in the file."""
    images, masks = unit_images(case.inputs["image"]), as_tensor(case.inputs["masks"])
    iterations = case.settings.get("iterations", 10)
    rounds = {int(name[4:]) for name in case.outputs if re.fullmatch(r"out_\d+", name)}
    produced: dict[str, Any] = {
        f"out_{count}": _par(case, count)(images, masks) for count in sorted(rounds)
    }
    refined = _par(case, iterations)(images, masks)
    before = F.interpolate(masks, refined.shape[-2:], mode="bilinear", align_corners=True)
    produced["growth"] = float(refined.double().sum() / before.double().sum())
    if "affinity_crop" in case.outputs:
        crop = as_tensor(case.outputs["affinity_crop"])
        whole = _par(case, 1).affinity(images)
        # the file does not say where its crop lies: where its first pixel fits best
        height, width = crop.shape[-2:]
        first = whole[:, :, : whole.shape[2] - height + 1, : whole.shape[3] - width + 1]
        distance = (first - crop[:, :, :1, :1]).abs().amax(dim=(0, 1))
        row, column = divmod(int(distance.argmin()), distance.shape[1])
        produced["affinity_crop"] = whole[:, :, row : row + height, column : column + width]
    return produced


def _labels(case: Case, images: Tensor, cam: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Labels at both thresholds and the pseudo label."""
    cfg = case.settings
    high, low = cfg["bg"] + cfg["delta"], cfg["bg"] - cfg["delta"]
    refiner, scale = _par(case, cfg["iterations"]), cfg["down_scale"]
    pairs = {"label_high": (high, high), "label_low": (low, low), "pseudo_label": (high, low)}
    return {
        name: refine_cam_to_label(
            refiner, images, cam, targets, high=over, low=under, down_scale=scale
        )
        for name, (over, under) in pairs.items()
    }


def labels_from_cam(case: Case) -> Produced:
    """Labels of given CAMs."""
    cam = as_tensor(case.inputs["cam_u8"]).float() / 255
    return _labels(case, unit_images(case.inputs["image"]), cam, as_tensor(case.inputs["targets"]))


@torch.no_grad()
def ms_cam_labels(case: Case) -> Produced:
    """Multi-scale CAMs, then labels and loss from the file's own CAMs and guide image."""
    model, images = build_clustercam(case), network_images(case.inputs["image"])
    targets = as_tensor(case.inputs["targets"])
    every = torch.ones_like(targets)
    guide = model._guide(images)
    stored, stored_guide = as_tensor(case.outputs["cam_ms"]), unit_images(case.outputs["denorm"])
    produced: dict[str, Any] = {
        "cam_ms": model.cams(images, every),
        "denorm": (guide * 255).round().byte().permute(0, 2, 3, 1),
        "denorm_offby1": int(
            (guide * 255).round().ne(unit_images(case.inputs["image"]) * 255).sum()
        ),
    }
    for name in [name for name in case.outputs if name.startswith("cam_scale_")]:
        scale = float(name.removeprefix("cam_scale_"))
        size = [int(scale * side) for side in images.shape[-2:]]
        scaled = images if scale == 1 else F.interpolate(images, size, mode="bilinear")
        both = torch.cat([scaled, scaled.flip(-1)])
        produced[name] = model.raw_cam(both, torch.arange(model.num_classes))
    produced |= _labels(case, stored_guide, stored, targets)
    produced |= _refined_planes(case, stored_guide, stored, targets)
    label = as_tensor(case.outputs["pseudo_label"])
    produced["seg_loss"] = model.losses_of(model.encode(images), targets, label).losses["seg_loss"]
    return produced


def _refined_planes(case: Case, guide: Tensor, cam: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """PAR's output for every image and threshold: background, then the present classes."""
    cfg = case.settings
    size = (guide.shape[-2] // cfg["down_scale"], guide.shape[-1] // cfg["down_scale"])
    small = F.interpolate(guide, size, mode="bilinear")
    ids, valid = present_slots(targets)
    thresholds = (cfg["bg"] + cfg["delta"], cfg["bg"] - cfg["delta"])
    scores = packed_scores(cam, targets, ids, size, thresholds)
    refined = refined_scores(_par(case, cfg["iterations"]), small, scores, valid)
    return {
        f"par_{name}_image{image}": refined[image, index][valid[image]]
        for image in range(len(targets))
        for index, name in enumerate(("high", "low"))
    }


# ---- cases: inference ----------------------------------------------------------------------------


class StoredLogits:
    """The file's logits in the place of a network: found by the size of the input."""

    def __init__(self, case: Case) -> None:
        self.by_size = {}
        for name, array in case.inputs.items():
            if name.startswith("logits_scale_"):
                scale = float(name.removeprefix("logits_scale_"))
                size = tuple(int(scale * side) for side in case.inputs["image"].shape[:2])
                self.by_size[size] = as_tensor(array)

    def __call__(self, images: Tensor) -> Outputs:
        """Logits for an image of one of the file's scales."""
        logits = self.by_size[tuple(images.shape[-2:])]
        return Outputs(logits.mean((-2, -1))[:, 1:], logits)

    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Inference makes no CAMs."""
        raise NotImplementedError


def _protocol(case: Case) -> Protocol:
    settings = compose_run(["method=clustercam", "data.root=unset", "backbone.weights=random"])
    return Protocol(**{**settings["eval"], "seg_scales": tuple(case.settings["scales"])})


@torch.no_grad()
def _predicted(case: Case, module: ModuleLike) -> dict[str, Any]:
    """Probabilities, labels and scores of one image under the method's protocol."""
    image, protocol = case.inputs["image"], _protocol(case)
    merged = predict(module, network_images(image)[None], image.shape[:2], protocol).merged
    assert merged is not None
    # what the CRF gets in evaluation: renormalised, which only its clipping can see
    posterior = dense_crf(image, merged[0].softmax(0).numpy(), CRF_PRESETS[CRF])
    plain = merged[0].argmax(0)
    label = as_tensor(posterior.argmax(0)) if case.settings.get("use_crf", True) else plain
    counter = ConfusionMatrix(num_classes=len(posterior))
    counter.update(label[None], as_tensor(case.inputs["gt"].astype(np.int64))[None])
    matrix = counter.compute().matrix
    hit = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - hit
    # of one image; classes that were predicted and do not occur count, other than in our scores
    iou = torch.where(union > 0, hit.double() / union.clamp_min(1), -1.0)
    return {
        "probs": merged[0].exp(),
        "label_no_crf": plain,
        "label": label,
        "confusion": matrix,
        "iou": iou,
        "miou": float(iou[union > 0].mean()),
        "crf_top": np.sort(posterior, axis=0)[-2:],
        "crf_label_changed": int((label != plain).sum()),
    }


@torch.no_grad()
def inference(case: Case) -> Produced:
    """The network's logits at every scale, and what the protocol makes of them."""
    model = build_clustercam(case)
    images = network_images(case.inputs["image"])[None]
    produced = _predicted(case, model)
    for name in [name for name in case.outputs if name.startswith("logits_scale_")]:
        scale = float(name.removeprefix("logits_scale_"))
        size = [int(scale * side) for side in images.shape[-2:]]
        scaled = F.interpolate(images, size, mode="bilinear", align_corners=True)
        produced[name] = model(scaled).seg_logits
    return produced


def inference_merge(case: Case) -> Produced:
    """What the protocol makes of given logits."""
    return _predicted(case, StoredLogits(case))


# ---- cases: schedule, start ----------------------------------------------------------------------


def schedule(case: Case) -> Produced:
    """Rates and phases of both experiments, decay of every parameter, sizes of networks."""
    produced: dict[str, Any] = {}
    for name in [name for name in EXPERIMENTS if f"lr_{name}" in case.outputs]:
        settings = _experiment(name)["method"]
        model = _tiny(case, settings, official_compat=True)
        starts = range(0, model.max_steps, model.max_steps // model.epochs)
        produced[f"lr_{name}"] = np.array([model.lr * model.lr_multiplier(s) for s in starts])
        produced[f"skip_seg_{name}"] = np.array([not model.learns_segmentation(s) for s in starts])
        produced[f"base_lr_{name}"] = model.lr
    settings = _experiment("voc")["method"]
    for name, compat in (("weight_decay", True), ("weight_decay_unwrapped", False)):
        model = _tiny(case, settings, official_compat=compat)
        produced[name] = _decays(case, model)
    optimizer = model.optimizer(model.param_groups())
    told = {key: optimizer.defaults[key] for key in ("betas", "eps", "amsgrad")}
    produced["optimizer"] = [json.dumps({"name": type(optimizer).__name__, **told})]
    for name in case.outputs:
        if match := re.fullmatch(r"deit_small_K(\d+)_params", name):
            whole = build_module(_experiment("voc"), int(match[1]))
            produced[name] = sum(p.numel() for p in whole.parameters())
    return produced


def _experiment(name: str) -> dict[str, Any]:
    overrides = ["data.root=unset", "backbone=deit_small", "backbone.weights=random"]
    return compose_run([f"+experiments=clustercam/{EXPERIMENTS[name]}", *overrides])


def _tiny(case: Case, settings: dict[str, Any], *, official_compat: bool) -> ClusterCAM:
    """An experiment's settings on a small encoder with the file's number of blocks."""
    blocks = {n.split(".")[1] for n in case.inputs["wd_param_names"].tolist() if "blocks." in n}
    backbone = build_backbone(dim=48, depth=len(blocks), heads=6, hidden=192, patch=16, side=14)
    own = {key: value for key, value in settings.items() if key != "_target_"}
    own |= {"official_compat": official_compat, "decoder_channels": 16}
    return ClusterCAM(backbone=backbone, num_classes=4, **own)


def _decays(case: Case, model: ClusterCAM) -> Array:
    decay = {id(p): g["weight_decay"] for g in model.param_groups() for p in g["params"]}
    ours = {clustercam_official_name(n): decay[id(p)] for n, p in model.named_parameters()}
    return np.array([ours[name] for name in case.inputs["wd_param_names"].tolist()])


def init_map(case: Case) -> Produced:
    """Where every parameter comes from when a DeiT checkpoint is loaded, with seed 0."""
    cfg = case.settings
    sizes = {"dim": cfg["embed"], "depth": cfg["depth"], "heads": cfg["heads"]}
    backbone = build_backbone(**sizes, hidden=4 * cfg["embed"], patch=16, side=14)
    stand_in = {name: torch.randn_like(value) for name, value in backbone.vit.state_dict().items()}
    stand_in |= {"head.weight": torch.randn(1000, cfg["embed"]), "head.bias": torch.randn(1000)}
    load_encoder(backbone.vit, stand_in, case.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ClusterCAM(
            backbone=backbone, num_classes=cfg["classes"], max_steps=1, official_compat=True
        )
    values = {clustercam_official_name(n): p.detach() for n, p in model.named_parameters()}
    names = [name for name in case.inputs["names"].tolist() if name in values]
    names += sorted(values.keys() - set(names))
    sources = {name: _source(values[name], stand_in, cfg["classes"]) for name in names}
    used = {source.partition(" ")[0] for source in sources.values()}
    random = [name for name in names if sources[name] == "random"]
    flat = [values[name].double() for name in random]
    return {
        "source": [sources[name] for name in names],
        "unused_deit": [name for name in stand_in if name not in used],
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
    """The DeiT entry that a parameter starts from, in the file's words."""
    token, positions = stand_in["cls_token"], stand_in["pos_embed"]
    if torch.equal(value, token.expand(1, classes, -1)):
        return "cls_token (replicated K times)"
    row = positions[:, :1].expand(1, classes, -1)
    if torch.equal(value, torch.cat([row, positions[:, 1:]], dim=1)):
        return "pos_embed (class row replicated K times, grid kept)"
    return next((name for name, other in stand_in.items() if torch.equal(value, other)), "random")


def rng_mix(case: Case) -> Produced:
    """Mixing scalars that seed 0 gives, and the draws that lead to them."""
    produced: dict[str, Any] = {}
    for key in [name for name in case.outputs if name.startswith("sequence_")]:
        build = key.removeprefix("sequence")
        told = json.loads(str(case.outputs[key]))
        counts = {name: count for _, count, name, *_ in told}
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


def _sizes(counts: Mapping[str, int]) -> dict[str, int]:
    """Sizes of a network from the entries of its parameters."""
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


# ---- tolerances: the golden README's, case by case -----------------------------------------------


def _relative(bound: float) -> Tolerance:
    return Tolerance(relative=bound)


def _each(relative: float, absolute: float = 0.0) -> Tolerance:
    return Tolerance(relative=relative, absolute=absolute, entrywise=True)


_INNER = ("A", "S", "R", "G", "a", "b", "c", "out")
_FP64 = _relative(1e-12)
_MARGIN = Tolerance(spare="margin_lt_1e5")
_FEW = Tolerance(spare=0.001)
_NAMES = ("grad_names", "group_names", "group_of_param")
_INFERENCE = {
    "probs": Tolerance(absolute=1e-5),
    "label_no_crf": _MARGIN,
    "label": _FEW,
    "confusion": EXACT,
    "iou": _each(1e-9),
    "miou": _each(1e-9),
    # a marginal follows the labels' 99.9 %: no tolerance is given for it
    "crf_top": Tolerance(absolute=1e-3),
    "crf_label_changed": Tolerance(relative=0.01),
}
KINDS = {
    "stem": Kind(
        stem,
        # the convolution's rounding alone is 6e-6 in the official run, by its float64 value
        {"pos": Tolerance(absolute=1e-6), "tokens": Tolerance(absolute=1e-5)},
        ("image_*",),
    ),
    "cluster_block": Kind(
        cluster_block,
        {"": _relative(5e-6), "Z": _relative(2e-6), "S0": _relative(2e-6)}
        | {f"{name}_fp64": _FP64 for name in _INNER},
        ("X",),
    ),
    "network": Kind(
        network,
        {"": _relative(5e-6)} | {f"{n}_logits_fp64": _FP64 for n in ("cls", "pat", "seg")},
        ("image",),
    ),
    "cam": Kind(
        cam,
        {"": _relative(5e-6), "cam_raw_fp64": _FP64, "cam_refined_fp64": _FP64},
        ("image",),
    ),
    "gradients": Kind(
        gradients,
        {f"loss_{n}": _each(1e-6) for n in ("cls", "pat", "seg", "total")}
        | {f"gradnorm_{n}": _each(1e-4, 1e-8) for n in ("cls", "pat", "seg", "total")}
        | {f"gradnorm_{n}_fp64": _each(1e-8, 1e-12) for n in ("cls", "pat", "seg", "total")}
        | {"groupnorm": _each(1e-8), "grad_": _relative(1e-8)},
        ("image", "targets", "seg_label", *_NAMES),
    ),
    "par": Kind(par, {"": _relative(2e-6), "growth": _each(2e-6)}, ("image", "masks")),
    "ms_cam_labels": Kind(
        ms_cam_labels,
        {
            "cam_ms": Tolerance(absolute=1e-4),
            "cam_scale": _relative(5e-6),
            "label": _MARGIN,
            "pseudo_label": _MARGIN,
            "par_": _relative(2e-6),
            "seg_loss": _each(1e-5),
        },
        ("image", "targets"),
    ),
    "labels_from_cam": Kind(labels_from_cam, {"": _MARGIN}, ("image", "cam_u8", "targets")),
    "seg_loss": Kind(
        seg_loss,
        {"loss": _each(1e-6), "grad": _relative(1e-5)},
        ("case_names", "pred", "labels"),
    ),
    "schedule": Kind(
        schedule, {"lr": Tolerance(absolute=1e-15), "base_lr": _each(1e-15)}, ("wd_param_names",)
    ),
    "init_map": Kind(init_map, {"random_mean": Tolerance(absolute=1e-6)}, ("names",)),
    "inference": Kind(inference, _INFERENCE | {"logits": _relative(5e-6)}, ("image", "gt")),
    "inference_merge": Kind(inference_merge, _INFERENCE, ("image", "gt", "logits_scale_*")),
    "rng_mix": Kind(rng_mix, {"mix": EXACT, "next_rand": EXACT}, ("torch_version",)),
    "train_phase": Kind(
        train_phase,
        {
            "losses_step": _each(1e-4),
            "losses_step0": _each(1e-5),
            "cls_logits": _relative(1e-3),
            "cls_logits_step0": _relative(5e-6),
            "pat_logits": _relative(1e-3),
            "pat_logits_step0": _relative(5e-6),
            "gradnorm_step": _each(1e-2, 1e-8),
            "gradnorm_step0": _each(1e-4, 1e-8),
            "mixgrad_step": _each(1e-2, 1e-8),
            "mixgrad_step0": _each(1e-4, 1e-8),
            "deltanorm": _each(1e-3),
            "cam_ms_mean_step": Tolerance(absolute=1e-3),
            "cam_ms_mean_step0": Tolerance(absolute=1e-4),
            "pseudo_label_step": Tolerance(spare=0.01),
            "pseudo_label_step0": _FEW,
        },
        ("image_step*", "targets", "grad_names"),
    ),
}
