"""TKP-PCL as a module: properties 3, 7, 8 and 10 of tkp_pcl.md section 8, then what is left.

Properties 1, 2, 4 to 7 and 9 are in test_tkp_pcl_patches.py, 10a in test_tkp_pcl_equivariance.py.
"""

from typing import Any

import lightning
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_tkp_pcl import CLASSES, SIDE, make_batch, random_scores, tiny, without_dropout
from torch import Tensor
from torch.utils.data import DataLoader

from wsss.core.errors import WSSSError
from wsss.data.views.tkp_pcl import SquareViews
from wsss.maps.pseudo_labels import cam_probabilities, cam_to_label
from wsss.methods.base import Batch
from wsss.methods.tkp_pcl import TKPPCL, TKPPCLSettings
from wsss.methods.tkp_pcl.equivariance import apply_symmetry, label_merge
from wsss.methods.tkp_pcl.patches import confident_sets, top_k_pool
from wsss.models.backbone import Backbone
from wsss.models.vit import resize_positions

# ---- pooling and the background column -----------------------------------------------------------


def test_a_fraction_pools_by_the_grid_and_k_above_n_is_an_error() -> None:
    with pytest.raises(WSSSError, match="top_k=17"):
        tiny(top_k=17)(torch.zeros(1, 3, SIDE, SIDE))
    module = tiny(top_k_fraction=0.25)
    scores = random_scores(1, 16, 5)
    assert torch.equal(module.pool(scores), top_k_pool(scores, 4))


def test_3_background_is_a_category_of_a_classifier_without_bias() -> None:
    module = tiny().eval()
    scores = module.score(make_batch()["image"])
    probabilities = scores.probabilities
    assert probabilities.shape == (4, 16, CLASSES + 1)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(4, 16))
    moved = scores._replace(logits=scores.logits + 3.5).probabilities
    torch.testing.assert_close(moved, probabilities)
    assert sum(p.numel() for p in module.classifier.parameters()) == 24 * (CLASSES + 1)


# ---- what the classifier reads -------------------------------------------------------------------


def test_classifier_reads_bilstm_tokens_or_their_sum() -> None:
    alone, both, none = (tiny(bilstm=kind).eval() for kind in ("alone", "residual", "none"))
    both.load_state_dict(alone.state_dict())
    image = make_batch()["image"]
    context, total = alone.score(image), both.score(image)
    torch.testing.assert_close(total.embeddings, context.embeddings + context.tokens)
    torch.testing.assert_close(total.logits, both.classifier(total.embeddings))
    tokens = none.score(image)
    assert torch.equal(tokens.embeddings, tokens.tokens)
    assert not any("bilstm" in name for name, _ in none.named_parameters())
    heads = none.param_groups()[0]["params"]
    assert [p.shape for p in heads] == [(CLASSES + 1, 24)], "the classifier alone"
    none.train().losses(make_batch(), 5).total.backward()
    with pytest.raises(WSSSError, match=r"adds 20 values to tokens of 24: set method.lstm_hidden"):
        tiny(bilstm="residual", lstm_hidden=5)


# ---- 7: missing sets -----------------------------------------------------------------------------


def test_7_an_image_of_background_alone_gives_finite_gradients() -> None:
    module = without_dropout()
    batch = make_batch()
    batch["labels"] = torch.zeros(4, CLASSES)
    module.losses(batch, 5).total.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def updated(**changes: Any) -> dict[str, Tensor]:
    """Parameters after two steps, dropout included, drawn from one seed."""
    module = tiny(**changes)
    module.classifier.weight.data *= 20  # scores sharp enough for pairs
    optimizer = module.optimizer(module.param_groups())
    torch.manual_seed(7)
    for step in (1, 5):
        optimizer.zero_grad()
        module.losses(make_batch(), step).total.backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def test_7_epsilon_of_one_is_mce_alone() -> None:
    full, plain = updated(epsilon=1.0, pce_weight=0.5), updated(pce_weight=0.0)
    assert all(torch.equal(full[name], plain[name]) for name in plain)
    felt = updated(epsilon=0.5, pce_weight=0.5)
    name = "bilstm.horizontal.weight_ih_l0"
    assert not torch.equal(felt[name], plain[name])


# ---- 8: batches and shards -----------------------------------------------------------------------


def loss_of(module: TKPPCL, batch: Batch, indices: list[int]) -> float:
    part = {key: value[indices] for key, value in batch.items() if isinstance(value, Tensor)}
    return module.losses(part, 5).total.item()


def test_8_a_batch_is_the_mean_of_its_images_and_shards() -> None:
    module = without_dropout(pce_weight=1.0, epsilon=0.5)
    module.classifier.weight.data *= 20  # scores sharp enough for pairs
    batch = make_batch()
    assert module.losses(batch, 5).losses["pce_loss"].item() > 0
    whole = loss_of(module, batch, [0, 1, 2, 3])
    singles = [loss_of(module, batch, [index]) for index in range(4)]
    assert whole == pytest.approx(sum(singles) / 4, rel=1e-5)
    shards = [loss_of(module, batch, part) for part in ([0, 1], [2, 3])]
    assert whole == pytest.approx(sum(shards) / 2, rel=1e-5)
    assert whole == pytest.approx(loss_of(module, batch, [2, 0, 3, 1]), rel=1e-5)


