"""ToCo's parity cases of the network, and the network that other cases use."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsss.maps.cams import multiscale_cam
from wsss.methods.official import load_official
from wsss.methods.toco.method import ToCo, ToCoSettings
from wsss.methods.toco.official import OFFICIAL, official_name, our_name
from wsss.models.backbone import Backbone
from wsss.models.weights import load_encoder
from wsss.parity.cases import Case, Found, Produced
from wsss.parity.inputs import network_images
from wsss.parity.networks import build_backbone, official_weights
from wsss.parity.tolerances import Array

ITERATIONS, GATED_ITERATIONS = 20_000, 2_000  # VOC's run, and its steps without segmentation loss


# ---- building ------------------------------------------------------------------------------------


def thresholds(case: Case) -> tuple[float, float, float]:
    """Read high, low and background threshold."""
    cfg = case.settings
    return cfg.get("high_thre", 0.7), cfg.get("low_thre", 0.25), cfg.get("bkg_thre", 0.5)


def _network_settings(case: Case) -> dict[str, Any]:
    return case.settings | case.settings.get("net", {})


def _encoder(case: Case, state: dict[str, Tensor]) -> Backbone:
    """Build a backbone of the file's shape, still with random weights."""
    cfg = _network_settings(case)
    state = {name.removeprefix("encoder."): value for name, value in state.items()}
    return build_backbone(
        state, num_heads=cfg.get("num_heads", 3), norm_eps=cfg.get("ln_eps", 1e-6)
    )


def build_toco(case: Case, **overrides: Any) -> ToCo:
    """Build the method as training does with ``official_compat=true``, with the file's weights."""
    cfg, state = _network_settings(case), official_weights(case)
    high, low, _ = thresholds(case)
    settings: dict[str, Any] = {
        "max_steps": ITERATIONS,
        "aux_layer": cfg.get("aux_layer", -3),
        "decoder_channels": state["decoder.conv6.weight"].shape[0],
        "local_size": cfg.get("local_size", 96),
        "scales": cfg.get("scales", (1.0, 0.5, 1.5)),
        "high_threshold": high,
        "low_threshold": low,
        "temperature": cfg.get("temp", 0.5),
        "momentum": cfg.get("momentum", 0.9),
        "seg_after": GATED_ITERATIONS / ITERATIONS,
    }
    model = ToCo(
        backbone=_encoder(case, state),
        num_classes=state["classifier.weight"].shape[0],
        settings=ToCoSettings(**(settings | overrides)),
        quirks=OFFICIAL,
    )
    load_official("toco", model, state, case.name)
    return model.eval()


def tiny_toco(**settings: Any) -> ToCo:
    """Build a small network of its own, for what does not depend on the network."""
    backbone = Backbone(
        name="vit_tiny_patch16_224",
        weights="random",
        overrides={"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 32},
    )
    chosen = ToCoSettings(max_steps=ITERATIONS, aux_layer=-1, decoder_channels=16, **settings)
    return ToCo(backbone=backbone, num_classes=2, settings=chosen, quirks=OFFICIAL)


@torch.no_grad()
def projections(model: ToCo, class_tokens: Tensor, crops: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what both heads make of the views.

    Args:
        model: gives the encoder and the heads.
        class_tokens: of the global views, (2B, D).
        crops: local views, (8B, 3, s, s).

    Returns:
        Student outputs for the global views and the crops, teacher outputs for the global views.
    """
    local_tokens = model.encode(crops).cls_tokens[:, 0]
    student = model.ctc_student(torch.cat([class_tokens, local_tokens]))
    return student, model.ctc_teacher(class_tokens)


def teacher_parameters(model: ToCo) -> dict[str, Tensor]:
    """Give the teacher head's parameters under their official names."""
    named = model.ctc_teacher.named_parameters(prefix="ctc_teacher")
    return {official_name(name): parameter.detach() for name, parameter in named}


def teacher_summary(model: ToCo) -> dict[str, Array | list[str]]:
    """Give names, sums, norms and first entries of the teacher head's parameters."""
    parameters = teacher_parameters(model)
    flat = [p.numpy().ravel() for p in parameters.values()]
    wide = [f.astype(np.float64) for f in flat]
    return {
        "names": list(parameters),
        "sum": np.array([w.sum() for w in wide]),
        "l2": np.array([np.sqrt((w**2).sum()) for w in wide]),
        "first8": np.stack([f[:8] for f in flat]),
    }


def official_names(case: Case) -> tuple[dict[str, str], list[str]]:
    """Give our parameter name -> official one, and the official ones that no method uses."""
    ours = {name: our_name(name) for name in case.extra["param_names"].tolist()}
    used = {our: official for official, our in ours.items() if our is not None}
    return used, [official for official, our in ours.items() if our is None]


# ---- cases ---------------------------------------------------------------------------------------


@torch.no_grad()
def a_backbone(case: Case) -> Produced:
    """Compute class token, patch tokens and auxiliary tokens at every size."""
    state = official_weights(case)
    backbone = _encoder(case, state).eval()
    load_encoder(backbone.vit, state, case.name)
    aux = case.settings.get("aux_layer", -3) % backbone.depth
    produced = Found()
    for size in case.suffixes("img", "cls", "patch", "aux"):  # "_64x96"
        with produced.given():
            features = backbone(network_images(case.inputs[f"img{size}"]), taps=(aux,))
            last = aux == backbone.depth - 1  # the last list entry is the normed output
            produced[f"cls{size}"] = features.cls_tokens[:, 0]
            produced[f"patch{size}"] = features.patch_tokens
            produced[f"aux{size}"] = features.patch_tokens if last else features.intermediates[aux]
    return produced


@torch.no_grad()
def b_network(case: Case) -> Produced:
    """Compute every output of the network, and the teacher's moving average."""
    model, produced = build_toco(case), Found()
    with produced.given():
        images = network_images(case.inputs["img"])
        outputs, features = model(images), model.encode(images)
        cam, cam_aux = model.raw_cams(images)
        token = features.cls_tokens[:, 0]
        produced |= {
            "cls": outputs.class_logits,
            "seg": outputs.seg_logits,
            "fmap": features.patch_map,
            "cls_aux": model.classify(model.aux_classifier, model.aux_map(features)),
            "cam": cam,
            "cam_aux": cam_aux,
            "cls_token": token,
            "head_student": model.ctc_student(token),
            "head_teacher": model.ctc_teacher(token),
        }
    model.update_teacher()
    produced |= {f"ema_{k}": v for k, v in teacher_summary(model).items()}
    with produced.given():
        produced["cls_with_crops"] = model(network_images(case.inputs["img"])).class_logits
    with produced.given():
        views = torch.cat([network_images(case.inputs[v]) for v in ("view1", "view2")])
        crops = network_images(case.inputs["locals"]).flatten(0, 1)
        student, teacher = projections(model, model.encode(views).cls_tokens[:, 0], crops)
        produced |= {"ctc_student": student, "ctc_teacher": teacher}
    return produced


def c_multiscale_cam(case: Case) -> Produced:
    """Compute normalised multi-scale CAMs of both token sets."""
    model = build_toco(case)
    cam, cam_aux = multiscale_cam(
        model.raw_cams, network_images(case.inputs["img"]), scales=case.settings["scales"]
    )
    return {"cam": cam, "cam_aux": cam_aux}
