"""The network of MCTformer+: K class tokens on the shared ViT, a patch head, ranking pooling.

The backbone stays the method's: functions here take it, so that parameters keep the names that
checkpoints know.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.methods.losses import full_precision, widened
from wsss.models.backbone import Backbone, token_map
from wsss.models.class_tokens import block_with_class_rows, give_class_tokens, set_drop_path


def prepare_backbone(
    backbone: Backbone,
    num_classes: int,
    *,
    side: int,
    nearest: bool,
    token_noise: float,
    drop_path: float,
) -> None:
    """Make a shared encoder MCTformer+'s (mctformer.md section 1, "Initialisation").

    Positions are brought to the grid of training, the class token and its position are copied K
    times, and the final norm, which is never applied, is not trained.

    Args:
        backbone: changed in place; it has one class token.
        num_classes: K.
        side: patches a side of a training crop.
        nearest: repeat the nearest position; otherwise they are resized bicubically.
        token_noise: standard deviation of normal noise on the copied tokens.
        drop_path: rate of the last block.
    """
    vit: Any = backbone.vit
    stored = vit.pos_embed.detach()
    token, patches = stored[:, :1], stored[:, 1:]
    own = round(patches.shape[1] ** 0.5)
    if own != side:
        grid = patches.unflatten(1, (own, own)).permute(0, 3, 1, 2)  # (1, D, n, n)
        if nearest:
            grid = F.interpolate(grid, (side, side), mode="nearest")
        else:
            grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
        patches = grid.flatten(2).transpose(1, 2)
    vit.pos_embed = nn.Parameter(torch.cat([token, patches], dim=1))
    give_class_tokens(backbone, num_classes, noise=token_noise)
    set_drop_path(backbone, drop_path)
    vit.norm.requires_grad_(False)


class Attention:
    """What class tokens and patches attend to, summed while the blocks run; for maps alone.

    No block's attention between patches is kept, for any head (section 8, saving 2).

    Args:
        classes: the C class indices whose maps are wanted.
        layers: last blocks that the class maps average; all where there are fewer.
        with_affinity: sum up what patches give patches, too; not differentiable.
    """

    def __init__(self, classes: Tensor, layers: int, *, with_affinity: bool) -> None:
        self.classes, self.layers, self.with_affinity = classes, layers, with_affinity
        #: Omega, (B, N, N): sum over all blocks of the head mean; rows are queries
        self.affinity: Tensor | None = None
        self._rows: list[Tensor] = []  # of the last blocks, each (B, C, N)

    def run(self, block: Any, tokens: Tensor, num_classes: int) -> Tensor:
        """Run one block on tokens (B, K+N, D), and add what it attends to."""
        if self.with_affinity and self.affinity is None:
            count = tokens.shape[1] - num_classes
            # at least float32, as the softmax is under autocast
            kind = torch.promote_types(tokens.dtype, torch.float32)
            self.affinity = tokens.new_zeros(len(tokens), count, count, dtype=kind)
        tokens, rows = block_with_class_rows(block, tokens, num_classes, self.affinity)
        self._rows = [*self._rows, rows[:, :, self.classes].mean(dim=1)][-self.layers :]
        return tokens

    @property
    def class_maps(self) -> Tensor:
        """R, (B, C, N): mean over the last blocks and all heads, not renormalised."""
        return torch.stack(self._rows).mean(dim=0)


class Encoded(NamedTuple):
    """What the encoder makes of a batch; nothing is normed."""

    class_tokens: Tensor  # c_l, after every block, (L, B, K, D)
    features: Tensor  # F, final patch tokens, (B, D, h, w)

    @property
    def class_logits(self) -> Tensor:
        """Mean over the channels of each class's final token, (B, K)."""
        return self.class_tokens[-1].mean(dim=-1)


def encode(backbone: Backbone, images: Tensor, attention: Attention | None = None) -> Encoded:
    """Run all blocks, fused where nobody asks what they attend to.

    Args:
        backbone: of :func:`prepare_backbone`.
        images: (B, 3, H, W), normalised; the remainder of a patch is dropped.
        attention: receives what every block attends to.
    """
    tokens, grid = backbone.embed(images)
    num_classes = tokens.shape[1] - grid[0] * grid[1]
    after = []
    for block in backbone.vit.blocks:
        tokens = block(tokens) if attention is None else attention.run(block, tokens, num_classes)
        after.append(tokens[:, :num_classes])
    return Encoded(torch.stack(after), token_map(tokens[:, num_classes:], grid))


def ranking_pooling(maps: Tensor, decay: float) -> Tensor:
    """Average each map's values, the j-th highest weighted by decay^j (section 1).

    Args:
        maps: U, (B, K, h, w).
        decay: 1 gives the mean, 0 the maximum.

    Returns:
        (B, K), in float32 at least.
    """
    with full_precision(maps):
        ranked = widened(maps).flatten(2).sort(dim=-1, descending=True).values  # (B, K, N)
        # powers in float64, or the 700th would have lost its digits
        ranks = torch.arange(ranked.shape[-1], device=maps.device, dtype=torch.float64)
        weights = (decay**ranks).to(ranked.dtype)
        return (ranked * weights).sum(dim=-1) / weights.sum()
