"""ToCo: the numbers of toco.md section 8, the quirks, and that nothing is computed in vain."""

import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD
from wsss.methods.base import Batch, Step
from wsss.methods.losses import balanced_segmentation_loss, pair_masks, ptc_loss
from wsss.methods.toco.contrast import LocalCrops, crop_local_views, ctc_loss
from wsss.methods.toco.method import ToCo, ToCoSettings
from wsss.methods.toco.official import CORRECTED, OFFICIAL, Quirks, official_name
from wsss.models.backbone import Backbone

SIDE = 96


def tiny(quirks: Quirks = CORRECTED, **changes: Any) -> ToCo:
    """A ToCo of 4 blocks on 64 px positions; its thresholds suit a random network's maps."""
    torch.manual_seed(0)
    backbone = Backbone(
        name="vit_tiny_patch16_224",
        weights="random",
        overrides={"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 64},
    )
    settings: dict[str, Any] = {
        "max_steps": 100,
        "warmup_steps": 2,
        "local_size": 32,
        "decoder_channels": 32,
        "low_threshold": 0.5,
        "high_threshold": 0.75,
    }
    chosen = ToCoSettings(**{**settings, **changes})
    return ToCo(backbone=backbone, num_classes=4, settings=chosen, quirks=quirks).train()


def make_batch(seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def view() -> Tensor:
        patches = torch.randn(2, 3, 6, 6, generator=generator)
        return nn.functional.interpolate(patches, size=(SIDE, SIDE), mode="bicubic")

    return {
        "image": view(),
        "view2": view(),
        "local_view": view(),
        "labels": torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]]),
        "box": torch.tensor([[0, SIDE, 0, SIDE], [10, 90, 0, 80]]),
    }


def losses_at(module: ToCo, step: int, seed: int = 1) -> Step:
    torch.manual_seed(seed)
    return module.losses(make_batch(seed), step)


# ---- numbers of toco.md section 8 ----------------------------------------------------------------


def sinusoid(shape: tuple[int, ...], a: float, f: Any = np.sin) -> Tensor:
    """S(shape; a, f) of section 8."""
    flat = f(a * np.arange(np.prod(shape), dtype=np.float64))
    return torch.from_numpy(flat.reshape(shape).astype(np.float32))


def noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """R(seed, shape) of section 8."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="module")
def vit_base() -> ToCo:
    """VOC ViT-B with the weights W of section 8."""
    backbone = Backbone(name="vit_base_patch16_224", weights="random")
    module = ToCo(backbone=backbone, num_classes=20, settings=ToCoSettings(max_steps=20000)).eval()
    state = module.state_dict()
    for name, value in state.items():
        key = official_name(name)
        weight = noise(zlib.crc32(key.encode()), tuple(value.shape)) * 0.02
        if "norm" in key and key.endswith(".weight"):
            weight += 1
        if key.endswith("weight_g"):
            weight.fill_(1)
        state[name] = weight
    module.load_state_dict(state)
    return module


def close(value: Tensor, expected: list[float], absolute: float = 1e-5) -> None:
    assert value.tolist() == pytest.approx(expected, abs=absolute)


@pytest.mark.slow
@torch.no_grad()
def test_check_1_forward(vit_base: ToCo) -> None:
    images = noise(0, (1, 3, 224, 224))
    features = vit_base.encode(images)
    outputs = vit_base(images)
    assert outputs.seg_logits is not None
    close(outputs.class_logits[0, :3], [0.5039, 0.35906, -0.1916])
    aux = vit_base.classify(vit_base.aux_classifier, vit_base.aux_map(features))
    close(aux[0, :3], [1.90471, -1.59126, 0.65058])
    close(outputs.seg_logits[0, 0, 0, :3], [0.09329, 0.20172, 0.27341])
    assert features.patch_tokens.abs().mean().item() == pytest.approx(0.80062, abs=1e-5)
    cam, cam_aux = vit_base.raw_cams(images)
    assert cam.abs().mean().item() == pytest.approx(0.453553, abs=2e-6)
    assert cam_aux.abs().mean().item() == pytest.approx(0.604888, abs=2e-6)


@pytest.mark.slow
@torch.no_grad()
def test_check_3_forward_on_a_remainder(vit_base: ToCo) -> None:
    outputs = vit_base(noise(0, (1, 3, 250, 330)))
    assert outputs.seg_logits is not None
    assert outputs.seg_logits.shape == (1, 21, 15, 20)
    close(outputs.class_logits[0, :3], [0.30389, 0.36075, -0.19386])
    assert outputs.seg_logits.abs().mean().item() == pytest.approx(0.261881, abs=2e-6)


@pytest.mark.slow
@torch.no_grad()
def test_check_4_small_images_and_heads(vit_base: ToCo) -> None:
    cls_token = vit_base.backbone(noise(0, (1, 3, 96, 96))).cls_tokens[:, 0]
    close(cls_token[0, :3], [-0.84255, 0.64069, -1.02368])
    close(vit_base.ctc_student(cls_token)[0, :3], [0.0318, 0.05688, 0.08121])
    close(vit_base.ctc_teacher(cls_token)[0, :3], [-0.04588, 0.07768, 0.21015])


def test_check_6_patch_token_contrast() -> None:
    tokens = sinusoid((2, 8, 4, 4), 0.7).requires_grad_()
    label = torch.full((2, 4, 4), 255)
    label[0] = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [255, 0, 1, 255], [0, 0, 0, 0]])
    same, different = pair_masks(label)
    assert (int(same.sum()), int(different.sum())) == (92, 90)
    loss = ptc_loss(tokens, same, different)
    loss.backward()
    assert loss.item() == pytest.approx(0.424032, abs=1e-6)
    assert tokens.grad is not None
    assert tokens.grad.abs().sum().item() == pytest.approx(0.759189, abs=1e-5)


@pytest.mark.parametrize(("temperature", "expected"), [(0.5, 1.064383), (1.0, 0.741124)])
def test_check_7_class_token_contrast(temperature: float, expected: float) -> None:
    student = (0.5 * sinusoid((20, 16), 0.3)).requires_grad_()
    teacher = 0.5 * sinusoid((4, 16), 0.17, np.cos)
    flags = torch.tensor([[1.0, 1, 1, 0, 1, 0, 1, 1, 0, 1], [1.0] * 10])
    loss = ctc_loss(student, teacher, flags, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    if temperature == 0.5:
        assert student.grad is not None
        assert student.grad.abs().sum().item() == pytest.approx(5.226347, abs=1e-5)


@pytest.mark.slow
def test_check_13_whole_loss(vit_base: ToCo) -> None:
    images, view2 = noise(1, (2, 3, 224, 224)), noise(2, (2, 3, 224, 224))
    crops = torch.stack([noise(seed, (2, 3, 96, 96)) for seed in range(10, 18)])
    flags = torch.tensor([[float(f) for f in row] for row in ("1110101101", "1100111111")])
    labels = torch.zeros(2, 20)
    labels[0, [0, 6]] = labels[1, 14] = 1
    kinds = np.array([0, 1, 7, 255])
    token_label = torch.from_numpy(np.random.RandomState(5).choice(kinds, (2, 14, 14)))
    label = torch.from_numpy(np.random.RandomState(6).choice(kinds, (2, 224, 224)))
    kept = {name: value.clone() for name, value in vit_base.ctc_teacher.state_dict().items()}

    features = vit_base.encode(torch.cat([images, view2]))
    tokens, aux = features.patch_map[:2], vit_base.aux_map(features)[:2]
    margin = nn.functional.multilabel_soft_margin_loss
    cls = margin(vit_base.classify(vit_base.classifier, tokens), labels)
    cls_aux = margin(vit_base.classify(vit_base.aux_classifier, aux), labels)
    ptc = ptc_loss(tokens, *pair_masks(token_label))
    local = LocalCrops(crops, flags, torch.zeros(2, 8, 2))
    vit_base.update_teacher()
    ctc = vit_base.class_token_contrast(features, local)
    logits = nn.functional.interpolate(vit_base.decoder(tokens), (224, 224), mode="bilinear")
    seg = balanced_segmentation_loss(logits, label)
    total = cls + cls_aux + 0.2 * ptc + 0.5 * ctc + 0.1 * seg
    total.backward()

    expected = [0.920203, 1.195146, 0.499821, 1.441682, 2.819659, 3.218121]
    close(torch.stack([cls, cls_aux, ptc, ctc, seg, total]).detach(), expected, 5e-6)
    for weight, norm in (
        (vit_base.backbone.vit.blocks[0].attn.qkv.weight, 2.091882),
        (vit_base.decoder.conv6.weight, 0.2086366),
        (vit_base.classifier.weight, 8.046517),
        (vit_base.aux_classifier.weight, 11.76794),
    ):
        assert weight.grad is not None
        assert weight.grad.norm().item() == pytest.approx(norm, rel=1e-5)
    vit_base.zero_grad()
    vit_base.ctc_teacher.load_state_dict(kept)


def test_check_14_crops_and_flags() -> None:
    roi = torch.zeros(2, 448, 448, dtype=torch.long)
    roi[:, 150:300, 150:300] = 1
    roi[:, 200:260, 200:260] = 2
    images = torch.randn(2, 3, 448, 448)
    torch.manual_seed(0)
    local = crop_local_views(images, roi, 96)
    corners = [(56, 60), (100, 45), (124, 321), (298, 26), (332, 3), (265, 334), (289, 311)]
    assert [tuple(c) for c in local.corners[0].tolist()] == [*corners, (155, 237)]
    assert local.flags.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0, 0, 1], [1, 1, *[0] * 8]]
    assert torch.equal(local.crops[7, 0], images[0, :, 155 : 155 + 96, 237 : 237 + 96])
    assert local.crops.shape == (8, 2, 3, 96, 96)


# ---- the pieces ----------------------------------------------------------------------------------


def test_crops_come_from_anywhere_when_all_is_foreground() -> None:
    roi = torch.full((1, 64, 64), 2)
    roi[0, 32, 32:38] = 0  # six candidates, fewer than eight crops
    torch.manual_seed(0)
    local = crop_local_views(torch.randn(1, 3, 64, 64), roi, 32)
    centres = local.corners[0] + 16
    assert local.flags.tolist() == [[1.0] * 10]
    assert (roi[0][tuple(centres.T)] == 2).any()
    assert len(set(map(tuple, centres.tolist()))) == 8


def test_crops_avoid_the_certain_foreground() -> None:
    roi = torch.full((1, 96, 96), 2)
    roi[0, 40:50, 40:50] = 1
    torch.manual_seed(0)
    centres = crop_local_views(torch.randn(1, 3, 96, 96), roi, 32).corners[0] + 16
    assert (roi[0][tuple(centres.T)] == 1).all()


def test_crops_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        WSSSError, match=r"local crops of 64 px do not fit into images of \(64, 64\)"
    ):
        crop_local_views(torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.long), 64)


def naive_ctc(student: Tensor, teacher: Tensor, flags: Tensor, temperature: float) -> Tensor:
    """The formula of toco.md, term by term, in double precision."""
    batch, views = flags.shape
    student = student.double().reshape(views, batch, -1)
    teacher = teacher.double().reshape(2, batch, -1)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(batch):
        for t in range(2):
            e = [(teacher[t, b] @ student[v, b] / temperature).exp() for v in range(views)]
            n = sum((e[v] for v in range(views) if flags[b, v] == 0), torch.zeros(()))
            terms = [-(e[v] / (e[v] + n + 1e-4)).log() for v in range(views) if flags[b, v] == 1]
            image = sum(terms, torch.zeros(())) + (1 + n + 1e-4).log()
            total = total + image / (2 * (flags[b].sum() + 1e-4))
    return total / batch


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_ctc_equals_its_formula(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(40, 16), torch.randn(8, 16)
    flags = (torch.rand(4, 10) > 0.5).float()
    flags[1], flags[2] = 1, 0  # no negative, no positive at all
    expected = naive_ctc(student, teacher, flags, temperature)
    value = ctc_loss(student, teacher, flags, temperature)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_ctc_stays_finite_where_exp_overflows() -> None:
    student = torch.full((10, 16), 30.0, requires_grad=True)
    teacher = torch.full((2, 16), 30.0)  # products of 14,400, divided by 0.5
    flags = torch.tensor([[1.0, 1, 0, 0, 1, 1, 1, 1, 1, 1]])
    loss = ctc_loss(student, teacher, flags, 0.5)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert naive_ctc(student, teacher, flags, 0.5).isnan()


def test_ptc_without_pairs_is_one_half_with_zero_gradient() -> None:
    tokens = torch.randn(1, 8, 3, 3, requires_grad=True)
    none = torch.zeros(1, 9, 9, dtype=torch.bool)
    loss = ptc_loss(tokens, none, none)
    loss.backward()
    assert loss.item() == 0.5
    assert tokens.grad is not None
    assert not tokens.grad.any()


def test_teacher_follows_the_student_slowly() -> None:
    module = tiny(momentum=0.75)
    with torch.no_grad():
        for student in module.ctc_student.parameters():
            student.add_(torch.randn_like(student))
    pairs = zip(
        [t.clone() for t in module.ctc_teacher.parameters()],
        module.ctc_student.parameters(),
        strict=True,
    )
    expected = [0.75 * teacher + 0.25 * student for teacher, student in pairs]
    module.update_teacher()
    for teacher, value in zip(module.ctc_teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(teacher, value)


@pytest.mark.parametrize("first", [True, False])
def test_teacher_moves_once_an_optimiser_step(first: bool) -> None:
    """With the first of the batches whose gradients are accumulated."""
    others = dict.fromkeys(("ptc_weight", "seg_weight", "reg_weight"), 0.0)
    module = tiny(**others)
    student, teacher = (head.mlp[0].weight for head in (module.ctc_student, module.ctc_teacher))
    student.data += 1
    before = teacher.clone()
    module.first_of_step = first
    losses_at(module, 99)
    torch.testing.assert_close(teacher, before + 0.1 if first else before)


def test_every_parameter_is_in_exactly_one_group() -> None:
    module = tiny(lr=1e-4, head_lr_factor=5.0)
    groups = module.param_groups()
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    trainable = {id(p) for p in module.parameters() if p.requires_grad}
    assert trainable <= set(listed)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == pytest.approx({"encoder": 1e-4, "norms": 1e-4, "heads": 5e-4, "decoder": 5e-4})
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    teacher = {name for name, _ in module.named_parameters() if name.startswith("ctc_teacher.")}
    magnitude = "ctc_student.last_layer.parametrizations.weight.original0"
    assert frozen == {"backbone.vit.pos_embed", magnitude} | teacher


def test_backbone_without_class_token_is_refused() -> None:
    backbone = Backbone(
        name="vit_base_patch16_siglip_224",
        weights="random",
        overrides={"depth": 1, "embed_dim": 48, "num_heads": 3},
    )
    with pytest.raises(WSSSError, match="contrasts class tokens"):
        ToCo(
            backbone=backbone,
            num_classes=4,
            settings=ToCoSettings(max_steps=10, aux_layer=-1),
        )


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(WSSSError, match=r"aux_layer=-5: the backbone has 4 blocks"):
        tiny(aux_layer=-5)
    with pytest.raises(WSSSError, match="low_threshold <= high_threshold"):
        tiny(low_threshold=0.8)
    with pytest.raises(WSSSError, match="local_size=8: smaller than one patch of 16 px"):
        tiny(local_size=8)


# ---- schedules and zero weights ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, (0.2, 0.5, 0, 0)), (2000, (0.2, 0.5, 0, 0)), (2001, (0.2, 0.5, 0.1, 0.05))],
)
def test_weights_of_voc(step: int, expected: tuple[float, ...]) -> None:
    assert tuple(tiny(max_steps=20000).loss_weights(step).values()) == expected


@pytest.mark.parametrize(
    ("step", "expected", "from_aux"),
    [
        (8000, (0, 0, 0, 0), True),
        (8001, (0, 0, 0.1, 0.05), True),
        (12000, (0, 0, 0.1, 0.05), True),
        (12001, (0.2, 0.5, 0.1, 0.05), False),
    ],
)
def test_weights_of_coco(step: int, expected: tuple[float, ...], from_aux: bool) -> None:
    module = tiny(max_steps=80000, contrast_after=0.15, seg_after=0.1, aux_labels_until=0.15)
    assert tuple(module.loss_weights(step).values()) == expected
    assert module.labels_from_aux(step) is from_aux
    assert tiny(max_steps=20000).labels_from_aux(0) is False  # VOC: never


def test_shares_of_a_run_are_rounded_to_steps() -> None:
    assert 0.29 * 100 < 29, "cut off it would be 28"
    module = tiny(contrast_after=0.29, seg_after=0.29, aux_labels_until=0.29)
    assert not any(module.loss_weights(29).values())
    assert all(module.loss_weights(30).values())
    assert (module.labels_from_aux(29), module.labels_from_aux(30)) == (True, False)


def forbid(module: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"{name} was computed")

    monkeypatch.setattr(module, name, fail)


def test_terms_of_zero_weight_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny()
    for name in ("pseudo_labels", "energy"):
        forbid(module, name, monkeypatch)
    forbid(module.decoder, "forward", monkeypatch)
    result = losses_at(module, 10)
    assert set(result.losses) == {"cls_loss", "cls_aux_loss", "ptc_loss", "ctc_loss"}
    assert "pseudo_label" not in result.seen
    result.total.backward()
    assert all(p.grad is None for p in module.decoder.parameters())


@pytest.mark.parametrize("term", ["ptc", "ctc", "seg", "reg"])
def test_a_term_works_alone(term: str) -> None:
    others = [f"{name}_weight" for name in ("ptc", "ctc", "seg", "reg") if name != term]
    result = losses_at(tiny(**dict.fromkeys(others, 0.0)), 99)
    assert list(result.losses) == ["cls_loss", "cls_aux_loss", f"{term}_loss"]
    assert result.losses[f"{term}_loss"].requires_grad


def test_without_any_weight_even_the_cam_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny(contrast_after=0.15)
    monkeypatch.setattr("wsss.methods.toco.method.multiscale_cam", None)
    forbid(module.ctc_student, "forward", monkeypatch)
    result = losses_at(module, 0)
    assert set(result.losses) == {"cls_loss", "cls_aux_loss"}
    assert result.total.item() == pytest.approx(sum(v.item() for v in result.losses.values()))


def test_q4b_gives_the_decoder_zero_gradients() -> None:
    module = tiny(Quirks(zero_weight_terms=True))
    result = losses_at(module, 0)
    assert set(result.losses) >= {"seg_loss", "reg_loss"}
    result.total.backward()
    for weight in module.decoder.parameters():  # Q4b: zeros, which AdamW decays, and not None
        assert weight.grad is not None
        assert not weight.grad.any()


def test_total_is_the_weighted_sum() -> None:
    result = losses_at(tiny(), 99)
    loss = {name: value.item() for name, value in result.losses.items()}
    expected = loss["cls_loss"] + loss["cls_aux_loss"] + 0.2 * loss["ptc_loss"]
    expected += 0.5 * loss["ctc_loss"] + 0.1 * loss["seg_loss"] + 0.05 * loss["reg_loss"]
    assert result.total.item() == pytest.approx(expected, rel=1e-6)


# ---- quirks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [False, True])
def test_q4_segmentation_without_foreground(on: bool) -> None:
    """Officially NaN when half of the pixels' kinds are missing, by default that half is 0."""
    module = tiny(Quirks(nan_without_pixels=on))
    nothing = torch.zeros(2, SIDE, SIDE, dtype=torch.long)
    module.pseudo_labels = lambda *_: nothing  # type: ignore[method-assign]
    result = losses_at(module, 99)
    assert bool(result.losses["seg_loss"].isnan()) is on
    assert bool(result.total.isnan()) is on
    result.total.backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_q1_box_masks_tokens_on_their_own_grid() -> None:
    """Officially pixel coordinates are applied to the token grid."""
    cam = torch.ones(1, 4, SIDE, SIDE)
    labels = torch.tensor([[0.0, 0, 1, 0]])
    box = torch.tensor([[10, 90, 0, 80]])  # token rows 1..4 and columns 0..4 are wholly real
    scaled = tiny().token_labels(cam, labels, box, (6, 6))
    expected = torch.full((1, 6, 6), 255)
    expected[0, 1:5, 0:5] = 3
    assert torch.equal(scaled, expected)
    official = tiny(Quirks(box_in_pixels=True)).token_labels(cam, labels, box, (6, 6))
    assert (official == 255).all()  # rows start at 10 of 6
    whole = torch.tensor([[0, SIDE, 0, SIDE]])
    assert (tiny().token_labels(cam, labels, whole, (6, 6)) == 3).all()


