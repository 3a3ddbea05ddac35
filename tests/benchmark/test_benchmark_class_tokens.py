"""The benchmark of MCTformer+, MoRe and WeCLIP: both ways agree, the official one does its work."""

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from wsss.benchmark import (
    mctformer_official,
    more_official,
    one_hot,
    runner,
    weclip_official,
)
from wsss.benchmark.arguments import OFFICIAL, parse
from wsss.benchmark.mctformer_official import OfficialMCTformerPlus
from wsss.benchmark.more_official import OfficialMoRe, looped_selection
from wsss.benchmark.runner import TimedSide, make_batch, saving_names
from wsss.benchmark.steps import groups
from wsss.benchmark.weclip_official import OfficialWeCLIP, boxes_by_opencv
from wsss.core.errors import WSSSError
from wsss.maps.refine.par import PAR
from wsss.methods.base import Batch, Step, WSSSModule
from wsss.methods.mctformer import MCTformerPlus, MCTformerPlusSettings
from wsss.methods.mctformer import official as mctformer_quirks
from wsss.methods.more import MoRe, MoReSettings
from wsss.methods.more import official as more_quirks
from wsss.methods.more.contrast import select_tokens
from wsss.methods.weclip import WeCLIP, WeCLIPSettings
from wsss.methods.weclip import official as weclip_quirks
from wsss.methods.weclip.affinity import box_mask
from wsss.models.backbone import Backbone

LAST = 99
STAGES = {"first": 0, "last": LAST}
TINY: dict[str, Any] = {"batch_size": 2, "pairs": 3, "num_classes": 4}
# no whole patches, and for more 8 x 8 tokens: UNE's windows are 6 x 6
SIZES = {"mctformer": 90, "more": 128, "weclip": 45}


def sharpened(module: WSSSModule) -> WSSSModule:
    """Attention that is not nearly uniform, and maps that are not all alike."""
    with torch.no_grad():
        for parameter in module.backbone.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return module.train()


def small_vit(depth: int) -> Backbone:
    sizes = {"embed_dim": 48, "depth": depth, "num_heads": 3, "img_size": 64}
    return Backbone(name="vit_tiny_patch16_224", weights="random", overrides=sizes)


def mctformer(
    kind: type[MCTformerPlus] = MCTformerPlus,
    quirks: mctformer_quirks.Quirks = mctformer_quirks.CORRECTED,
) -> WSSSModule:
    torch.manual_seed(0)
    settings = MCTformerPlusSettings(
        max_steps=LAST + 1, input_size=96, drop_path=0.3, token_noise=0.02
    )
    backbone = small_vit(3)
    return sharpened(kind(backbone=backbone, num_classes=4, settings=settings, quirks=quirks))


def more(
    kind: type[MoRe] = MoRe, quirks: more_quirks.Quirks = more_quirks.CORRECTED, **changes: Any
) -> WSSSModule:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "max_steps": LAST + 1,
        "decoder_channels": 16,
        "decoder_dilation": 1,
        "scales": (1.0, 0.5),
        # a random network's maps need these to contain background, uncertain and foreground
        "low_threshold": 0.55,
        "high_threshold": 0.75,
        "cle_high_threshold": 0.65,
        "late_low_threshold": 0.5,
        "late_high_threshold": 0.7,
    }
    chosen = MoReSettings(**(settings | changes))
    return kind(backbone=small_vit(4), num_classes=4, settings=chosen, quirks=quirks).train()


def weclip(
    kind: type[WeCLIP] = WeCLIP, quirks: weclip_quirks.Quirks = weclip_quirks.CORRECTED
) -> WSSSModule:
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 4, "num_heads": 3, "img_size": 32, "patch_size": 8}
    name = "vit_base_patch16_clip_quickgelu_224"
    backbone = Backbone(
        name=name, weights="random", overrides={**sizes, "num_classes": 16}, frozen=True
    )
    settings = WeCLIPSettings(
        max_steps=LAST + 1,
        text="random",
        decoder_channels=16,
        decoder_layers=1,
        decoder_heads=2,
        static_layers=3,
        rfm_layers=2,
        rfm_start=11,
    )
    module = sharpened(kind(backbone=backbone, num_classes=4, settings=settings, quirks=quirks))
    module.get_buffer("texts.scale").fill_(3)  # so that no text alone wins
    return module.double()  # scores of two labels may be as near as float32's rounding


