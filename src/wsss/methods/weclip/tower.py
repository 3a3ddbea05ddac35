"""CLIP's frozen image tower as WeCLIP reads it (weclip.md section 1)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD, numbers_beside
from wsss.methods.losses import full_precision, widened
from wsss.methods.weclip.gradcam import LastBlock
from wsss.methods.weclip.texts import RANDOM, STORED
from wsss.models.backbone import Backbone

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Normalisation = Literal["imagenet", "clip"]


@dataclass(frozen=True)
class Encoded:
    """What the frozen tower gives for B images on a grid of h x w; N = h w, L = P + N.

    Attributes:
        tokens: Z_l of every block but the last, raw, prefix first, each (B, L, D).
        attentions: head-mean A_l of the last blocks that were asked for, each (B, L, L).
        last: the last block, where it was asked for; its attention is not among those.
        num_prefix: P.
        grid: (h, w).
    """

    tokens: list[Tensor]
    attentions: list[Tensor]
    last: LastBlock | None
    num_prefix: int
    grid: tuple[int, int]

    @property
    def taps(self) -> list[Tensor]:
        """Patch rows of the tokens, each (B, N, D)."""
        return [tokens[:, self.num_prefix :] for tokens in self.tokens]

    def patch_attention(self, layers: int) -> Tensor:
        """Give patch-to-patch attention of the last ``layers`` blocks, (B, layers, N, N)."""
        assert self.last is not None
        every = [*map(widened, self.attentions), self.last.attention.mean(1)][-layers:]
        return torch.stack(every, dim=1)[:, :, self.num_prefix :, self.num_prefix :]


def freeze(backbone: Backbone, text: str, method: str) -> None:
    """Freeze an encoder, and resize its positions as CLIP's official code does.

    Raises:
        WSSSError: it shares no space with texts, unless these are random.
    """
    if backbone.projection is None and text not in (RANDOM, STORED):
        name = backbone.weights_info.name
        raise WSSSError(
            f"backbone.name={name}: no frozen image tower of CLIP, which method={method} compares "
            "with texts; use backbone=clip_base, or backbone.frozen=true for a tower of CLIP"
        )
    if backbone.num_prefix_tokens != 1:
        raise WSSSError(
            f"method={method} needs an encoder with one class token, and this one has "
            f"{backbone.num_prefix_tokens} prefix tokens"
        )
    backbone.requires_grad_(False)
    backbone.position_mode = "bilinear"
    backbone.take_as_given()  # method.normalisation


def check_layers(backbone: Backbone, **layers: int) -> None:
    """Raise WSSSError where more blocks are asked for than there are; names the setting."""
    for name, count in layers.items():
        if count > backbone.depth:
            raise WSSSError(f"method.{name}={count}: the backbone has {backbone.depth} blocks")


@torch.no_grad()
def encode(
    backbone: Backbone,
    images: Tensor,
    *,
    layers: int = 0,
    phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Encoded:
    """Run the frozen tower.

    Args:
        backbone: CLIP's tower.
        images: (B, 3, H, W), normalised as the tower shall see them.
        layers: of how many last blocks attention is wanted; 0 leaves out the last block.
        phase: opens ``cam`` around the last block, which belongs to the CAM.
    """
    before = backbone.depth - 1
    wanted = range(max(0, backbone.depth - layers), before) if layers else ()
    features = backbone(images, taps=range(before), mean_attentions=wanted, blocks=before)
    tokens = [
        torch.cat([features.prefixes[index], features.intermediates[index]], dim=1)
        for index in range(before)
    ]
    last, vit = None, backbone.vit
    if layers:
        with phase("cam"), full_precision(images):
            state, prefix = widened(tokens[-1]), backbone.num_prefix_tokens
            last = LastBlock.run(vit.blocks[-1], vit.norm, backbone.projection, state, prefix)
    attentions = [features.mean_attentions[index] for index in wanted]
    return Encoded(tokens, attentions, last, backbone.num_prefix_tokens, features.grid)


def renormalised(images: Tensor, how: Normalisation) -> Tensor:
    """Give images (B, 3, H, W), normalised by ImageNet's colours, as the tower shall see them."""
    if how == "imagenet":  # Q1: the published numbers have it
        return images
    mean, std, own_mean, own_std = (
        numbers_beside(images, v).view(3, 1, 1)
        for v in (IMAGENET_MEAN, IMAGENET_STD, CLIP_MEAN, CLIP_STD)
    )
    return (images * std + mean - own_mean) / own_std


def whole_patches(images: Tensor, patch: int, *, cut: bool = False) -> Tensor:
    """Repeat the edge of images (B, 3, H, W) at the right and at the bottom to whole patches.

    Args:
        images: of any size.
        patch: side of a patch.
        cut: leave them as they are: the tower drops the remainder (Q18).
    """
    height, width = images.shape[-2:]
    missing = (0, -width % patch, 0, -height % patch)
    if cut or not any(missing):
        return images
    return F.pad(images, missing, mode="replicate")


def at_pixels(maps: Tensor, size: Sequence[int], patch: int, *, cut: bool = False) -> Tensor:
    """Resize maps (B, C, h, w) of :func:`whole_patches` bilinearly to the image's size (H, W)."""
    full = tuple(size) if cut else tuple(-(-side // patch) * patch for side in size)
    maps = F.interpolate(maps.float(), full, mode="bilinear", align_corners=False)
    return maps[..., : size[0], : size[1]]
