"""MoRe's parity cases of the network, its maps and inference, and the network of other cases."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wsss.evaluation.inference import localise_further, predict
from wsss.evaluation.protocol import Protocol
from wsss.maps.cams import multiscale_cam
from wsss.maps.pseudo_labels import cam_to_label
from wsss.maps.refine.dense_crf import CRFPreset, dense_crf
from wsss.methods.more import MoRe, MoReSettings
from wsss.methods.more.graph import CategoryGraph
from wsss.methods.more.official import OFFICIAL, official_name, our_name
from wsss.methods.official import load_official
from wsss.models.aux_tokens import aux_map, max_pooled_logits
from wsss.models.backbone import Backbone
from wsss.models.class_tokens import give_class_tokens
from wsss.models.vit import resize_positions
from wsss.models.weights import load_state_dict_strictly
from wsss.parity.cases import Case, Found, Produced
from wsss.parity.inputs import as_tensor, gradient_norm, network_images
from wsss.parity.networks import build_backbone, official_weights, parameter_names
from wsss.parity.tolerances import Array

MAX_STEPS = 20_000  # VOC's run


# ---- building ------------------------------------------------------------------------------------


def build_more(case: Case, **overrides: Any) -> MoRe:
    """Build the method as training does with ``official_compat=true``, with the file's weights."""
    cfg, state = case.settings, official_weights(case)
    registers = cfg.get("registers", 4)
    encoder = {
        name.removeprefix("encoder."): value
        for name, value in state.items()
        if name.startswith("encoder.") and not name.startswith("encoder.head.")
    }
    count = encoder["cls_token"].shape[1] - registers
    decoder = state.get("decoder.conv6.weight", torch.empty(1))
    settings: dict[str, Any] = {
        "max_steps": MAX_STEPS,
        "registers": registers,
        "aux_layer": cfg.get("aux_layer", -3),
        "decoder_channels": decoder.shape[0],
        "scales": cfg.get("scales", (1.0, 0.5, 0.75, 1.5)),
        "lam_scales": cfg.get("lam_scales", (1.0,)),
        "high_threshold": cfg.get("high_thre", 0.7),
        "low_threshold": cfg.get("low_thre", 0.25),
        "temperature": cfg.get("cle_temp", 0.5),
    }
    # one class token before the method makes its own of it
    single = dict(encoder)
    single["cls_token"] = encoder["cls_token"][:, :1]
    single["pos_embed"] = encoder["pos_embed"][:, registers + count - 1 :]
    model = MoRe(
        backbone=build_backbone(
            single, num_heads=cfg.get("heads", 3), norm_eps=cfg.get("ln_eps", 1e-6)
        ),
        num_classes=count,
        settings=MoReSettings(**(settings | overrides)),
        quirks=OFFICIAL,
    )
    if "classifier.weight" in state:
        load_official("more", model, state, case.name)
    else:  # a file of the encoder alone
        named = {our_name(name): value for name, value in state.items()}
        own = {n.removeprefix("backbone."): v for n, v in named.items() if n is not None}
        load_state_dict_strictly(model.backbone, own, case.name)
    return model.eval()


def official_names(case: Case) -> dict[str, str | None]:
    """Give official parameter name -> ours, None where the method never uses it."""
    return {name: our_name(name) for name in parameter_names(case)}


def norms_of(names: list[str], gradients: dict[str, Tensor | None]) -> Array:
    """Give the L2 norm of each named gradient; NaN where there is none at all."""
    found = [gradients[name] for name in names]
    return np.array([np.nan if g is None else gradient_norm([g]) for g in found])


# ---- cases ---------------------------------------------------------------------------------------


@torch.no_grad()
def a_encoder(case: Case) -> Produced:
    """Compute class tokens, patch tokens and auxiliary tokens at every size."""
    model, produced = build_more(case), Found()
    for size in case.suffixes("img", "cls", "patch", "aux"):  # "_64x96"
        with produced.given():
            features = model.encode(network_images(case.inputs[f"img{size}"]))
            produced[f"cls{size}"] = features.cls_tokens[:, model.settings.registers :]
            produced[f"patch{size}"] = features.patch_tokens
            produced[f"aux{size}"] = features.intermediates.get(
                model.aux_block, features.patch_tokens
            )
    return produced


def b_gcr(case: Case) -> Produced:
    """Compute the graph module with its choice and all gradients."""
    weights = {our_name(name): value for name, value in official_weights(case).items()}
    state = {n.removeprefix("graph."): v for n, v in weights.items() if n is not None}
    tokens = as_tensor(case.inputs["tokens"]).requires_grad_()
    patches = as_tensor(case.inputs["patches"]).requires_grad_()
    graph = CategoryGraph(tokens.shape[2], neighbours=case.settings["top_k"])
    load_state_dict_strictly(graph, state, case.name)
    joined = graph(tokens, patches)
    total = (joined * as_tensor(case.inputs["probe"])).sum()
    named = dict(graph.named_parameters())
    found = torch.autograd.grad(total, [tokens, patches, *named.values()], allow_unused=True)
    official = {official_name(f"graph.{name}"): g for name, g in zip(named, found[2:], strict=True)}
    names = parameter_names(case)
    with torch.no_grad():
        nodes = torch.cat([tokens, patches], dim=1)
        chosen = graph.choose(graph.head_proj(tokens), graph.tail_proj(nodes))
    return {
        "tokens": joined,
        "grad_tokens": found[0],
        "grad_patches": torch.zeros_like(patches) if found[1] is None else found[1],
        "gradnorm_param": norms_of(names, dict.fromkeys(names) | official),
        "topk_index": chosen.nodes,
        "grad_param_names": names,
    }


