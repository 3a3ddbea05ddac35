"""The affinity network: losses pair by pair, labels of its grid, groups, what it refuses."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wsss.core.errors import WSSSError
from wsss.methods.affinity_net import (
    AffinityNet,
    AffinityNetSettings,
    grid_labels,
    pair_losses,
)
from wsss.models.backbone import Backbone
from wsss.models.conv_backbone import ConvBackbone


def pico(depth: int = 3) -> Backbone:
    overrides = {"patch_size": 8, "depth": depth, "img_size": 32, "embed_dim": 48}
    return Backbone(name="vit_tiny_patch16_224", weights="random", overrides=overrides)


def make(backbone: Backbone | ConvBackbone | None = None, **settings: object) -> AffinityNet:
    torch.manual_seed(0)
    small = {"widths": (4, 5, 6), "radius": 3, "max_steps": 10}
    chosen = AffinityNetSettings(**small | settings)  # type: ignore[arg-type]
    return AffinityNet(backbone=backbone or pico(), num_classes=3, settings=chosen)


def make_batch() -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    target = torch.zeros(2, 32, 32, dtype=torch.long)
    target[:, 8:24, 8:24] = 2
    target[1, :, 24:] = 255
    return {"image": torch.randn(2, 3, 32, 32, generator=draws), "target": target}


def test_losses_are_those_of_every_pair() -> None:
    draws = torch.Generator().manual_seed(1)
    features = torch.rand(2, 6, 5, 4, generator=draws, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 255])[torch.randint(4, (2, 5, 4), generator=draws)]
    background, same, different = [], [], []
    for b in range(2):
        places = itertools.product(range(5), range(4))
        for (r, c), (row, column) in itertools.combinations(places, 2):
            one, other = labels[b, r, c].item(), labels[b, row, column].item()
            if math.hypot(r - row, c - column) >= 3 or 255 in (one, other):
                continue
            a = math.exp(-(features[b, :, r, c] - features[b, :, row, column]).abs().mean())
            if one != other:
                different.append(-math.log(1 + 1e-5 - a))
            else:
                (same if one else background).append(-math.log(a + 1e-5))
    assert min(len(background), len(same), len(different)) > 3
    found = pair_losses(features, labels, radius=3)
    assert [value.item() for value in found.values()] == pytest.approx(
        [sum(one) / len(one) for one in (background, same, different)]
    )


def test_pairs_that_do_not_exist_cost_nothing() -> None:
    features = torch.rand(1, 6, 4, 4, requires_grad=True)
    undecided = pair_losses(features, torch.full((1, 4, 4), 255), radius=3)
    assert [value.item() for value in undecided.values()] == [0, 0, 0]
    only = pair_losses(features, torch.zeros(1, 4, 4, dtype=torch.long), radius=3)
    assert [value.item() > 0 for value in only.values()] == [True, False, False]
    sum(only.values()).backward()  # type: ignore[union-attr]
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_equal_features_of_unlike_places_have_a_finite_loss() -> None:
    features = torch.zeros(1, 2, 1, 2, requires_grad=True)
    losses = pair_losses(features, torch.tensor([[[0, 1]]]), radius=2)
    assert losses["different_pairs_loss"].item() == pytest.approx(-math.log(1e-5), rel=0.01)


def test_total_weighs_a_quarter_a_quarter_and_a_half() -> None:
    module = make()
    step = module.losses(make_batch(), 0)
    background, same, different = step.losses.values()
    torch.testing.assert_close(step.total, 0.25 * background + 0.25 * same + 0.5 * different)
    assert list(step.losses) == [
        "background_pairs_loss", "same_pairs_loss", "different_pairs_loss",
    ]  # fmt: skip
    assert torch.equal(step.seen["target"], grid_labels(make_batch()["target"], 8))
    assert step.outputs.class_logits.shape == (2, 0)


def test_losses_are_float32_under_autocast() -> None:
    """In bfloat16 1 + 1e-5 is 1: the loss of equal features of two classes is infinite."""
    module = make()
    with torch.autocast("cpu", torch.bfloat16):
        features = module.features(make_batch()["image"])
        losses = module.losses(make_batch(), 0).losses
    assert features.dtype == torch.float32
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    target = grid_labels(make_batch()["target"], 8)
    assert {**losses} == pair_losses(features, target, radius=3)


def block(**counts: int) -> torch.Tensor:
    """A block of 4 x 4 pixels, with so many of each label."""
    pixels = [int(label[1:]) for label, count in counts.items() for _ in range(count)]
    assert len(pixels) == 16
    return torch.tensor(pixels).view(1, 4, 4)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"_0": 16}, 0),
        ({"_255": 16}, 255),
        ({"_3": 9, "_0": 4, "_255": 3}, 3),
        ({"_3": 8, "_0": 4, "_255": 4}, 255),  # the high background wins a tie
        ({"_3": 5, "_0": 8, "_255": 3}, 0),  # so does the low one
        ({"_3": 5, "_0": 7, "_255": 4}, 255),
        ({"_3": 5, "_1": 5, "_0": 4, "_255": 2}, 255),
        ({"_3": 6, "_1": 5, "_0": 5}, 3),
        ({"_3": 5, "_1": 5, "_0": 6}, 0),
        ({"_3": 7, "_1": 7, "_0": 2}, 1),  # of equal classes the first
    ],
)
def test_grid_label_is_what_most_pixels_say(counts: dict[str, int], expected: int) -> None:
    assert grid_labels(block(**counts), 4).tolist() == [[[expected]]]


def test_grid_labels_lie_where_their_pixels_lie() -> None:
    target = torch.arange(6).view(1, 2, 3)
    large = target.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(grid_labels(large, 4), target)


def test_features_are_of_the_padded_image_and_the_taps() -> None:
    module = make(taps=(-3, 0, 2)).eval()
    images = torch.randn(1, 3, 20, 27)
    with torch.no_grad():
        found = module.features(images)
        padded = F.pad(images, (0, 5, 0, 4))
        encoded = module.backbone(padded, taps=[0, 2])
        taps = [encoded.as_map(encoded.intermediates[index]) for index in (0, 0, 2)]
        parts = [F.elu(layer(tap)) for layer, tap in zip(module.narrow, taps, strict=True)]
        expected = F.conv2d(torch.cat(parts, 1), module.joined.weight)
    assert found.shape == (1, 15, 3, 4)
    torch.testing.assert_close(found, expected)


def test_stages_of_a_resnet_are_tapped_at_its_last_size() -> None:
    module = make(ConvBackbone(name="resnet50"), taps=(4, -2, -1)).eval()
    assert [layer.in_channels for layer in module.narrow] == [256, 1024, 2048]
    with torch.no_grad():
        assert module.features(torch.randn(1, 3, 40, 33)).shape == (1, 15, 5, 5)


def test_batch_norms_stay_unless_they_are_to_learn() -> None:
    module = make(ConvBackbone(name="mobilenet_v3_small")).train()
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(norm.training or norm.weight.requires_grad for norm in norms)
    module = make(ConvBackbone(name="mobilenet_v3_small"), freeze_batch_norm=False).train()
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.training and norm.weight.requires_grad for norm in norms)


def test_biases_learn_twice_as_fast_without_decay() -> None:
    module = make(lr=0.01, weight_decay=0.1)
    groups = {group["name"]: group for group in module.param_groups()}
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {"encoder": 0.01, "encoder_biases": 0.02, "head": 0.1, "head_biases": 0.2}
    )
    optimizer = module.optimizer(list(groups.values()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1, 0.0]
    assert [group["momentum"] for group in optimizer.param_groups] == [0.0] * 4
    (first, *_) = make(momentum=0.9).optimizer(module.param_groups()).param_groups
    assert first["momentum"] == 0.9
    members = [parameter for group in groups.values() for parameter in group["params"]]
    assert {*members} == {*module.parameters()}
    assert len(members) == len({*members})
    assert len(groups["head"]["params"]) == 4
    assert len(groups["head_biases"]["params"]) == 3
    assert module.lr_multiplier(5) == pytest.approx(0.5**0.9)
    assert isinstance(make(optimiser="adamw").optimizer(module.param_groups()), torch.optim.AdamW)


def test_it_learns_which_neighbours_differ() -> None:
    module = make(optimiser="adamw", lr=1e-3)
    optimizer = module.optimizer(module.param_groups())
    batch = make_batch()
    batch["image"] = (batch["target"][:, None] == 2).float().repeat(1, 3, 1, 1)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        total = module.losses(batch, 0).total
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert values[-1] < 0.8 * values[0]


def test_it_is_not_evaluated() -> None:
    with pytest.raises(WSSSError, match="no maps of its own"):
        make()(torch.zeros(1, 3, 32, 32))
    with pytest.raises(WSSSError, match="no maps of its own"):
        make().cams(torch.zeros(1, 3, 32, 32), torch.ones(1, 3))


def test_settings_that_fit_no_network_are_named() -> None:
    with pytest.raises(WSSSError, match=r"method\.radius=1: expected"):
        make(radius=1)
    with pytest.raises(WSSSError, match=r"method\.widths=\[4\]: .*the 3 method\.taps"):
        make(widths=(4,))
    with pytest.raises(WSSSError, match=r"method\.taps: -4 is none of the encoder's 3 parts"):
        make(taps=(-4, -2, -1))
    with pytest.raises(WSSSError, match=r"method\.taps: part 2 .* no convolution"):
        make(ConvBackbone(name="resnet50"), taps=(2, -2, -1))


def test_crops_that_are_no_grid_are_named() -> None:
    settings = make(radius=5).settings
    settings.check_crop(40, 8)
    with pytest.raises(WSSSError, match=r"method\.radius=5: .*crop_size=32 has 4 features"):
        settings.check_crop(32, 8)
    with pytest.raises(WSSSError, match=r"budget\.crop_size=44: expected a multiple of 8"):
        settings.check_crop(44, 8)
