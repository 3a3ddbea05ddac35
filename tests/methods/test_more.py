"""MoRe as a whole: reference values, what a step computes, both maps, what is refused."""

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_more import MAX_STEPS, SIDE, TERMS, losses_at, make_batch, make_images, tiny
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.evaluation.evaluator import evaluate
from wsss.evaluation.inference import predict
from wsss.evaluation.protocol import Protocol
from wsss.maps.pixels import denormalise
from wsss.maps.pseudo_labels import refine_cam_to_label
from wsss.methods.more import MoRe, MoReSettings
from wsss.methods.more.contrast import cle_loss, distinct_loss, select_tokens, uncertainty_map
from wsss.methods.more.contrast import une_loss as une
from wsss.methods.more.official import OFFICIAL, Quirks, official_name, our_name
from wsss.methods.official import load_official
from wsss.models.aux_tokens import aux_map, max_pooled_logits
from wsss.models.backbone import Backbone
from wsss.models.weights import read_state_dict
from wsss.runs.compose import compose_run
from wsss.runs.conversion import convert
from wsss.runs.folder import build_module

# ---- reference values of more.md section 10 ------------------------------------------------------


@pytest.fixture(scope="module")
def vit_base() -> MoRe:
    """VOC's network with the weights of the golden README's rule."""
    backbone = Backbone(name="vit_base_patch16_224", weights="random")
    settings = MoReSettings(max_steps=20000)
    module = MoRe(backbone=backbone, num_classes=20, settings=settings, quirks=OFFICIAL).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            key = official_name(name)
            draw = np.random.default_rng(zlib.crc32(key.encode()))
            z = draw.standard_normal(parameter.shape).astype(np.float32)
            if key.endswith(("cls_token", "pos_embed")):
                z = 0.2 * z
            elif z.ndim >= 2:
                z = z / np.sqrt(np.prod(z.shape[1:]))
            else:
                z = 0.1 * z if key.endswith(".bias") else 1 + 0.1 * z
            parameter.copy_(torch.from_numpy(np.asarray(z, dtype=np.float32)))
    return module


def noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


REFERENCES = [
    (
        (224, 224),
        ([2.26967, -1.21689, 3.39941], [-5.19108, -1.83562, -3.14573]),
        ([-0.58327, -0.86204, 0.05696], 0.801603, 21.4838),
        (1.162808, 11.820166, 30.5763, 0.503484),
    ),
    (
        (160, 256),
        ([1.79775, -1.25801, 3.8565], [-3.51969, -0.22492, -2.28388]),
        ([-0.34099, -0.76597, -0.29754], 0.803344, 15.1677),
        (1.133332, 11.484264, 30.5216, 0.500986),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "logits", "means", "losses"), REFERENCES)
@torch.no_grad()
def test_reference_values(
    vit_base: MoRe,
    size: tuple[int, int],
    logits: tuple[list[float], list[float]],
    means: tuple[list[float], float, float],
    losses: tuple[float, ...],
) -> None:
    images = noise(0, (1, 3, *size))
    features = vit_base.encode(images)
    aux = aux_map(features, vit_base.aux_block)
    tokens, patches = vit_base.class_tokens(features), features.patch_map
    for classifier, values, expected in (
        (vit_base.classifier, patches, logits[0]),
        (vit_base.aux_classifier, aux, logits[1]),
    ):
        found = max_pooled_logits(classifier, values)[0, :3].tolist()
        assert found == pytest.approx(expected, abs=2e-5)
    assert tokens[0, 0, :3].tolist() == pytest.approx(means[0], abs=2e-5)
    assert patches.abs().mean().item() == pytest.approx(means[1], abs=1e-5)
    assert vit_base.raw_lam(images)[0].abs().mean().item() == pytest.approx(means[2], rel=1e-5)
    if size == (224, 224):
        seg = vit_base.decoder(patches)[0, 0, 0, :3].tolist()
        assert seg == pytest.approx([-0.39212, -0.29029, -0.25055], abs=2e-5)
    labels = torch.zeros(1, 20)
    labels[0, [0, 6]] = 1
    drawn = np.random.RandomState(5).choice([0, 1, 7, 255], (1, *features.grid))
    mask = torch.from_numpy(drawn)
    torch.manual_seed(0)
    selected = select_tokens(uncertainty_map(mask), [None], corner=True)
    found = (
        distinct_loss(tokens),
        cle_loss(tokens, patches, mask, labels, 0.5),
        cle_loss(tokens, patches, mask, labels, 0.1),
        une(tokens, patches, selected, labels),
    )
    assert [value.item() for value in found] == pytest.approx(losses, rel=1e-5)


