"""Reading weights safely, and official checkpoints made ours.

Every file is read with ``weights_only=True`` (or as safetensors): a checkpoint from a stranger
cannot run code. Keys are never matched loosely: what is missing, extra or misshapen is named.
"""

import hashlib
from collections.abc import Callable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsss.errors import WSSSError
from wsss.files import whole_file

# official ToCo name -> ours, by prefix (../shared/methods/toco.md section 1); order matters
TOCO_PREFIXES = {
    "encoder.": "backbone.vit.",
    "classifier.": "classifier.",
    "aux_classifier.": "aux_classifier.",
    "decoder.": "decoder.",
    "proj_head.": "ctc_student.",
    "proj_head_t.": "ctc_teacher.",
}
# `encoder.head` is the unused ImageNet classifier; older files also hold `conv` and `aux_conv`
TOCO_UNUSED = ("encoder.head.", "conv.", "aux_conv.")

# official GETAM name -> ours, by prefix (../shared/methods/getam.md section 1); order matters
GETAM_PREFIXES = {
    "pretrained.model.": "backbone.vit.",
    **{
        f"pretrained.act_postprocess{level}.{theirs}.": f"reassemble.{level}.{ours}."
        for level in (1, 2, 3, 4)
        for theirs, ours in (("0.project.0", "readout"), ("3", "narrow"), ("4", "resize"))
    },
    **{f"scratch.layer{level}_rn.": f"decoder.narrow.{level - 1}." for level in (1, 2, 3, 4)},
    **{
        f"scratch.refinenet{level}.{theirs}.": f"decoder.fusions.{level - 1}.{ours}."
        for level in (1, 2, 3, 4)
        for theirs, ours in (
            ("resConfUnit1", "skip_unit"),
            ("resConfUnit2", "unit"),
            ("out_conv", "out_conv"),
        )
    },
    "cam_module.body.": "decoder.squeeze.body.",
    "cam_module.fc.": "decoder.squeeze.gate.",
    "scratch.output_conv.": "decoder.head.",
    "cls_head.": "classifier.",
}
# the ImageNet classifiers, and a unit that waits for a skip which the coarsest level has not
GETAM_UNUSED = (
    "pretrained.model.head.",
    "pretrained.model.head_dist.",
    "scratch.refinenet4.resConfUnit1.",
)


def first_line(error: BaseException) -> str:
    """What an error says, as one line; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The parameters in a ``.safetensors`` file or a torch checkpoint.

    Torch files may hold the parameters directly or under ``state_dict`` or ``model``.

    Raises:
        WSSSError: missing, truncated or unsafe file, or one that holds no parameters.
    """
    if not path.is_file():
        raise WSSSError(f"{path}: no such checkpoint")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, safetensors and OS errors share no base class
        raise WSSSError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); "
            "expected .safetensors, or a torch file that loads with weights_only=True"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise WSSSError(f"{path}: holds no parameters; expected a state dict")
    strangers = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise WSSSError(f"{path}: entries that are not tensors: {_some(strangers)}")
    return content


def save_atomically(checkpoint: Mapping[str, Any], target: Path) -> None:
    """Write a torch file beside its target, then rename: the old file, or the new one whole.

    Raises:
        WSSSError: it cannot be written; what was there is untouched.
    """
    try:
        with whole_file(target) as temporary:
            torch.save(checkpoint, temporary)
    except (OSError, RuntimeError) as error:  # torch tells a full disk as a RuntimeError
        raise WSSSError(
            f"{target}: cannot be written ({first_line(error)}); a previous file is untouched"
        ) from error


