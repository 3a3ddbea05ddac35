"""Why TKP-PCL depends on its seed in short runs: variants of it, and where its winning patches lie.

``python tools/tkp_pcl_study.py RUNS_DIR [VARIANT ...]`` trains every variant with three seeds on
MiniVOC, first stage alone, and prints a table; finished runs are not trained again. A winning patch
is one of the K whose mean is the probability of a class that the image has. Training notes
where they lie (``train/winners_*`` of ``metrics.csv``); after it, masks of `val`, which training
never sees, say how many lie on an object.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import vl_convert
from torch import Tensor, nn

import wsss
from wsss.methods.base import Batch, Step
from wsss.methods.settings import Positive
from wsss.methods.tkp_pcl import TKPPCL, TKPPCLSettings
from wsss.models.backbone import Backbone

SEEDS = (0, 1, 2)
BASE = [
    "+experiments=tkp_pcl/minivoc",
    "method._target_=tkp_pcl_study.Varied",
    "method.bilstm=alone",  # the experiment has none, for what this study found
    "second_stage=null",
    "study=tkp_pcl-study",
    "budget.max_steps=200",
    "budget.warmup_steps=50",
    "data.test_splits=[]",
    "eval.seg_scales=[1.0]",
    "eval.flip=false",
    "gallery=0",
    "trainer.log_every_n_steps=5",
]
#: what differs from ViT-PCM's way, where the BiLSTMs' output alone is classified
VARIANTS = {
    "as ViT-PCM": [],
    "no BiLSTM": ["method.bilstm=none"],
    "residual BiLSTM": ["method.bilstm=residual"],
    "residual, rate x 0.1": ["method.bilstm=residual", "+method.lstm_lr_factor=0.1"],
    "rate x 0.1": ["+method.lstm_lr_factor=0.1"],
    "PyTorch's start": ["+method.lstm_start=torch"],
    "no warm-up": ["budget.warmup_steps=0"],
    "warm-up half of the run": ["budget.warmup_steps=100"],
    "K = 1": ["method.top_k=1"],
    "K = 1/8 of the patches": ["method.top_k_fraction=0.125"],
    "K = 1/4 of the patches": ["method.top_k_fraction=0.25"],
    "no BiLSTM, K = 1/8": ["method.bilstm=none", "method.top_k_fraction=0.125"],
    "no BiLSTM, no warm-up": ["method.bilstm=none", "budget.warmup_steps=0"],
    "no dropout": ["method.dropout=0"],
    "no PCE": ["method.pce_weight=0"],
}


ON_GRID = ("winners_at_border", "winners_in_upper_half", "winners_in_left_half")
DRAWN = ("as ViT-PCM", "no BiLSTM", "residual BiLSTM")  # in the figure


@dataclass(frozen=True, kw_only=True)
class VariedSettings(TKPPCLSettings):
    """Settings of TKP-PCL and two that only this study has."""

    lstm_lr_factor: Positive = 1.0  # rate of the BiLSTMs over that of the classifier
    lstm_start: Literal["keras", "torch"] = "keras"  # what draws the BiLSTMs' weights


class Varied(TKPPCL):
    """TKP-PCL that notes where its winning patches lie."""

    settings: VariedSettings

    def __init__(self, *, backbone: Backbone, num_classes: int, settings: VariedSettings) -> None:
        super().__init__(backbone=backbone, num_classes=num_classes, settings=settings)
        if settings.lstm_start == "torch":
            for lstm in (m for m in self.modules() if isinstance(m, nn.LSTM)):
                lstm.reset_parameters()

    def param_groups(self) -> list[dict[str, object]]:
        """Give the groups of TKP-PCL, the BiLSTMs apart where their rate differs."""
        groups = super().param_groups()
        if self.settings.lstm_lr_factor == 1:
            return groups
        apart = {id(p) for p in self.bilstm.parameters()}
        heads = groups[0]["params"]
        rate = self.settings.warmup_lr * self.settings.lstm_lr_factor
        lstm = [p for p in heads if id(p) in apart]
        groups[0] = {**groups[0], "params": [p for p in heads if id(p) not in apart]}
        return [*groups, {"name": "bilstm", "params": lstm, "lr": rate}]

    def losses(self, batch: Batch, step: int) -> Step:
        """Give the losses of TKP-PCL, and the shares of its winners in three parts of the grid."""
        found = super().losses(batch, step)
        logits = found.outputs.seg_logits
        assert logits is not None
        won = self.winners(logits.detach(), batch["labels"])
        rows, columns = won.shape[-2:]
        total = won.sum().clamp(min=1)
        inner = won[..., 1 : rows - 1, 1 : columns - 1].sum()
        upper, left = won[..., : rows // 2, :].sum(), won[..., : columns // 2].sum()
        shares = ((total - inner) / total, upper / total, left / total)
        return found._replace(scalars={**found.scalars, **dict(zip(ON_GRID, shares, strict=True))})

    def winners(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Say which patches (B, K, h, w) make the probabilities of the classes an image has."""
        probabilities = logits.softmax(1)[:, 1:].flatten(2)  # (B, K, N)
        count = self.num_pooled(probabilities.shape[2])
        chosen = torch.zeros_like(probabilities, dtype=torch.bool)
        chosen.scatter_(2, probabilities.topk(count, dim=2).indices, True)
        return (chosen & (labels > 0)[..., None]).unflatten(2, logits.shape[2:])


