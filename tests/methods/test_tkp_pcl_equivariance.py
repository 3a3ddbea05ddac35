"""TKP-PCL's label merge (property 10a of tkp_pcl.md section 8) and ViT-PCM's equivariance term."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_tkp_pcl import CLASSES, SIDE, make_batch, random_scores, tiny, without_dropout

from wsss.core.errors import WSSSError
from wsss.data.views.tkp_pcl import SquareViews
from wsss.methods.base import Batch
from wsss.methods.tkp_pcl.equivariance import apply_symmetry, label_merge, mosaic, tiles_of


def test_10a_merge_keeps_to_the_labels() -> None:
    scores = random_scores(2, 4, 4, 5).permute(0, 3, 1, 2)
    targets = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 1, 0]])
    merged = label_merge(scores, targets)
    assert merged[0, 2:4].abs().max() == 0
    torch.testing.assert_close(merged.sum(1), torch.ones(2, 4, 4, dtype=torch.float64))
    # the odds of two present categories are those of maps with maximum 1
    peaked = scores / scores.amax((2, 3), keepdim=True)
    torch.testing.assert_close(merged[0, 4] / merged[0, 0], peaked[0, 4] / peaked[0, 0])
    other = scores.clone()
    other[:, 2] = 0.3
    torch.testing.assert_close(label_merge(other, targets), merged)
    assert set(merged[1].argmax(0).unique().tolist()) <= {0, 3}
    assert label_merge(torch.zeros_like(scores), targets).abs().max() == 0


def test_symmetries_and_mosaics_have_inverses() -> None:
    maps = torch.randn(8, 2, 3, 3)
    symmetry = torch.tensor([[bool(i & 1), bool(i & 2), bool(i & 4)] for i in range(8)])
    turned = apply_symmetry(maps, symmetry)
    assert torch.equal(apply_symmetry(turned, symmetry, inverse=True), maps)
    assert (
        len({tuple(apply_symmetry(maps[:1], row[None]).flatten().tolist()) for row in symmetry})
        == 8
    )
    views = torch.randn(8, 3, 4, 4)
    assert torch.equal(tiles_of(mosaic(views)), views)
    assert torch.equal(mosaic(views)[1, :, :4, 4:], views[5])  # row by row
    with pytest.raises(WSSSError, match="multiple"):
        mosaic(views[:6])


def equivariance_batch(rng: np.random.Generator) -> Batch:
    views = SquareViews(size=SIDE, view=True, patch_size=8)
    rgb = np.random.default_rng(5).integers(0, 255, (4, 40, 44, 3), np.uint8)
    samples = [views(image, rng) for image in rgb]
    stacked = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    return stacked | {"labels": make_batch()["labels"]}


def test_target_of_a_view_is_what_the_view_shows() -> None:
    """A module whose scores are its input's: the target must be the view's own merged scores."""
    module = without_dropout(equivariance_weight=1.0)
    batch = equivariance_batch(np.random.default_rng(0))
    targets = F.pad(batch["labels"], (1, 0), value=1.0)
    target = module.equivariance_target(batch, targets, (2, 2))
    assert target.shape == (4, CLASSES + 1, 2, 2)
    assert not target.requires_grad
    assert target[targets == 0].abs().max() == 0
    with torch.no_grad():
        scores = module.eval().score(batch["image"])
    maps = apply_symmetry(
        scores.as_map(scores.probabilities), batch["symmetry"], inverse=True
    )  # upright, 4 x 4 patches
    whole = batch["view_box"][:, 1] - batch["view_box"][:, 0] == SIDE
    assert whole.any()
    for index in whole.nonzero().flatten().tolist():
        small = F.interpolate(maps[index : index + 1], (2, 2), mode="bilinear")
        small = apply_symmetry(small, batch["view_symmetry"][index : index + 1])
        torch.testing.assert_close(
            target[index : index + 1], label_merge(small, targets[index : index + 1])
        )


def test_boxes_of_views_mean_the_same_for_any_size_of_patches() -> None:
    """Views drawn on a coarser grid than the encoder's show the same part of its map."""
    module = without_dropout(equivariance_weight=1.0)
    batch = equivariance_batch(np.random.default_rng(0))
    batch["view_box"] = torch.tensor([[16, 32, 0, 16]]).expand(4, 4)
    batch["view_symmetry"] = batch["symmetry"] = torch.zeros(4, 3, dtype=torch.bool)
    targets = F.pad(batch["labels"], (1, 0), value=1.0)
    with torch.no_grad():
        scores = module.eval().score(batch["image"])
    shown = scores.as_map(scores.probabilities)[..., 2:4, 0:2]  # of 4 x 4 patches of 8 px
    target = module.equivariance_target(batch, targets, (2, 2))
    torch.testing.assert_close(target, label_merge(shown, targets))


def test_view_shows_the_box_that_it_names() -> None:
    views = SquareViews(size=24, view=True, patch_size=4)
    views.steps.transforms = []
    smooth = np.linspace(0, 250, 24, dtype=np.uint8)
    rgb = np.stack([*np.meshgrid(smooth, smooth), np.zeros((24, 24), np.uint8)], axis=-1)
    rgb = rgb.astype(np.uint8)
    parts = 0
    for seed in range(30):
        sample = views(rgb, np.random.default_rng(seed))
        r0, r1, c0, c1 = sample["view_box"].tolist()
        upright = apply_symmetry(sample["image"][None], sample["symmetry"][None], inverse=True)
        shown = apply_symmetry(sample["view"][None], sample["view_symmetry"][None], inverse=True)
        expected = F.interpolate(upright[..., r0:r1, c0:c1], (12, 12), mode="bilinear")
        assert (shown - expected).abs().mean() < 0.05
        parts += r1 - r0 == 8  # two of six patches
    assert 3 <= parts <= 20


def test_targets_of_views_have_no_dropout() -> None:
    module = tiny(equivariance_weight=1.0)
    batch = equivariance_batch(np.random.default_rng(0))
    targets = F.pad(batch["labels"], (1, 0), value=1.0)
    first, second = (module.equivariance_target(batch, targets, (2, 2)) for _ in range(2))
    assert torch.equal(first, second)
    assert all(child.training for child in module.modules()), "its mode is given back"


def test_equivariance_leaves_a_frozen_encoder_alone() -> None:
    module = tiny(equivariance_weight=1.0)
    batch = equivariance_batch(np.random.default_rng(0))
    for step, learns in ((1, False), (2, True)):
        module.losses(batch, step).losses["equivariance_loss"].backward()
        assert module.classifier.weight.grad is not None
        assert (module.backbone.vit.norm.weight.grad is not None) is learns


def test_equivariance_trains_and_says_what_it_misses() -> None:
    module = tiny(equivariance_weight=1.0)
    result = module.losses(equivariance_batch(np.random.default_rng(0)), 5)
    result.total.backward()
    assert result.losses["equivariance_loss"] > 0
    with pytest.raises(WSSSError, match=r"train_transform\.view=true"):
        module.losses(make_batch(), 5)
    batch = equivariance_batch(np.random.default_rng(0))
    batch["view_box"] = torch.tensor([[4, 20, 0, 16]]).expand(4, 4)
    with pytest.raises(WSSSError, match=r"patch_size: .* patches of 8 px; set it to 8"):
        module.losses(batch, 5)
    with pytest.raises(WSSSError, match="patch_size=16"):
        SquareViews(size=96 + 16, view=True)