# ---- 10: the pipeline ----------------------------------------------------------------------------


def test_10a_maps_of_the_evaluator_are_the_merged_map() -> None:
    module = tiny().eval()
    module.classifier.weight.data *= 20
    images, labels = make_batch()["image"], make_batch()["labels"]
    maps = module.cams(images, labels)
    assert maps.shape == (4, CLASSES, SIDE, SIDE)
    assert maps[labels == 0].abs().max() == 0
    assert torch.equal(module.cams(images, torch.ones(4, CLASSES))[labels > 0], maps[labels > 0])

    scores = module.score(images)
    merged = label_merge(scores.as_map(scores.probabilities), F.pad(labels, (1, 0), value=1))
    peaked = merged[:, 1:] / (merged[:, 1:] + merged[:, :1]).clamp_min(1e-12)
    larger = F.interpolate(peaked, (SIDE, SIDE), mode="bilinear")
    torch.testing.assert_close(maps, larger, atol=1e-5, rtol=1e-4)
    probabilities = cam_probabilities(peaked, labels, bg_threshold=0.5)
    torch.testing.assert_close(probabilities, merged, atol=1e-5, rtol=1e-4)
    assert torch.equal(cam_to_label(peaked, labels, bg_threshold=0.5), merged.argmax(1))


def trained_names(module: TKPPCL, step: int) -> set[str]:
    """Encoder tensors that a step at a given time changes."""
    optimizer = module.optimizer(module.param_groups())
    before = {n: p.detach().clone() for n, p in module.backbone.named_parameters()}
    module.losses(make_batch(), step).total.backward()
    optimizer.step()
    after = dict(module.backbone.named_parameters())
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_10b_heads_learn_first_then_the_last_five_blocks() -> None:
    assert trained_names(tiny(), 1) == set()
    changed = trained_names(tiny(), 2)
    expected = {
        name
        for name, _ in tiny().backbone.named_parameters()
        if name.startswith((*(f"vit.blocks.{i}." for i in range(2, 7)), "vit.norm."))
    }
    # the key's bias moves no softmax, so only whole tensors are compared
    assert changed == expected


@pytest.mark.parametrize(("trained", "blocks"), [(0, []), (2, [1, 2]), (9, [0, 1, 2])])
def test_10b_blocks_are_counted_from_the_last(trained: int, blocks: list[int]) -> None:
    parameters = tiny(depth=3, trained_blocks=trained).backbone.named_parameters()
    learning = {name.rsplit(".", 1)[0] for name, p in parameters if p.requires_grad}
    assert {int(name.split(".")[2]) for name in learning - {"vit.norm"}} == set(blocks)
    assert "vit.norm" in learning


def test_10b_adam_starts_afresh_when_the_encoder_joins() -> None:
    module = tiny(depth=1, warmup_steps=2)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = [make_batch()] * 5
    trainer.fit(module, DataLoader(batches, batch_size=None))
    state = trainer.optimizers[0].state
    for parameter in (module.classifier.weight, module.backbone.vit.norm.weight):
        assert state[parameter]["step"] == 3  # steps 2, 3 and 4


def test_10b_frozen_blocks_keep_their_dropout() -> None:
    module = tiny(depth=4, trained_blocks=1, dropout=0.0)
    first = module.backbone.vit.blocks[0]
    tokens = torch.randn(1, 17, 24)
    assert not next(first.parameters()).requires_grad
    assert not torch.equal(first(tokens), first(tokens))
    assert first.mlp.drop1.p == first.mlp.drop2.p == first.attn.proj_drop.p == 0.1
    assert first.attn.attn_drop.p == 0


def test_10c_maps_grow_with_images() -> None:
    backbone = Backbone(
        name="vit_tiny_patch16_384",
        weights="random",
        overrides={"embed_dim": 12, "depth": 1, "num_heads": 3},
    )
    settings = TKPPCLSettings(max_steps=1, lstm_hidden=3)
    module = TKPPCL(backbone=backbone, num_classes=3, settings=settings).eval()
    for side, grid in ((384, 24), (960, 60)):
        with torch.no_grad():
            outputs = module(torch.zeros(1, 3, side, side))
        assert outputs.seg_logits is not None
        assert outputs.seg_logits.shape == (1, 4, grid, grid)
    positions = backbone.vit.pos_embed
    assert resize_positions(positions, (24, 24), 1) is positions


def test_maps_of_an_image_that_is_not_square() -> None:
    module, images = tiny().eval(), torch.randn(1, 3, 24, 40)
    scores = module.score(images)
    assert scores.grid == (3, 5)
    assert torch.equal(scores.embeddings, module.bilstm(scores.tokens, (3, 5)))
    assert module.cams(images, torch.ones(1, CLASSES)).shape == (1, CLASSES, 24, 40)


