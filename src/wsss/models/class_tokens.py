"""One class token a class on the shared ViT: their start, what they attend to, patch affinity.

Shared by ClusterCAM, MCTformer+ and MoRe.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.models.backbone import Backbone
from wsss.models.vit import merge_heads, split_heads

QUERY_ROWS = 64  # of attention kept at once in CAM passes
#: attention of all tokens; arguments and results as of :func:`attend`
Attend = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], tuple[Tensor, Tensor]]


def require_one_class_token(backbone: Backbone, method: str) -> None:
    """Raise WSSSError unless the backbone has exactly one class token, which has a position."""
    if backbone.num_prefix_tokens != 1 or backbone.vit.no_embed_class:
        raise WSSSError(
            f"method={method} turns the class token into one a class; this backbone has "
            f"{backbone.num_prefix_tokens} prefix tokens, expected 1 that has a position"
        )


def give_class_tokens(
    backbone: Backbone,
    num_classes: int,
    *,
    noise: float = 0.0,
    registers: int = 0,
    register_std: float = 1.0,
) -> None:
    """Turn the backbone's one class token into registers and K class tokens, in this order.

    Each is a copy of the pretrained token. Class tokens also get copies of its position, registers
    positions from a normal distribution that is cut at -2 and 2.

    Args:
        backbone: changed in place; see :func:`require_one_class_token`.
        num_classes: K.
        noise: standard deviation of normal noise on the class tokens; copies do not part by
            themselves.
        registers: R, further tokens that no head reads.
        register_std: standard deviation of the registers' positions.
    """
    vit: Any = backbone.vit
    position, grid = vit.pos_embed.detach()[:, :1], vit.pos_embed.detach()[:, 1:]
    tokens = vit.cls_token.detach().repeat(1, num_classes, 1)
    # drawn in any case, so that what else a seed gives does not depend on the noise
    tokens = tokens + noise * torch.randn_like(tokens)
    positions = [position.repeat(1, num_classes, 1), grid]
    if registers:
        tokens = torch.cat([vit.cls_token.detach().repeat(1, registers, 1), tokens], dim=1)
        own = nn.init.trunc_normal_(position.repeat(1, registers, 1), std=register_std)
        positions = [own, *positions]
    vit.cls_token = nn.Parameter(tokens)
    vit.pos_embed = nn.Parameter(torch.cat(positions, dim=1))
    vit.num_prefix_tokens = registers + num_classes


def set_drop_path(backbone: Backbone, rate: float) -> None:
    """Drop paths at a rate that rises linearly over the blocks, from 0 to ``rate``."""
    blocks = list(backbone.vit.blocks)
    for block, own in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
        block.drop_path1, block.drop_path2 = DropPath(own), DropPath(own)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, num_classes: int, affinity: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend with all tokens; keep the class rows, and not what patches give patches.

    Args:
        queries: scaled, (B, heads, K+N, d).
        keys: (B, heads, K+N, d).
        values: (B, heads, K+N, d).
        num_classes: K.
        affinity: (B, N, N), to which the head-mean of patch-to-patch attention is added row by row
            (for CAM passes, without gradient); None uses fused attention.

    Returns:
        Mixed values (B, heads, K+N, d), and class-to-patch attention (B, heads, K, N), which is not
        renormalised.
    """
    # laid out once for all products; heads of one projection are strided, and each would copy them
    columns, values = keys.transpose(-2, -1).contiguous(), values.contiguous()
    weights = (queries[:, :, :num_classes] @ columns).softmax(dim=-1)
    class_rows = weights[..., num_classes:]
    mixed = [weights @ values]
    patches = queries[:, :, num_classes:]
    if affinity is None:
        mixed.append(F.scaled_dot_product_attention(patches, keys, values, scale=1.0))
    else:
        for rows, total in zip(
            patches.split(QUERY_ROWS, dim=2), affinity.split(QUERY_ROWS, dim=1), strict=True
        ):
            weights = (rows @ columns).softmax(dim=-1)
            mixed.append(weights @ values)
            total.add_(weights[..., num_classes:].mean(dim=1))
    return torch.cat(mixed, dim=2), class_rows


def plain_attention(
    block: Any, tokens: Tensor, num_classes: int, affinity: Tensor | None, attend: Attend
) -> tuple[Tensor, Tensor]:
    """Give branch A (B, K+N, D) and its class-to-patch attention R (B, heads, K, N)."""
    attn = block.attn
    queries, keys, values = split_heads(attn.qkv(block.norm1(tokens)), attn.num_heads)
    queries, keys = attn.q_norm(queries), attn.k_norm(keys)
    mixed, class_rows = attend(queries * attn.scale, keys, values, num_classes, affinity)
    return attn.proj(attn.norm(merge_heads(mixed))), class_rows


def block_with_class_rows(
    block: Any, tokens: Tensor, num_classes: int, affinity: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run one pre-norm block on tokens (B, K+N, D); give also what class tokens give patches.

    Args:
        block: of timm.
        tokens: K class tokens, then the patches.
        num_classes: K.
        affinity: as of :func:`attend`.

    Returns:
        Tokens (B, K+N, D) and class-to-patch attention (B, heads, K, N).
    """
    update, class_rows = plain_attention(block, tokens, num_classes, affinity, attend)
    tokens = tokens + block.drop_path1(block.ls1(update))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))), class_rows


def sum_of_last(maps: Sequence[Tensor], layers: int) -> Tensor:
    """Sum the head-means of the last of all blocks' maps (B, heads, K, N): (B, K, N)."""
    return torch.stack([one.mean(dim=1) for one in maps[-layers:]]).sum(dim=0)


def whole_patches(images: Tensor, patch: int) -> Tensor:
    """Enlarge images (B, 3, H, W) whose sides are no multiples of the patch."""
    size = [-(-side // patch) * patch for side in images.shape[-2:]]
    if size == list(images.shape[-2:]):
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False)
