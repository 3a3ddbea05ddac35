"""What ClusterCAM's official code does otherwise, its random start, and its parameters' names.

Q1 to Q14 are the numbered quirks of clustercam.md section 7. Each departure of ours is a switch
that takes it back; ``official_compat=true`` takes all of them back, ``+method.quirks.NAME=true`` a
single one.

Same numbers, less work (always): attention between patches is never kept, its sum over blocks is
accumulated row by row, and only in CAM passes; CAMs are made before the training graph exists and
of the batch's classes alone; PAR's affinity is computed once for both thresholds; patch logits come
from nine sums a channel.
Kept as official: positions scaled by (h + 0.1) / n; LayerNorm eps 1e-5 in both branches and 1e-6
before the MLP (Q11); the final norm exists and is never applied; assignments lag one update behind
the centres. Settings that the switches leave alone: ``method.token_noise`` (officially 0) and
``method.head_lr_factor`` (officially 1).
Nothing here corresponds to Q2 (mIoU while training), Q3 (selection on val), Q5 (label file) and Q13
(half precision in PAR; ours stays float32). Q1: the margin that COCO's script lacks is 0.1. Q4: a
batch of ignored pixels gives 0, where the official loop crashes. Q7: lambda stays near its random
start, so the mixing scalars are logged.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from wsss.methods.settings import StepQuirks

RATE_FLOOR = 1e-5  # of the official cosine, absolute


@dataclass(frozen=True, kw_only=True)
class Quirks(StepQuirks):
    """One boolean a quirk; True does as the official code."""

    # Q6: the cosine ends at 1e-5, above the official base rate of 8.8e-6, so the rate rises; here
    # it ends at 0.16 of the base rate, the proportion that 1e-5 had in MCTformer
    absolute_floor: bool = False
    # Q6: the rate stays for a whole epoch and lags one behind; here it follows the step
    rate_by_epoch: bool = False
    # Q8: class tokens and positions are decayed, as DataParallel hides the list of exceptions; here
    # they are not
    decayed_tokens: bool = False
    # Q9: DataParallel gives unused parameters zero gradients, so AdamW decays the decoder, and
    # counts its steps, through the whole first phase; here they are left alone
    zero_gradients: bool = False
    # Q10: every CAM pass of training draws its own drop paths; here CAM passes run without
    drop_path_in_cams: bool = False
    # Q12: the image for PAR is truncated to bytes, and levels outside 0 to 255 wrap around; here it
    # is rounded and clipped
    wrapped_guide: bool = False
    # Q14: the remainder of an image that is no whole number of patches is dropped, and the maps are
    # stretched over it; here such an image is enlarged to whole patches
    dropped_remainder: bool = False
    # new parts start from the draws of the official constructor; here from PyTorch's, which differ
    # in value alone
    official_start: bool = False


CORRECTED = Quirks()
OFFICIAL = Quirks.all_on()

# ---- the random start ----------------------------------------------------------------------------

# Which mixing scalars a seed gives depends on everything that is drawn before them (clustercam.md
# sections 1 and 7, Q7; golden `rng_mix`), so all draws of the official constructor are repeated in
# their order, those too whose values a checkpoint replaces.


class Draw(NamedTuple):
    """One uniform draw of the official constructor.

    Attributes:
        name: official parameter, or ``(later replaced)``.
        shape: of the drawn tensor.
        low: lower bound.
        high: upper bound.
    """

    name: str
    shape: tuple[int, ...]
    low: float
    high: float


REPLACED = "(later replaced)"
MIXING = ".mix_param"  # how the mixing scalars' official names end


def _default_draws(name: str, *shape: int, bias: bool = True) -> Iterator[Draw]:
    """Give what PyTorch draws for a new linear or convolutional layer."""
    fan = prod(shape[1:])
    bound = sqrt(3.0) * (sqrt(2.0 / (1 + sqrt(5) ** 2)) / sqrt(fan))
    replaced = name == REPLACED
    yield Draw(name if replaced else f"{name}.weight", shape, -bound, bound)
    if bias:
        edge = 1 / sqrt(fan)
        yield Draw(name if replaced else f"{name}.bias", shape[:1], -edge, edge)


def official_draws(
    *,
    dim: int,
    depth: int,
    hidden: int,
    patch_size: int,
    positions: int,
    num_classes: int,
    features: int,
    channels: int,
) -> Iterator[Draw]:
    """Give all draws of the official constructor in their order (golden README, ``rng_mix``).

    A draw in (-1, 1) becomes a truncated normal one. Later draws of a name replace earlier ones.
    """
    in_order = {
        "st_attn.qkv": (3 * dim, dim),
        "st_attn.proj": (dim, dim),
        "st_attn.proj_st": (dim, dim),
        "st_attn.qkv_stsa": (3 * dim, dim),
        "st_attn.proj_cls": (dim, dim),
        "mlp.fc1": (hidden, dim),
        "mlp.fc2": (dim, hidden),
    }
    yield from _default_draws("patch_embed.proj", dim, 3, patch_size, patch_size)
    for index in range(depth):
        for name, shape in in_order.items():
            if name == "mlp.fc1":
                yield Draw(f"blocks.{index}.st_attn{MIXING}", (1,), 0.0, 1.0)
            yield from _default_draws(f"blocks.{index}.{name}", *shape)
    yield from _default_draws(REPLACED, num_classes, dim)
    yield Draw(REPLACED, (1, positions + 1, dim), -1.0, 1.0)
    yield Draw(REPLACED, (1, 1, dim), -1.0, 1.0)
    for index in range(depth):
        for name, shape in in_order.items():
            yield Draw(f"blocks.{index}.{name}.weight", shape, -1.0, 1.0)
    yield Draw(REPLACED, (num_classes, dim), -1.0, 1.0)
    yield from _default_draws("head", num_classes, features, 3, 3)
    yield from _default_draws("decoder.conv6", channels, features, 3, 3, bias=False)
    yield from _default_draws("decoder.conv7", channels, channels, 3, 3, bias=False)
    yield from _default_draws("decoder.conv8", num_classes + 1, channels, 1, 1, bias=False)
    yield Draw("cls_token", (1, num_classes, dim), -1.0, 1.0)
    yield Draw("pos_embed", (1, positions + num_classes, dim), -1.0, 1.0)


def official_start(generator: torch.Generator, **sizes: int) -> dict[str, Tensor]:
    """Give the official parameters whose random start survives; see :func:`official_draws`.

    Args:
        generator: on the CPU; it is left where the official constructor leaves it.
        sizes: as of :func:`official_draws`.
    """
    kept = (MIXING, "proj_st.weight", "head.weight", "head.bias")
    start = {}
    for draw in official_draws(**sizes):
        values = torch.empty(draw.shape).uniform_(draw.low, draw.high, generator=generator)
        if draw.low == -1.0:
            values = values.erfinv_().mul_(0.02 * sqrt(2.0)).clamp_(-2, 2)
        if draw.name.endswith(kept) or draw.name.startswith("decoder."):
            start[draw.name] = values
    return start


# ---- names ---------------------------------------------------------------------------------------

# official ClusterCAM module -> ours, inside block i (clustercam.md section 1, "Checkpoint")
MODULES = {
    "st_attn.ln_pat": "backbone.vit.blocks.{}.norm1",
    "st_attn.qkv": "backbone.vit.blocks.{}.attn.qkv",
    "st_attn.proj": "backbone.vit.blocks.{}.attn.proj",
    "norm2": "backbone.vit.blocks.{}.norm2",
    "mlp.fc1": "backbone.vit.blocks.{}.mlp.fc1",
    "mlp.fc2": "backbone.vit.blocks.{}.mlp.fc2",
    "st_attn.proj_st": "branches.{}.to_space",
    "st_attn.ln_pat2": "branches.{}.norm_space",
    "st_attn.ln_cls": "branches.{}.norm_cls",
    "st_attn.ln_st": "branches.{}.norm_centres",
    "st_attn.qkv_stsa": "branches.{}.qkv",
    "st_attn.proj_cls": "branches.{}.proj_cls",
    "st_attn.mix_param": "branches.{}.mixing",
}


def our_name(official: str) -> str | None:
    """Give our name of an official ClusterCAM parameter; all are kept, the final norm too."""
    name = official.removeprefix("module.")
    parts = name.split(".")
    if parts[0] == "blocks" and len(parts) > 2:
        for theirs, ours in MODULES.items():
            rest = name.removeprefix(f"blocks.{parts[1]}.{theirs}")
            if rest in ("", ".weight", ".bias"):
                return ours.format(parts[1]) + rest
    if parts[0] in ("cls_token", "pos_embed", "patch_embed", "norm"):
        return f"backbone.vit.{name}"
    return name.replace("head.", "patch_head.", 1) if parts[0] == "head" else name


def official_name(ours: str) -> str:
    """Give the official ClusterCAM name of a parameter of ours."""
    for theirs, own in MODULES.items():
        before, _, after = own.partition("{}")
        index, dot, rest = ours.removeprefix(before).partition(".")
        if ours.startswith(before) and (dot + rest).startswith(after) and index.isdigit():
            tail = (dot + rest).removeprefix(after)
            if tail in ("", ".weight", ".bias"):
                return f"blocks.{index}.{theirs}{tail}"
    return ours.removeprefix("backbone.vit.").replace("patch_head.", "head.")
