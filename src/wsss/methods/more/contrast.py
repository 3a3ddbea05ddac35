"""MoRe's losses on class tokens: distinctness, certain tokens (CLE), uncertain tokens (UNE)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.core.ranks import sum_over_ranks
from wsss.maps.pixels import IGNORE_INDEX, numbers_beside
from wsss.maps.pseudo_labels import inside_boxes
from wsss.methods.losses import full_precision, widened

DISTINCT_TEMPERATURE = 0.07
EPS = 1e-4  # in both denominators of CLE
WANTED = 8  # tokens an image that UNE takes at most
WINDOW = 6  # side of UNE's windows in tokens
RATIO = 1.2  # mean of a window from which its centre is a candidate
BACKGROUND, UNCERTAIN, CLASS = 0, 1, 2  # what a token is to UNE


def unit_tokens(tokens: Tensor, dim: int, eps: float = 1e-8) -> Tensor:
    """Give vectors of unit length along a dimension, in float32 at least."""
    return F.normalize(widened(tokens), dim=dim, eps=eps)


def distinct_loss(tokens: Tensor, temperature: float = DISTINCT_TEMPERATURE) -> Tensor:
    """Tell class tokens apart: cross-entropy of each row of their cosines against its own index.

    Args:
        tokens: class tokens, (B, K, D).
        temperature: divides the cosines.

    Returns:
        The mean over the B K rows; ln K with zero gradient where all tokens are equal (Q1).
    """
    with full_precision(tokens):
        unit = unit_tokens(tokens, dim=2, eps=1e-12)
        cosines = unit @ unit.transpose(1, 2) / temperature  # (B, K, K)
        own = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        return F.cross_entropy(cosines.transpose(1, 2), own)


def mean_logit_loss(tokens: Tensor, labels: Tensor) -> Tensor:
    """Read a class's logit off its token: the mean channel of its unit-length token.

    This is the term that COCO's training log adds (more.md section 6, "Provenance").

    Args:
        tokens: class tokens, (B, K, D).
        labels: (B, K) in {0, 1}.
    """
    with full_precision(tokens):
        logits = unit_tokens(tokens, dim=2, eps=1e-12).mean(dim=2)
        return F.multilabel_soft_margin_loss(logits, labels.to(logits.dtype))


def distinctness(tokens: Tensor, labels: Tensor, share: float) -> Tensor:
    """Mix :func:`distinct_loss` with a share of :func:`mean_logit_loss`."""
    loss = distinct_loss(tokens)
    return (1 - share) * loss + share * mean_logit_loss(tokens, labels) if share else loss


def cle_loss(
    tokens: Tensor,
    patches: Tensor,
    mask: Tensor,
    labels: Tensor,
    temperature: float,
    *,
    overflowing: bool = False,
    fails_without_labels: bool = False,
) -> Tensor:
    """Let the certain tokens of each labelled class pull its class token (CLE).

    With l_cx = exp(<C_c / |C_c|, F_x> / temperature), patches without gradient and not normalised:
    sum over labelled classes of the mean over their tokens of -log(l_cx / (sum_x l_cx + 1e-4)),
    divided by B. The mean divides by the tokens plus 1e-4: a class without one gives 0.

    Args:
        tokens: class tokens C, (B, K, D).
        patches: (B, D, h, w).
        mask: class + 1 where a token is certain, 0 background, 255 uncertain, (B, h, w).
        labels: (B, K) in {0, 1}.
        temperature: 0.5 for VOC, 0.1 for COCO.
        overflowing: exponentiate first, as the official code does: NaN or infinite where a product
            is beyond float32's exponents (Q4). False stays in logarithms.
        fails_without_labels: refuse a batch without any label, as the official code does (Q7).

    Returns:
        A scalar; 0 where no class is labelled.

    Raises:
        WSSSError: no class is labelled, and that is refused.
    """
    if fails_without_labels and not bool(labels.any()):
        raise WSSSError(
            "method.quirks.fails_without_labels=true: no image of this batch has a label, and the "
            "official code stops there"
        )
    image, label = (labels > 0).nonzero(as_tuple=True)
    with full_precision(tokens):
        unit, flat = unit_tokens(tokens, dim=2), widened(patches).detach().flatten(2)
        logits = (unit @ flat)[image, label] / temperature  # (M, N), a row a labelled class
    if overflowing:
        weights = logits.exp()
        total = weights.sum(dim=1, keepdim=True)
        share = torch.where(total == 0, 1 / (1 + EPS), weights / (total + EPS))
        each = -share.log()
    else:
        floor = numbers_beside(logits, [EPS]).log()
        each = torch.logaddexp(logits.logsumexp(dim=1, keepdim=True), floor) - logits
    own = (mask.flatten(1)[image] == label[:, None] + 1).to(each.dtype)  # (M, N)
    return ((each * own).sum(dim=1) / (own.sum(dim=1) + EPS)).sum() / len(labels)


def uncertainty_map(mask: Tensor, boxes: Tensor | None = None) -> Tensor:
    """Turn token masks (B, h, w) into 0 background, 1 uncertain, 2 class.

    Args:
        mask: class + 1 where a token is certain, 0 background, 255 uncertain.
        boxes: (B, 4) tokens; what lies outside is padding, not uncertain. None: all tokens count.
    """
    uncertain = torch.where(mask == IGNORE_INDEX, UNCERTAIN, CLASS).masked_fill(
        mask == 0, BACKGROUND
    )
    if boxes is None:
        return uncertain
    return uncertain.masked_fill(~inside_boxes(boxes.to(mask.device), *mask.shape[1:]), BACKGROUND)


def image_generators(seed: int, step: int, indices: Tensor) -> list[torch.Generator]:
    """Make a source of random draws for each image that nothing else has a part in.

    Args:
        seed: of the run.
        step: of the optimiser.
        indices: numbers of the images in their list, (B,).
    """
    keys = [hash((seed, step, index)) % 2**63 for index in indices.tolist()]
    return [torch.Generator().manual_seed(key) for key in keys]


def select_tokens(
    uncertainty: Tensor,
    generators: Sequence[torch.Generator | None],
    *,
    wanted: int = WANTED,
    window: int = WINDOW,
    ratio: float = RATIO,
    corner: bool = False,
    fails_on_small_grids: bool = True,
) -> list[Tensor]:
    """Choose the tokens that UNE contrasts: uncertain ones among tokens of a class.

    A window is a candidate where its centre is uncertain and its mean at least ``ratio``. Of more
    than ``wanted`` candidates some are drawn; fewer are all taken, with a quarter as many tokens of
    a class as are missing, drawn from the inner ones. The last row and column of windows is left
    out, as officially.

    Args:
        uncertainty: of :func:`uncertainty_map`, (B, h, w).
        generators: one an image, on the CPU; None is the process's global one.
        wanted: tokens an image at most.
        window: side of a window.
        ratio: least mean of a candidate's window.
        corner: give a window's upper left corner, as the official code does (Q3), not its centre.
        fails_on_small_grids: refuse a grid that is not larger than a window, as the official code
            does (Q10). False chooses no token there.

    Returns:
        (n, 2) rows and columns for each image, on the CPU, in the order of the draws.

    Raises:
        WSSSError: the grid is not larger than a window, and that is refused.
    """
    height, width = uncertainty.shape[1:]
    if min(height, width) <= window and not fails_on_small_grids:
        return [torch.empty(0, 2, dtype=torch.long)] * len(uncertainty)
    if min(height, width) <= window:
        raise WSSSError(
            f"uncertain tokens are searched in windows of {window} x {window} tokens, and the grid "
            f"has {height} x {width}; use larger crops, or give "
            "+method.quirks.fails_on_small_grids=false"
        )
    values = uncertainty.cpu()
    half, rows, columns = window // 2, height - window, width - window
    sums = F.avg_pool2d(values[:, None].double(), window, stride=1, divisor_override=1)[:, 0]
    inner = values[:, half : half + rows, half : half + columns]
    chosen = (inner == UNCERTAIN) & (sums[:, :rows, :columns] / window**2 >= ratio)
    selected = []
    for candidates, cells, generator in zip(chosen, inner, generators, strict=True):
        found = candidates.nonzero()
        if len(found) > wanted:
            found = found[torch.randperm(len(found), generator=generator)[:wanted]]
        else:
            extra = (wanted - len(found)) // 4
            pool = (cells == CLASS).nonzero()
            if len(pool) < extra:
                pool = torch.ones_like(cells).nonzero()
            drawn = torch.randperm(len(pool), generator=generator)[:extra]
            found = torch.cat([found, pool[drawn]])
        selected.append(found if corner else found + half)
    return selected


def une_loss(
    tokens: Tensor,
    patches: Tensor,
    selected: Sequence[Tensor],
    labels: Tensor,
    *,
    over_ranks: bool = False,
) -> Tensor:
    """Pull uncertain tokens towards the image's class tokens, and push them from the others (UNE).

    With g_c = |cos(F_x, C_c)|, class tokens without gradient, y the image's labels:
    l = 1/2 (1 - sum_c y_c g_c / (sum y + 1)) + 1/2 sum_c (1 - y_c) g_c / (sum(1 - y) + 1).

    Args:
        tokens: class tokens C, (B, K, D).
        patches: (B, D, h, w).
        selected: rows and columns of the tokens of each image, (n, 2).
        labels: (B, K) in {0, 1}.
        over_ranks: count the tokens of all processes, see :func:`~wsss.core.ranks.sum_over_ranks`.

    Returns:
        The mean over all selected tokens of the batch, a scalar; 0 where there is none. Over ranks,
        this process's part of their mean.
    """
    counts = torch.tensor([len(one) for one in selected])
    # before anything else: the other processes wait for this one's count, also for none
    total, ranks = sum_over_ranks(counts.sum(), enabled=over_ranks, device=patches.device)
    if not sum(map(len, selected)):
        return patches.new_zeros(())
    # copied without waiting for what a GPU has still to compute
    image = torch.arange(len(selected)).repeat_interleave(counts)
    image = image.to(patches.device, non_blocking=True)
    row, column = torch.cat(list(selected)).to(patches.device, non_blocking=True).unbind(1)
    with full_precision(patches):
        chosen = unit_tokens(patches[image, :, row, column], dim=1)  # (n, D)
        unit = unit_tokens(tokens.detach(), dim=2)[image]  # (n, K, D)
        similarity = (unit @ chosen[:, :, None])[..., 0].abs()  # g, (n, K)
    present = labels[image].to(similarity.dtype)
    absent = 1 - present
    towards = (present * similarity).sum(dim=1) / (present.sum(dim=1) + 1)
    away = (absent * similarity).sum(dim=1) / (absent.sum(dim=1) + 1)
    half = 0.5 * ranks
    return (half * (1 - towards) + half * away).sum() / total