BUILD: dict[str, Callable[..., WSSSModule]] = {
    "mctformer": mctformer,
    "more": more,
    "weclip": weclip,
}
KINDS: dict[str, Any] = {
    "mctformer": OfficialMCTformerPlus,
    "more": OfficialMoRe,
    "weclip": OfficialWeCLIP,
}
SAVINGS: dict[str, Any] = {
    "mctformer": mctformer_official.Savings,
    "more": more_official.Savings,
    "weclip": weclip_official.Savings,
}
SINGLE = [(method, one.name) for method, kind in SAVINGS.items() for one in fields(kind)]


def batch_of(method: str, **changes: Any) -> Batch:
    torch.manual_seed(1)
    config = {**TINY, "image_size": SIZES[method], **changes}
    return make_batch(config, torch.device("cpu"))


def step_of(method: str, module: WSSSModule, step: int) -> tuple[Step, dict[str, torch.Tensor]]:
    """Losses and gradients of one step with fixed weights, batch and draws."""
    batch, kind = batch_of(method), next(module.parameters()).dtype
    result = module.losses({**batch, "image": batch["image"].to(kind)}, step)
    result.total.backward()
    zero = {name: torch.zeros_like(p) for name, p in module.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return result, {**zero, **found}


def assert_same_step(method: str, module: WSSSModule, expected: WSSSModule, step: int) -> Step:
    ours, grads = step_of(method, expected, step)
    theirs, their_grads = step_of(method, module, step)
    assert ours.losses.keys() <= theirs.losses.keys()
    for name, loss in ours.losses.items():
        assert theirs.losses[name].item() == pytest.approx(loss.item(), rel=5e-6), name
    assert theirs.total.item() == pytest.approx(ours.total.item(), rel=5e-6)
    assert their_grads.keys() == grads.keys()
    for name, grad in grads.items():
        limit = 2e-4 * grad.abs().max().item() + 1e-8
        assert (their_grads[name] - grad).abs().max().item() <= limit, name
    return ours


def without(method: str, *off: str) -> Any:
    module: Any = BUILD[method](KINDS[method])
    names = [one.name for one in fields(SAVINGS[method])]
    module.savings = SAVINGS[method](**{name: name not in off for name in names})
    return module


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("method", KINDS)
def test_the_official_way_gives_the_same_step(method: str, stage: str) -> None:
    module: Any = BUILD[method](KINDS[method])
    assert not any(asdict(module.savings).values())
    seen = assert_same_step(method, module, BUILD[method](), STAGES[stage]).seen
    if stage == "last" and method != "mctformer":  # what is compared is not all of one kind
        assert set(seen["pseudo_label"].unique().tolist()) > {0, 255}
    if stage == "last" and method == "more":
        assert {0, 255} < set(seen["une_mask"].unique().tolist())
        assert min(map(len, seen["selected"])) > 0


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("method", "quirks"),
    [
        ("mctformer", mctformer_quirks.OFFICIAL),
        ("more", more_quirks.OFFICIAL),
        ("weclip", weclip_quirks.OFFICIAL),
    ],
)
def test_both_ways_agree_under_all_quirks(method: str, quirks: Any, stage: str) -> None:
    module = BUILD[method](KINDS[method], quirks)
    assert_same_step(method, module, BUILD[method](quirks=quirks), STAGES[stage])


@pytest.mark.parametrize(("method", "off"), SINGLE)
def test_each_saving_alone_changes_nothing(method: str, off: str) -> None:
    assert_same_step(method, without(method, off), BUILD[method](), LAST)


@pytest.mark.parametrize("off", ["aux_blocks_alone", "reuse_scale_one", "skip_zero_terms"])
def test_maps_of_the_first_phase_are_the_same_too(off: str) -> None:
    assert_same_step("more", without("more", off), more(), 0)


# ---- what the official way keeps and repeats ----------------------------------------------------


