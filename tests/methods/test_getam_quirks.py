"""What each switch of GETAM's official code changes, alone; the formulae are getam.md's."""

from dataclasses import fields, replace
from typing import Any

import cv2
import lightning
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from small_getam import SIDE, losses_at, make_batch, tiny
from torch import Tensor
from torch.utils.data import DataLoader

from wsss.core.errors import WSSSError
from wsss.core.schema import plain
from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD
from wsss.methods.base import Batch, Outputs, Step
from wsss.methods.getam.labels import Labels, saliency_target
from wsss.methods.getam.method import GETAM
from wsss.methods.getam.official import CORRECTED, OFFICIAL, Quirks
from wsss.runs.compose import compose_config
from wsss.runs.folder import build_module
from wsss.runs.line import sweep_jobs

SWITCHES = [field.name for field in fields(Quirks)]


def only(name: str, on: bool = True) -> Quirks:
    """Switch one quirk on, or none."""
    return replace(CORRECTED, **{name: on})


def test_official_is_every_switch_and_corrected_none() -> None:
    assert all(getattr(OFFICIAL, name) is True for name in SWITCHES)
    assert not any(getattr(CORRECTED, name) for name in SWITCHES)
    for name in SWITCHES:  # each has its test below
        assert any(test.startswith(f"test_{name}") for test in globals()), name


# ---- network and optimiser -----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("on", "mode"), [(False, "bicubic"), (True, "bilinear")])
def test_bilinear_positions(on: bool, mode: str) -> None:
    backbone = tiny(quirks=only("bilinear_positions", on)).backbone
    torch.nn.init.normal_(backbone.vit.pos_embed)
    tokens, grid = backbone.embed(make_batch()["image"])
    stored = backbone.vit.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resized = F.interpolate(stored, size=(6, 6), mode=mode, align_corners=False)
    positions = resized.flatten(2).transpose(1, 2)
    patches = backbone.vit.patch_embed.proj(make_batch()["image"]).flatten(2).transpose(1, 2)
    assert grid == (6, 6)
    torch.testing.assert_close(tokens[:, 1:] - patches, positions.expand_as(patches))


@pytest.mark.parametrize(("on", "momentum", "decay"), [(False, 0.25, 5e-4), (True, 5e-4, 0.0)])
def test_decay_in_momentum(on: bool, momentum: float, decay: float) -> None:
    module = tiny(quirks=only("decay_in_momentum", on), momentum=0.25)
    settings = module.optimizer(module.param_groups()).defaults
    assert (settings["momentum"], settings["weight_decay"]) == (momentum, decay)


# ---- labels --------------------------------------------------------------------------------------


