"""Contrast of class tokens (CCT): each token unlike those of all other classes."""

import torch.nn.functional as F
from torch import Tensor

from wsss.methods.losses import full_precision, widened


def class_token_contrast(tokens: Tensor, labels: Tensor) -> Tensor:
    """Classify each labelled class's token as its own class (mctformer.md section 2, "CCT").

    With unit tokens e and S = e e^T, without a temperature, the loss of class k is
    log sum_m exp S[k, m] - S[k, k], m over all K classes. It is averaged over blocks, over the
    labelled classes of an image, then over images; an image without labels adds 0 and counts.
    Equal tokens give log K and no gradient.

    Args:
        tokens: class tokens after the blocks that count, (L', B, K, D).
        labels: (B, K) in {0, 1}.

    Returns:
        A scalar.
    """
    with full_precision(tokens):
        unit = F.normalize(widened(tokens), dim=-1, eps=1e-12)
        similarity = unit @ unit.transpose(-2, -1)  # S, (L', B, K, K)
    own = similarity.diagonal(dim1=-2, dim2=-1)  # (L', B, K)
    loss = (similarity.logsumexp(dim=-1) - own).mean(dim=0)  # (B, K)
    return ((labels * loss).sum(dim=1) / (labels.sum(dim=1) + 1e-8)).mean()
