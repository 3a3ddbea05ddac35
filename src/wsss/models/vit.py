"""timm's ViT opened: blocks with their attention, heads, positions, the hybrid's stem."""

import difflib
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import HybridEmbed, PatchEmbed, StdConv2dSame, pad_same
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.core.files import first_line

HYBRID = "vit_base_r50_s16_384"  # the one convolutional stem that is supported


@dataclass(frozen=True)
class AttentionParts:
    """What one block's attention was made of, without the N x N map itself.

    Attributes:
        queries: already scaled, (B, heads, P+N, d).
        keys: (B, heads, P+N, d).
        values: (B, heads, P+N, d).
        output: attention times values, (B, heads, P+N, d), in the graph of all that follows.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor


def resize_positions(
    positions: Tensor,
    grid: tuple[int, int],
    num_prefix: int,
    *,
    mode: str = "bicubic",
    offset: float | None = None,
    square: bool = True,
) -> Tensor:
    """Resize positions (1, P+n*n, D) to a grid of (h, w): no antialias, prefix untouched.

    Args:
        positions: as stored.
        grid: (h, w) that is wanted; the stored one is left as it is.
        num_prefix: P.
        mode: of interpolation, ``bicubic`` or ``bilinear``.
        offset: None resizes to (h, w). A number scales by (h + offset) / n and (w + offset) / n, as
            DINO's descendants do with 0.1: pixel i is then sampled at (i + 1/2) n / (h + offset) -
            1/2, about 1e-3 away from the former (clustercam.md section 1, "Stem").
        square: whether the image is; with an offset only then the stored grid is left as it is.
    """
    prefix, patches = positions[:, :num_prefix], positions[:, num_prefix:]
    side = round(patches.shape[1] ** 0.5)
    if (side, side) == grid and (offset is None or square):
        return positions
    patches = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, n, n)
    if offset is None:
        patches = F.interpolate(patches, size=grid, mode=mode, align_corners=False)
    else:
        scale = ((grid[0] + offset) / side, (grid[1] + offset) / side)
        patches = F.interpolate(patches, scale_factor=scale, mode=mode, align_corners=False)
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a projection (B, T, 3 D) into queries, keys, values, each (B, heads, T, D / heads)."""
    batch, count, _ = qkv.shape
    queries, keys, values = qkv.reshape(batch, count, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return queries, keys, values


def merge_heads(mixed: Tensor) -> Tensor:
    """Lay heads (B, heads, T, D / heads) side by side again, (B, T, D)."""
    return mixed.transpose(1, 2).flatten(2)


def block_with_attention(block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Run one pre-norm block; its softmax attention (B, heads, N, N) stays in the graph."""
    queries, keys, values = _queries_keys_values(block, tokens)
    attention = (queries @ keys.transpose(-2, -1)).softmax(dim=-1)
    mixed = block.attn.attn_drop(attention) @ values
    return _after_attention(block, tokens, mixed), attention


def block_with_mean_attention(block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Run one pre-norm block; give also its attention averaged over the heads, (B, N, N).

    One head's map is there at a time, so the memory is that of one head and the mean.
    """
    queries, keys, values = _queries_keys_values(block, tokens)
    heads = zip(queries.unbind(1), keys.unbind(1), values.unbind(1), strict=True)
    total: Tensor | None = None
    mixed: list[Tensor] = []
    for query, key, value in heads:
        attention = (query @ key.transpose(-2, -1)).softmax(dim=-1)
        total = attention if total is None else total + attention
        mixed.append(block.attn.attn_drop(attention) @ value)
    assert total is not None  # a block has a head
    tokens = _after_attention(block, tokens, torch.stack(mixed, dim=1))
    return tokens, total / len(mixed)


def block_with_parts(block: Any, tokens: Tensor) -> tuple[Tensor, AttentionParts]:
    """Run one pre-norm block on fused attention; give also what its attention is made of."""
    queries, keys, values = _queries_keys_values(block, tokens)
    dropout = block.attn.attn_drop.p if block.training else 0.0
    mixed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, scale=1.0)
    return _after_attention(block, tokens, mixed), AttentionParts(queries, keys, values, mixed)


def _queries_keys_values(block: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give queries, keys and values, each (B, heads, N, D / heads); queries are scaled already."""
    attn = block.attn
    queries, keys, values = split_heads(attn.qkv(block.norm1(tokens)), attn.num_heads)
    return attn.q_norm(queries) * attn.scale, attn.k_norm(keys), values


def _after_attention(block: Any, tokens: Tensor, mixed: Tensor) -> Tensor:
    """Run the rest of a block, from attention times values (B, heads, N, D / heads)."""
    attn = block.attn
    mixed = merge_heads(mixed)
    mixed = attn.proj_drop(attn.proj(attn.norm(mixed)))
    tokens = tokens + block.drop_path1(block.ls1(mixed))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


class StandardisedConv(StdConv2dSame):
    """Convolution with standardised weight: (w - mean) / (population std + 1e-5), SAME padding.

    Source: getam.md section 1, "Hybrid stem"; it is how the weights of the hybrid were trained.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Filter (B, C, H, W)."""
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) / (std + 1e-5)
        if self.same_pad:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _hybrid_embed(**arguments: Any) -> HybridEmbed:
    """Make the ResNet-50 stem of three stages with :class:`StandardisedConv`."""
    stem = ResNetV2(
        layers=(3, 4, 9),
        num_classes=0,
        global_pool="",
        preact=False,
        stem_type="same",
        conv_layer=StandardisedConv,
    )
    return HybridEmbed(backbone=stem, **arguments)


def check_name(name: str, *, pretrained: bool) -> None:
    """Raise WSSSError unless timm knows a name, and its tag where it has one or needs one.

    Args:
        name: timm's.
        pretrained: timm's weights are wanted, so that a tag is needed.
    """
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        if pretrained:
            near = [tagged[0] for one in near if (tagged := timm.list_pretrained(f"{one}.*"))]
        hint = f"; near: {', '.join(near)}" if near else ""
        raise WSSSError(f"backbone.name={name} is not a timm model{hint}")
    tagged = timm.list_pretrained(f"{architecture}.*")
    if (pretrained or "." in name) and name not in tagged:
        reason = "is not a pretrained tag" if "." in name else "has no pretrained tag"
        raise WSSSError(
            f"backbone.name={name} {reason}, and untagged names change meaning; "
            f"pin one of: {', '.join(tagged) or 'none known to timm'}"
        )


def create_vit(
    name: str, *, pretrained: bool, overrides: dict[str, Any], num_outputs: int = 0
) -> VisionTransformer:
    """Make a plain timm ViT.

    Args:
        name: timm's.
        pretrained: load timm's weights.
        overrides: arguments of timm's constructor.
        num_outputs: of the linear head; 0 for none.

    Raises:
        WSSSError: a name, a tag or overrides that timm does not know; another kind of network.
    """
    check_name(name, pretrained=pretrained)
    architecture = name.partition(".")[0]
    if architecture == HYBRID:
        overrides = {"embed_layer": _hybrid_embed, **overrides}
    try:
        vit = timm.create_model(name, pretrained=pretrained, num_classes=num_outputs, **overrides)
    except OSError as error:
        raise WSSSError(
            f"backbone {name}: its weights are not cached and cannot be downloaded "
            f"({first_line(error)}); fetch the file on a machine with internet "
            "and pass backbone.weights=/path/to/file.safetensors"
        ) from error
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise WSSSError(
            f"backbone {name}: timm cannot build it with overrides {overrides} "
            f"({first_line(error)})"
        ) from error
    if type(vit) is not VisionTransformer and not hasattr(vit, "dist_token"):
        raise WSSSError(
            f"backbone.name={name} is a {type(vit).__name__}; only ViT, DeiT and DINOv2 "
            "(timm's VisionTransformer) are supported"
        )
    if not isinstance(vit.patch_embed, PatchEmbed) and architecture != HYBRID:
        raise WSSSError(
            f"backbone.name={name} has a convolutional stem; choose a plain ViT or {HYBRID}"
        )
    if not hasattr(vit.blocks[0], "ls1"):
        raise WSSSError(f"backbone.name={name} uses an unusual block; choose a plain ViT")
    return vit