# ---- network -------------------------------------------------------------------------------------


def test_tokens_are_registers_classes_patches() -> None:
    module, batch = tiny(), make_batch()
    vit: Any = module.backbone.vit
    assert vit.cls_token.shape == (1, 8, 48)
    assert vit.pos_embed.shape == (1, 8 + 16, 48)
    assert vit.pos_embed.requires_grad
    registers = vit.pos_embed[0, :4]
    assert registers.std().item() == pytest.approx(0.88, abs=0.08)
    assert registers.abs().max() <= 2
    narrow: Any = tiny(register_std=0.1).backbone.vit
    assert narrow.pos_embed[0, :4].std().item() == pytest.approx(0.1, abs=0.02)
    features = module.encode(batch["image"])
    plain = tiny(graph=False)
    assert plain.graph is None
    assert torch.equal(plain.class_tokens(plain.encode(batch["image"])), features.cls_tokens[:, 4:])


def test_positions_stay_on_their_own_square_grid() -> None:
    """64 x 64 px is the stored grid; 32 x 128 has as many patches in another shape."""
    module = tiny()
    vit: Any = module.backbone.vit
    with torch.no_grad():
        vit.pos_embed[:, 8:] = torch.randn(1, 16, 48)
    zeros = torch.zeros(1, 3, 64, 64)
    embedded, _ = module.backbone.embed(zeros)
    bias = vit.patch_embed.proj.bias
    torch.testing.assert_close(embedded[:, 8:] - bias, vit.pos_embed[:, 8:], atol=1e-6, rtol=0)
    embedded, grid = module.backbone.embed(torch.zeros(1, 3, 32, 128))
    assert grid == (2, 8)
    patches = vit.pos_embed[:, 8:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resized = F.interpolate(patches, scale_factor=(2.1 / 4, 8.1 / 4), mode="bicubic")
    found = (embedded[:, 8:] - bias).unflatten(1, grid).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, resized, atol=1e-5, rtol=0)


def test_the_maps_are_products_with_classifier_and_class_tokens() -> None:
    module, images = tiny().eval(), make_images()
    features = module.encode(images)
    cam, cam_aux = module.raw_cams(images)
    weights = module.classifier.weight[:, :, 0, 0], module.aux_classifier.weight[:, :, 0, 0]
    expected = torch.einsum("bdhw,kd->bkhw", features.patch_map, weights[0])
    torch.testing.assert_close(cam, expected)
    second = aux_map(features, 1)
    torch.testing.assert_close(cam_aux, torch.einsum("bdhw,kd->bkhw", second, weights[1]))
    tokens = module.class_tokens(features)
    expected = torch.einsum("bdhw,bkd->bkhw", features.patch_map, tokens)
    torch.testing.assert_close(module.raw_lam(images)[0], expected)
    torch.testing.assert_close(module.aux_activation(images)[0], cam_aux)
    assert not any(one.requires_grad for one in (cam, cam_aux))


def test_the_last_block_is_an_auxiliary_one_after_its_norm() -> None:
    module, images = tiny(aux_layer=-1).eval(), make_images()
    features = module.encode(images)
    assert torch.equal(aux_map(features, module.aux_block), features.patch_map)
    torch.testing.assert_close(module.aux_activation(images)[0], module.raw_cams(images)[1])


@pytest.mark.parametrize("depth", [3, 5])
def test_other_sizes_and_one_class_work(depth: int) -> None:
    module = tiny(num_classes=1, depth=depth, registers=2, neighbours=5)
    step = module.losses(make_batch(side=144, num_classes=1), MAX_STEPS - 1)
    assert step.total.isfinite()
    assert module(make_images(90, 130)).seg_logits.shape == (2, 2, 5, 8)


