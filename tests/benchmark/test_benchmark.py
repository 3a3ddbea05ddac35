"""The benchmark: both ways of computing agree, and the command measures and reports."""

import json
import signal
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from small_runs import Command, processes_of
from torch import nn

from wsss.benchmark import crf
from wsss.benchmark.arguments import BenchmarkConfig, parse
from wsss.benchmark.clustercam_official import OfficialClusterCAM
from wsss.benchmark.clustercam_official import Savings as ClusterSavings
from wsss.benchmark.report import show, summarise
from wsss.benchmark.runner import Side, TimedSide, make_batch
from wsss.benchmark.steps import groups
from wsss.benchmark.toco_official import OfficialToCo, Savings, looped_ctc_loss
from wsss.cli import main
from wsss.commands import benchmark
from wsss.core.errors import WSSSError
from wsss.core.stopwatch import Stopwatch, peak_memory
from wsss.methods.base import Step
from wsss.methods.clustercam.method import ClusterCAM, ClusterCAMSettings
from wsss.methods.toco.contrast import ctc_loss
from wsss.methods.toco.method import ToCo, ToCoSettings
from wsss.methods.toco.official import CORRECTED, OFFICIAL, Quirks
from wsss.models.backbone import Backbone

SAVINGS = [field.name for field in fields(Savings)]
MAX_STEPS = 100
TINY = {"image_size": 96, "batch_size": 2, "pairs": None, "num_classes": 4, "seed": 0}


