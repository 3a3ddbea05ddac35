"""CLIP's image towers: how their files name them, what they project with, which GELU they need."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from timm.layers import QuickGELU
from torch import Tensor

from wsss.core.errors import WSSSError

# timm does not say that these were trained with QuickGELU; open_clip does
QUICK_GELU = ("vit_base_patch16_clip_224.dfn2b",)

# OpenAI's and open_clip's name below ``visual.`` -> timm's (weclip.md section 11)
NAMES = {
    "conv1.weight": "patch_embed.proj.weight",
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "proj": "head.weight",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm.",
    "transformer.resblocks.": "blocks.",
    "trunk.": "",  # open_clip's name for a tower that is timm's already
}
BLOCK_NAMES = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def timm_name(name: str) -> str:
    """Give timm's name of a parameter that OpenAI calls ``visual.NAME``."""
    for theirs, ours in NAMES.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    block = re.match(r"blocks\.\d+\.", name)
    if block is None:
        return name
    head, leaf = block[0], name.removeprefix(block[0])
    for theirs, ours in BLOCK_NAMES.items():
        if leaf.startswith(theirs):
            return head + ours + leaf.removeprefix(theirs)
    return name


def image_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the image tower out of a whole CLIP, under timm's names.

    Args:
        state: parameters under OpenAI's or open_clip's names, the text tower's among them; or
            under timm's, which are given back as they are.
    """
    plain = {key.removeprefix("module."): value for key, value in state.items()}
    visual = {k.removeprefix("visual."): v for k, v in plain.items() if k.startswith("visual.")}
    if not visual:
        return dict(state)
    tower = {timm_name(key): value for key, value in visual.items()}
    if "proj" in visual:
        tower["head.weight"] = tower["head.weight"].T.contiguous()  # (D, E) -> (E, D)
    if "class_embedding" in visual:
        tower["cls_token"] = tower["cls_token"].reshape(1, 1, -1)
        tower["pos_embed"] = tower["pos_embed"][None]
    return tower


def is_clip_state(state: Mapping[str, Tensor]) -> bool:
    """Tell whether names are those of a CLIP: a ``visual`` tower, or a norm before the blocks."""
    return any(
        key.removeprefix("module.").startswith("visual.") or "norm_pre." in key for key in state
    )


def projection_width(name: str, overrides: Mapping[str, Any]) -> int:
    """Give the width E of the space that a tower shares with its texts; 0 where it has none.

    Args:
        name: timm's, with or without a tag. SigLIP's towers pool by attention and have no
            projection; weights that were fine-tuned to classify have lost theirs.
        overrides: of the constructor; ``num_classes`` is the width of a tower of another size.
    """
    architecture, _, tag = name.partition(".")
    if "clip" not in architecture:
        return 0
    tags = [name] if tag else timm.list_pretrained(f"{architecture}.*")
    configs = [timm.get_pretrained_cfg(each) for each in tags if "_ft_" not in each]
    widths = [config.num_classes for config in configs if config is not None]
    return int(overrides.get("num_classes", widths[0] if widths else 0))


def check_gelu(name: str, vit: Any) -> None:
    """Raise WSSSError where timm builds another GELU than the one a tag's weights were made with.

    The exact GELU moves the tokens of OpenAI's weights by up to .08 (weclip.md section 12, 1).
    """
    architecture, _, tag = name.partition(".")
    config = timm.get_pretrained_cfg(name) if tag else None
    notes = " ".join(config.notes or ()) if config is not None else ""
    quick = name in QUICK_GELU or "quickgelu" in notes.lower()
    if not quick or isinstance(vit.blocks[0].mlp.act, QuickGELU):
        return
    better = f"{architecture.replace('_clip_', '_clip_quickgelu_')}.{tag}"
    hint = "+backbone.overrides.act_layer=quick_gelu"
    if better in timm.list_pretrained(better):
        hint = f"backbone.name={better}"
    raise WSSSError(
        f"backbone.name={name}: its weights were trained with QuickGELU, and timm builds the exact "
        f"GELU under this name; use {hint}"
    )


def find_projection(state: Mapping[str, Tensor], shape: Sequence[int], origin: str) -> Tensor:
    """Give a tower's projection (D, E) as a file under timm's names holds it.

    Args:
        state: of :func:`image_tower`.
        shape: (D, E) that is expected.
        origin: what to call the source in an error.

    Raises:
        WSSSError: there is none, or it is of another shape.
    """
    keys = [key for key in state if key.endswith("head.weight")]
    if len(keys) != 1:
        raise WSSSError(
            f"{origin}: holds no projection (visual.proj or head.weight), which a frozen CLIP "
            "tower needs; take the file of the whole CLIP"
        )
    found = state[keys[0]].float().T.contiguous()
    if tuple(found.shape) != tuple(shape):
        raise WSSSError(
            f"{origin}: its projection {keys[0]} is {tuple(found.T.shape)}, and this tower's is "
            f"{tuple(reversed(shape))}; expected CLIP's own weights, not fine-tuned ones"
        )
    return found