def test_patches_and_tokens_are_those_of_the_backbone() -> None:
    """Patches of 14 px, and four registers beside the class token."""
    overrides = {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 56}
    backbone = Backbone(name="vit_small_patch14_reg4_dinov2", weights="random", overrides=overrides)
    settings = ToCoSettings(max_steps=1, aux_layer=-1, decoder_channels=8)
    module = ToCo(backbone=backbone, num_classes=4, settings=settings)
    labels, box = torch.tensor([[0.0, 0, 1, 0]]), torch.tensor([[14, 70, 0, 83]])
    expected = torch.full((1, 6, 6), 255)
    expected[0, 1:5, 0:5] = 3
    found = module.token_labels(torch.ones(1, 4, 84, 84), labels, box, (6, 6))
    assert torch.equal(found, expected)

    seen: list[Tensor] = []
    module.ctc_student.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    features, crops = module.encode(torch.randn(2, 3, 56, 56)), torch.randn(8, 1, 3, 28, 28)
    module.class_token_contrast(features, LocalCrops(crops, torch.ones(1, 10), torch.zeros(1)))
    local = backbone(crops.flatten(0, 1))
    torch.testing.assert_close(
        seen[0], torch.cat([features.cls_tokens[:, 0], local.cls_tokens[:, 0]])
    )