def load_state_dict_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    origin: str,
    rename: Mapping[str, str] | None = None,
) -> None:
    """Load parameters; every name and shape must fit.

    Args:
        module: changed in place, only when everything fits.
        state: parameters under the module's names.
        origin: what to call the source in an error.
        rename: the module's name -> the name to print (the official one), where they differ.

    Raises:
        WSSSError: one line with the missing, extra and misshapen keys.
    """
    own = module.state_dict()
    shown = rename or {}
    faults = [
        (label, [shown.get(key, key) for key in keys])
        for label, keys in (
            ("missing", sorted(own.keys() - state.keys())),
            ("extra", sorted(state.keys() - own.keys())),
        )
    ]
    misshapen = [
        f"{shown.get(key, key)} (expected {tuple(own[key].shape)}, got {tuple(state[key].shape)})"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    faults.append(("misshapen", misshapen))
    lines = [f"{label} {len(keys)}: {_some(keys)}" for label, keys in faults if keys]
    if lines:
        raise WSSSError(f"{origin}: keys do not fit; " + "; ".join(lines))
    module.load_state_dict(dict(state))


def fit_positions(vit: Any, positions: Tensor | None) -> None:
    """Give an encoder the position grid of the weights it is about to load.

    Positions are resized at every call, so a file made at another image size fits as it is. A
    width that differs or a grid that is not square is left alone: strict loading then names it.
    """
    if positions is None or positions.ndim != 3 or positions.shape[-1] != vit.embed_dim:
        return
    count = positions.shape[1] - (0 if vit.no_embed_class else vit.num_prefix_tokens)
    if count > 0 and isqrt(count) ** 2 == count:
        vit.pos_embed = nn.Parameter(
            torch.empty_like(positions, dtype=torch.float32),
            requires_grad=vit.pos_embed.requires_grad,
        )


def _some(names: list[str], most: int = 8) -> str:
    rest = f", ... ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """A name with the first prefix that it begins with replaced."""
    for theirs, ours in prefixes.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def toco_name(official: str) -> str | None:
    """Our name of an official ToCo parameter; None where the method never uses it."""
    name = official.removeprefix("module.")
    if name.startswith(TOCO_UNUSED):
        return None
    # torch's weight norm moved from weight_g / weight_v to a parametrisation
    name = _renamed(name, TOCO_PREFIXES).replace(".weight_g", ".parametrizations.weight.original0")
    return name.replace(".weight_v", ".parametrizations.weight.original1")


def toco_official_name(ours: str) -> str:
    """The official ToCo name of a parameter of ours."""
    ours = _renamed(ours, {own: theirs for theirs, own in TOCO_PREFIXES.items()})
    ours = ours.replace(".parametrizations.weight.original0", ".weight_g")
    return ours.replace(".parametrizations.weight.original1", ".weight_v")


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


def getam_name(official: str) -> str | None:
    """Our name of an official GETAM parameter; None where the method never uses it."""
    name = official.removeprefix("module.")
    return None if name.startswith(GETAM_UNUSED) else _renamed(name, GETAM_PREFIXES)


def getam_official_name(ours: str) -> str:
    """The official GETAM name of a parameter of ours."""
    return _renamed(ours, {own: theirs for theirs, own in GETAM_PREFIXES.items()})


CONVERTERS: dict[str, Callable[[str], str | None]] = {
    "toco": toco_name,
    "clustercam": clustercam_name,
    "getam": getam_name,
}
OFFICIAL_NAMES: dict[str, Callable[[str], str]] = {
    "toco": toco_official_name,
    "clustercam": clustercam_official_name,
    "getam": getam_official_name,
}


def convert_official(
    method: str, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An official state dict under our names, and a map from our names back to theirs.

    Raises:
        WSSSError: no converter is known for the method.
    """
    if method not in CONVERTERS:
        raise WSSSError(
            f"no converter for method {method!r}; known: {', '.join(sorted(CONVERTERS))}"
        )
    ours = {name: CONVERTERS[method](name) for name in state}
    converted = {our: state[official] for official, our in ours.items() if our is not None}
    return converted, {our: official for official, our in ours.items() if our is not None}


def load_official(method: str, module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load an official checkpoint's parameters into our module.

    The position grid follows the file, since positions are resized at every call.

    Raises:
        WSSSError: missing, extra or misshapen keys, under their official names.
    """
    converted, back = convert_official(method, state)
    fit_positions(module.get_submodule("backbone.vit"), converted.get("backbone.vit.pos_embed"))
    # names of ours that the file lacks have no way back through the file
    named = {name: OFFICIAL_NAMES[method](name) for name in module.state_dict()}
    load_state_dict_strictly(module, converted, origin, rename={**named, **back})