@torch.no_grad()
def c_network(case: Case) -> Produced:
    """Compute every output of the network."""
    model, images = build_more(case), network_images(case.inputs["img"])
    outputs, features = model(images), model.encode(images)
    cam, cam_aux = model.raw_cams(images)
    return {
        "cls": outputs.class_logits,
        "seg": outputs.seg_logits,
        "fmap": features.patch_map,
        "cls_aux": max_pooled_logits(model.aux_classifier, aux_map(features, model.aux_block)),
        "tokens": model.class_tokens(features),
        "tokens_without_gcr": features.cls_tokens[:, model.settings.registers :],
        "cam": cam,
        "cam_aux": cam_aux,
        "lam": model.raw_lam(images)[0],
    }


def d_maps(case: Case) -> Produced:
    """Compute normalised multi-scale CAMs, and the auxiliary one by the shorter way, and LAMs."""
    model, images = build_more(case), network_images(case.inputs["img"])
    scales, every = model.settings.scales, images.new_ones(len(images), model.num_classes)
    (cam_aux,) = multiscale_cam(model.aux_activation, images, scales=scales)
    lam = model.further_cams(images, every)["lam"]
    return {"cam": model.cams(images, every), "cam_aux": cam_aux, "lam": lam}


def i_inference(case: Case) -> Produced:
    """Compute segmentation and LAM seeds at native size, and the dense CRF of given scores."""
    cfg, produced = case.settings, Found()
    crf = cfg.get("crf", {})
    preset = CRFPreset(
        case.name,
        pos_xy=crf.get("gaussian_sxy", 1),
        pos_w=crf.get("gaussian_weight", 3),
        bi_xy=crf.get("bilateral_sxy", 67),
        bi_rgb=crf.get("bilateral_srgb", 3),
        bi_w=crf.get("bilateral_weight", 4),
        iterations=crf.get("iterations", 10),
    )
    with produced.given():
        produced |= _segmentation_and_seeds(case)
    with produced.given():
        posterior = dense_crf(case.inputs["img"][0], case.inputs["crf_prob"], preset)
        produced |= {"crf_prob": posterior, "crf_label": posterior.argmax(0)}
    with produced.given():
        posterior = dense_crf(case.inputs["img"][0], case.inputs["lam_crf_prob"], preset)
        produced["lam_crf_label"] = case.inputs["lam_crf_classes"][posterior.argmax(0)]
    return produced


@torch.no_grad()
def _segmentation_and_seeds(case: Case) -> dict[str, Tensor]:
    """Compute both as an evaluation under MoRe's protocol does."""
    model, images = build_more(case), network_images(case.inputs["img"])
    cfg, size, side = case.settings, images.shape[-2:], case.settings["base"]
    protocol = Protocol(
        resize=side,
        single_resize=side,
        cam_resize=side,
        seg_scales=tuple(cfg["scales"]),
        scale_from="native",
        flip=True,
        flip_merge="sum",
        scale_merge="max",
        cam_threshold=cfg["bkg_thre"],
    )
    merged = predict(model, images, size, protocol).merged
    assert merged is not None  # the protocol has a mirror image
    labels = as_tensor(case.inputs["cls_label"])
    # the file's maps are of all classes
    lam = localise_further(model, images, torch.ones_like(labels), size, protocol)["lam"]
    return {
        "seg": merged[0],
        "seg_label": merged[0].argmax(0),
        "lam": lam[0],
        "lam_label": cam_to_label(lam, labels, bg_threshold=protocol.cam_threshold)[0],
    }


def j_init(case: Case) -> Produced:
    """Make class tokens and registers of a stored class token and positions."""
    cfg, token = case.settings, as_tensor(case.inputs["cls_token"])
    positions, grid = as_tensor(case.inputs["pos_embed"]), cfg["grid_to"]
    backbone = Backbone(
        name="vit_tiny_patch16_224",
        weights="random",
        overrides={"embed_dim": token.shape[2], "depth": 1, "img_size": 16 * grid},
    )
    vit: Any = backbone.vit
    vit.cls_token = nn.Parameter(token)
    vit.pos_embed = nn.Parameter(resize_positions(positions, (grid, grid), num_prefix=1))
    give_class_tokens(backbone, cfg["classes"], registers=cfg["registers"])
    return {
        "cls_token": vit.cls_token.detach(),
        "pos_embed_without_registers": vit.pos_embed.detach()[:, cfg["registers"] :],
    }