def labels_of_the_page(
    maps: NDArray[Any], classes: list[int], salient: NDArray[Any], quirks: Quirks
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Complete one image's labels step by step, getam.md section 2; maps (S, H, W)."""
    label = np.where((1 - maps.max(0)) ** 32 >= maps.max(0), 255, 0)
    for one, index in zip(maps, classes, strict=True):
        label[(label != 255) & (one == maps.max(0))] = index + 1
    label[~salient] = 0
    completed = salient.astype(int)
    claims = np.zeros(label.shape, int)
    for one, index in zip(maps, classes, strict=True):
        positive = np.sort(one[one > 0])
        above = (one > positive[int(0.9 * len(positive))]) & ~salient
        label[above & (claims == 0)] = index + 1
        completed[above] = 255
        claims += above
    if not quirks.contested_to_lowest:
        label[claims > 1] = 255
    square = np.ones((10, 10), np.uint8)
    anchor = (-1, -1) if quirks.shifted_opening else (4, 4)
    eroded = cv2.erode((label != 0).astype(np.uint8), square)
    opened = cv2.dilate(eroded, square, anchor=anchor) > 0
    label[~opened] = 0
    if not quirks.unopened_saliency:
        completed[(claims > 0) & ~opened] = 0
    return label, completed


def contested_maps() -> tuple[Tensor, Tensor]:
    """Make maps (1, 2, 60, 60) that overlap outside the saliency (1, 60, 60), and a thin claim."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(1, 2, 60, 60, generator=generator) * 0.05
    maps[0, 0, 30:44, 30:44] += 0.5
    maps[0, 1, 33:47, 33:47] += 0.4
    maps[0, 1, 5:8, 40:56] += 0.4  # no square fits in
    saliency = torch.zeros(1, 60, 60, dtype=torch.bool)
    saliency[:, 5:25, 5:25] = True
    maps[0, 0, 5:25, 5:25] += 0.3
    return maps, saliency


def labelled(quirks: Quirks) -> Labels:
    """Label the contested maps as a module with these quirks does."""
    maps, saliency = contested_maps()
    present, box = torch.tensor([[0.0, 1, 0, 1]]), torch.tensor([[0, 60, 0, 60]])
    return tiny(quirks=quirks).make_labels(maps, torch.tensor([[1, 3]]), present, box, saliency)


def completed(made: Labels) -> Tensor:
    """Give the completed saliency as numbers that may be subtracted."""
    assert made.saliency is not None
    return made.saliency.int()


OF_LABELS = ["contested_to_lowest", "shifted_opening", "unopened_saliency"]


@pytest.mark.parametrize("quirks", [CORRECTED, OFFICIAL, *map(only, OF_LABELS)])
def test_labels_are_those_of_the_page(quirks: Quirks) -> None:
    maps, saliency = contested_maps()
    label, salient = labels_of_the_page(maps[0].numpy(), [1, 3], saliency[0].numpy(), quirks)
    made = labelled(quirks)
    np.testing.assert_array_equal(made.label[0].numpy(), label)
    np.testing.assert_array_equal(completed(made)[0].numpy(), salient)


def test_contested_to_lowest() -> None:
    ours, officially = labelled(CORRECTED), labelled(only("contested_to_lowest"))
    other = ours.label != officially.label
    assert other.sum() > 50
    assert (ours.label[other] == 255).all()
    assert (officially.label[other] == 2).all()  # classes 1 and 3 claim them
    assert torch.equal(completed(ours), completed(officially))


def test_shifted_opening() -> None:
    ours, officially = labelled(CORRECTED), labelled(only("shifted_opening"))
    assert ours.label[0, 5:25, 5:25].all()  # the salient square, whole
    assert not ours.label[0, 25:27, 5:25].any()
    assert officially.label[0, 6:25, 6:25].all()
    assert not officially.label[0, 5, 5:25].any()  # a pixel to the lower right
    assert not officially.label[0, 5:25, 5].any()


def test_unopened_saliency() -> None:
    ours, officially = labelled(CORRECTED), labelled(only("unopened_saliency"))
    assert torch.equal(ours.label, officially.label)
    other = completed(ours) != completed(officially)
    assert other[0, 5:8, 40:56].all()
    assert (completed(ours)[other] == 0).all()
    assert (completed(officially)[other] == 255).all()
    assert (ours.label[other] == 0).all()


@pytest.mark.parametrize(("on", "expected"), [(False, 255), (True, 0)])
def test_padding_as_background(on: bool, expected: int) -> None:
    module, batch = tiny(quirks=only("padding_as_background", on), quantile=None), make_batch()
    outside = torch.ones(SIDE, SIDE, dtype=torch.bool)
    outside[10:90, :80] = False
    batch["saliency"][1, outside] = False  # as the views make it
    made = module.losses(batch, 99).seen["labels"]
    assert (made.label[1, outside] == expected).all()
    labels, box, ids = batch["labels"], batch["box"], torch.tensor([[0], [1]])
    without = module.make_labels(torch.zeros(2, 1, SIDE, SIDE), ids, labels, box, None)
    assert (without.label[1, outside] == expected).all()
    assert not without.label[1, ~outside].any()
    default = tiny(quantile=None).losses(batch, 99).seen["labels"]
    assert torch.equal(made.label[1, ~outside], default.label[1, ~outside])


@pytest.mark.parametrize("on", [False, True])
def test_truncated_guide(on: bool) -> None:
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16).float()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    module = tiny(quirks=only("truncated_guide", on))
    lower = levels - module.guide((levels / 255 - mean) / std)
    padding = module.guide(torch.zeros(1, 3, 1, 1)).flatten().tolist()
    if not on:
        assert not lower.any()
        assert padding == [124, 116, 104]
        return
    assert set(lower.unique().tolist()) == {0, 1}
    assert 0.1 < lower.mean().item() < 0.6
    assert padding == [123, 116, 103]  # getam.md section 4


# ---- losses --------------------------------------------------------------------------------------


def inside_of(step: Step) -> Tensor:
    """Mark the real pixels of the batch, (2, H, W)."""
    inside = torch.zeros(step.seen["guide"].shape[0], SIDE, SIDE, dtype=torch.bool)
    inside[0], inside[1, 10:90, :80] = True, True
    return inside


def saliency_entropy(step: Step, target: Tensor) -> Tensor:
    """Compute the cross-entropy of each pixel's background probability, (2, H, W)."""
    assert step.outputs.seg_logits is not None
    background = step.outputs.seg_logits.softmax(1)[:, 0]
    return -torch.where(target, background.log(), (1 - background).log())


@pytest.mark.parametrize("on", [False, True])
def test_inverted_saliency(on: bool) -> None:
    step = losses_at(tiny(quirks=only("inverted_saliency", on)), 99)
    saliency = step.seen["labels"].saliency
    assert {0, 1, 255} == set(saliency.unique().tolist())
    target = (1 - saliency.int() // 255).bool()  # getam.md section 3, L_sal
    wanted, unwanted = (saliency_entropy(step, t) for t in (target, saliency == 0))
    formula, corrected = (each[inside_of(step)].mean().item() for each in (wanted, unwanted))
    assert step.losses["sal_loss"].item() == pytest.approx(formula if on else corrected, rel=1e-5)
    assert formula != pytest.approx(corrected, rel=1e-2)


def test_inverted_saliency_calls_given_pixels_background() -> None:
    given = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)
    assert saliency_target(given, inverted=True).tolist() == [[[True, True, False]]]
    assert saliency_target(given).tolist() == [[[True, False, False]]]


@pytest.mark.parametrize("on", [False, True])
def test_padding_in_saliency_loss(on: bool) -> None:
    step = losses_at(tiny(quirks=only("padding_in_saliency_loss", on)), 99)
    entropy = saliency_entropy(step, step.seen["labels"].saliency == 0)
    every, inside = entropy.mean().item(), entropy[inside_of(step)].mean().item()
    assert step.losses["sal_loss"].item() == pytest.approx(every if on else inside, rel=1e-5)
    assert every != pytest.approx(inside, rel=1e-3)


@pytest.mark.parametrize("on", [False, True])
def test_nan_without_pixels(on: bool) -> None:
    module = tiny(quirks=only("nan_without_pixels", on))
    nothing = Labels(torch.zeros(2, SIDE, SIDE, dtype=torch.long), None)
    module.make_labels = lambda *_: nothing  # type: ignore[method-assign]
    step = losses_at(module, 99)
    assert bool(step.losses["seg_loss"].isnan()) is on
    assert bool(step.total.isnan()) is on
    step.total.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


# ---- the step around the losses ------------------------------------------------------------------


def fitted(module: GETAM, steps: int) -> lightning.Trainer:
    """Fit a module by Lightning, and nothing around it, for some steps of one batch."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = [make_batch()] * steps
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return trainer


@pytest.mark.parametrize("on", [False, True])
def test_shared_draws(on: bool) -> None:
    """What the process has drawn before changes the dropout officially, and not here."""
    losses = []
    for burnt in (0, 3):
        module = tiny(quirks=only("shared_draws", on), phase_one=0.0, energy_weight=0.0)
        torch.manual_seed(0)
        torch.rand(burnt)
        trainer = fitted(module, 2)  # the first step is of the first phase
        losses.append(float(trainer.callback_metrics["train/seg_loss"]))
    assert (losses[0] != losses[1]) is on


@pytest.mark.parametrize("on", [False, True])
def test_goes_on_after_nan(on: bool) -> None:
    module = tiny(quirks=only("goes_on_after_nan", on))
    weight = module.classifier.weight

    def spoilt(batch: Batch, step: int) -> Step:
        loss = weight.sum() * torch.nan
        return Step({"cls_loss": loss}, loss, Outputs(weight, None))

    module.losses = spoilt  # type: ignore[method-assign]
    if on:
        fitted(module, 1)
    else:
        with pytest.raises(
            WSSSError, match=r"the loss is not finite \(cls_loss nan; images a, b\)"
        ):
            fitted(module, 1)
    assert bool(weight.isnan().all()) is on


# ---- the study -----------------------------------------------------------------------------------


def test_the_study_switches_none_one_and_all_that_it_names() -> None:
    jobs = sweep_jobs(["+experiments=getam/ablation_quirks"]).samples
    configs = [plain(compose_config(job)) for job in jobs if "seed=0" in job]
    built = [build_module(config, 8, with_weights=False) for config in configs]
    first, *single, last = [
        {name for name in SWITCHES if getattr(module.quirks, name)} for module in built
    ]
    assert first == set()
    assert all(len(one) == 1 for one in single)
    assert set().union(*single) == last
    assert len(single) == len(last) == 4
