"""ClusterCAM's block and losses, written out as their page states them (clustercam.md 1 to 3)."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_clustercam import (
    MAX_STEPS,
    NUM_CLASSES,
    built,
    losses_at,
    make_batch,
    make_images,
    tiny,
)
from torch import Tensor

from wsss.maps.pseudo_labels import refine_cam_to_label
from wsss.methods.clustercam.method import ClusterCAM
from wsss.methods.clustercam.network import (
    BlockOutput,
    initial_centres,
    run_block,
)
from wsss.models.backbone import Backbone
from wsss.models.class_tokens import sum_of_last, whole_patches

GRID = (5, 4)
EPS = 1e-5  # of every norm but the one before the MLP


def norm(layer: Any, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / deviation * layer.weight + layer.bias


def heads_of(projected: Tensor, heads: int) -> list[Tensor]:
    """Queries, keys, values, each (B, heads, T, d), of (B, T, 3 D)."""
    parts = projected.chunk(3, dim=-1)
    return [torch.stack(part.chunk(heads, dim=-1), dim=1) for part in parts]


def joined(mixed: Tensor) -> Tensor:
    return torch.cat(list(mixed.unbind(1)), dim=-1)


def block_of_the_page(module: ClusterCAM, index: int, tokens: Tensor) -> dict[str, Tensor]:
    """One block, section 1: branch A, branch B, both residuals and the map."""
    block: Any = module.backbone.vit.blocks[index]
    branch: Any = module.branches[index]
    classes, heads = NUM_CLASSES, block.attn.num_heads
    dim = tokens.shape[-1]

    queries, keys, values = heads_of(block.attn.qkv(norm(block.norm1, tokens, EPS)), heads)
    weights = (queries @ keys.mT / (dim / heads) ** 0.5).softmax(-1)
    plain = block.attn.proj(joined(weights @ values))
    rows = weights[:, :, :classes, classes:]

    patches = tokens[:, classes:]
    space = norm(branch.norm_space, branch.to_space(patches), EPS)  # Z
    as_map = space.unflatten(1, GRID)
    height, width = GRID[0] // 2, GRID[1] // 2
    centres = torch.stack(
        [
            as_map[:, r0:r1, c0:c1].mean((1, 2))
            for r0, r1 in spans(GRID[0], height)
            for c0, c1 in spans(GRID[1], width)
        ],
        dim=1,
    )
    for _ in range(3):
        assignment = (space @ centres.mT / dim**0.5).softmax(-1)
        centres = assignment.mT @ space / (assignment.sum(1)[..., None] + 1e-8)
    joint = [
        norm(branch.norm_cls, tokens[:, :classes], EPS),
        norm(branch.norm_centres, centres, EPS),
    ]
    queries, keys, values = heads_of(branch.qkv(torch.cat(joint, dim=1)), heads)
    weights = (queries @ keys.mT / (dim / heads) ** 0.5).softmax(-1)
    mixed = joined(weights @ values)
    update = torch.cat(
        [branch.proj_cls(mixed[:, :classes]), assignment @ mixed[:, classes:]], dim=1
    )
    pulled = torch.stack([w @ assignment.mT for w in weights[:, :, :classes, classes:].unbind(1)])
    clustered = pulled.transpose(0, 1)  # G, (B, heads, K, N)

    after = tokens + plain + update
    out = after + block.mlp(norm(block.norm2, after, 1e-6))
    return {
        "plain": plain,
        "update": update,
        "rows": rows,
        "clustered": clustered,
        "map": (1 - branch.mixing) * rows + branch.mixing * clustered,
        "out": out,
    }


def spans(total: int, parts: int) -> list[tuple[int, int]]:
    """Where adaptive pooling begins and ends: floor(i n / m), ceil((i + 1) n / m)."""
    return [(i * total // parts, -(-(i + 1) * total // parts)) for i in range(parts)]


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 3])
def test_a_block_is_that_of_the_page(index: int) -> None:
    module = tiny().double().eval()
    generator = torch.Generator().manual_seed(0)
    count = NUM_CLASSES + GRID[0] * GRID[1]
    # small tokens, so that the epsilon of the norms counts
    tokens = 0.02 * torch.randn(2, count, 48, dtype=torch.float64, generator=generator)
    block = module.backbone.vit.blocks[index]
    output = run_block(block, module.branches[index], tokens, GRID)
    found = {
        "plain": output.plain,
        "update": output.clustered.update,
        "rows": output.class_rows,
        "clustered": output.clustered.class_map,
        "map": output.class_map,
        "out": output.tokens,
    }
    for name, expected in block_of_the_page(module, index, tokens).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-11, msg=name)


def test_centres_start_as_means_of_floored_squares() -> None:
    tokens = torch.randn(1, 20, 3, dtype=torch.float64)
    assert initial_centres(tokens, GRID).shape == (1, 4, 3)
    first = tokens.unflatten(1, GRID)[:, :3, :2].mean((1, 2))
    torch.testing.assert_close(initial_centres(tokens, GRID)[:, 0], first)
    assert initial_centres(tokens, GRID, side=3).shape == (1, 1, 3)


@torch.no_grad()
def test_features_are_tokens_then_maps_by_block_head_and_class() -> None:
    module = tiny().eval()
    kept: list[BlockOutput] = []
    images = make_images(64, 96)
    encoded = module.encode(images, keep=kept)
    grid, last = (4, 6), kept[-1].tokens
    assert encoded.activation.shape == (2, 48 + 4 * 3 * NUM_CLASSES, *grid)
    for index in (0, 13, 23):
        row, column = divmod(index, 6)
        expected = last[:, NUM_CLASSES + index]
        torch.testing.assert_close(encoded.activation[:, :48, row, column], expected)
    for block, head, k in ((0, 0, 1), (2, 1, 3), (3, 2, 0)):
        channel = 48 + (block * 3 + head) * NUM_CLASSES + k
        expected = kept[block].class_map[:, head, k].unflatten(1, grid)
        torch.testing.assert_close(encoded.activation[:, channel], expected)
    torch.testing.assert_close(encoded.class_logits, last[:, :NUM_CLASSES].mean(2))
    mean = F.conv2d(
        encoded.activation, module.patch_head.weight, module.patch_head.bias, padding=1
    ).mean((2, 3))
    torch.testing.assert_close(module.patch_logits(encoded.activation), mean)


def test_maps_of_the_last_blocks_are_summed_over_heads_means() -> None:
    maps = [torch.full((1, 2, 1, 1), value) for value in (1.0, 10.0, 100.0)]
    maps[2][0, 1] = 300
    assert sum_of_last(maps, 2).item() == pytest.approx(10 + 200)


def test_an_image_is_enlarged_to_whole_patches() -> None:
    images = make_images(33, 48)
    found = whole_patches(images, 16)
    expected = F.interpolate(images, (48, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected)
    assert whole_patches(found, 16) is found


@torch.no_grad()
def test_whole_patches_are_those_of_the_backbone() -> None:
    overrides = {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 56}
    backbone = Backbone(name="vit_small_patch14_dinov2", weights="random", overrides=overrides)
    module = built(backbone, decoder_channels=8).eval()
    images = make_images(60, 90)
    logits = module(images).seg_logits
    assert logits.shape == (2, NUM_CLASSES + 1, 5, 7)
    resized = F.interpolate(images, (70, 98), mode="bilinear", align_corners=False)
    assert torch.equal(logits, module(resized).seg_logits)


@torch.no_grad()
def test_both_branches_and_the_mlp_drop_their_paths_apart() -> None:
    module = tiny(drop_path=0.5)
    block: Any = module.backbone.vit.blocks[-1]
    torch.manual_seed(0)
    count = NUM_CLASSES + GRID[0] * GRID[1]
    tokens = torch.randn(1, count, 48).expand(64, -1, -1)
    output = run_block(block, module.branches[-1], tokens, GRID)
    kinds = set()
    for index in range(64):
        for a, b in ((0, 0), (0, 2), (2, 0), (2, 2)):  # what is kept counts twice
            plain, update = output.plain[index], output.clustered.update[index]
            after = tokens[index] + a * plain + b * update
            mlp = block.mlp(block.norm2(after))
            for c in (0, 2):
                if torch.allclose(output.tokens[index], after + c * mlp, atol=1e-4):
                    kinds.add((a, b, c))
    assert len(kinds) == 8


def test_paths_are_dropped_more_often_in_later_blocks() -> None:
    blocks: Any = tiny(drop_path=0.3).backbone.vit.blocks
    for index, block in enumerate(blocks):
        for path in (block.drop_path1, block.drop_path2):
            assert path.drop_prob == pytest.approx(0.1 * index)


def test_refinement_has_the_page_epsilon_and_iterations() -> None:
    par = tiny().par
    assert (par.eps, par.num_iter, par.dilations) == (1e-5, 10, (1, 2, 4, 8, 12, 24))


def test_labels_are_refined_against_both_thresholds() -> None:
    module, batch = tiny(high_threshold=0.6, low_threshold=0.3), make_batch()
    with torch.no_grad():
        targets = module.targets(batch["image"], batch["labels"])
        guide, cam = module.guide(batch["image"]), targets["cam"]
        expected = refine_cam_to_label(module.par, guide, cam, batch["labels"], high=0.6, low=0.3)
    assert torch.equal(targets["pseudo_label"], expected)
    assert (expected == 255).any()


def test_total_has_the_weight_of_the_settings() -> None:
    result = losses_at(tiny(seg_weight=0.7), MAX_STEPS - 1)
    loss = {name: value.item() for name, value in result.losses.items()}
    total = loss["cls_loss"] + loss["patch_loss"] + 0.7 * loss["seg_loss"]
    assert result.total.item() == pytest.approx(total, rel=1e-6)
    labels = make_batch()["labels"]
    for name, logits in (
        ("cls_loss", result.outputs.class_logits),
        ("patch_loss", result.seen["patch_logits"]),
    ):
        each = labels * F.logsigmoid(logits) + (1 - labels) * F.logsigmoid(-logits)
        assert loss[name] == pytest.approx(-each.mean().item(), rel=1e-5)


@torch.no_grad()
def test_negative_maps_are_kept_between_scales() -> None:
    """CAMs are sums over scales of the larger of two mirrors, not cut at zero, then normalised."""
    module = tiny(scales=(1.0, 0.5)).eval()
    images, labels = make_images(), torch.ones(2, NUM_CLASSES)
    real, seen = module.raw_cam, []

    def lowered(view: Tensor, classes: Tensor) -> Tensor:
        seen.append(real(view, classes) - 0.5)
        return seen[-1]

    module.raw_cam = lowered  # type: ignore[method-assign, assignment]
    cam = module.cams(images, labels)
    total = torch.zeros_like(cam)
    for raw in seen:
        plain, mirrored = (
            F.interpolate(part, images.shape[-2:], mode="bilinear") for part in raw.chunk(2)
        )
        total += torch.maximum(plain, mirrored.flip(-1))
    assert (total < 0).any()
    total -= total.amin((2, 3), keepdim=True)
    torch.testing.assert_close(cam, total / (total.amax((2, 3), keepdim=True) + 1e-5))