def module_of(kind: type[ToCo], quirks: Quirks = CORRECTED) -> ToCo:
    torch.manual_seed(0)
    backbone = Backbone(
        name="vit_tiny_patch16_224",
        weights="random",
        overrides={"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 64},
    )
    settings = ToCoSettings(
        max_steps=MAX_STEPS,
        local_size=32,
        decoder_channels=32,
        # a random network's maps need these to contain background, uncertain and foreground
        low_threshold=0.5,
        high_threshold=0.75,
    )
    return kind(backbone=backbone, num_classes=4, settings=settings, quirks=quirks).train()


def step_of(module: ToCo, step: int) -> tuple[Step, dict[str, torch.Tensor]]:
    """Losses and gradients of one step with fixed weights, batch and draws."""
    torch.manual_seed(1)
    batch = make_batch(TINY, torch.device("cpu"))
    result = module.losses(batch, step)
    result.total.backward()
    zero = {name: torch.zeros_like(p) for name, p in module.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return result, {**zero, **found}


def assert_same_step(module: OfficialToCo, step: int, quirks: Quirks = CORRECTED) -> None:
    expected, expected_grads = step_of(module_of(ToCo, quirks), step)
    result, grads = step_of(module, step)
    assert set(expected.seen["local"].flags.flatten().tolist()) == {0.0, 1.0}
    assert expected.losses.keys() <= result.losses.keys()
    for name, loss in expected.losses.items():
        assert result.losses[name].item() == pytest.approx(loss.item(), rel=1e-6), name
    assert result.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        limit = 1e-4 * grad.abs().max().item() + 1e-9
        assert (grads[name] - grad).abs().max().item() <= limit, name


@pytest.mark.parametrize("step", [0, MAX_STEPS - 1])
@pytest.mark.parametrize("quirks", [CORRECTED, OFFICIAL], ids=["corrected", "official"])
def test_the_official_way_gives_the_same_step(step: int, quirks: Quirks) -> None:
    module = module_of(OfficialToCo, quirks)
    assert isinstance(module, OfficialToCo)
    assert module.savings == Savings()
    assert not any(asdict(module.savings).values())
    assert_same_step(module, step, quirks)


@pytest.mark.parametrize("off", SAVINGS)
def test_each_saving_alone_changes_nothing(off: str) -> None:
    module = module_of(OfficialToCo)
    assert isinstance(module, OfficialToCo)
    module.savings = Savings(**{name: name != off for name in SAVINGS})
    assert_same_step(module, MAX_STEPS - 1)


class Work(NamedTuple):
    """Encoder passes as (images, side in pixels, with gradient) and images the decoder saw."""

    passes: list[tuple[int, int, bool]]
    decoder: list[int]


def work_of(module: ToCo) -> Work:
    work = Work([], [])

    def encoder(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        work.passes.append((len(inputs[0]), inputs[0].shape[-1], torch.is_grad_enabled()))

    module.backbone.register_forward_pre_hook(encoder)
    module.decoder.register_forward_pre_hook(lambda _, inputs: work.decoder.append(len(inputs[0])))
    step_of(module, MAX_STEPS - 1)
    return work


def test_our_step_encodes_the_views_once_and_decodes_once() -> None:
    work = work_of(module_of(ToCo))
    views, locals_ = (4, 96, True), (16, 32, True)
    flip, half, one_and_a_half = (2, 96, False), (4, 48, False), (4, 144, False)
    assert work.passes == [views, flip, half, one_and_a_half, locals_]
    assert work.decoder == [2]


def test_the_official_way_does_all_the_work_of_the_page() -> None:
    work = work_of(module_of(OfficialToCo))
    # item 1: three CAM scales with mirror images; input, both globals twice, locals with gradient
    assert sorted(work.passes) == sorted(
        [
            *[(4, 96, False), (4, 48, False), (4, 144, False)],
            *[(2, 96, True), (4, 96, True), (4, 96, True), (16, 32, True)],
        ]
    )
    assert work.decoder == [4, 4, 4, 2]  # item 2: on every CAM pass


def test_attention_is_materialised_only_the_official_way(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    fused = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        used.append(True)
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    step_of(module_of(OfficialToCo), 0)
    assert not used
    step_of(module_of(ToCo), 0)
    assert used


def test_looped_contrast_equals_the_closed_form() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(30, 16) * 0.5, torch.randn(6, 16) * 0.5
    flags = (torch.rand(3, 10) > 0.4).float()
    for temperature in (0.5, 1.0):
        torch.testing.assert_close(
            looped_ctc_loss(student, teacher, flags, temperature),
            ctc_loss(student, teacher, flags, temperature),
            rtol=1e-6,
            atol=1e-6,
        )


def test_stopwatch_counts_nested_time_once() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with watch("outer"):
        time.sleep(0.02)
        with watch("inner"):
            time.sleep(0.05)
        time.sleep(0.02)
    assert watch.seconds["inner"] == pytest.approx(0.05, abs=0.02)
    assert watch.seconds["outer"] == pytest.approx(0.04, abs=0.02)
    watch.reset()
    assert watch.seconds == {}


def test_batch_has_padding_and_one_to_three_classes() -> None:
    batch = make_batch({**TINY, "batch_size": 3}, torch.device("cpu"))
    assert batch["labels"].sum(1).tolist() == [1, 2, 3]
    assert batch["box"][0].tolist() == [0, 96, 0, 96]
    r0, r1, c0, c1 = batch["box"][1].tolist()
    assert batch["image"][1, :, r0:r1, c0:c1].abs().min() > 0
    assert (batch["image"][1, :, :r0] == 0).all()
    assert (batch["image"][1, :, :, c1:] == 0).all()
    assert (batch["view2"][1] != 0).all()


def test_sides_are_ours_the_official_one_and_one_a_saving() -> None:
    config = parse(["method=toco", "ablate=true"])
    listed = groups(config)
    assert [group[0] for group in listed] == [Side("ours", None, ())] * len(listed)
    assert [group[1].off for group in listed] == [tuple(SAVINGS), *((name,) for name in SAVINGS)]
    assert groups(parse(["method=toco", "official=false"])) == [[listed[0][0]]]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("image_sizes=448", "did you mean image_size"),
        ("batch_size=two", "batch_size"),
        ("batch_size=0", "at least 1"),
        ("official=maybe", "official"),
        ("dtype=float16", "float32 or bfloat16"),
        ("stage=during", "after or before"),
        ("method=tocco", "method=tocco: expected clip_cam or clustercam"),
        ("repeats", "expected KEY=VALUE"),
        ("out=/nowhere/at/all.json", "/nowhere/at"),
        ("out=/tmp", "out=/tmp: is a folder"),
    ],
)
def test_bad_arguments_are_one_clear_line(argument: str, message: str) -> None:
    with pytest.raises(WSSSError, match=message) as caught:
        benchmark.main(["method=toco", argument])
    assert "\n" not in str(caught.value)


def test_backbone_is_the_papers_unless_given() -> None:
    assert parse(["method=toco"]).backbone == "vit_base"
    assert parse(["method=clustercam"]).backbone == "deit_small"
    assert parse(["method=clustercam", "backbone=vit_pico"]).backbone == "vit_pico"


def timed(config: BenchmarkConfig, side: Side) -> dict[str, Any]:
    """What one side measures in this process."""
    one = TimedSide(asdict(config), side)
    for _ in range(config.warmup + config.repeats):
        one.step()
    return one.result()


def test_methods_without_an_official_side_are_timed_alone() -> None:
    config = parse(["method=tkp_pcl", "ablate=true"])
    assert (config.backbone, config.image_size) == ("vit_base", 384)
    assert [[side.name for side in group] for group in groups(config)] == [["ours"]]
    arguments = "method=tkp_pcl backbone=vit_pico image_size=64 repeats=1 warmup=0 device=cpu"
    config = parse([*arguments.split(), "num_classes=4"])
    # its views (a symmetry) are not among those of the shared batch
    result = timed(config, *groups(config)[0])
    assert {"forward", "pce", "backward"} <= set(result["steps"][0]["phases"])
    assert {"mce_loss", "pce_loss"} <= set(result["losses"])
    screen = Console(width=120, record=True)
    show(summarise(asdict(config), [[result]]), screen)
    assert "pce" in screen.export_text()


def test_a_second_stage_is_not_timed() -> None:
    config = parse(["method=segmenter_vit", "backbone=vit_pico", "image_size=64"])
    with pytest.raises(WSSSError, match="trains on masks, its step is not timed"):
        timed(config, *groups(config)[0])


def test_method_must_be_given() -> None:
    with pytest.raises(WSSSError, match="method is missing"):
        parse([])


def side_result(name: str, times: list[float], memory: int, off: list[str]) -> dict[str, Any]:
    """What a side measures, with a quarter of every step in the forward pass."""
    steps = [{"seconds": t, "phases": {"forward": t / 4, "rest": 3 * t / 4}} for t in times]
    return {
        "name": name,
        "switched_off": off,
        "steps": steps,
        "losses": {"cls_loss": 1.0 if name == "ours" else 1.5},
        "peak_memory_bytes": memory,
        "peak_memory_kind": "",
        "machine": {"device": "abacus", "threads": 1, "torch": "0"},
    }


def test_summary_takes_phases_of_the_fastest_step() -> None:
    ours = side_result("ours", [2.0, 1.0, 4.0], 100, [])
    (side,) = summarise({"batch_size": 2}, [[ours]])["sides"]
    assert (side["fastest_seconds"], side["median_seconds"]) == (1.0, 2.0)
    assert side["fastest_phases"] == {"forward": 0.25, "rest": 0.75}
    assert side["images_per_second"] == 2.0


def test_a_ratio_is_the_median_over_neighbouring_steps() -> None:
    """Whatever else the machine does meets both: here it is five times slower in one pair."""
    ours = side_result("ours", [1.0, 5.0, 1.0], 100, [])
    official = side_result("official way", [3.0, 10.0, 4.0], 250, SAVINGS)
    summary = summarise({"batch_size": 2}, [[ours, official]])
    _, side = summary["sides"]
    assert (side["ratio"], side["ratio_range"]) == (3.0, [2.0, 4.0])
    assert side["ratio_memory"] == 2.5
    assert side["largest_loss_difference"] == 0.5


def test_each_saving_has_an_ours_of_its_own() -> None:
    first = [side_result("ours", [1.0], 100, []), side_result("official way", [2.0], 200, SAVINGS)]
    second = [side_result("ours", [2.0], 100, []), side_result("without a", [3.0], 100, ["a"])]
    sides = summarise({"batch_size": 2}, [first, second])["sides"]
    assert [side["name"] for side in sides] == ["ours", "official way", "without a"]
    assert sides[0]["median_seconds"] == 1.0
    assert sides[2]["ratio"] == 1.5


@pytest.mark.parametrize(
    ("times", "warns"), [([1.0, 1.0, 1.2, 1.2], False), ([1, 1, 1.3, 1.3], True)]
)
def test_halves_that_differ_by_a_fifth_are_said(times: list[float], warns: bool) -> None:
    config = asdict(parse(["method=toco"]))
    for changed in (0, 1):
        both = [[1.0] * 4, [1.0] * 4]
        both[changed] = times
        ours = side_result("ours", both[0], 100, [])
        official = side_result("official way", both[1], 100, SAVINGS)
        console = Console(record=True, width=120)
        show(summarise(config, [[ours, official]]), console)
        assert ("something else was running" in console.export_text()) == warns


def test_tables_show_both_sides_and_single_savings_by_cost() -> None:
    ours = side_result("ours", [1.0], 2**30, [])
    others = [
        side_result("official way", [3.0], 2**31, SAVINGS),
        side_result("without cheap", [1.1], 2**30, ["cheap"]),
        side_result("without dear", [1.7], 2**30, ["dear"]),
    ]
    console = Console(record=True, width=120)
    results = [[ours, other] for other in others]
    show(summarise(asdict(parse(["method=toco"])), results), console)
    text = console.export_text()
    assert "forward" in text
    assert "+0.500" in text  # 0.75 s officially, 0.25 s ours
    assert "official way: 3.00 times the time of ours (median of 1 pairs, 3.00 to 3.00)" in text
    assert text.index("dear") < text.index("cheap")
    assert "x 1.70" in text


def test_peak_memory_counts_this_process_and_never_falls() -> None:
    before, kind = peak_memory(torch.device("cpu"))
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    after, _ = peak_memory(torch.device("cpu"))
    assert kind == "resident set of the process"
    assert 0 < before <= after
    assert after >= block.numel()


# ---- ClusterCAM ---------------------------------------------------------------------------------

CLUSTER_SAVINGS = [field.name for field in fields(ClusterSavings)]


def cluster_module(kind: type[ClusterCAM]) -> ClusterCAM:
    torch.manual_seed(0)
    backbone = Backbone(
        name="vit_tiny_patch16_224",
        weights="random",
        overrides={"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 64},
    )
    settings = ClusterCAMSettings(max_steps=80, decoder_channels=16)
    module = kind(backbone=backbone, num_classes=4, settings=settings)
    with torch.no_grad():  # attention that is not nearly uniform, and maps that are not all alike
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return module.train()


def cluster_step(module: ClusterCAM, step: int) -> tuple[Step, dict[str, torch.Tensor]]:
    """Losses and gradients of one step with fixed weights, batch and drop paths."""
    torch.manual_seed(1)
    batch = make_batch(TINY, torch.device("cpu"))
    result = module.losses(batch, step)
    result.total.backward()
    return result, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("step", [0, 79])
@pytest.mark.parametrize("off", [CLUSTER_SAVINGS, *([name] for name in CLUSTER_SAVINGS)])
def test_the_official_way_gives_the_same_clustercam_step(step: int, off: list[str]) -> None:
    expected, expected_grads = cluster_step(cluster_module(ClusterCAM), step)
    module = cluster_module(OfficialClusterCAM)
    assert isinstance(module, OfficialClusterCAM)
    module.savings = ClusterSavings(**{name: name not in off for name in CLUSTER_SAVINGS})
    result, grads = cluster_step(module, step)
    assert result.losses.keys() == expected.losses.keys()
    assert len(result.losses) == (2 if step == 0 else 3)
    for name, loss in expected.losses.items():
        assert result.losses[name].item() == pytest.approx(loss.item(), rel=2e-6), name
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        limit = 2e-4 * grad.abs().max().item() + 1e-9
        assert (grads[name] - grad).abs().max().item() <= limit, name


def test_clustercam_keeps_all_maps_the_official_way_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = []
    stack = torch.stack

    def spy(tensors: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        stacked.append(tuple(tensors[0].shape))
        return stack(tensors, *args, **kwargs)

    monkeypatch.setattr(torch, "stack", spy)
    cluster_step(cluster_module(OfficialClusterCAM), 79)
    # images and mirrors, heads, patches of 96, 80 (whole patches for 72) and 128 px (for 120)
    whole = [(4, 3, side * side, side * side) for side in (6, 5, 8)]
    assert [shape for shape in stacked if len(shape) == 4 and shape[2] == shape[3]] == whole
    stacked.clear()
    cluster_step(cluster_module(ClusterCAM), 79)
    assert not [shape for shape in stacked if len(shape) == 4 and shape[2] == shape[3]]


@pytest.mark.slow
def test_both_sides_of_clustercam_come_from_the_configuration() -> None:
    arguments = "method=clustercam backbone=vit_pico image_size=64 repeats=1 warmup=0 device=cpu"
    config = parse([*arguments.split(), "num_classes=4"])
    ((first, second),) = groups(config)
    assert second.off == tuple(CLUSTER_SAVINGS)
    ours, official = timed(config, first), timed(config, second)
    assert set(ours["losses"]) == {"cls_loss", "patch_loss", "seg_loss"}
    for name, loss in ours["losses"].items():
        assert official["losses"][name] == pytest.approx(loss, rel=1e-5), name
    assert {"forward", "cam", "pseudo_labels", "backward"} <= set(ours["steps"][0]["phases"])


@pytest.mark.slow
def test_command_measures_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "benchmark.json"
    arguments = (
        "method=toco backbone=vit_pico image_size=64 repeats=2 warmup=0 device=cpu threads=1"
    )
    assert main(["benchmark", *arguments.split(), "num_classes=4", f"out={out}"]) == 0
    summary = json.loads(out.read_text())
    ours, official = summary["sides"]
    assert official["switched_off"] == SAVINGS
    for side in (ours, official):
        assert len(side["steps"]) == 2
        phases = side["fastest_phases"]
        assert {"forward", "cam", "pseudo_labels", "energy", "backward", "optimiser"} <= set(phases)
        assert sum(phases.values()) == pytest.approx(side["fastest_seconds"], rel=1e-6)
        assert min(phases.values()) >= 0
        assert side["peak_memory_bytes"] > 2**27
    assert official["largest_loss_difference"] < 1e-6
    pairs = zip(official["steps"], ours["steps"], strict=True)
    assert official["ratio_range"] == sorted(a["seconds"] / b["seconds"] for a, b in pairs)
    printed = capsys.readouterr().out
    for text in ("pseudo labels", "images/s", "peak memory", "times the time of ours"):
        assert text in printed


@pytest.mark.slow
def test_sides_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    arguments = "method=toco backbone=vit_pico image_size=64 repeats=9999 warmup=0 device=cpu"
    command = Command(["benchmark", *arguments.split()], tmp_path / "log")
    pid = command.process.pid
    assert pid is not None
    command.until(lambda: len(processes_of(pid)) > 2)
    command.send(signal.SIGKILL)
    assert command.end() == -signal.SIGKILL  # which waits for all of its processes


def test_crfs_are_compared_by_labels_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(crf, "VOC_SIZE", (60, 80))  # the real size is for a quiet machine
    out = tmp_path / "crf.json"
    arguments = ["part=crf", "repeats=1", "warmup=0", "num_classes=5", "device=cpu", "crf=psa"]
    assert main(["benchmark", *arguments, f"out={out}"]) == 0
    rows = json.loads(out.read_text())["crfs"]
    assert [(row["image"], row["classes"]) for row in rows] == [("MiniVOC", 9), ("500 x 375", 6)]
    for row in rows:
        assert row["agreement"] >= 0.995
        assert row["ours_seconds"] > 0
        assert row["pydensecrf_seconds"] > 0
    assert "same labels" in capsys.readouterr().out