def test_10d_the_main_view_is_turned_and_never_cropped() -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8)
    views = SquareViews(size=16, patch_size=4)
    views.steps.transforms = []  # geometry alone
    plain = views(rgb, Fixed([0.9, 0.9, 0.9]))["image"]
    seen = set()
    for seed in range(60):
        sample = views(rgb, np.random.default_rng(seed))
        assert set(sample) == {"image", "symmetry"}  # labels are the data set's, untouched
        upright = apply_symmetry(sample["image"][None], sample["symmetry"][None], inverse=True)
        assert torch.equal(upright[0], plain)
        seen.add(tuple(sample["symmetry"].tolist()))
    assert len(seen) == 8


class Fixed:
    """A generator whose coins always fall the same way."""

    def __init__(self, coins: list[float]) -> None:
        self.coins = coins

    def random(self, size: int) -> np.ndarray:
        return np.array(self.coins[:size])

    def integers(self, *_: Any) -> int:
        return 0


# ---- the rest ------------------------------------------------------------------------------------


def test_a_step_gives_the_outputs_of_its_forward_pass() -> None:
    module = tiny().eval()  # without dropout, so that two passes are alike
    step, outputs = module.losses(make_batch(), 5), module(make_batch()["image"])
    assert torch.equal(step.outputs.class_logits, outputs.class_logits)
    assert torch.equal(step.outputs.seg_logits, outputs.seg_logits)
    assert step.outputs.class_logits.shape == (4, CLASSES)
    pooled = module.pool(module.score(make_batch()["image"]).probabilities)
    torch.testing.assert_close(outputs.class_logits.sigmoid(), pooled[:, 1:])
    targets = F.pad(make_batch()["labels"], (1, 0), value=1.0)
    assert torch.equal(step.seen["targets"], targets)
    assert not (step.seen["sets"].high | step.seen["sets"].low)[targets == 0].any()


def test_terms_of_zero_weight_are_not_computed() -> None:
    result = tiny(pce_weight=0.0, l2_weight=0.0).losses(make_batch(), 5)
    assert set(result.losses) == {"mce_loss"}
    assert not result.scalars


@pytest.mark.parametrize(
    "options",
    [
        {"pce_embedding": "encoder"},
        {"pce_background": False},
        {"pce_scope": "batch"},
        {"pce_sets": "no_dropout"},
    ],
)
def test_every_option_changes_the_contrast(options: dict[str, Any]) -> None:
    def contrast(**changes: Any) -> float:
        module = tiny(pce_weight=1.0, **changes)
        module.classifier.weight.data *= 20
        torch.manual_seed(3)
        return module.losses(make_batch(), 5).losses["pce_loss"].item()

    assert contrast() != contrast(**options)


def test_sets_without_dropout_are_those_of_evaluation() -> None:
    module, batch = tiny(pce_sets="no_dropout"), make_batch()
    module.classifier.weight.data *= 20
    step = module.losses(batch, 5)
    assert all(child.training for child in module.modules()), "its mode is given back"
    probabilities = module.eval().score(batch["image"]).probabilities
    expected = confident_sets(probabilities, step.seen["targets"] > 0, 0.5)
    assert all(torch.equal(*pair) for pair in zip(step.seen["sets"], expected, strict=True))


def test_probabilities_are_float32_under_autocast() -> None:
    module = without_dropout()
    with torch.autocast("cpu", torch.bfloat16):
        scores = module.score(make_batch()["image"])
        probabilities = scores.probabilities
    assert scores.logits.dtype == torch.bfloat16
    assert torch.equal(probabilities, scores.logits.float().softmax(-1))


def test_coverage_is_the_share_of_present_pairs_with_two_anchors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = without_dropout()
    scores = module.score(make_batch()["image"])
    logits = torch.full_like(scores.logits, -9.0)
    logits[..., 0] = 9  # all background, except one patch of class 1 in image 0
    logits[0, 0, :2] = torch.tensor([-9.0, 9.0])
    monkeypatch.setattr(module, "score", lambda *_, **__: scores._replace(logits=logits))
    step = module.losses(make_batch(), 5)
    targets = F.pad(make_batch()["labels"], (1, 0), value=1.0)
    assert float(step.scalars["pce_coverage"]) == pytest.approx(4 / targets.sum().item())


def test_schedule_has_two_steps() -> None:
    module = tiny(warmup_steps=3, warmup_lr=1e-3, lr=1e-4)
    assert [module.lr_multiplier(step) for step in (0, 2, 3, 19)] == pytest.approx([1, 1, 0.1, 0.1])
    optimizer = module.optimizer(module.param_groups())
    assert optimizer.defaults["eps"] == 1e-7
    assert all(
        group["lr"] == 1e-3 and group["weight_decay"] == 0 for group in optimizer.param_groups
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epsilon": 0.4}, "epsilon=0.4"),
        ({"epsilon": 1.1}, "epsilon=1.1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"pce_scope": "images"}, "pce_scope='images'"),
        ({"trained_blocks": -1}, "trained_blocks=-1"),
        ({"top_k": 0}, "top_k"),
        ({"top_k_fraction": 1.5}, "top_k_fraction=1.5"),
        ({"warmup_lr": 0.0}, "warmup_lr=0.0"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(WSSSError, match=expected):
        tiny(**changes)
