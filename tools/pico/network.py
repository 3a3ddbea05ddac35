"""ViT-Pico, the heads that its pretraining throws away, and how its weights start."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from cutouts import CLASSES
from torch import Tensor, nn

from pico.pooling import TOP, split_tiles, top_mean
from pico.teacher import DIM as TEACHER_DIM

PATCH = 8
GRID = 12  # patches on a side of the position embedding: 96 / 8
BLOCKS = 5


def pico(depth: int = BLOCKS) -> nn.Module:
    """Build the backbone: a ViT-Tiny of fewer blocks with 8-pixel patches."""
    return timm.create_model(
        "vit_tiny_patch16_224", patch_size=PATCH, depth=depth, img_size=GRID * PATCH, num_classes=0
    )


def positions(vit: nn.Module, grid: int) -> Tensor:
    """Give the patch positions ``(grid ** 2, 192)``, resampled where ``grid`` is not 12."""
    table = vit.pos_embed[:, 1:]
    if grid != GRID:
        square = table.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
        square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
        table = square.flatten(2).transpose(1, 2)
    return table[0]


def tokens(
    vit: nn.Module,
    images: Tensor,
    window: Tensor | None = None,
    patches: Tensor | None = None,
    grid: int = GRID,
) -> Tensor:
    """Run the backbone on images that may be smaller than the grid of positions.

    Args:
        vit: the backbone.
        images: ``(b, 3, s, s)``.
        window: ``(b, 2)`` in 0..1, where each image lies on the position grid from top to bottom
            and left to right; ``None`` is the top left corner. Drawing it at random makes the net
            independent of the absolute place.
        patches: int64 ``(b, k)``, the patches to read; ``None`` reads all. Leaving half of them
            out costs little accuracy and halves the time.
        grid: patches on a side of the position grid.

    Returns:
        Normalised tokens ``(b, 1 + k, 192)``, cls first.
    """
    x = vit.patch_embed.proj(images)
    batch, dim, side, _ = x.shape
    x = x.flatten(2).transpose(1, 2)
    if window is None:
        window = torch.zeros(batch, 2, device=x.device)
    window = (window * (grid - side + 1)).long()
    steps = torch.arange(side, device=x.device)
    rows, cols = window[:, :1] + steps, window[:, 1:] + steps
    index = (rows[:, :, None] * grid + cols[:, None, :]).flatten(1)
    x = x + positions(vit, grid)[index]
    if patches is not None:
        x = x.gather(1, patches[:, :, None].expand(-1, -1, dim))
    cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(batch, 1, dim)
    return vit.norm(vit.blocks(torch.cat((cls, x), dim=1)))


class Pupil(nn.Module):
    """Backbone with the throw-away heads of the pretraining."""

    def __init__(self, identities: int) -> None:
        """Make heads for ``identities`` cut-outs and the eight classes."""
        super().__init__()
        self.vit = pico()
        dim = self.vit.embed_dim
        self.identity_cls = nn.Linear(dim, identities)
        self.identity_mean = nn.Linear(dim, identities)
        self.classes_cls = nn.Linear(dim, len(CLASSES))
        self.classes_mean = nn.Linear(dim, len(CLASSES))
        self.classes_max = nn.Linear(dim, len(CLASSES))
        self.classes_token = nn.Linear(dim, len(CLASSES))
        self.teacher = nn.Linear(dim, TEACHER_DIM)

    def forward(
        self,
        images: Tensor,
        window: Tensor | None = None,
        patches: Tensor | None = None,
        grid: int = GRID,
        tiles: int = 1,
    ) -> dict[str, Tensor]:
        """Give identity logits ``(b, n)`` and class logits ``(b, 8)`` of each kind of pooling.

        The names ending in ``_cls`` are read from the class token. The other pooled logits are of
        each of the ``tiles ** 2`` pictures of a mosaic: ``(b * tiles ** 2, .)``. ``classes_max``
        uses the pooling of the methods' classifiers, the max over tokens. ``classes_token`` is the
        mean of the largest token logits, which is what a CAM shows: a share ``TOP`` of the tokens
        must show a class, and no token of a picture without the class may. ``token_logits`` are
        those of every token, ``(b, n, 8)``; ``tokens`` is what they are read from, ``(b, n, 192)``.
        """
        out = tokens(self.vit, images, window, patches, grid)
        cls, local = out[:, 0], out[:, 1:]
        token_logits = self.classes_token(local)
        pictures = split_tiles(local, tiles) if tiles > 1 else local
        pooled = split_tiles(token_logits, tiles) if tiles > 1 else token_logits
        mean, peak = pictures.mean(1), pictures.amax(1)
        return {
            "tokens": local,
            "token_logits": token_logits,
            "identity_cls": self.identity_cls(cls),
            "identity_mean": self.identity_mean(mean),
            "classes_cls": self.classes_cls(cls),
            "classes_mean": self.classes_mean(mean),
            "classes_max": self.classes_max(peak),
            "classes_token": top_mean(pooled, TOP[tiles]),
        }


def whiten_patches(vit: nn.Module, images: Tensor) -> None:
    """Set the patch embedding to the whitened principal components of image patches.

    A patch has 192 numbers and there are 192 channels: nothing is lost, and the blocks start from
    inputs of equal variance in place of ones that brightness dominates.

    Args:
        vit: the backbone, changed in place.
        images: ``(n, 3, s, s)`` normalised images to learn the components from.
    """
    patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH * PATCH)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T).double())
    # The floor keeps sensor noise, the smallest components, from being blown up to full size.
    scale = 0.5 / (values + 0.02 * values.mean()).sqrt()
    weight = (vectors * scale).T.to(patches.dtype)
    weight = torch.linalg.qr(torch.randn(len(weight), len(weight)))[0] @ weight
    vit.patch_embed.proj.weight.data.copy_(weight.view_as(vit.patch_embed.proj.weight))
    vit.patch_embed.proj.bias.data.copy_(-weight @ mean)


def seed_positions(vit: nn.Module) -> None:
    """Set the position embedding to 2-D sines, so that nearness is known from the start."""
    dim = vit.embed_dim // 4
    freq = 1.0 / 100 ** (torch.arange(dim) / dim)
    angle = torch.arange(GRID)[:, None] * freq
    wave = torch.cat((angle.sin(), angle.cos()), dim=1)
    rows = wave[:, None].expand(GRID, GRID, -1)
    cols = wave[None].expand(GRID, GRID, -1)
    vit.pos_embed.data[0, 1:] = 0.25 * torch.cat((rows, cols), dim=2).reshape(GRID * GRID, -1)
