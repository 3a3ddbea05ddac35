"""Class token contrast (CTC) of ToCo; its patch token contrast stands in `methods/losses.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from wsss.core.errors import WSSSError
from wsss.methods.losses import full_precision, widened

NUM_LOCALS = 8  # local crops an image
NEGATIVE_ROI = 0.2  # a crop whose mean ROI value is at most this is background


class CTCHead(nn.Module):
    """Projection head of class token contrast: MLP, unit length, weight-normed linear map.

    Source: toco.md section 1, "CTC head". The magnitudes of the weight norm are frozen at 1.
    """

    def __init__(self, dim: int, hidden: int = 2048, bottleneck: int = 256, out: int = 1024):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck, out, bias=False))
        magnitude = self.last_layer.parametrizations.weight.original0
        magnitude.data.fill_(1.0)
        magnitude.requires_grad_(False)

    def forward(self, cls_tokens: Tensor) -> Tensor:
        """Give projections (B, 1024), not normalised, of class tokens (B, D)."""
        return self.last_layer(F.normalize(self.mlp(cls_tokens), dim=-1))


def ctc_loss(student: Tensor, teacher: Tensor, flags: Tensor, temperature: float) -> Tensor:
    """Contrast class tokens between the views of each image, in closed form.

    With E_tj = exp(<T_t, S_j> / temperature), N_t the sum of E_tj over negative crops and P the
    number of positive ones (toco.md section 2, "CTC loss"):
    l = sum_t [sum_positive -log(E_tj / (E_tj + N_t + 1e-4)) + log(1 + N_t + 1e-4)]
    / (2 (P + 1e-4)).
    Everything stays in logarithms, since the unnormalised products overflow ``exp`` (Q6).

    Args:
        student: (V*B, C), crop-major (row = view * B + image).
        teacher: (2*B, C), the two global views, crop-major.
        flags: (B, V), 1 positive, 0 negative.
        temperature: 0.5 for VOC, 1.0 for COCO.

    Returns:
        The mean over images, a scalar.
    """
    batch, views = flags.shape
    with full_precision(student):
        logits = torch.einsum(
            "tbc,vbc->btv",
            widened(teacher).unflatten(0, (2, batch)),
            widened(student).unflatten(0, (views, batch)),
        )
    logits = logits / temperature  # (B, 2, V)
    negatives = logits.masked_fill(flags[:, None] > 0, -torch.inf)
    floor = logits.new_full((batch, 2, 1), 1e-4).log()
    log_negative = torch.cat([negatives, floor], dim=2).logsumexp(dim=2)  # log(N_t + 1e-4), (B, 2)
    attraction = torch.logaddexp(logits, log_negative[..., None]) - logits  # -log(E/(E + N + 1e-4))
    per_teacher = (attraction * flags[:, None]).sum(dim=2) + F.softplus(log_negative)
    return (per_teacher.sum(dim=1) / (2 * (flags.sum(dim=1) + 1e-4))).mean()


class LocalCrops(NamedTuple):
    """Local views of a batch.

    Attributes:
        crops: (8, B, 3, s, s).
        flags: (B, 2 + 8); the two global views lead and are always positive.
        corners: top-left (row, column) of each crop, (B, 8, 2).
    """

    crops: Tensor
    flags: Tensor
    corners: Tensor


def crop_local_views(
    images: Tensor,
    roi: Tensor,
    size: int,
    count: int = NUM_LOCALS,
    draws: Tensor | None = None,
) -> LocalCrops:
    """Cut local views whose centre is not certain foreground, and flag the background ones.

    Source: toco.md section 2, "CTC crops"; draws come from torch's CPU generator.

    Args:
        images: the local-view images, (B, 3, H, W).
        roi: 0 background, 1 uncertain, 2 foreground, (B, H, W).
        size: side s of a crop in pixels.
        count: crops an image.
        draws: (B, count) which of an image's candidates to take; None draws them.

    Raises:
        WSSSError: the images leave no room for the crops.
    """
    margin = size // 2
    if min(roi.shape[1:]) <= size or (min(roi.shape[1:]) - 2 * margin) ** 2 < count:
        raise WSSSError(
            f"local crops of {size} px do not fit into images of {tuple(roi.shape[1:])} px; lower "
            "method.local_size or raise the crop size"
        )
    roi = roi.cpu()
    inner = roi[:, margin:-margin, margin:-margin]
    corners = []
    for index, mask in enumerate(inner):
        candidates = (mask <= 1).nonzero()
        if len(candidates) < count:
            candidates = torch.ones_like(mask).nonzero()
        drawn = torch.randperm(len(candidates))[:count] if draws is None else draws[index]
        corners.append(candidates[drawn])
    corner = torch.stack(corners)  # (B, count, 2)
    # box sums from an integral image: one gather instead of a sync a crop
    integral = F.pad(roi.long().cumsum(1).cumsum(2), (1, 0, 1, 0))
    rows, cols = corner.unbind(-1)
    image = torch.arange(len(roi))[:, None]
    area_sum = (
        integral[image, rows + size, cols + size]
        - integral[image, rows, cols + size]
        - integral[image, rows + size, cols]
        + integral[image, rows, cols]
    )
    positive = area_sum.double() / size**2 > NEGATIVE_ROI
    flags = torch.cat([torch.ones(len(roi), 2), positive.float()], dim=1)
    crops = torch.stack(
        [
            torch.stack([images[b, :, r : r + size, c : c + size] for r, c in corner[b].tolist()])
            for b in range(len(images))
        ],
        dim=1,
    )
    return LocalCrops(crops, flags.to(images.device, non_blocking=True), corner)