@pytest.mark.parametrize("on", [False, True])
def test_q5_no_token_pair(on: bool) -> None:
    """Officially 0.5 with zero gradient, by default no such term."""
    module = tiny(Quirks(half_without_pairs=on))
    module.token_labels = lambda *_: torch.full((2, 6, 6), 255)  # type: ignore[method-assign]
    losses = losses_at(module, 10).losses
    assert ("ptc_loss" in losses) is on
    if on:
        assert losses["ptc_loss"].item() == 0.5


def test_truncated_guide_is_one_level_lower() -> None:
    """The guide of PAR is cut to whole grey levels where ours is rounded."""
    grey = torch.full((1, 3, 2, 2), 0.7) / torch.tensor(IMAGENET_STD).view(3, 1, 1) / 255
    images = grey - (torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_STD)).view(3, 1, 1)
    assert (tiny().guide(images) * 255).round().unique().tolist() == [1]
    assert (tiny(Quirks(truncated_guide=True)).guide(images) * 255).round().unique().tolist() == [0]


def test_quirks_of_the_step_around_the_losses() -> None:
    plain, official = tiny(), tiny(OFFICIAL)
    assert (plain.draws_apart, plain.stops_unless_finite) == (True, True)
    assert (official.draws_apart, official.stops_unless_finite) == (False, False)
    assert tiny(Quirks(shared_draws=True)).stops_unless_finite
    assert tiny(Quirks(goes_on_after_nan=True)).draws_apart


