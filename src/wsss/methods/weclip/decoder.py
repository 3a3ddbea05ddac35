"""WeCLIP's decoder: taps of the frozen encoder fused, their affinity, a small transformer."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import QuickGELU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from wsss.methods.losses import full_precision, widened
from wsss.models.backbone import token_map


class TapMLP(nn.Module):
    """Two linear layers with a ReLU between, for the tokens of one block."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, N, D) to (B, N, d)."""
        return self.fc2(self.fc1(tokens).relu())


class WeCLIPDecoder(nn.Module):
    """Fuse the patch tokens of several blocks and segment them (weclip.md section 5).

    Args:
        dim: D, width of the encoder.
        num_taps: how many blocks' tokens come in.
        num_outputs: K + 1.
        width: d.
        depth: blocks of the transformer.
        num_heads: of each.
        dropout: probability that a channel of the fused features is dropped.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_taps: int,
        num_outputs: int,
        width: int,
        depth: int,
        num_heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(TapMLP(dim, width) for _ in range(num_taps))
        self.fuse = nn.Conv2d(num_taps * width, width, 1)
        self.dropout: nn.Module = nn.Dropout2d(dropout)
        block = partial(
            Block,
            width,
            num_heads,
            qkv_bias=True,
            act_layer=QuickGELU,
            norm_layer=partial(nn.LayerNorm, eps=1e-5),
        )
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        attention: Any = [one.attn for one in self.blocks]
        for one in attention:  # starts as torch's own
            nn.init.xavier_uniform_(one.qkv.weight)
            nn.init.zeros_(one.qkv.bias)
            nn.init.zeros_(one.proj.bias)
        self.predict = nn.Conv2d(width, num_outputs, 1)

    def fused(self, taps: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Fuse patch tokens (B, N, D) of the blocks in their order: (B, d, h, w)."""
        parts = [mlp(tokens) for mlp, tokens in zip(self.mlps, taps, strict=True)]
        return self.dropout(self.fuse(token_map(torch.cat(parts, dim=2), grid)))

    def segment(self, fused: Tensor) -> Tensor:
        """Give logits (B, K+1, h, w) of fused features (B, d, h, w)."""
        tokens = self.blocks(fused.flatten(2).transpose(1, 2))  # (B, N, d)
        return self.predict(token_map(tokens, (fused.shape[2], fused.shape[3])))


def affinity(fused: Tensor) -> Tensor:
    """Compute R = sigmoid(f^T f), (B, N, N), of fused features (B, d, h, w)."""
    with full_precision(fused):
        features = widened(fused).flatten(2)
        return (features.transpose(1, 2) @ features).sigmoid()
