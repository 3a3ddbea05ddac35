"""MoRe's graph module: class tokens gather what their nearest tokens hold (more.md section 1)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.methods.losses import full_precision, widened

Gate = Literal["sums", "dot"]


class Neighbours(NamedTuple):
    """The nodes that each class token chose, best first.

    Attributes:
        scores: (B, K, k).
        nodes: numbers of class tokens and then patches, (B, K, k).
    """

    scores: Tensor
    nodes: Tensor


class CategoryGraph(nn.Module):
    """Graph category representation (GCR): a class token joined with its k nearest nodes.

    With a = head(C0), X = [C0; patches without gradient], b = tail(X): the k largest of
    e = a b^T / sqrt(D) give scores v_j and tails t_j. Then p = softmax(v),
    u_j = tanh((2 - p_j) a + p_j t_j), q = softmax(s), m = sum_j q_j t_j and
    C = LN(LeakyReLU(linear1(0.1 (a + m) + C0)) + LeakyReLU(linear2(0.1 a m + C0))).

    Args:
        dim: width D of the tokens.
        neighbours: k; 0 leaves m = 0.
        gate: how s_j is made of t_j and u_j: ``sums`` (sum t_j)(sum u_j), as officially (Q2), or
            ``dot`` sum(t_j u_j) / sqrt(D).
    """

    def __init__(self, dim: int, *, neighbours: int, gate: Gate = "sums") -> None:
        super().__init__()
        self.neighbours = neighbours
        self.gate = gate
        self.head_proj = nn.Linear(dim, dim)
        self.tail_proj = nn.Linear(dim, dim)
        self.linear1 = nn.Linear(dim, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """Give class tokens C (B, K, D), in float32 also under autocast.

        Args:
            tokens: class tokens C0 of the encoder, (B, K, D).
            patches: patch tokens, (B, N, D); no gradient reaches them.

        Raises:
            WSSSError: there are fewer nodes than neighbours.
        """
        with full_precision(tokens):
            tokens = widened(tokens)
            heads = self.head_proj(tokens)  # a, (B, K, D)
            tails = self.tail_proj(torch.cat([tokens, widened(patches).detach()], dim=1))  # b
            message = self.gather(heads, tails, self.choose(heads, tails))  # m, (B, K, D)
            added = F.leaky_relu(self.linear1(0.1 * (heads + message) + tokens))
            multiplied = F.leaky_relu(self.linear2(0.1 * heads * message + tokens))
            return self.norm(added + multiplied)

    def choose(self, heads: Tensor, tails: Tensor) -> Neighbours:
        """Choose the nodes of the largest products of heads (B, K, D) and tails (B, K+N, D).

        Raises:
            WSSSError: there are fewer nodes than neighbours.
        """
        if self.neighbours > tails.shape[1]:
            raise WSSSError(
                f"method.neighbours={self.neighbours}: a class token has {tails.shape[1]} nodes to "
                f"choose from ({heads.shape[1]} classes and {tails.shape[1] - heads.shape[1]} "
                "patches); lower it, or use larger images"
            )
        scores = (heads * heads.shape[2] ** -0.5) @ tails.transpose(1, 2)  # e, (B, K, K+N)
        return Neighbours(*scores.topk(self.neighbours, dim=2))

    def gather(self, heads: Tensor, tails: Tensor, chosen: Neighbours) -> Tensor:
        """Mix the chosen tails into one message a class, m (B, K, D)."""
        batch = torch.arange(len(tails), device=tails.device)[:, None, None]
        near = tails[batch, chosen.nodes]  # t, (B, K, k, D)
        share = chosen.scores.softmax(dim=2)[..., None]  # p
        joined = torch.tanh((2 - share) * heads[:, :, None] + share * near)  # u
        if self.gate == "sums":
            gate = tails.sum(dim=2)[batch, chosen.nodes] * joined.sum(dim=3)  # s, (B, K, k)
        else:
            gate = (near * joined).sum(dim=3) * near.shape[3] ** -0.5
        return (gate.softmax(dim=2)[..., None] * near).sum(dim=2)
