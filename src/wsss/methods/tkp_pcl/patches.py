"""Patch classification of TKP-PCL: BiLSTMs, top-K pooling, the patch contrastive error."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.methods.losses import full_precision, widened
from wsss.models.backbone import token_map


class HVBiLSTM(nn.Module):
    """A BiLSTM along every row beside another along every column (tkp_pcl.md 1.4; ViT-PCM).

    Args:
        dim: width of the tokens.
        hidden: width of each direction; the output is ``4 * hidden`` wide.
        dropout: of the tokens, and once more of each LSTM's input with one mask a sequence.
    """

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.horizontal = keras_lstm(dim, hidden)
        self.vertical = keras_lstm(dim, hidden)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Run tokens (B, N, D) on a grid (h, w), N = h*w, to (B, N, 4 * hidden)."""
        tokens = F.dropout(tokens, self.dropout, self.training).unflatten(1, grid)  # (B, h, w, D)
        rows = self.along(self.horizontal, tokens)
        columns = self.along(self.vertical, tokens.transpose(1, 2)).transpose(1, 2)
        return torch.cat([rows, columns], dim=-1).flatten(1, 2)

    def along(self, lstm: nn.LSTM, lines: Tensor) -> Tensor:
        """Run an LSTM along all lines (B, lines, length, D), as one batch of sequences."""
        sequences = lines.flatten(0, 1)
        # nn.LSTM(dropout=) does nothing for one layer; Keras holds one mask over the time steps
        mask = F.dropout(torch.ones_like(sequences[:, :1]), self.dropout, self.training)
        return lstm(sequences * mask)[0].unflatten(0, lines.shape[:2])


def keras_lstm(dim: int, hidden: int) -> nn.LSTM:
    """Make a bidirectional LSTM as Keras starts it: Glorot, orthogonal, forget bias 1, one bias."""
    lstm = nn.LSTM(dim, hidden, batch_first=True, bidirectional=True)
    for name, parameter in lstm.named_parameters():
        if name.startswith("weight_ih"):
            nn.init.xavier_uniform_(parameter)
        elif name.startswith("weight_hh"):
            nn.init.orthogonal_(parameter)
        else:
            nn.init.zeros_(parameter)
            if name.startswith("bias_ih"):
                # gates lie as input, forget, cell, output
                parameter.data[hidden : 2 * hidden] = 1.0
            else:
                parameter.requires_grad_(False)  # the second bias would double the first one's rate
    return lstm


def top_k_pool(probabilities: Tensor, k: int) -> Tensor:
    """Take the mean of the k largest patch probabilities of each category (tkp_pcl.md 1.6).

    The gradient is 1/k for each chosen patch and 0 elsewhere; categories choose independently.

    Args:
        probabilities: Z, (B, N, C).
        k: patches to choose.

    Returns:
        (B, C); rows do not add up to 1 and must not be renormalised.

    Raises:
        WSSSError: there are fewer than k patches.
    """
    if k > probabilities.shape[1]:
        raise WSSSError(
            f"method.top_k={k}: images have only {probabilities.shape[1]} patches; lower it or "
            "use larger images"
        )
    return probabilities.transpose(1, 2).topk(k, dim=2, sorted=False).values.mean(dim=2)


def mce_loss(pooled: Tensor, targets: Tensor) -> Tensor:
    """Compute MCE: binary cross-entropy over all C categories and the batch.

    Source: tkp_pcl.md section 2, "MCE"; probabilities are clipped to [1e-7, 1 - 1e-7].

    Args:
        pooled: y, (B, C) probabilities.
        targets: t, (B, C), background first.
    """
    pooled = pooled.clamp(1e-7, 1 - 1e-7)  # not F.binary_cross_entropy, which autocast forbids
    return -(targets * pooled.log() + (1 - targets) * (-pooled).log1p()).mean()


class ConfidentSets(NamedTuple):
    """Which patches PCE compares, both (B, C, N), boolean and without gradient.

    Attributes:
        high: H, patches surely of a category.
        low: L, patches surely not of it.
    """

    high: Tensor
    low: Tensor