# ---- as a whole ----------------------------------------------------------------------------------


def test_training_shares_the_cam_of_evaluation() -> None:
    module = tiny()
    batch = make_batch()
    result = losses_at(module, 99)
    expected = module.cams(batch["image"], batch["labels"])
    outputs = module(batch["image"])
    torch.testing.assert_close(result.outputs.class_logits, outputs.class_logits)
    torch.testing.assert_close(result.outputs.seg_logits, outputs.seg_logits)
    masked = result.seen["cam"] * batch["labels"][..., None, None]
    torch.testing.assert_close(masked, expected, rtol=0, atol=2e-6)
    assert not expected[0, 1].any()
    assert 0 <= expected.min() <= expected.max() <= 1


def test_encoder_passes_of_a_step() -> None:
    module, passes = tiny(), []
    module.backbone.register_forward_pre_hook(
        lambda _, inputs: passes.append((len(inputs[0]), inputs[0].shape[-1]))
    )
    losses_at(module, 99)
    # views; mirrored input; CAM at half and one and a half size with mirror images; local crops
    assert passes == [(4, 96), (2, 96), (4, 48), (4, 144), (16, 32)]


@pytest.mark.parametrize("quirks", [CORRECTED, OFFICIAL])
def test_a_few_steps_lower_the_loss(quirks: Quirks) -> None:
    module = tiny(quirks, lr=3e-4)
    optimizer = module.optimizer(module.param_groups())
    first = losses_at(module, 99)
    for _ in range(6):
        optimizer.zero_grad()
        losses_at(module, 99).total.backward()
        optimizer.step()
    last = losses_at(module, 99)
    assert last.total.item() < first.total.item()
    assert last.losses["cls_loss"].item() < first.losses["cls_loss"].item()
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_both_energy_kernels_are_of_one_size() -> None:
    lattice = losses_at(tiny(), 99).losses["reg_loss"].item()
    gaussian = losses_at(tiny(energy_kernel="gaussian"), 99).losses["reg_loss"].item()
    assert lattice < 0
    assert gaussian == pytest.approx(lattice, rel=0.3)
