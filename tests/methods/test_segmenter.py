"""The second stage: losses, encoders, optimiser, and what counts as pixel supervision."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.core.supervision import PIXEL_MASKS
from wsss.evaluation.protocol import Protocol
from wsss.methods.losses import balanced_segmentation_loss, imagenet_energy_loss
from wsss.methods.segmenter import Segmenter, SegmenterSettings, masked_cross_entropy
from wsss.models.backbone import Backbone
from wsss.models.conv_backbone import ConvBackbone
from wsss.runs.compose import compose_run
from wsss.runs.folder import Run, build_data
from wsss.runs.supervision import supervision_of_run


def light(**changes: Any) -> Segmenter:
    torch.manual_seed(0)
    backbone = changes.pop("backbone", None) or ConvBackbone(name="mobilenet_v3_small")
    settings = SegmenterSettings(**{"max_steps": 10, **changes})
    return Segmenter(backbone=backbone, num_classes=3, settings=settings).train()


def pico() -> Backbone:
    return Backbone(
        name="vit_tiny_patch16_224",
        weights="random",
        overrides={"embed_dim": 24, "depth": 1, "num_heads": 3, "img_size": 32, "patch_size": 8},
    )


def make_batch(side: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, 4, (2, side, side), generator=generator)
    target[:, :8] = 255
    return {"image": torch.randn(2, 3, side, side, generator=generator), "target": target}


def test_cross_entropy_ignores_255_and_survives_nothing_else() -> None:
    logits, target = torch.randn(2, 4, 8, 8), make_batch(8)["target"]
    target[0, 4:], target[1] = 2, 255
    valid = target[0] != 255
    expected = F.cross_entropy(logits[0, :, valid].T, target[0][valid]) if valid.any() else 0
    torch.testing.assert_close(masked_cross_entropy(logits, target), torch.as_tensor(expected))
    nothing = torch.full_like(target, 255)
    assert masked_cross_entropy(logits, nothing) == 0


def test_losses_are_of_each_scale_and_their_maximum() -> None:
    module = light(backbone=pico(), loss_scales=(1.0, 0.5)).eval()
    batch = make_batch(32)
    step = module.losses(batch, 0)
    losses = step.losses
    assert list(losses) == ["seg_1_loss", "seg_0.5_loss", "seg_max_loss"]
    full = []
    for size in (32, 16):
        images = F.interpolate(batch["image"], (size, size), mode="bilinear")
        logits = module(images).seg_logits
        assert logits is not None
        full.append(F.interpolate(logits, (32, 32), mode="bilinear"))
        if size == 32:
            assert torch.equal(step.outputs.seg_logits, logits)
    torch.testing.assert_close(
        losses["seg_max_loss"], masked_cross_entropy(torch.maximum(*full), batch["target"])
    )
    torch.testing.assert_close(step.total, torch.stack(list(losses.values())).sum())
    one = light(backbone=pico(), loss_scales=(1.0,)).losses(batch, 0)
    assert list(one.losses) == ["seg_1_loss"]


def test_one_image_is_too_few_for_a_head_with_batch_norms() -> None:
    one = {name: value[:1] for name, value in make_batch().items()}
    with pytest.raises(WSSSError, match=r"head=v3 .*budget\.global_batch_size"):
        light(head="v3").losses(one, 0)
    assert light(head="v3").eval().losses(one, 0).losses
    assert light().losses(one, 0).losses


def test_settings_that_train_nothing_are_refused() -> None:
    with pytest.raises(WSSSError, match=r"method\.lr=0\.0"):
        light(lr=0.0)
    with pytest.raises(WSSSError, match=r"method\.loss_scales=\[\]"):
        light(loss_scales=[])
    with pytest.raises(WSSSError, match=r"method\.rates=\[\]"):
        light(rates=[])
    with pytest.raises(WSSSError, match=r"method\.head='v4'"):
        light(head="v4")


@pytest.mark.parametrize("head", ["v2", "v3", "largefov"])
def test_a_light_encoder_learns_and_gives_what_an_evaluator_asks(head: str) -> None:
    module = light(head=head, freeze_batch_norm=False, optimiser="adamw", lr=1e-3, rates=(1, 2))
    optimizer = module.optimizer(module.param_groups())
    batch = make_batch()
    batch["target"] = (batch["image"][:, 0] > 0).long()  # something that can be learnt
    values = []
    for _ in range(6):
        optimizer.zero_grad()
        total = module.losses(batch, 0).total
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert values[-1] < values[0]
    module.eval()
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    with torch.no_grad():
        outputs = module(batch["image"])
    assert outputs.class_logits.shape == (2, 3)
    assert outputs.seg_logits is not None
    assert outputs.seg_logits.shape == (2, 4, 4, 4)
    maps = module.cams(batch["image"], labels)
    assert maps.shape == (2, 3, 64, 64)
    assert maps[labels == 0].abs().max() == 0
    assert maps.min() >= 0
    assert maps.max() <= 1
    # an image shows a class where some pixel prefers it to the background
    wins = (outputs.seg_logits[:, 1:] > outputs.seg_logits[:, :1]).flatten(2).any(2)
    assert torch.equal(outputs.class_logits > 0, wins)


def deep() -> Backbone:
    """Four blocks, which a DPT needs."""
    overrides = {"embed_dim": 24, "depth": 4, "num_heads": 3, "img_size": 32, "patch_size": 8}
    return Backbone(name="vit_tiny_patch16_224", weights="random", overrides=overrides)


def test_dpt_reads_four_blocks_of_a_vit() -> None:
    torch.manual_seed(0)
    module = light(backbone=deep(), head="dpt", channels=8, loss_scales=(1.0,))
    outputs = module(torch.randn(2, 3, 32, 48))
    assert outputs.seg_logits is not None
    assert outputs.seg_logits.shape == (2, 4, 32, 48), "DPT's logits are as large as the image"
    module.losses(make_batch(32), 0).total.backward()
    assert module.head.taps == {1: 0, 2: 1, 3: 2, 4: 3}
    still = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert {name.split(".")[0] for name in still} <= {"backbone"}, still
    groups = {group["name"]: group["params"] for group in module.param_groups()}
    parameters = [p for p in module.parameters() if p.requires_grad]
    assert sum(map(len, groups.values())) == len(parameters)


def test_dpt_on_a_convolutional_encoder_is_refused() -> None:
    with pytest.raises(WSSSError, match=r"method\.head=dpt reads four blocks of a ViT"):
        light(head="dpt")


def test_channels_and_dilation_are_those_of_largefov() -> None:
    head = light(backbone=pico(), head="largefov", channels=16, dilation=2).head
    assert (head.conv6.out_channels, head.conv6.dilation) == (16, (2, 2))
    assert light(backbone=pico(), head="largefov").head.conv7.out_channels == 512
    assert light(backbone=deep(), head="dpt").head.decoder.squeeze.body[0].out_channels == 256


def test_balanced_loss_and_energy_are_tocos() -> None:
    batch = make_batch(32) | {"box": torch.tensor([[0, 32, 0, 32], [4, 32, 0, 20]])}
    chosen = {"loss": "balanced", "loss_scales": (1.0, 0.5), "reg_weight": 1e5}
    step = light(backbone=pico(), **chosen).losses(batch, 0)
    assert list(step.losses) == ["seg_1_loss", "seg_0.5_loss", "seg_max_loss", "reg_loss"]
    small = step.outputs.seg_logits
    assert small is not None
    full = F.interpolate(small, (32, 32), mode="bilinear")
    expected = balanced_segmentation_loss(full, batch["target"])
    torch.testing.assert_close(step.losses["seg_1_loss"], expected)
    energy = imagenet_energy_loss(batch["image"], full, batch["target"], batch["box"], "lattice")
    torch.testing.assert_close(step.losses["reg_loss"], energy)
    assert energy < -1e-6
    terms = torch.stack(list(step.losses.values()))
    torch.testing.assert_close(step.total, terms[:3].sum() + 1e5 * terms[3])


def test_frozen_batch_norms_stay_as_they_are() -> None:
    module = light()
    norms = [m for m in module.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    before = [norm.running_mean.clone() for norm in norms]
    module.train().losses(make_batch(), 0)
    assert all(torch.equal(a, n.running_mean) for a, n in zip(before, norms, strict=True))
    assert not any(norm.weight.requires_grad for norm in norms)
    moving = light(freeze_batch_norm=False)
    first = next(m for m in moving.modules() if isinstance(m, nn.BatchNorm2d))
    before_first = first.running_mean.clone()
    moving.losses(make_batch(), 0)
    assert not torch.equal(first.running_mean, before_first)


def test_heads_learn_faster_and_their_biases_do_not_decay() -> None:
    module = light(lr=1e-3, weight_decay=0.1)
    groups = {group["name"]: group for group in module.param_groups()}
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {"encoder": 1e-3, "head": 1e-2, "head_biases": 2e-2}
    )
    optimizer = module.optimizer(module.param_groups())
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [0.1, 0.1, 0.0]
    assert len(groups["head"]["params"]) == len(groups["head_biases"]["params"]) == 4
    assert module.lr_multiplier(5) == pytest.approx(0.5**0.9)


def test_resnet_is_dilated_to_stride_eight() -> None:
    backbone = ConvBackbone(name="resnet50").eval()
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, 64, 64)).shape == (1, 2048, 8, 8)
    assert backbone.weights_info.source == "random"


def test_weights_of_a_segmenter_are_pixel_masks(tmp_path: Path) -> None:
    classifier = torchvision.models.mobilenet_v3_small(weights=None)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    made = ConvBackbone(
        name="mobilenet_v3_small",
        weights=str(tmp_path / "classifier.pth"),
        declared_pretraining="Places",
    )
    assert made.weights_info.pretraining == "declared by the user: Places"
    assert len(made.weights_info.file_sha256 or "") == 64
    assert torch.equal(made.body[0][0].weight, classifier.features[0][0].weight)

    network = {
        f"backbone.{key.removeprefix('features.')}": value
        for key, value in classifier.state_dict().items()
        if key.startswith("features.")
    }
    torch.save(network | {"classifier.4.weight": torch.zeros(21, 256, 1, 1)}, tmp_path / "seg.pth")
    segmenter = ConvBackbone(
        name="mobilenet_v3_small", weights=str(tmp_path / "seg.pth"), declared_pretraining="COCO"
    )
    config = compose_run(["data=minivoc"])
    rest = (build_data(config), Protocol(), config, tmp_path)
    assert supervision_of_run(Run(light(backbone=made), *rest)) == "image labels"
    assert supervision_of_run(Run(light(backbone=segmenter), *rest)) == PIXEL_MASKS


def test_real_segmentation_networks_of_torchvision_fit() -> None:
    network = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None
    )
    made = ConvBackbone(name="resnet50")
    state = made._encoder_state(network.state_dict())
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in made.body.state_dict().items()
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "resnet18"}, "resnet18"),
        ({"name": "resnet50", "weights": "ResNet50_Wieghts.IMAGENET1K_V1"}, "torchvision name"),
        ({"name": "resnet50", "weights": "no/such.pth"}, "no/such.pth"),
    ],
)
def test_bad_encoders_are_named(settings: dict[str, str], expected: str) -> None:
    with pytest.raises(WSSSError, match=expected):
        ConvBackbone(**settings)