def confident_sets(probabilities: Tensor, present: Tensor, epsilon: float) -> ConfidentSets:
    """Give H_c = {Z_c > epsilon} and L_c = {Z_c < 1 - epsilon} of the categories that count.

    Args:
        probabilities: Z, (B, N, C).
        present: (B, C), boolean: categories that are compared at all.
        epsilon: at least 0.5, so that the sets are disjoint.
    """
    scores = probabilities.detach().transpose(1, 2)  # (B, C, N)
    counted = present[..., None]
    return ConfidentSets((scores > epsilon) & counted, (scores < 1 - epsilon) & counted)


class PCETerms(NamedTuple):
    """PCE of each image and category, all (B, C).

    Attributes:
        positive: mean of 1 - S over ordered pairs of H; 0 where there is none.
        negative: mean of S over H x L; 0 where there is none.
        valid: boolean: at least one of the two exists.
    """

    positive: Tensor
    negative: Tensor
    valid: Tensor


def pce_terms(embeddings: Tensor, sets: ConfidentSets) -> PCETerms:
    """Compute the contrastive error with S(i, j) = (1 + cos(F_i, F_j)) / 2, in closed form.

    With unit rows u, sums s of them over a set and its size h or l (tkp_pcl.md section 7):
    positive = 1/2 [1 - (|s_H|^2 - sum_H |u|^2) / (h (h - 1))],
    negative = 1/2 [1 + s_H s_L / (h l)].
    That is O(N C e) where all pairs are O(N^2 e).

    Args:
        embeddings: F, (B, N, e).
        sets: H and L of each image and category.
    """
    with full_precision(embeddings):  # |s|^2 - h cancels, which bfloat16 cannot bear
        wide = widened(embeddings)
        high, low = sets.high.to(wide), sets.low.to(wide)
        unit = wide / (wide.square().sum(-1, keepdim=True) + 1e-12).sqrt()
        sum_high, sum_low = high @ unit, low @ unit  # (B, C, e)
        own = high @ unit.square().sum(-1, keepdim=True)  # (B, C, 1), the pairs i = j
        h, n_low = high.sum(-1), low.sum(-1)  # (B, C)
        alike = (sum_high.square().sum(-1) - own[..., 0]) / (h * (h - 1)).clamp_min(1)
        unlike = (sum_high * sum_low).sum(-1) / (h * n_low).clamp_min(1)
    has_positive, has_negative = h >= 2, (h >= 1) & (n_low >= 1)
    return PCETerms(
        0.5 * (1 - alike) * has_positive,
        0.5 * (1 + unlike) * has_negative,
        has_positive | has_negative,
    )


def pce_loss(embeddings: Tensor, sets: ConfidentSets) -> Tensor:
    """Take the mean of PCE over an image's categories that have pairs, then over all images.

    An image without pairs counts as 0, so that equal shards of a batch average to the whole.
    """
    terms = pce_terms(embeddings, sets)
    per_image = (terms.positive + terms.negative).sum(1) / terms.valid.sum(1).clamp_min(1)
    return per_image.mean()


def pce_coverage(sets: ConfidentSets, present: Tensor) -> Tensor:
    """Give the share of present (image, category) pairs (B, C) with two sure patches or more.

    Where it is near 0, PCE does nothing (tkp_pcl.md section 7).
    """
    return (sets.high.sum(-1) >= 2).sum() / present.sum().clamp_min(1)


def across_images(embeddings: Tensor, sets: ConfidentSets) -> tuple[Tensor, ConfidentSets]:
    """Join the batch to one image of B*N patches, for pairs across images."""
    high, low = (part.transpose(0, 1).flatten(1)[None] for part in sets)  # (1, C, B*N)
    return embeddings.flatten(0, 1)[None], ConfidentSets(high, low)


class PatchScores(NamedTuple):
    """What the network says of N = h*w patches.

    Attributes:
        logits: A, (B, N, C).
        embeddings: F, output of the BiLSTMs, (B, N, e).
        tokens: output of the encoder, (B, N, D).
        grid: (h, w).
    """

    logits: Tensor
    embeddings: Tensor
    tokens: Tensor
    grid: tuple[int, int]

    @property
    def probabilities(self) -> Tensor:
        """Z, (B, N, C), at least float32."""
        return widened(self.logits).softmax(-1)

    def as_map(self, values: Tensor) -> Tensor:
        """Give (B, N, C) as (B, C, h, w)."""
        return token_map(values, self.grid)