@torch.no_grad()
def on_objects(run: wsss.Run) -> dict[str, float]:
    """Compare patches with the masks of `val`.

    Returns:
        Share of winning patches that show their class; mean probability of an image's classes on
        patches that show them and on patches that do not, and of classes the image lacks.
    """
    module: Any = run.module.eval()  # a Varied of the module that the configuration names
    sums = dict.fromkeys(("won", "hit", "on", "n_on", "off", "n_off", "absent", "n_absent"), 0.0)
    for batch in run.data.eval_dataloader("val"):
        image = batch["image"]
        height, width = (8 * (side // 8) for side in image.shape[-2:])
        logits = module(image[..., :height, :width]).seg_logits
        masks = batch["mask"][..., :height, :width]
        classes = torch.arange(1, logits.shape[1])[:, None, None]
        shown = (masks[:, None] == classes).float()
        shown = nn.functional.avg_pool2d(shown, height // logits.shape[2]) > 0.25
        labels = batch["labels"][..., None, None] > 0
        won = module.winners(logits, batch["labels"])
        z = logits.softmax(1)[:, 1:]
        for name, where in (("on", shown & labels), ("off", ~shown & labels)):
            sums[name] += float(z[where].sum())
            sums[f"n_{name}"] += float(where.sum())
        absent = (~labels).expand_as(z)
        sums["absent"] += float(z[absent].sum())
        sums["n_absent"] += float(absent.sum())
        sums["won"] += float(won.sum())
        sums["hit"] += float((won & shown).sum())
    return {
        "winners_on_object": sums["hit"] / sums["won"],
        "z_on_object": sums["on"] / sums["n_on"],
        "z_beside": sums["off"] / sums["n_off"],
        "z_absent": sums["absent"] / sums["n_absent"],
    }


def figure(curves: pd.DataFrame) -> str:
    """Draw the share of winning patches at the border over the training, a line a seed."""
    axis = {"titleFontWeight": "normal", "grid": True}
    specification = {
        "width": 190,
        "height": 150,
        "data": {"values": curves.to_dict("records")},
        "mark": {"type": "line", "strokeWidth": 1.5},
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "axis": {**axis, "tickCount": 4}},
            "y": {
                "field": "winners_at_border",
                "type": "quantitative",
                "title": "winning patches at the border (%)",
                "axis": axis,
            },
            "color": {"field": "seed", "type": "nominal"},
            "strokeDash": {"field": "seed", "type": "nominal"},
            "column": {"field": "variant", "sort": list(VARIANTS), "title": None},
        },
        "config": {"background": "white"},
    }
    svg: str = vl_convert.vegalite_to_svg(json.dumps(specification), allowed_base_urls=[])
    return svg


def curve_of(folder: Path) -> pd.DataFrame:
    """Read what training noted of the winners, a row every five steps."""
    logged = pd.read_csv(folder / "logs" / "version_0" / "metrics.csv")
    columns = {f"train/{name}": name for name in ON_GRID} | {"step": "step"}
    return logged[list(columns)].dropna().rename(columns=columns)


def main(runs_dir: Path, names: list[str]) -> None:
    """Train what is not trained yet; print the table and draw ``winners.svg``."""
    rows, curves = [], []
    for name in names or VARIANTS:
        for seed in SEEDS:
            line = [*BASE, *VARIANTS[name], f"seed={seed}", f"runs_dir={runs_dir}"]
            folder = wsss.train(line)
            results = json.loads((folder / "results.json").read_text())["splits"]["val"]
            curve = curve_of(folder)
            patches = on_objects(wsss.load_run(folder, trust=["tkp_pcl_study"]))
            scores = {key: results[key] for key in ("seed_miou", "seg_miou_crf", "image_map")}
            late = curve[list(ON_GRID)].tail(10).mean()  # the last fifty steps
            rows.append({"variant": name, "seed": seed, **scores, **late, **patches})
            smooth = 100 * curve["winners_at_border"].rolling(4, min_periods=1).mean()
            curves.append(curve.assign(winners_at_border=smooth, variant=name, seed=seed))
    groups = pd.DataFrame(rows).drop(columns="seed").groupby("variant", sort=False)
    table = (100 * groups.agg(["mean", "std"])).round(1)
    print(table.T.to_string())
    drawn = pd.concat(curves)
    shown = drawn[drawn["variant"].isin(DRAWN)]
    keep = ["step", "winners_at_border", "variant", "seed"]
    (runs_dir / "winners.svg").write_text(figure(shown[keep].round(2)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
