"""GETAM: maps against the straightforward way, labels and losses, both phases."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_getam import NAMES, SIDE, losses_at, make_batch, tiny
from small_runs import SMALL
from torch import Tensor

from wsss.benchmark.getam_official import OfficialGETAM, Savings
from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.data.builtin import minivoc_root
from wsss.methods.base import Step
from wsss.methods.getam.labels import (
    complete_labels,
    completion_thresholds,
    open_region,
    saliency_loss,
    split_cross_entropy,
)
from wsss.methods.getam.maps import attention_term, class_slots, enlarged
from wsss.methods.getam.method import GETAM
from wsss.methods.getam.official import CORRECTED, OFFICIAL, Quirks

# ---- the map -------------------------------------------------------------------------------------


def straightforward_maps(module: GETAM, images: Tensor, labels: Tensor) -> Tensor:
    """One full backward pass a pair through whole attention maps, (pairs, h, w)."""
    depth, first = module.backbone.depth, module.backbone.num_prefix_tokens
    maps = []
    for image, class_index in (labels > 0).nonzero().tolist():
        features = module.backbone(images, taps=(depth - 1,), attentions=range(depth))
        logits = module.classify(module.level_map(features, 4))
        attentions = [features.attentions[block] for block in range(depth)]
        for attention in attentions:
            attention.retain_grad()
        logits[image, class_index].backward()
        total = torch.zeros(features.patch_tokens.shape[1], dtype=images.dtype)
        for attention in attentions[max(0, depth - 6) :]:
            gradient, weights = attention.grad[image], attention[image]  # type: ignore[index]
            term = (gradient * weights).relu().mean(0) * gradient.relu().mean(0)
            total = total + term[0, first:].detach()
        maps.append(total.unflatten(0, features.grid))
    return torch.stack(maps)


@pytest.mark.parametrize(
    ("kind", "depth"), [("plain", 12), ("plain", 6), ("distilled", 8), ("hybrid", 4)]
)
def test_slot_maps_equal_the_straightforward_way(kind: str, depth: int) -> None:
    module = tiny(kind, depth).double()
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    labels = torch.tensor([[1.0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 1]])
    encoded = module.encode(images, levels=(4,))
    ids, valid = class_slots(labels)
    assert valid.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    maps = module.maps_of_slots(encoded, ids, valid).sum(2)
    expected = straightforward_maps(module, images, labels)
    assert maps[~valid].abs().max() == 0
    assert expected.max() > 0
    assert (maps[valid] - expected).abs().max() < 1e-10 * expected.max()


def test_two_models_in_one_process_do_not_disturb_each_other() -> None:
    first, second = tiny(), tiny(depth=6)
    batch = make_batch()
    ids, valid = class_slots(batch["labels"])
    alone = first.cams(batch["image"], batch["labels"])
    encoded = first.encode(batch["image"], levels=(4,))
    second.cams(batch["image"], batch["labels"])  # between first's forward and backward
    second.losses(batch, 99).total.backward()
    maps = first.maps_of_slots(encoded, ids, valid).sum(2)
    full = enlarged(maps, (SIDE, SIDE))
    full = full / (full.amax((2, 3), keepdim=True) + 1e-5)
    assert torch.equal(full[0, 0], alone[0, 0])
    assert torch.equal(full[1, 0], alone[1, 1])


def test_cams_are_zero_for_absent_classes_and_alike_for_others() -> None:
    module = tiny().eval()
    images = make_batch()["image"]
    with torch.no_grad():  # as the evaluator calls it
        few = module.cams(images, torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]))
        many = module.cams(images, torch.ones(2, 4))
    assert few.shape == (2, 4, SIDE, SIDE)
    assert not few.requires_grad
    assert not few[0, 1:].any()
    assert not few[1].any()
    torch.testing.assert_close(few[0, 0], many[0, 0])
    assert 0 <= many.min() <= many.max() <= 1
    assert module.cams(images, torch.zeros(2, 4)).abs().max() == 0
    assert all(p.grad is None for p in module.parameters())


def test_gallery_shows_every_block_of_the_map() -> None:
    module = tiny(depth=8).eval()
    batch = make_batch()
    with torch.no_grad():
        maps = module.gallery_maps(batch["image"], batch["labels"])
    assert list(maps) == [f"block {i}" for i in range(2, 8)]
    assert all(one.shape == (2, SIDE, SIDE) for one in maps.values())
    assert all(float(one.max()) == pytest.approx(1.0) for one in maps.values())


@pytest.mark.parametrize("strongest", [0, 2])
def test_gallery_is_of_the_strongest_present_class(strongest: int) -> None:
    """The second image has fewer classes; its empty slot counts for nothing."""
    module, batch = tiny().eval(), make_batch()
    module.classifier.bias.data[strongest] += 9
    alone = batch["labels"].clone()
    alone[0] = torch.eye(4)[strongest]
    with torch.no_grad():
        found, expected = (
            module.gallery_maps(batch["image"], labels) for labels in (batch["labels"], alone)
        )
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one)


@pytest.mark.parametrize(
    ("depth", "taps"), [(12, [2, 5, 8, 11]), (6, [0, 2, 3, 5]), (4, [0, 1, 2, 3])]
)
def test_taps_follow_the_depth(depth: int, taps: list[int]) -> None:
    module = tiny(depth=depth)
    assert list(module.taps.values()) == taps
    assert module.map_blocks == tuple(range(max(0, depth - 6), depth))


@pytest.mark.parametrize("kind", list(NAMES))
@pytest.mark.parametrize("size", [(64, 64), (70, 120)])
def test_every_backbone_segments_at_any_size(kind: str, size: tuple[int, int]) -> None:
    module = tiny(kind).eval()
    outputs = module(torch.randn(1, 3, *size))
    assert outputs.class_logits.shape == (1, 4)
    assert outputs.seg_logits is not None
    patch = module.backbone.patch_size
    assert patch == (14 if kind == "fourteen" else 16)
    assert outputs.seg_logits.shape[:2] == (1, 5)
    assert outputs.seg_logits.shape[2:] == tuple(side // patch * patch for side in size)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(WSSSError, match="taps four blocks, and this backbone has 3"):
        tiny(depth=3)
    with pytest.raises(WSSSError, match="low_threshold <= high_threshold"):
        tiny(low_threshold=0.8)
    with pytest.raises(WSSSError, match=r"method\.tap_channels=\[8, 16\]: .* at least 4 of them"):
        tiny(tap_channels=[8, 16])
    with pytest.raises(WSSSError, match=r"method\.tap_channels=.*greater than or equal to 1"):
        tiny(tap_channels=[8, 16, 0, 4])
    with pytest.raises(WSSSError, match=r"method\.quantile=1\.0: .*less than 1, or null"):
        tiny(quantile=1.0)
    for name in ("map_layers", "opening", "decoder_channels"):
        with pytest.raises(WSSSError, match=rf"method\.{name}=0: .*greater than or equal to 1"):
            tiny(**{name: 0})
    with pytest.raises(WSSSError, match=r"method\.phase_one=1\.5: .*less than or equal to 1"):
        tiny(phase_one=1.5)
    with pytest.raises(WSSSError, match=r"method\.lr=-1"):
        tiny(lr=-1.0)


def test_forms_of_the_gradient_are_those_of_the_comparison() -> None:
    attention = torch.tensor([[[[0.2, 0.8]], [[0.5, 0.5]]]])  # (1, 2 heads, 1 row, 2)
    slope = torch.tensor([[[[1.0, -1.0]], [[2.0, 3.0]]]])
    means = {
        "attention": [0.35, 0.65],
        "gradient": [1.5, 1.5],
        "product": [0.6, 0.75],
        "coupled": [0.9, 1.125],
    }
    for form, expected in means.items():
        found = attention_term(attention, slope, form)  # type: ignore[arg-type]
        assert found.flatten().tolist() == pytest.approx(expected), form


def test_form_and_layers_reach_the_maps() -> None:
    images, labels = make_batch()["image"], make_batch()["labels"]
    found = {
        name: tiny(depth=6, **changes).eval().cams(images, labels)
        for name, changes in {
            "default": {},
            "paper": {"gradient_form": "coupled", "map_layers": 6},
            "last": {"map_layers": 1},
            "attention": {"gradient_form": "attention"},
        }.items()
    }
    assert torch.equal(found["default"], found["paper"])
    assert not torch.allclose(found["last"], found["default"])
    # without the gradient every class of an image has the same map
    assert torch.equal(found["attention"][0, 0], found["attention"][0, 2])
    assert not torch.allclose(found["default"][0, 0], found["default"][0, 2])


# ---- labels --------------------------------------------------------------------------------------


def test_threshold_is_an_entry_of_the_positive_values() -> None:
    maps = torch.zeros(1, 3, 4, 5)
    maps[0, 0] = torch.arange(20).view(4, 5) / 20  # 19 positive values: entry int(17.1)
    maps[0, 1, 0, 0] = 0.5  # one positive value: entry 0, hence none
    found = completion_thresholds(maps, 0.9)[0]
    assert found[0].item() == pytest.approx(18 / 20)
    assert found[1:].tolist() == [torch.inf, torch.inf]
    assert completion_thresholds(maps, None)[0].tolist() == [torch.inf] * 3


def test_opening_removes_what_no_square_fits_into() -> None:
    region = torch.zeros(1, 30, 30, dtype=torch.bool)
    region[0, 2:12, 3:13] = True  # exactly a square of 10
    region[0, 20:25, 20:30] = True  # too narrow
    centred = open_region(region, 10)
    assert centred.sum() == 100
    assert centred[0, 2:12, 3:13].all()
    official = open_region(region, 10, centred=False)
    assert official[0, 3:13, 4:14].all()  # a pixel to the lower right
    assert official.sum() == 100
    border = torch.zeros(1, 20, 20, dtype=torch.bool)
    border[0, :5, :] = True  # beyond the border nothing objects
    assert open_region(border, 10)[0, :4].all()


def two_claims() -> tuple[Tensor, Tensor, Tensor]:
    """Maps of two classes that both claim the right half, where nothing is salient."""
    maps = torch.full((1, 2, 40, 40), 0.01)
    maps[0, 0, :, 20:] = 0.5
    maps[0, 1, :, 20:] = 0.4
    maps[0, :, 0, 20:] = 0.005  # a row that no threshold passes
    saliency = torch.zeros(1, 40, 40, dtype=torch.bool)
    saliency[:, :, :10] = True
    return maps, torch.tensor([[1, 3]]), saliency


def test_contested_pixels() -> None:
    maps, ids, saliency = two_claims()
    maps[0, 0, :, 20:30] = 0.3  # so that the upper values are a tenth
    ours = complete_labels(maps, ids, saliency, quantile=0.4)
    assert (ours.label[0, 12:28, 32:38] == 255).all()  # claimed by both
    assert (ours.label[0, 12:28, 2:8] == 255).all()  # salient, not activated
    assert (ours.label[0, :, 11:18] == 0).all()
    assert ours.saliency is not None
    assert set(ours.saliency.unique().tolist()) <= {0, 1, 255}
    within = complete_labels(maps, ids, saliency, quantile=None)
    assert (within.label[~saliency] == 0).all()
    assert within.saliency is not None
    assert within.saliency.bool().equal(saliency)


def test_without_saliency_two_thresholds_decide() -> None:
    module = tiny(low_threshold=0.2, high_threshold=0.6, opening=1)
    refined = torch.zeros(1, 2, 8, 8)
    refined[0, 0, :, 0:3] = 0.9
    refined[0, 1, :, 2:4] = 0.95
    refined[0, 0, :, 4:6] = 0.4
    labels = torch.tensor([[0.0, 1, 0, 1]])
    boxes = torch.tensor([[0, 8, 0, 8]])
    made = module.make_labels(refined, torch.tensor([[1, 3]]), labels, boxes, None)
    assert made.saliency is None
    assert made.label[0, 0].tolist() == [2, 2, 4, 4, 255, 255, 0, 0]


# ---- losses --------------------------------------------------------------------------------------


def test_saliency_loss_wants_background_where_nothing_is_salient() -> None:
    logits = torch.zeros(1, 3, 1, 3)
    logits[0, 0] = torch.tensor([-9.0, 9.0, -9.0])  # background in the middle only
    completed = torch.tensor([[[1, 0, 255]]], dtype=torch.uint8)
    assert saliency_loss(logits, completed).item() < 1e-2
    only = torch.tensor([[[False, True, True]]])
    assert saliency_loss(logits, completed, only).item() < 1e-2


@pytest.mark.parametrize("guard", [False, True])
def test_cross_entropy_without_foreground(guard: bool) -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = split_cross_entropy(logits, torch.zeros(1, 4, 4, dtype=torch.long), guard=guard)
    assert bool(loss.isnan()) is not guard
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_phase_one_trains_the_classifier_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny()
    for part in (module.decoder, module.pamr):
        monkeypatch.setattr(part, "forward", None)
    result = losses_at(module, 50)
    assert set(result.losses) == {"cls_loss"}
    result.total.backward()
    assert all(p.grad is None for p in module.decoder.parameters())
    assert all(p.grad is None for p in module.reassemble["1"].parameters())


def test_a_crop_need_not_be_a_whole_number_of_patches() -> None:
    module, batch = tiny(), make_batch()
    for name in ("image", "saliency"):
        batch[name] = batch[name][..., :90, :90]
    batch["box"] = batch["box"].clamp_max(90)
    result = module.losses(batch, 99)
    assert result.outputs.seg_logits is not None
    assert result.outputs.seg_logits.shape[-2:] == (90, 90)
    assert set(result.losses) == {"cls_loss", "seg_loss", "sal_loss", "reg_loss"}
    assert bool(result.total.isfinite())


def test_terms_of_zero_weight_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny(energy_weight=0.0, saliency_weight=0.0, seg_weight=0.0)
    monkeypatch.setattr(module, "energy", None)
    assert set(losses_at(module, 99).losses) == {"cls_loss"}
    without = losses_at(tiny(), 99, saliency=False)
    assert set(without.losses) == {"cls_loss", "seg_loss", "reg_loss"}


@pytest.mark.parametrize("term", ["seg", "sal", "reg"])
def test_a_term_works_alone(term: str) -> None:
    names = {"seg": "seg_weight", "sal": "saliency_weight", "reg": "energy_weight"}
    others = dict.fromkeys(set(names.values()) - {names[term]}, 0.0)
    result = losses_at(tiny(**others), 99)
    assert list(result.losses) == ["cls_loss", f"{term}_loss"]
    assert result.total.item() == pytest.approx(sum(v.item() for v in result.losses.values()))


def test_total_is_the_sum_of_terms_and_reaches_every_parameter() -> None:
    module = tiny()
    result = losses_at(module, 99)
    assert set(result.losses) == {"cls_loss", "seg_loss", "sal_loss", "reg_loss"}
    assert result.total.item() == pytest.approx(sum(v.item() for v in result.losses.values()))
    result.total.backward()
    unused = {name for name, p in module.named_parameters() if p.grad is None}
    assert unused == {"backbone.vit.norm.weight", "backbone.vit.norm.bias"}


def test_mixed_precision_keeps_the_maps_in_full_precision() -> None:
    module = tiny()
    exact = losses_at(module, 99)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = losses_at(module, 99)
    assert mixed.seen["maps"].dtype == mixed.seen["refined"].dtype == torch.float32
    close = torch.corrcoef(torch.stack([one.seen["maps"].ravel() for one in (exact, mixed)]))
    assert close[0, 1] > 0.98
    for name, loss in exact.losses.items():
        assert mixed.losses[name].item() == pytest.approx(loss.item(), rel=0.1), name
    mixed.total.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def test_one_forward_pass_a_step() -> None:
    module, passes = tiny(), []
    module.backbone.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    losses_at(module, 0)
    losses_at(module, 99)
    assert passes == [2, 2]


def test_image_without_any_label_gives_background() -> None:
    module, batch = tiny(), make_batch(saliency=False)
    result = module.losses({**batch, "labels": torch.zeros(2, 4)}, 99)
    assert set(result.seen["labels"].label.unique().tolist()) <= {0, 255}
    assert result.total.isfinite()


@pytest.mark.parametrize("quirks", [CORRECTED, OFFICIAL])
def test_a_few_steps_lower_the_loss(quirks: Quirks) -> None:
    module = tiny(quirks=quirks, energy_weight=0.0)
    optimizer = module.optimizer([{"params": list(module.parameters()), "lr": 0.05}])
    first = losses_at(module, 99)
    for _ in range(8):
        optimizer.zero_grad()
        losses_at(module, 99).total.backward()
        optimizer.step()
    last = losses_at(module, 99)
    assert last.losses["cls_loss"].item() < first.losses["cls_loss"].item()
    assert last.losses["seg_loss"].item() < first.losses["seg_loss"].item()


# ---- schedule and optimiser ----------------------------------------------------------------------


def test_schedule_of_voc() -> None:
    module = tiny(max_steps=52900)
    assert sum(not module.in_phase_two(t) for t in range(52901)) == 26451
    rate = [module.settings.lr * module.lr_multiplier(t) for t in (0, 26450, 26451, 52899, 52900)]
    assert rate == pytest.approx([0.04, 0.0214354693, 0.00214347399, 2.24362302e-7, 2.24362302e-7])
    assert tiny(max_steps=52900, step_decay=True).lr_scale(35266) == pytest.approx(0.01)
    assert tiny(max_steps=4, step_decay=True).lr_scale(3) == pytest.approx(0.01)


def test_every_parameter_is_trained() -> None:
    module = tiny()
    (group,) = module.param_groups()
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}
    assert all(p.requires_grad for p in module.parameters())


# ---- the official way of computing ---------------------------------------------------------------

SAVINGS = [field.name for field in fields(Savings)]


def step_of(module: GETAM, step: int = 99) -> tuple[Step, dict[str, Tensor]]:
    result = losses_at(module, step)
    result.total.backward()
    return result, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def official(on: dict[str, bool], **settings: Any) -> OfficialGETAM:
    module = tiny(method=OfficialGETAM, depth=8, **settings)
    assert isinstance(module, OfficialGETAM)
    module.savings = Savings(**on)
    return module


@pytest.mark.parametrize("quirks", [CORRECTED, OFFICIAL])
@pytest.mark.parametrize("off", ["every", *SAVINGS])
def test_the_official_way_gives_the_same_step(off: str, quirks: Quirks) -> None:
    expected, expected_grads = step_of(tiny(depth=8, quirks=quirks))
    on = {name: off not in ("every", name) for name in SAVINGS}
    result, grads = step_of(official(on, quirks=quirks))
    maps, expected_maps = result.seen["maps"], expected.seen["maps"]
    torch.testing.assert_close(maps, expected_maps, rtol=1e-4, atol=1e-9)
    differing = result.seen["labels"].label != expected.seen["labels"].label
    assert differing.sum() <= 2  # a pixel beside a threshold
    assert result.losses.keys() == expected.losses.keys()
    for name, loss in expected.losses.items():
        assert result.losses[name].item() == pytest.approx(loss.item(), rel=1e-3), name
    assert grads.keys() == expected_grads.keys()


def test_the_official_way_does_all_the_work_of_the_page() -> None:
    passes: list[int] = []
    ours, theirs = tiny(), official(dict.fromkeys(SAVINGS, False))
    for module in (ours, theirs):
        module.backbone.register_forward_pre_hook(lambda _, inputs: passes.append(1))
        losses_at(module, 99)
    assert len(passes) == 1 + 2


# ---- records -------------------------------------------------------------------------------------


TINY = [
    "method=getam",
    *SMALL,
    "budget.eval_every=100",
    "method.decoder_channels=16",
    "eval.seg_sizes=[64]",
    "eval.crf=null",
]


@pytest.mark.slow
@pytest.mark.parametrize("with_saliency", [False, True])
def test_a_run_records_whether_it_used_saliency(tmp_path: Path, with_saliency: bool) -> None:
    folder = tmp_path / "saliency"
    folder.mkdir()
    lists = minivoc_root() / "VOC2012" / "ImageSets" / "Segmentation"
    for name in (lists / "train.txt").read_text().split()[:8]:
        grey = np.zeros((160, 160), np.uint8)
        grey[40:120, 40:120] = 200
        Image.fromarray(grey).save(folder / f"{name}.png")
    chosen = [f"data.saliency_folder={folder}"] if with_saliency else []
    steps = ["budget.max_steps=2", "gallery=2", "method.phase_one=0", "trainer.log_every_n_steps=1"]
    runs = tmp_path / "runs"
    try:
        status = main(["train", *TINY, *steps, *chosen, f"runs_dir={runs}"])
    except SystemExit as leave:
        status = int(leave.code or 0)
    assert status == 0
    (path,) = runs.rglob("results.json")
    protocol = json.loads(path.read_text())["splits"]["val"]["protocol"]
    expected = "image labels and saliency maps (above 127)" if with_saliency else "image labels"
    assert protocol["supervision"] == expected
    assert protocol["seg_sizes"] == [64]
    (metrics,) = runs.rglob("metrics.csv")
    assert ("train/sal_loss" in metrics.read_text()) is with_saliency
