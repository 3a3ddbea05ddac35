"""The random start of the official ClusterCAM, draw by draw, for ``official_compat``.

Which mixing scalars a seed gives depends on everything that is drawn before them (clustercam.md
sections 1 and 7, Q7; golden ``rng_mix``), so all draws of the official constructor are repeated in
their order, those too whose values a checkpoint replaces.
"""

from collections.abc import Iterator
from math import prod, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
    """What PyTorch draws for a new linear or convolutional layer."""
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
    """All draws of the official constructor in their order (golden README, ``rng_mix``).

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
    """Values of the official parameters whose random start survives; see :func:`official_draws`.

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


@torch.no_grad()
def start_as_official(model: Any) -> None:
    """Give the new parts the random values that the official constructor draws after the seed."""
    vit: Any = model.backbone.vit
    start = official_start(
        torch.Generator().manual_seed(torch.initial_seed()),
        dim=model.backbone.dim,
        depth=model.backbone.depth,
        hidden=vit.blocks[0].mlp.fc1.out_features,
        patch_size=model.backbone.patch_size,
        positions=vit.pos_embed.shape[1] - model.num_classes,
        num_classes=model.num_classes,
        features=model.patch_head.in_channels,
        channels=model.decoder.conv6.out_channels,
    )
    for name, parameter in model.named_parameters():
        official = clustercam_official_name(name)
        if official in start:
            parameter.copy_(start[official])


# official ClusterCAM module -> ours, inside block i (clustercam.md section 1, "Checkpoint")
CLUSTERCAM_MODULES = {
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


def clustercam_name(official: str) -> str | None:
    """Our name of an official ClusterCAM parameter; all are kept, the unused final norm too."""
    name = official.removeprefix("module.")
    parts = name.split(".")
    if parts[0] == "blocks" and len(parts) > 2:
        for theirs, ours in CLUSTERCAM_MODULES.items():
            rest = name.removeprefix(f"blocks.{parts[1]}.{theirs}")
            if rest in ("", ".weight", ".bias"):
                return ours.format(parts[1]) + rest
    if parts[0] in ("cls_token", "pos_embed", "patch_embed", "norm"):
        return f"backbone.vit.{name}"
    return name.replace("head.", "patch_head.", 1) if parts[0] == "head" else name


def clustercam_official_name(ours: str) -> str:
    """The official ClusterCAM name of a parameter of ours."""
    for theirs, own in CLUSTERCAM_MODULES.items():
        before, _, after = own.partition("{}")
        index, dot, rest = ours.removeprefix(before).partition(".")
        if ours.startswith(before) and (dot + rest).startswith(after) and index.isdigit():
            tail = (dot + rest).removeprefix(after)
            if tail in ("", ".weight", ".bias"):
                return f"blocks.{index}.{theirs}{tail}"
    return ours.removeprefix("backbone.vit.").replace("patch_head.", "head.")