# ---- evaluation ----------------------------------------------------------------------------------


def test_both_maps_are_of_labelled_classes_alone() -> None:
    module, batch = tiny().eval(), make_batch()
    further = module.further_cams(batch["image"], batch["labels"])
    assert set(further) == set(module.further_map_names)
    for maps in (module.cams(batch["image"], batch["labels"]), further["lam"]):
        assert maps.shape == (2, 4, SIDE, SIDE)
        assert 0 <= maps.min() <= maps.max() <= 1
        assert not maps[batch["labels"] == 0].any()
        assert (maps.amax((2, 3)) > 0.9)[batch["labels"] == 1].all()
    shown = module.gallery_maps(batch["image"], batch["labels"])["LAM"]
    assert torch.equal(shown[1], further["lam"][1, 2])


def test_a_lam_keeps_what_is_negative_and_forgets_constants() -> None:
    module, images = tiny().eval(), make_images()
    (raw,) = module.raw_lam(images)
    every = torch.ones(2, 4)
    plain = module.further_cams(images, every)["lam"]
    raised = tiny().eval()
    raised.raw_lam = lambda x: [3 * module.raw_lam(x)[0] - 500]  # type: ignore[method-assign]
    torch.testing.assert_close(raised.further_cams(images, every)["lam"], plain, atol=1e-3, rtol=0)
    assert (raw < 0).any()
    up = F.interpolate(raw, (SIDE, SIDE), mode="bilinear")
    (back,) = module.raw_lam(images.flip(-1))
    best = torch.maximum(up, F.interpolate(back, (SIDE, SIDE), mode="bilinear").flip(-1))
    best = best - best.amin((2, 3), keepdim=True)
    expected = best / (best.amax((2, 3), keepdim=True) + 1e-5)
    torch.testing.assert_close(plain, expected)


def test_the_lam_is_scored_beside_the_cam() -> None:
    module, batch = tiny().eval(), make_batch()
    masks = torch.zeros(2, SIDE, SIDE, dtype=torch.long)
    masks[0, :40], masks[0, 90:], masks[1, :, 30:] = 1, 4, 3
    rgb = torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8)
    batch |= {"mask": masks, "rgb": rgb, "index": torch.arange(2)}
    protocol = Protocol(cam_threshold=0.4)
    result = evaluate(module, [batch], protocol, ["a", "b", "c", "d"])
    lam = module.further_cams(batch["image"], batch["labels"])["lam"]

    def miou(threshold: float) -> float:
        value, best = lam.max(dim=1)
        guess = (best + 1) * (value > threshold)
        parts = []
        for k in masks.unique():
            hit = ((guess == k) & (masks == k)).sum().item()
            parts.append(hit / ((guess == k) | (masks == k)).sum().item())
        return sum(parts) / len(parts)

    assert result["lam_miou"] == pytest.approx(miou(0.4), abs=1e-9)
    curve = {t: miou(t) for t in protocol.curve_thresholds}
    best = max(curve, key=lambda t: curve[t])
    assert result["lam_miou_oracle"] == pytest.approx(curve[best], abs=1e-9)
    assert result["lam_threshold_oracle"] == best
    assert result["seed_miou"] != result["lam_miou"]


def test_a_scale_is_sampled_from_the_native_image_at_once() -> None:
    module, images = tiny().eval(), make_images(90, 120)
    protocol = Protocol(
        resize=64, single_resize=64, seg_scales=(1.0, 1.5), scale_from="native", scale_merge="max"
    )
    with torch.no_grad():
        merged = predict(module, images, (90, 120), protocol).merged
        parts = []
        for side in (64, 96):
            scaled = F.interpolate(images, (side, side), mode="bilinear")
            logits = module(scaled).seg_logits
            parts.append(F.interpolate(logits, (90, 120), mode="bilinear"))
        twice = predict(module, images, (90, 120), replace(protocol, scale_from="resized")).merged
    torch.testing.assert_close(merged, torch.maximum(*parts))
    assert not torch.allclose(merged, twice, atol=1e-4)


# ---- training ------------------------------------------------------------------------------------


