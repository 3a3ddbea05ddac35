"""The network of ClusterCAM: soft clusters, the branch that attends through them, its blocks.

The backbone stays the method's, and so do the branches: functions here take both, so that their
parameters have the names that checkpoints know.
"""

from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.models.backbone import Backbone
from wsss.models.class_tokens import (
    Attend,
    attend,
    give_class_tokens,
    plain_attention,
    set_drop_path,
)
from wsss.models.vit import merge_heads, split_heads

NORM_EPS = 1e-5  # of the norms in both branches
MLP_NORM_EPS = 1e-6
POSITION_OFFSET = 0.1


def initial_centres(tokens: Tensor, grid: tuple[int, int], side: int = 2) -> Tensor:
    """Average patch tokens (B, N, D) over squares of so many patches a side: S_0 (B, M, D)."""
    as_map = tokens.transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
    size = (max(1, grid[0] // side), max(1, grid[1] // side))
    return F.adaptive_avg_pool2d(as_map, size).flatten(2).transpose(1, 2)


def assign(tokens: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Step once: A = softmax_clusters(Z S^T / sqrt(D)), S = A^T Z / (column sums of A + 1e-8).

    Args:
        tokens: Z, (B, N, D).
        centres: S of the step before, (B, M, D).

    Returns:
        A (B, N, M), whose rows sum to 1, and the new S (B, M, D).
    """
    scaled = tokens * tokens.shape[-1] ** -0.5
    assignment = (scaled @ centres.transpose(1, 2)).softmax(dim=-1)  # (B, N, M)
    mass = assignment.sum(dim=1)[..., None] + 1e-8  # (B, M, 1)
    return assignment, assignment.transpose(1, 2) @ tokens / mass


class BranchOutput(NamedTuple):
    """What the clustering branch gives."""

    update: Tensor  # of all tokens, (B, K+N, D)
    class_map: Tensor  # class attention pulled back to patches, (B, heads, K, N)
    class_attention: Tensor  # class attention to clusters, (B, heads, K, M)
    assignment: Tensor  # of patches to clusters, (B, N, M)


class ClusterBranch(nn.Module):
    """Branch B of a block (clustercam.md section 1): class tokens and clusters attend.

    Args:
        block: the timm block beside it, whose first norm, qkv and projection it starts from.
        side: of the square of patches that a cluster starts as.
        iterations: of soft assignment.
    """

    def __init__(self, block: Any, *, side: int, iterations: int) -> None:
        super().__init__()
        self.side, self.iterations = side, iterations
        dim = block.attn.qkv.in_features
        self.num_heads = block.attn.num_heads
        self.to_space = nn.Linear(dim, dim)  # where patches are compared
        self.norm_space, self.norm_cls, self.norm_centres = (
            deepcopy(block.norm1) for _ in range(3)
        )
        self.qkv = deepcopy(block.attn.qkv)
        self.proj_cls = deepcopy(block.attn.proj)
        self.mixing = nn.Parameter(torch.rand(1))  # lambda, free to leave [0, 1]
        nn.init.trunc_normal_(self.to_space.weight, std=0.02)
        nn.init.zeros_(self.to_space.bias)

    def space(self, patches: Tensor) -> Tensor:
        """Give Z (B, N, D): projection, then norm."""
        return self.norm_space(self.to_space(patches))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> BranchOutput:
        """Update raw tokens (B, K+N, D) whose patches lie on a grid of h x w = N."""
        num_classes = tokens.shape[1] - grid[0] * grid[1]
        classes, patches = tokens[:, :num_classes], tokens[:, num_classes:]
        space = self.space(patches)
        centres = initial_centres(space, grid, self.side)
        for _ in range(self.iterations):
            assignment, centres = assign(space, centres)

        joint = torch.cat([self.norm_cls(classes), self.norm_centres(centres)], dim=1)
        queries, keys, values = split_heads(self.qkv(joint), self.num_heads)
        scale = queries.shape[-1] ** -0.5
        weights = (queries * scale @ keys.transpose(-2, -1)).softmax(dim=-1)  # (B, heads, K+M, K+M)
        mixed = merge_heads(weights @ values)  # (B, K+M, D), heads side by side
        update = torch.cat(
            [self.proj_cls(mixed[:, :num_classes]), assignment @ mixed[:, num_classes:]], dim=1
        )
        attention = weights[:, :, :num_classes, num_classes:]  # (B, heads, K, M)
        class_map = attention.flatten(1, 2) @ assignment.transpose(1, 2)  # (B, heads K, N)
        return BranchOutput(
            update,
            class_map.unflatten(1, (self.num_heads, num_classes)),
            attention,
            assignment,
        )


class BlockOutput(NamedTuple):
    """What a block gives."""

    tokens: Tensor  # (B, K+N, D)
    plain: Tensor  # output of branch A, (B, K+N, D)
    class_rows: Tensor  # its class-to-patch attention R, (B, heads, K, N)
    clustered: BranchOutput
    class_map: Tensor  # (1 - lambda) R + lambda G, (B, heads, K, N)


def run_block(
    block: Any,
    branch: Any,
    tokens: Tensor,
    grid: tuple[int, int],
    affinity: Tensor | None = None,
    attend: Attend = attend,
) -> BlockOutput:
    """Run both branches, then the MLP, with three independent drop-path draws.

    X' = X + DP(a) + DP(b), X'' = X' + DP(MLP(LN(X'))).

    Args:
        block: of timm; its attention is branch A.
        branch: the :class:`ClusterBranch` beside it.
        tokens: X, (B, K+N, D), whose patches lie on the grid.
        grid: h, w with h w = N.
        affinity: as of :func:`attend`.
        attend: how branch A attends.
    """
    num_classes = tokens.shape[1] - grid[0] * grid[1]
    plain, class_rows = plain_attention(block, tokens, num_classes, affinity, attend)
    clustered = branch(tokens, grid)
    tokens = tokens + block.drop_path1(block.ls1(plain))
    tokens = tokens + block.drop_path1(block.ls1(clustered.update))
    tokens = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
    class_map = (1 - branch.mixing) * class_rows + branch.mixing * clustered.class_map
    return BlockOutput(tokens, plain, class_rows, clustered, class_map)


class Encoded(NamedTuple):
    """What the network knows of a batch before its heads."""

    class_tokens: Tensor  # (B, K, D), without a norm
    # F, (B, D + L heads K, h, w): final patch tokens, then the class maps of all L blocks,
    # layer-major, then head, then class
    activation: Tensor
    class_maps: list[Tensor]  # those maps block by block, each (B, heads, K, N)
    # Omega, (B, N, N): patch-to-patch attention summed over blocks, mean over heads; in CAM passes
    affinity: Tensor | None

    @property
    def class_logits(self) -> Tensor:
        """Mean of each class's token, (B, K)."""
        return self.class_tokens.mean(dim=-1)


def encode(
    backbone: Backbone,
    branches: nn.ModuleList,
    images: Tensor,
    attend: Attend = attend,
    *,
    with_affinity: bool = False,
    keep: list[BlockOutput] | None = None,
) -> Encoded:
    """Run all blocks; the final norm is not applied.

    Args:
        backbone: of :func:`prepare_backbone`.
        branches: a :class:`ClusterBranch` a block.
        images: (B, 3, H, W), normalised; the remainder of a patch is dropped.
        attend: how branch A of every block attends.
        with_affinity: accumulate the patches' attention, for CAMs; not differentiable.
        keep: receives what every block gives.
    """
    tokens, grid = backbone.embed(images)
    count = grid[0] * grid[1]
    affinity = images.new_zeros(len(images), count, count) if with_affinity else None
    class_maps = []
    for block, branch in zip(backbone.vit.blocks, branches, strict=True):
        output = run_block(block, branch, tokens, grid, affinity, attend)
        tokens = output.tokens
        class_maps.append(output.class_map)
        if keep is not None:
            keep.append(output)
    classes, patches = tokens[:, :-count], tokens[:, -count:].transpose(1, 2)  # (B, D, N)
    channels = [patches, *(maps.flatten(1, 2) for maps in class_maps)]
    activation = torch.cat(channels, dim=1).unflatten(2, grid)
    return Encoded(classes, activation, class_maps, affinity)


def mean_of_convolution(features: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Take the spatial mean (B, K) of a zero-padded 3 x 3 convolution of features (B, D, h, w).

    Each tap sees every position but a border row or column, so nine sums a channel are enough.
    """
    sums = features
    for _ in range(2):  # rows, then columns: (B, D, h, w) -> (B, D, w, 3) -> (B, D, 3, 3)
        total = sums.sum(dim=2)
        sums = torch.stack([total - sums[:, :, -1], total, total - sums[:, :, 0]], dim=-1)
    weight = convolution.weight / features[0, 0].numel()
    return F.linear(sums.flatten(1), weight.flatten(1), convolution.bias)


def prepare_backbone(
    backbone: Backbone, num_classes: int, drop_path: float, token_noise: float
) -> None:
    """Make a shared encoder ClusterCAM's: K class tokens, its norms, positions and drop path.

    The class token and its position are copied K times (section 1, "Initialisation"); noise is
    added to the copied tokens.
    """
    give_class_tokens(backbone, num_classes, noise=token_noise)
    set_drop_path(backbone, drop_path)
    backbone.vit.norm.requires_grad_(False)  # never applied
    backbone.position_offset = POSITION_OFFSET
    for block in backbone.vit.blocks:
        block.norm1.eps, block.norm2.eps = NORM_EPS, MLP_NORM_EPS
