"""ClusterCAM's quirks: each alone, all others without it, none, and all.

Q2, Q3 and Q5 of clustercam.md section 7 concern official scripts that have no counterpart here.
"""

from collections.abc import Iterator
from dataclasses import fields
from math import cos, pi, prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quirk_ways import ways_of
from small_clustercam import (
    MAX_STEPS,
    SIDE,
    backbone_of,
    built,
    changed,
    fit,
    logits_of,
    losses_at,
    make_batch,
    make_images,
    tiny,
)
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD
from wsss.methods.clustercam.official import CORRECTED, OFFICIAL, Quirks
from wsss.runs.compose import compose_config

GOLDEN = Path(__file__).parents[1] / "golden" / "clustercam"
NAMES = [field.name for field in fields(Quirks)]
each_way = ways_of(Quirks)
LR = 8.7890625e-6
both_ways = pytest.mark.parametrize("quirks", [CORRECTED, OFFICIAL], ids=["default", "official"])


def test_official_is_every_quirk_and_corrected_none() -> None:
    assert all(getattr(OFFICIAL, name) is True for name in NAMES)
    assert all(getattr(CORRECTED, name) is False for name in NAMES)
    assert tiny().quirks == CORRECTED


def test_every_quirk_is_tested_here() -> None:
    text = Path(__file__).read_text()
    untested = [name for name in NAMES if f'each_way("{name}")' not in text]
    assert not untested


# ---- rates ---------------------------------------------------------------------------------------


def rates(quirks: Quirks) -> list[float]:
    """Rates of 80 epochs of 10 steps at the official base rate."""
    module = tiny(quirks, max_steps=800, lr=LR)
    return [LR * module.lr_multiplier(step) for step in range(800)]


def cosine(epoch: float, floor: float) -> float:
    return floor + 0.5 * (LR - floor) * (1 + cos(pi * epoch / 80))


def epochs_of(values: list[float]) -> Iterator[list[float]]:
    return (values[first : first + 10] for first in range(0, len(values), 10))


@each_way("absolute_floor")
def test_q6_the_rate_ends_at_an_absolute_floor(quirks: Quirks, on: bool) -> None:
    """After the warm-up of five epochs it rises officially, as the floor is above the base rate."""
    found = rates(quirks)[70:]
    late = quirks.rate_by_epoch
    times = [step // 10 - 1 if late else step / 10 for step in range(70, 800)]
    expected = [cosine(time, 1e-5 if on else 0.16 * LR) for time in times]
    assert found == pytest.approx(expected, rel=1e-9)
    assert found == sorted(found, reverse=not on)
    assert (found[-1] > LR) is on


@each_way("rate_by_epoch")
def test_q6_the_rate_stays_for_an_epoch_and_lags_one(quirks: Quirks, on: bool) -> None:
    module = tiny(quirks, max_steps=800, lr=LR)
    found = list(epochs_of(rates(quirks)))
    assert [len(set(epoch)) for epoch in found] == [1 if on else 10] * 80
    floor = 1e-5 if quirks.absolute_floor else 0.16 * LR
    for epoch, (first, *_) in enumerate(found):
        time = max(epoch - 1, 0) if on else epoch
        warming = 1e-6 + time * (LR - 1e-6) / 5
        assert first == pytest.approx(warming if time < 5 else cosine(time, floor), rel=1e-9)
    assert module.epoch(799) == 79


def test_q6_the_default_rate_falls_after_its_warm_up() -> None:
    found = rates(CORRECTED)
    assert found[0] == pytest.approx(1e-6)
    assert len(set(found[:50])) == 50, "warm-up by the step"
    assert max(found) <= LR
    assert found[50:] == sorted(found[50:], reverse=True)
    assert found[-1] == pytest.approx(0.16 * LR, rel=0.01)


def test_q6_the_official_rates_are_those_of_the_page() -> None:
    found = rates(OFFICIAL)
    assert found[:20] == [pytest.approx(1e-6)] * 20, "epochs 0 and 1 share the start"
    assert len(set(found)) == 79
    assert found == sorted(found)
    for epoch, expected in ((2, 2.558e-6), (6, 8.801e-6), (50, 9.604e-6), (79, 9.998e-6)):
        assert found[10 * epoch] == pytest.approx(expected, abs=1e-9)


# ---- optimiser -----------------------------------------------------------------------------------


@each_way("decayed_tokens")
def test_q8_tokens_and_positions_are_decayed(quirks: Quirks, on: bool) -> None:
    module = tiny(quirks)
    groups = module.param_groups()
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    vit: Any = module.backbone.vit
    assert (id(vit.cls_token) in decayed) is on
    assert (id(vit.pos_embed) in decayed) is on
    assert id(module.patch_head.weight) in decayed
    assert id(module.mixing()[0]) not in decayed
    assert id(module.branches[0].qkv.bias) not in decayed
    assert id(vit.blocks[0].norm1.weight) not in decayed


@each_way("zero_gradients")
def test_q9_the_decoder_decays_in_the_first_phase(quirks: Quirks, on: bool, tmp_path: Path) -> None:
    module = tiny(quirks, lr=0.01, weight_decay=0.5, seg_from_epoch=99)
    weight = module.decoder.conv7.weight
    before = weight.detach().clone()
    trainer = fit(module, tmp_path, 2)
    shrunk = prod(1 - 0.01 * module.lr_multiplier(step) * 0.5 for step in range(2))
    expected = before * shrunk if on else before
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=0)
    assert torch.equal(weight, before) is not on
    state = trainer.optimizers[0].state
    assert (weight in state) is on
    if on:
        assert state[weight]["step"] == 2
        assert not state[weight]["exp_avg"].any()


