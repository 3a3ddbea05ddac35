"""MoRe's quirks: each alone, all others without it, none, and all.

Q2 and Q6 are settings; Q11 to Q13 of more.md section 7 have no counterpart here.
"""

from dataclasses import fields
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from quirk_ways import ways_of
from small_more import MAX_STEPS, SIDE, losses_at, make_batch, tiny

from wsss.core.errors import WSSSError
from wsss.methods.more.official import CORRECTED, OFFICIAL, Quirks

NAMES = [field.name for field in fields(Quirks)]
each_way = ways_of(Quirks)


def test_official_is_every_quirk_and_corrected_none() -> None:
    assert all(getattr(OFFICIAL, name) is True for name in NAMES)
    assert all(getattr(CORRECTED, name) is False for name in NAMES)
    assert tiny().quirks == CORRECTED


def test_every_quirk_is_tested_here() -> None:
    text = Path(__file__).read_text()
    untested = [name for name in NAMES if f'each_way("{name}")' not in text]
    assert not untested


@each_way("equal_start")
def test_q1_class_tokens_start_equal(quirks: Quirks, on: bool) -> None:
    module = tiny(quirks)
    vit: Any = module.backbone.vit
    registers, classes = vit.cls_token[0, :4], vit.cls_token[0, 4:]
    assert torch.equal(registers, registers[:1].expand(4, -1))
    spread = (classes - registers[0]).std().item()
    assert spread == (0 if on else pytest.approx(0.02, rel=0.2))
    positions = vit.pos_embed[0, 4:8]
    assert torch.equal(positions, positions[:1].expand(4, -1))
    features = module.eval().encode(make_batch()["image"])
    tokens = module.class_tokens(features)
    loss = losses_at(module, 0).losses["distinct_loss"].item()
    assert (loss == pytest.approx(log(4), abs=1e-6)) is on
    assert torch.allclose(tokens, tokens[:, :1].expand_as(tokens), atol=1e-6) is on


@each_way("corner_token")
def test_q3_une_takes_the_corner_of_a_window(quirks: Quirks, on: bool) -> None:
    module, mask = tiny(quirks), torch.full((2, 8, 8), 255)
    whole, batch = torch.tensor([[0, SIDE, 0, SIDE]] * 2), make_batch()
    torch.manual_seed(0)
    chosen = torch.cat(module.select_tokens(mask, whole, batch, 3))
    assert chosen.shape == (4, 2)
    assert bool((chosen <= 1).all()) is on, "corners 0 and 1"
    assert bool((chosen >= 3).all()) is not on, "centres 3 and 4"


@each_way("overflowing_exponentials")
def test_q4_a_large_product_makes_cle_infinite(quirks: Quirks, on: bool) -> None:
    module = tiny(quirks, temperature=1e-3)
    loss = losses_at(module, 0).losses["cle_loss"]
    assert bool(loss.isfinite()) is not on


@each_way("padding_counts")
def test_q5_padding_has_masks_and_labels(quirks: Quirks, on: bool) -> None:
    seen = losses_at(tiny(quirks), MAX_STEPS - 1).seen
    # the second image: rows from 10, columns to 112; tokens of 16 px
    for name in ("ptc_mask", "cle_mask", "une_mask"):
        mask = seen[name][1]
        outside = torch.ones(8, 8, dtype=torch.bool)
        outside[1:, :7] = False
        assert bool((mask[outside] == 255).all()) is not on, name
        assert (mask[~outside] != 255).any(), name
    label = seen["pseudo_label"][1]
    outside = torch.ones(SIDE, SIDE, dtype=torch.bool)
    outside[10:, :112] = False
    assert bool((label[outside] == 255).all()) is not on
    assert (label[~outside] != 255).any()