@pytest.mark.parametrize("method", ["mctformer", "more"])
def test_attention_is_whole_the_official_way_alone(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    fused = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        used.append(True)
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    step_of(method, BUILD[method](KINDS[method]), LAST)
    assert not used
    step_of(method, BUILD[method](), LAST)
    assert used


def test_mctformer_keeps_the_maps_of_all_blocks_and_heads() -> None:
    module: Any = mctformer(OfficialMCTformerPlus)
    step_of("mctformer", module, 0)
    count = 4 + 36  # classes and patches
    assert module.kept_maps.shape == (3, 2, 3, count, count)
    torch.testing.assert_close(module.kept_maps.sum(-1), torch.ones(3, 2, 3, count))
    for saved in (without("mctformer", "fused_attention"), without("mctformer")):
        step_of("mctformer", saved, 0)
        assert not hasattr(saved, "kept_maps")


class Work(NamedTuple):
    """Runs of a block as (images, tokens, with gradient); images of decoder and graph module."""

    second: list[tuple[int, int, bool]]
    last: list[tuple[int, int, bool]]
    decoder: list[int]
    graph: list[int]


def work_of(module: Any, step: int) -> Work:
    work = Work([], [], [], [])

    def counted(runs: list[tuple[int, int, bool]]) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            runs.append((*inputs[0].shape[:2], torch.is_grad_enabled()))

        return hook

    blocks = module.backbone.vit.blocks
    blocks[1].register_forward_pre_hook(counted(work.second))
    blocks[3].register_forward_pre_hook(counted(work.last))
    module.decoder.register_forward_pre_hook(lambda _, inputs: work.decoder.append(len(inputs[0])))
    module.graph.register_forward_pre_hook(lambda _, inputs: work.graph.append(len(inputs[0])))
    step_of("more", module, step)
    return work


def test_more_saves_passes_blocks_and_heads() -> None:
    step, mirror = (2, 72, True), (2, 72, False)  # 4 registers, 4 classes, 64 patches
    half, both = (4, 24, False), (4, 72, False)
    assert work_of(more(), LAST) == Work([step, mirror, half], [step, mirror, half], [2], [2])
    assert work_of(more(), 0) == Work([step, mirror, half], [step], [], [2])
    twice = work_of(without("more", "reuse_scale_one"), 0)
    assert twice == Work([step, both, half], [step], [], [2])
    whole = Work([step, both, half], [step, both, half], [4, 4, 2], [2, 4, 4])
    for at in (0, LAST):
        assert work_of(more(OfficialMoRe), at) == whole


def test_more_never_computes_terms_of_zero_weight_itself() -> None:
    names = {f"{name}_loss" for name in ("cls", "cls_aux", "distinct", "ptc", "cle", "une")}
    assert set(step_of("more", more(), 0)[0].losses) == names
    official = step_of("more", more(OfficialMoRe), 0)[0]
    assert set(official.losses) == names | {"seg_loss", "reg_loss"}


@pytest.mark.parametrize("gate", ["sums", "dot"])
def test_the_gathering_graph_gives_the_same_tokens(gate: str) -> None:
    ours: Any = more(gate=gate)
    theirs: Any = more(OfficialMoRe, gate=gate)
    features = ours.encode(batch_of("more")["image"])
    torch.testing.assert_close(theirs.class_tokens(features), ours.class_tokens(features))


def test_a_batch_without_labels_agrees_too() -> None:
    batch = batch_of("more")
    batch["labels"] = torch.zeros_like(batch["labels"])
    ours, theirs = (build.losses(batch, LAST).total for build in (more(), more(OfficialMoRe)))
    torch.testing.assert_close(theirs, ours)


def uncertain_maps() -> list[torch.Tensor]:
    """Maps with many, few and no windows to choose, with and without tokens of a class."""
    draws = torch.Generator().manual_seed(3)
    shares = [(0.05, 0.3, 0.65), (0.35, 0.2, 0.45), (0.3, 0.7, 0.0), (1.0, 0.0, 0.0)]
    maps = [torch.multinomial(torch.tensor(s), 182, True, generator=draws) for s in shares]
    lonely = torch.zeros(2, 182, dtype=torch.long)
    lonely[:, 3 * 14 + 4] = 2  # a pool of one token is too small
    lonely[1, 6 * 14 + 5] = 2  # and of two just enough
    return [one.view(13, 14) for one in [*maps, *lonely]]


def test_tokens_found_cell_by_cell_are_the_same() -> None:
    maps = torch.stack(uncertain_maps())

    def draws() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(len(maps))]

    ours = select_tokens(maps, draws(), corner=True)
    many, few, *none = map(len, ours)
    assert many == 8  # drawn of more
    assert 2 < few < 8
    assert none == [2, 2, 2, 2]  # no window at all
    for expected, one, generator in zip(ours, maps, draws(), strict=True):
        torch.testing.assert_close(looped_selection(one, generator), expected)


