"""MCTformer+'s step computed the official way, so that what our step saves can be measured.

Only the benchmark uses this. It is written from our specification (mctformer.md section 8, item 1),
not from the official code. Parameters, random draws and losses are those of
:class:`wsss.methods.mctformer.MCTformerPlus`; only the way to them differs. Each saving can be
switched on by itself (:class:`Savings`).

Items 2 to 4 and 7 of that list are about the export of maps, which is no part of a step; items 5
and 6 are too small to measure.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from wsss.methods.mctformer.method import MCTformerPlus
from wsss.methods.mctformer.network import Attention, Encoded
from wsss.models.backbone import token_map
from wsss.models.class_tokens import whole_patches
from wsss.models.vit import block_with_attention


@dataclass(frozen=True, kw_only=True)
class Savings:
    """What our step saves, one switch an item; False computes it the official way.

    Attributes:
        no_maps: item 1: no attention map is kept in training, not those of all blocks and heads
            beside autograd's own.
        fused_attention: item 1: attention is never materialised.
    """

    no_maps: bool = False
    fused_attention: bool = False


class OfficialMCTformerPlus(MCTformerPlus):
    """MCTformer+ with every saving switched off; :attr:`savings` switches single ones on."""

    savings = Savings()

    def encode(self, images: Tensor, attention: Attention | None = None) -> Encoded:
        """Encode images, in training with materialised attention where a saving is off.

        What is kept of it is ``kept_maps``, (L, B, heads, K+N, K+N).
        """
        saved = self.savings.no_maps and self.savings.fused_attention
        if saved or attention is not None:
            return super().encode(images, attention)
        if not self.quirks.dropped_remainder:
            images = whole_patches(images, self.backbone.patch_size)
        tokens, grid = self.backbone.embed(images)
        after, maps = [], []
        for block in self.backbone.vit.blocks:
            tokens, weights = block_with_attention(block, tokens)
            after.append(tokens[:, : self.num_classes])
            maps.append(weights.detach())
        if not self.savings.no_maps:
            self.kept_maps = torch.stack(maps)
        return Encoded(torch.stack(after), token_map(tokens[:, self.num_classes :], grid))