# ---- CAMs and pseudo labels ----------------------------------------------------------------------


@each_way("drop_path_in_cams")
def test_q10_cam_passes_of_training_drop_paths(quirks: Quirks, on: bool) -> None:
    module, batch = tiny(quirks, drop_path=0.5), make_batch()
    torch.manual_seed(0)
    first, second = (module.targets(batch["image"], batch["labels"])["cam"] for _ in range(2))
    assert torch.equal(first, second) is not on
    assert all(child.training for child in module.modules()), "its mode is given back"
    plain = module.eval().cams(batch["image"], batch["labels"])
    assert torch.equal(plain, first) is not on
    module.train()
    logits = [module.encode(batch["image"]).class_logits for _ in range(2)]
    assert not torch.equal(*logits), "the training forward pass always drops paths"


@each_way("wrapped_guide")
def test_q12_the_guide_is_truncated_and_wraps_around(quirks: Quirks, on: bool) -> None:
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    levels = torch.tensor([-3.4, -0.2, 7.9, 254.6, 300.2]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    images = (levels / 255 - mean) / std
    found = tiny(quirks).guide(images)[0, 1, 0] * 255
    expected = [253, 0, 7, 254, 44] if on else [0, 0, 8, 255, 255]
    assert found.tolist() == pytest.approx(expected)


@each_way("dropped_remainder")
def test_q14_the_remainder_of_a_patch_is_dropped(quirks: Quirks, on: bool) -> None:
    images = make_images(90, 100)
    module = tiny(quirks).eval()
    logits = logits_of(module, images)
    resized = F.interpolate(images, (96, 112), mode="bilinear", align_corners=False)
    seen = images[..., :80, :96] if on else resized
    assert torch.equal(logits, logits_of(module, seen))
    assert logits.shape[-2:] == ((5, 6) if on else (6, 7))
    even = make_images(96, 112)
    assert torch.equal(logits_of(module, even), logits_of(tiny().eval(), even))


# ---- start ---------------------------------------------------------------------------------------


def start_of(quirks: Quirks, seed: int = 0, drawn_before: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    torch.rand(drawn_before)
    backbone = backbone_of(depth=12, heads=6, img_size=224)
    module = built(backbone, quirks, max_steps=1, decoder_channels=16)
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@each_way("official_start")
def test_q7_the_mixing_scalars_are_those_of_the_seed(quirks: Quirks, on: bool) -> None:
    start, again = start_of(quirks), start_of(quirks, drawn_before=7)
    mixing = [start[f"branches.{index}.mixing"].item() for index in range(12)]
    golden = np.load(GOLDEN / "rng_mix.npz")["mix_tiny_K4"]
    assert (mixing == [float(value) for value in golden]) is on
    new = ("mixing", "to_space.weight", "patch_head.weight", "patch_head.bias")
    names = [name for name in start if name.endswith(new) or name.startswith("decoder.")]
    assert len(names) == 2 * 12 + 2 + 3
    for name in names:
        assert torch.equal(start[name], again[name]) is on, "whatever was drawn before"


def test_q7_the_mixing_scalars_start_at_random() -> None:
    starts = [start_of(CORRECTED, seed) for seed in (0, 1)]
    found = {start[f"branches.{i}.mixing"].item() for start in starts for i in range(12)}
    assert len(found) == 24
    assert all(0 <= value < 1 for value in found)


# ---- the step around the losses ------------------------------------------------------------------


@each_way("shared_draws")
def test_drop_paths_come_from_the_global_generator(
    quirks: Quirks, on: bool, tmp_path: Path
) -> None:
    """Only then does it matter what was drawn before the run."""
    losses = []
    for drawn_before in (0, 5):
        module = tiny(quirks, drop_path=0.5, seg_weight=0.0)
        torch.rand(drawn_before)
        trainer = fit(module, tmp_path / str(drawn_before), 1)
        losses.append(trainer.callback_metrics["train/loss"].item())
    assert (losses[0] != losses[1]) is on
    assert module.draws_apart is not on


@each_way("goes_on_after_nan")
def test_a_loss_that_is_not_finite_reaches_the_weights(
    quirks: Quirks, on: bool, tmp_path: Path
) -> None:
    module = tiny(quirks)
    with torch.no_grad():
        module.patch_head.bias.fill_(torch.nan)
    if on:
        fit(module, tmp_path, 1)
    else:
        with pytest.raises(WSSSError, match="step 0: the loss is not finite"):
            fit(module, tmp_path, 1)
    # the first layer gets a gradient from the patch logits
    assert bool(module.backbone.vit.patch_embed.proj.weight.isnan().any()) is on


# ---- what has no switch --------------------------------------------------------------------------


def test_q1_a_missing_margin_is_refused_before_training() -> None:
    overrides = [
        "method=clustercam",
        "data=minivoc",
        "method.low_threshold=null",
        "eval.cam_low=0.3",
    ]
    with pytest.raises(WSSSError, match=r"method\.low_threshold=None: expected float"):
        compose_config(overrides)
    coco = compose_config(["+experiments=clustercam/coco", "data.root=unset"]).method
    assert (coco.high_threshold, coco.low_threshold) == (0.53, 0.33)


@both_ways
def test_q4_a_batch_of_ignored_pixels_has_a_finite_loss(quirks: Quirks) -> None:
    module = tiny(quirks)
    nothing = torch.full((2, SIDE, SIDE), 255)
    with changed(module, "pseudo_labels", lambda *_: nothing):
        result = losses_at(module, MAX_STEPS - 1)
    assert result.losses["seg_loss"].item() == 0
    assert result.total.isfinite()
    result.total.backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert not any(p.grad.any() for p in module.decoder.parameters() if p.grad is not None)


@both_ways
def test_q11_norms_have_two_epsilons(quirks: Quirks) -> None:
    module = tiny(quirks)
    found = {
        name.rpartition(".")[2]: layer.eps
        for name, layer in module.named_modules()
        if isinstance(layer, nn.LayerNorm) and "s.1." in name
    }
    assert found["norm2"] == 1e-6
    names = ("norm1", "norm_space", "norm_cls", "norm_centres")
    assert {found[name] for name in names} == {1e-5}


@both_ways
def test_q13_labels_are_refined_in_float32_under_autocast(quirks: Quirks) -> None:
    module, batch = tiny(quirks), make_batch()
    cam = module.cams(batch["image"], batch["labels"])
    plain = module.pseudo_labels(batch["image"], cam, batch["labels"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.pseudo_labels(batch["image"], cam, batch["labels"]), plain)