@each_way("padding_counts")
def test_q5_padding_has_energy_and_uncertain_tokens(quirks: Quirks, on: bool) -> None:
    module, half = tiny(quirks), torch.tensor([[0, SIDE, 0, SIDE // 2]] * 2)
    small = losses_at(module, MAX_STEPS - 1, box=half)
    whole = losses_at(module, MAX_STEPS - 1, box=torch.tensor([[0, SIDE, 0, SIDE]] * 2))
    assert torch.equal(small.losses["reg_loss"], whole.losses["reg_loss"]) is on
    # columns 0 to 4 of a class, the others uncertain, padding from 8: a window at 3 has 42 without
    mask = torch.full((2, 8, 14), 255)
    mask[:, :, :5] = 1
    boxes = torch.tensor([[0, SIDE, 0, 14 * 16 if on else 128]] * 2)
    first, _ = module.select_tokens(mask, boxes, make_batch(), 0)
    assert len(first) == (4 + 1 if on else 2 + 1)


@each_way("fails_without_labels")
def test_q7_no_label_at_all(quirks: Quirks, on: bool) -> None:
    module = tiny(quirks)
    if on:
        with pytest.raises(WSSSError, match="fails_without_labels=true: no image of this batch"):
            losses_at(module, 0, labels=torch.zeros(2, 4))
        return
    step = losses_at(module, MAX_STEPS - 1, labels=torch.zeros(2, 4))
    assert step.losses["cle_loss"].item() == 0
    assert step.total.isfinite()
    step.total.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


@each_way("rank_denominators")
def test_losses_count_in_one_process_alone(quirks: Quirks, on: bool) -> None:
    """``tests/test_ddp.py`` trains both ways in two processes."""
    assert tiny(quirks).over_ranks is not on


@each_way("zero_weight_terms")
def test_q8_terms_without_weight_are_computed(quirks: Quirks, on: bool) -> None:
    module = tiny(quirks)
    step = losses_at(module, 0)
    assert ("seg_loss" in step.losses) is on
    assert ("reg_loss" in step.losses) is on
    step.total.backward()
    gradient = module.decoder.conv7.weight.grad
    assert (gradient is not None) is on
    assert gradient is None or not gradient.any()


@each_way("no_neighbour_of_one")
def test_q9_the_neighbours_of_one_class(quirks: Quirks, on: bool) -> None:
    module = tiny(quirks, num_classes=1)
    assert module.graph is not None
    assert module.graph.neighbours == (0 if on else 1)
    step = losses_at(module, MAX_STEPS - 1, labels=torch.ones(2, 1))
    assert step.total.isfinite()
    losses_at(module, 0, labels=torch.ones(2, 1)).total.backward()
    moved = module.graph.tail_proj.weight.grad
    assert moved is not None
    assert bool(moved.any()) is not on
    for count, expected in ((2, 1), (5, 2), (8, 4)):
        graph = tiny(quirks, num_classes=count, depth=3).graph
        assert graph is not None
        assert graph.neighbours == expected


@each_way("fails_on_small_grids")
def test_q10_a_grid_within_a_window(quirks: Quirks, on: bool) -> None:
    module, small = tiny(quirks), make_batch(side=96)
    if on:
        with pytest.raises(WSSSError, match=r"6 x 6 tokens, and the grid has 6 x 6; use larger"):
            module.losses(small, 0)
        return
    torch.manual_seed(1)
    step = module.losses(small, MAX_STEPS - 1)
    assert step.losses["une_loss"].item() == 0
    step.total.backward()


@each_way("shared_draws")
def test_une_draws_from_the_global_generator(quirks: Quirks, on: bool) -> None:
    """Only then does it matter what was drawn before, and in which order images come."""
    module = tiny(quirks)
    mask, whole = torch.full((2, 8, 8), 255), torch.tensor([[0, SIDE, 0, SIDE]] * 2)

    def chosen(step: int, *indices: int) -> list[list[list[int]]]:
        batch = {"index": torch.tensor(indices)}
        return [one.tolist() for one in module.select_tokens(mask, whole, batch, step)]

    torch.manual_seed(0)
    first, second = chosen(3, 7, 8), chosen(3, 8, 7)
    assert (first[::-1] != second) is on
    assert module.draws_apart is not on
    if not on:
        others = [chosen(step, 7, 8) for step in range(4, 9)]
        assert any(other != first for other in others), "the step moves them"
        module.seed = 5
        assert any(chosen(step, 7, 8) != other for step, other in enumerate(others, start=4))


@each_way("goes_on_after_nan")
def test_a_loss_that_is_not_finite(quirks: Quirks, on: bool) -> None:
    assert tiny(quirks).stops_unless_finite is not on
