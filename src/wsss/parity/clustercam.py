"""ClusterCAM's parity cases: the product's functions on the official run's inputs.

Every function takes its sizes and settings from the file. The networks load their weights through
the converter for official checkpoints. Here are inference and all tolerances;
``clustercam_network.py`` has the network, ``clustercam_steps.py`` pseudo labels, losses and
training steps, ``clustercam_start.py`` the schedule and the start.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.evaluation.confusion import ConfusionMatrix
from wsss.evaluation.inference import ModuleLike, predict
from wsss.evaluation.protocol import Protocol
from wsss.maps.refine.dense_crf import CRF_PRESETS, dense_crf
from wsss.methods.base import Outputs
from wsss.parity.cases import Case, Found, Kind, Produced
from wsss.parity.clustercam_network import build_clustercam, cam, cluster_block, network, stem
from wsss.parity.clustercam_start import init_map, rng_mix, schedule
from wsss.parity.clustercam_steps import (
    gradients,
    labels_from_cam,
    ms_cam_labels,
    par,
    seg_loss,
    train_phase,
)
from wsss.parity.inputs import as_tensor, network_images
from wsss.parity.tolerances import EXACT, Tolerance
from wsss.runs.compose import compose_run

CRF = "mctformer"


# ---- inference -----------------------------------------------------------------------------------


class StoredLogits:
    """The file's logits in the place of a network: found by the size of the input."""

    def __init__(self, case: Case) -> None:
        self.case, self.names = case, {}
        for scale in case.settings["scales"]:
            size = tuple(int(scale * side) for side in case.inputs["image"].shape[:2])
            self.names[size] = f"logits_scale_{scale}"

    def __call__(self, images: Tensor) -> Outputs:
        """Find the logits for an image of one of the file's scales."""
        logits = as_tensor(self.case.inputs[self.names[tuple(images.shape[-2:])]])
        return Outputs(logits.mean((-2, -1))[:, 1:], logits)

    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Refuse: inference makes no CAMs."""
        raise NotImplementedError


def _protocol(case: Case) -> Protocol:
    settings = compose_run(["method=clustercam", "data.root=unset", "backbone.weights=random"])
    return Protocol(**{**settings["eval"], "seg_scales": tuple(case.settings["scales"])})


@torch.no_grad()
def _predicted(case: Case, module: ModuleLike) -> Found:
    """Give probabilities, labels and scores of one image under the method's protocol."""
    image, protocol, produced = case.inputs["image"], _protocol(case), Found()
    merged = predict(module, network_images(image)[None], image.shape[:2], protocol).merged
    assert merged is not None
    # what the CRF gets in evaluation: renormalised, which only its clipping can see
    posterior = dense_crf(image, merged[0].softmax(0).numpy(), CRF_PRESETS[CRF])
    plain = merged[0].argmax(0)
    label = as_tensor(posterior.argmax(0)) if case.settings.get("use_crf", True) else plain
    produced |= {
        "probs": merged[0].exp(),
        "label_no_crf": plain,
        "label": label,
        "crf_top": np.sort(posterior, axis=0)[-2:],
        "crf_label_changed": int((label != plain).sum()),
    }
    with produced.given():
        truth = as_tensor(case.inputs["gt"].astype(np.int64))
        produced |= _scores(label, truth, len(posterior))
    return produced


def _scores(label: Tensor, truth: Tensor, num_classes: int) -> dict[str, Any]:
    """Give confusion matrix and IoU of one image's label map (H, W)."""
    counter = ConfusionMatrix(num_classes=num_classes)
    counter.update(label[None], truth[None])
    matrix = counter.compute().matrix
    hit = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - hit
    # of one image; classes that were predicted and do not occur count, other than in our scores
    iou = torch.where(union > 0, hit.double() / union.clamp_min(1), -1.0)
    return {"confusion": matrix, "iou": iou, "miou": float(iou[union > 0].mean())}


@torch.no_grad()
def inference(case: Case) -> Produced:
    """Compute the network's logits at every scale, and what the protocol makes of them."""
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
    """Compute what the protocol makes of given logits."""
    return _predicted(case, StoredLogits(case))


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