def passes_of(module: MoRe, step: int) -> list[tuple[int, int]]:
    """Run a step; images and side of every pass through the first and the last block."""
    seen: list[tuple[int, int]] = []
    blocks = module.backbone.vit.blocks
    blocks[0].register_forward_pre_hook(lambda _, x: seen.append((0, len(x[0]))))
    blocks[-1].register_forward_pre_hook(lambda _, x: seen.append((1, len(x[0]))))
    losses_at(module, step)
    return seen


def test_passes_are_as_few_and_short_as_the_terms_allow() -> None:
    """Image, its mirror image, both at half size; blocks above the auxiliary one only where used.

    Steps 0 to 10 have no segmentation, steps up to 50 early masks.
    """
    whole = [(0, 2), (1, 2), (0, 2), (1, 2), (0, 4), (1, 4)]
    short = [(0, 2), (1, 2), (0, 2), (0, 4)]
    assert passes_of(tiny(), 10) == short
    assert passes_of(tiny(), 11) == whole
    assert passes_of(tiny(seg_weight=0.0, reg_weight=0.0), 50) == short
    assert passes_of(tiny(seg_weight=0.0, reg_weight=0.0), 51) == whole
    none = dict.fromkeys([f"{term}_weight" for term in TERMS[3:]], 0.0)
    assert passes_of(tiny(**none), 99) == [(0, 2), (1, 2)]


def test_cam_passes_run_neither_graph_nor_decoder() -> None:
    module, calls = tiny(), {"graph": 0, "decoder": 0}

    def count(name: str, part: nn.Module) -> None:
        part.register_forward_pre_hook(lambda *_: calls.update({name: calls[name] + 1}))

    assert module.graph is not None
    count("graph", module.graph)
    count("decoder", module.decoder)
    losses_at(module, MAX_STEPS - 1)
    assert calls == {"graph": 1, "decoder": 1}


def test_terms_without_weight_are_not_computed() -> None:
    for step, terms in ((10, TERMS[:6]), (11, TERMS)):
        assert list(losses_at(tiny(), step).losses) == [f"{term}_loss" for term in terms]
    late = tiny(ptc_after=0.2, tokens_after=0.4, distinct_weight=0.0, seg_after=0.6)
    for step, terms in ((20, ("cls", "cls_aux")), (21, ("cls", "cls_aux", "ptc"))):
        assert list(losses_at(late, step).losses) == [f"{term}_loss" for term in terms]
    assert list(losses_at(late, 41).losses) == [
        f"{term}_loss" for term in ("cls", "cls_aux", "ptc", "cle", "une")
    ]


@pytest.mark.parametrize("term", ["ptc", "cle", "une"])
def test_a_term_of_tokens_works_alone(term: str) -> None:
    """In the second half, where CLE and UNE need the final CAM and PTC does not."""
    others = [f"{name}_weight" for name in TERMS[2:] if name != term]
    step = losses_at(tiny(**dict.fromkeys(others, 0.0)), MAX_STEPS - 1)
    assert list(step.losses) == ["cls_loss", "cls_aux_loss", f"{term}_loss"]
    assert ("cam" in step.seen) is (term != "ptc")
    assert step.losses[f"{term}_loss"].requires_grad


def test_the_total_is_the_weighted_sum() -> None:
    module = tiny(OFFICIAL)
    step = losses_at(module, MAX_STEPS - 1)
    weights = [1, 1, 1, 0.3, 0.2, 0.1, 0.12, 0.05]
    terms = [step.losses[f"{term}_loss"].item() for term in TERMS]
    expected = sum(w * t for w, t in zip(weights, terms, strict=True))
    assert step.total.item() == pytest.approx(expected, rel=1e-6)
    assert step.losses["cls_loss"].item() == pytest.approx(
        F.multilabel_soft_margin_loss(step.outputs.class_logits, make_batch()["labels"]).item()
    )


