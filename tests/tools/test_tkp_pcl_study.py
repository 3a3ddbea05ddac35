"""Where the winning patches of TKP-PCL are said to lie."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from tkp_pcl_study import ON_GRID, Varied, VariedSettings

import wsss


def varied(**changes: object) -> Varied:
    torch.manual_seed(0)
    overrides = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8}
    backbone = wsss.Backbone(name="vit_tiny_patch16_224", weights="random", overrides=overrides)
    settings = VariedSettings(max_steps=2, warmup_steps=0, lstm_hidden=6, top_k=2, **changes)
    return Varied(backbone=backbone, num_classes=2, settings=settings)


def test_winners_are_the_pooled_patches_of_an_images_classes() -> None:
    logits = torch.zeros(1, 3, 4, 4)  # background and two classes
    logits[0, 1, 0, 3] = logits[0, 1, 2, 1] = 4.0
    logits[0, 2, 3, 3] = 5.0  # of a class that the image lacks
    won = varied().winners(logits, torch.tensor([[1.0, 0.0]]))
    assert won.nonzero().tolist() == [[0, 0, 0, 3], [0, 0, 2, 1]]
    module = varied(top_k_fraction=0.2)
    assert module.winners(logits, torch.tensor([[1.0, 1.0]])).sum() == 2 * 4, "ceil(0.2 * 16)"


def test_shares_count_border_upper_and_left_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    module = varied()
    won = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    won[0, 0, 0, 3] = won[0, 0, 1, 1] = won[0, 1, 2, 1] = won[0, 1, 2, 2] = True
    monkeypatch.setattr(module, "winners", lambda logits, labels: won)
    batch = {"image": torch.zeros(1, 3, 32, 32), "labels": torch.ones(1, 2)}
    shares = module.losses(batch, 0).scalars
    assert [float(shares[name]) for name in ON_GRID] == [0.25, 0.5, 0.5]


def test_bilstms_learn_at_a_rate_of_their_own() -> None:
    rates = {g["name"]: g["lr"] for g in varied(lstm_lr_factor=0.1).param_groups()}
    assert rates["bilstm"] == pytest.approx(0.1 * rates["heads"])
    one, other = varied(), varied(lstm_lr_factor=0.1)
    count = [sum(len(g["params"]) for g in module.param_groups()) for module in (one, other)]
    assert count[0] == count[1], "every parameter in one group"
    keras, torchs = varied().bilstm.horizontal, varied(lstm_start="torch").bilstm.horizontal
    assert keras.bias_hh_l0.abs().sum() == 0 < torchs.bias_hh_l0.abs().sum()