def spied(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[Any]:
    """Collect the last argument of every call of a function."""
    calls: list[Any] = []
    function = getattr(place, name)

    def spy(*given: Any, **named: Any) -> Any:
        calls.append(given[-1])
        return function(*given, **named)

    monkeypatch.setattr(place, name, spy)
    return calls


@pytest.mark.parametrize(("method", "runs"), [("more", 4), ("weclip", 2)])
def test_par_runs_one_by_one_the_official_way_alone(
    method: str, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MoRe's of two images and two thresholds."""
    images = spied(monkeypatch, PAR, "affinity")
    convolved = spied(monkeypatch, one_hot, "diffuse_by_convolution")
    step_of(method, BUILD[method](), LAST)
    assert ([len(one) for one in images], convolved) == ([2], [])
    images.clear()
    step_of(method, BUILD[method](KINDS[method]), LAST)
    assert [len(one) for one in images] == [1] * runs
    assert len(convolved) == runs


def test_weclip_differentiates_every_pair_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = spied(monkeypatch, weclip_official, "boxes_by_opencv")
    wanted = spied(monkeypatch, torch.autograd, "grad")

    def runs(module: Any) -> list[int]:
        """Images of every forward pass of the last block."""
        counts: list[int] = []
        norm = module.backbone.vit.blocks[-1].norm1
        norm.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
        step_of("weclip", module, LAST)
        return counts

    assert runs(weclip()) == [2]
    assert not boxes
    wanted.clear()
    assert runs(weclip(OfficialWeCLIP)) == [1, 1, 1]
    # the target and the block's twelve weights and biases
    assert [len(one) for one in wanted if isinstance(one, list)] == [13] * 3
    assert len(boxes) == 4  # of two images' slots
    wanted.clear()
    assert runs(without("weclip", "closed_form")) == [2]
    assert len(wanted) == 2  # slots


def test_weclip_keeps_the_attention_of_all_blocks() -> None:
    images = batch_of("weclip")["image"].double()
    modules: list[Any] = [weclip(OfficialWeCLIP), without("weclip"), weclip()]
    encoded = [module.encode(images, layers=2) for module in modules]
    assert [len(one.attentions) for one in encoded] == [3, 1, 1]  # the last block's is not there
    for one in encoded[1:]:
        torch.testing.assert_close(encoded[0].attentions[-1:], one.attentions)


def test_weclips_encoder_stays_frozen_the_official_way() -> None:
    module = weclip(OfficialWeCLIP)
    step_of("weclip", module, LAST)
    assert not any(p.requires_grad or p.grad is not None for p in module.backbone.parameters())


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("open_edge", [False, True])
def test_boxes_of_opencv_are_the_same(eight_bit: bool, open_edge: bool) -> None:
    cam = torch.rand(6, 9, 7, generator=torch.Generator().manual_seed(0)) ** 3
    cam[-1] = 0
    kinds = {"eight_bit": eight_bit, "open_edge": open_edge}
    ours = box_mask(cam, 0.4, **kinds)
    assert ours[:-1].any()
    assert not ours.all(dim=(1, 2)).any()
    for one, expected in zip(cam, ours, strict=True):
        assert torch.equal(boxes_by_opencv(one, 0.4, **kinds), expected)


# ---- the command --------------------------------------------------------------------------------


def test_pairs_are_spread_over_the_images() -> None:
    labels = batch_of("weclip", batch_size=4, pairs=6)["labels"]
    assert labels.sum(1).tolist() == [2, 2, 1, 1]
    given = ["method=weclip", "batch_size=4"]
    assert parse([*given, "pairs=6"]).pairs == 6
    for pairs in (3, 81):
        with pytest.raises(WSSSError, match=f"pairs={pairs}: expected 4 to 80"):
            parse([*given, f"pairs={pairs}"])


@pytest.mark.parametrize(
    ("method", "paper"),
    [
        ("mctformer", ("deit_small", 448)),
        ("more", ("vit_base", 448)),
        ("weclip", ("clip_base", 320)),
    ],
)
def test_both_sides_come_from_the_configuration(
    method: str, paper: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse([f"method={method}"])
    assert (config.backbone, config.image_size) == paper
    shallow = ["method.text=random", "method.static_layers=4", "method.rfm_layers=4"]
    monkeypatch.setitem(runner.REQUIRED, "weclip", shallow)  # ViT-Pico has five blocks
    given = f"method={method} backbone=vit_pico image_size=64 repeats=1 warmup=0 device=cpu"
    config = parse([*given.split(), "num_classes=4"])
    ((first, second),) = groups(config)
    assert second.off == saving_names(OFFICIAL[method])
    results = []
    for side in (first, second):
        timed = TimedSide(asdict(config), side)
        timed.step()
        results.append(timed.result())
    ours, official = results
    for name, loss in ours["losses"].items():
        assert official["losses"][name] == pytest.approx(loss, rel=1e-4), name
    phases = {"mctformer": {"forward"}, "more": {"cam", "energy"}, "weclip": {"encoder", "cam"}}
    for result in results:
        assert phases[method] <= set(result["steps"][0]["phases"])