@pytest.mark.parametrize("step", [50, 51])
def test_masks_and_labels_come_from_their_maps(step: int) -> None:
    """CLE and UNE change from the auxiliary to the final map; PTC and pseudo labels never do."""
    module, batch = tiny(), make_batch()
    seen = losses_at(module, step).seen
    s, labels = module.settings, batch["labels"]
    rules = {"ptc_mask": ("cam_aux", s.high_threshold, s.low_threshold)}
    rules["cle_mask"] = ("cam_aux", s.cle_high_threshold, s.low_threshold)
    rules["une_mask"] = rules["ptc_mask"]
    if step > 50:
        late = ("cam", s.late_high_threshold, s.late_low_threshold)
        rules |= {"cle_mask": late, "une_mask": late}
    for name, (source, high, low) in rules.items():
        small = F.interpolate(seen[source], (8, 8), mode="bilinear", align_corners=False)
        score, best = (small * labels[..., None, None]).max(dim=1)
        expected = torch.where(score > high, best + 1, torch.where(score > low, 255, 0))
        inside = torch.zeros(2, 8, 8, dtype=torch.bool)
        inside[0], inside[1, 1:, :7] = True, True
        assert torch.equal(seen[name], expected.masked_fill(~inside, 255)), name
    guide, boxes = module.guide(batch["image"]), batch["box"]
    with torch.no_grad():
        pseudo = refine_cam_to_label(
            module.par, guide, seen["cam"], labels, boxes=boxes, high=0.75, low=0.55
        )
        other = module.pseudo_labels(batch["image"], seen["cam_aux"], labels, batch["box"])
    assert torch.equal(seen["pseudo_label"], pseudo)
    assert not torch.equal(pseudo, other)


def test_training_shares_the_cam_of_evaluation() -> None:
    module, batch = tiny(), make_batch()
    seen = losses_at(module, MAX_STEPS - 1).seen
    expected = module.cams(batch["image"], batch["labels"])
    masked = seen["cam"] * batch["labels"][..., None, None]
    torch.testing.assert_close(masked, expected, rtol=0, atol=2e-6)
    short = losses_at(module, 0).seen
    assert "cam" not in short
    torch.testing.assert_close(short["cam_aux"], seen["cam_aux"], rtol=0, atol=2e-6)


def test_the_guide_is_truncated() -> None:
    images = make_images()
    levels = tiny().guide(images) * 255
    expected = denormalise(images).trunc().clamp(0, 255)
    torch.testing.assert_close(levels, expected, rtol=0, atol=1e-4)


def test_groups_are_the_official_five() -> None:
    module = tiny(lr=1e-3, head_lr_factor=5.0, weight_decay=0.03)
    optimizer = module.optimizer(module.param_groups())
    names = {id(p): official_name(name) for name, p in module.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 5e-3, 5e-3, 5e-3]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.03}
    assert "encoder.cls_token" in groups[0]
    assert "encoder.blocks.0.norm1.weight" in groups[1]
    assert groups[2] == {"classifier.weight", "aux_classifier.weight"}
    assert {name.split(".")[0] for name in groups[3]} == {"graph_layer"}
    assert {name.split(".")[0] for name in groups[4]} == {"decoder"}
    assert sum(map(len, groups)) == len(names)
    assert len(tiny(graph=False).param_groups()) == 4


def test_rates_are_those_of_the_page() -> None:
    module = tiny(max_steps=20000, warmup_steps=1500)
    for step, rate in ((0, 6e-11), (1499, 5.996e-5), (1500, 5.593438e-5), (19999, 8.07652e-9)):
        assert 6e-5 * module.lr_multiplier(step) == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize("quirks", [Quirks(), OFFICIAL])
def test_a_few_steps_lower_the_loss(quirks: Quirks) -> None:
    module = tiny(quirks, lr=3e-4, scales=(1.0,))
    optimizer = module.optimizer(module.param_groups())
    first = losses_at(module, 99)
    for _ in range(5):
        optimizer.zero_grad()
        losses_at(module, 99).total.backward()
        optimizer.step()
    last = losses_at(module, 99)
    assert last.total.item() < first.total.item()
    assert last.losses["cls_loss"].item() < first.losses["cls_loss"].item()
    assert all(bool(p.isfinite().all()) for p in module.parameters())


# ---- official checkpoints ------------------------------------------------------------------------


def official_state(module: MoRe) -> dict[str, Tensor]:
    state = {official_name(name): torch.randn_like(p) for name, p in module.state_dict().items()}
    return state | {
        "encoder.head.weight": torch.randn(8, 48),
        "encoder.head.bias": torch.randn(8),
        "graph_layer._fc1.0.weight": torch.randn(48, 48),
        "graph_layer._fc1.0.bias": torch.randn(48),
    }


def test_official_checkpoints_of_both_scripts_load(tmp_path: Path) -> None:
    module = tiny()
    state = official_state(module)
    coco = {f"module.{name}": value for name, value in state.items()}
    optimizer = {"state": {}, "param_groups": []}
    whole = {"step": 3, "model_state_dict": coco, "optimizer_state_dict": optimizer, "lr": 6e-5}
    for content in (state, whole):
        torch.save(content, tmp_path / "official.pth")
        fresh = tiny()
        load_official("more", fresh, read_state_dict(tmp_path / "official.pth"), "official.pth")
        for name, value in fresh.state_dict().items():
            assert torch.equal(value, state[official_name(name)]), name
            assert our_name(official_name(name)) == name
    unused = [name for name in state if our_name(name) is None]
    assert len(unused) == 4
    assert all("head." in name or "_fc1" in name for name in unused)


def test_converting_names_what_is_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["backbone.weights=random", "+backbone.overrides.embed_dim=48"]
    small += ["data=minivoc", "backbone.overrides.depth=4", "method.decoder_channels=16"]
    module = build_module(compose_run(["method=more", *small]), 8)
    torch.save(official_state(module), tmp_path / "official.pth")
    convert("more", str(tmp_path / "official.pth"), str(tmp_path / "a.ckpt"), overrides=small)
    dropped = capsys.readouterr().out.partition("dropped, as the method never uses them: ")[2]
    unused = ["encoder.head.weight", "encoder.head.bias"]
    unused += ["graph_layer._fc1.0.weight", "graph_layer._fc1.0.bias"]
    assert dropped.strip().split(", ") == unused


def test_a_checkpoint_of_other_classes_names_its_tokens() -> None:
    with pytest.raises(WSSSError, match=r"encoder\.cls_token \(expected \(1, 9, 48\), got \(1, 8"):
        load_official("more", tiny(num_classes=5), official_state(tiny()), "official.pth")


@pytest.mark.slow
def test_the_network_has_the_official_number_of_parameters(vit_base: MoRe) -> None:
    """And an unused head of 24 outputs, and an unused layer of the graph module."""
    unused = 24 * 769 + 590_592
    assert sum(p.numel() for p in vit_base.parameters()) + unused == 94_746_648


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-5, 4])
def test_an_auxiliary_block_beyond_the_encoder_is_refused(layer: int) -> None:
    with pytest.raises(WSSSError, match=rf"method\.aux_layer={layer}: the backbone has 4 blocks"):
        tiny(aux_layer=layer)


def test_a_backbone_without_one_class_token_is_refused() -> None:
    for name in ("vit_base_patch16_siglip_224", "deit_tiny_distilled_patch16_224"):
        backbone = Backbone(name=name, weights="random", overrides={"depth": 1})
        with pytest.raises(WSSSError, match="method=more turns the class token into one a class"):
            MoRe(backbone=backbone, num_classes=2, settings=MoReSettings(max_steps=1))


def test_more_neighbours_than_tokens_name_the_key() -> None:
    with pytest.raises(WSSSError, match=r"method\.neighbours=69: a class token has 68 nodes"):
        losses_at(tiny(neighbours=69), 0)
    assert losses_at(tiny(neighbours=68), 0).total.isfinite()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.gate=both", r"method\.gate='?both"),
        ("method.neighbours=0", r"method\.neighbours=0"),
        ("method.registers=-1", r"method\.registers=-1"),
        ("method.late_low_threshold=0.9", "expected late_low_threshold <= late_high_threshold"),
        ("+method.quirks.corner=true", "corner_token"),
    ],
)
def test_wrong_settings_are_refused_before_any_data(override: str, message: str) -> None:
    with pytest.raises(WSSSError, match=message) as caught:
        compose_run(["method=more", "data=minivoc", override])
    assert "\n" not in str(caught.value)
