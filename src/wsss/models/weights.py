"""Read and write weights safely.

Every file is read with ``weights_only=True`` (or as safetensors): a checkpoint from a stranger
cannot run code. Keys are never matched loosely: what is missing, extra or misshapen is named.
"""

import hashlib
import zipfile
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.core.files import cannot_write, first_line, whole_file
from wsss.core.places import PACKAGE
from wsss.models.hub import HUB, hub_weights


def read_torch_file(path: Path) -> Any:
    """Read what a torch file holds without running code from it.

    torch compares no checksum, so a flipped bit would load as another weight: the archive's own
    checksums are compared first. Files of torch before 1.6 are no archives and have none.

    Raises:
        WSSSError: missing, empty, truncated, damaged or unsafe file.
    """
    if not path.is_file():
        raise WSSSError(f"{path}: no such checkpoint")
    if path.stat().st_size == 0:
        raise WSSSError(f"{path}: is empty; copy it again, or remove it")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
                script = any(name.endswith("/constants.pkl") for name in archive.namelist())
            if script:
                raise WSSSError(
                    f"{path}: is a TorchScript archive, which holds code; take the same weights as "
                    "plain tensors, such as open_clip's or timm's .safetensors"
                )
            if damaged is not None:
                raise WSSSError(
                    f"{path}: is damaged, the checksum of {damaged} does not fit; copy it again"
                )
        return torch.load(path, map_location="cpu", weights_only=True)
    except WSSSError:
        raise
    except Exception as error:  # zip, pickle and OS errors share no base class
        raise WSSSError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); "
            "expected .safetensors, or a torch file that holds plain values and tensors alone"
        ) from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the parameters in a ``.safetensors`` file or a torch checkpoint.

    Torch files may hold the parameters directly or under ``state_dict``, ``model`` or
    ``model_state_dict``.

    Raises:
        WSSSError: missing, truncated or unsafe file, or one that holds no parameters.
    """
    if path.suffix == ".safetensors" and path.is_file():
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:  # safetensors and OS errors share no base class
            raise WSSSError(
                f"{path}: not a readable .safetensors file ({first_line(error)})"
            ) from error
    content = read_torch_file(path)
    for wrapper in ("state_dict", "model", "model_state_dict"):
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
        # a stream of ours: torch does not say why its own could not be written
        with whole_file(target) as temporary, temporary.open("wb") as stream:
            torch.save(checkpoint, stream)
    except RuntimeError as error:  # torch's writer ends after the stream has failed
        if not isinstance(error.__context__, OSError):
            raise
        raise cannot_write(target, error.__context__, untouched=True) from error


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
    expected = module.state_dict()
    shown = rename or {}
    faults = [
        (label, [shown.get(key, key) for key in keys])
        for label, keys in (
            ("missing", sorted(expected.keys() - state.keys())),
            ("extra", sorted(state.keys() - expected.keys())),
        )
    ]
    misshapen = [
        f"{shown.get(key, key)} (expected {tuple(expected[key].shape)}, "
        f"got {tuple(state[key].shape)})"
        for key in sorted(expected.keys() & state.keys())
        if expected[key].shape != state[key].shape
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


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace the first prefix that a name begins with."""
    for theirs, ours in prefixes.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def load_encoder(vit: VisionTransformer, state: Mapping[str, Tensor], origin: str) -> None:
    """Load timm-style encoder weights; the position grid follows the file.

    Args:
        vit: the encoder, changed in place.
        state: parameters, with or without ``module.`` / ``encoder.`` / ``backbone.`` prefixes;
            classification heads are ignored, since no method uses them.
        origin: what to call the source in an error.

    Raises:
        WSSSError: missing, extra or misshapen keys, by name.
    """
    state = {_plain_key(key): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith(("head", "fc_norm"))}
    fit_positions(vit, state.get("pos_embed"))
    load_state_dict_strictly(vit, state, origin)


def _plain_key(key: str) -> str:
    for prefix in ("module.", "encoder.", "backbone.", "vit."):
        key = key.removeprefix(prefix)
    return key


def weights_path(weights: str) -> Path:
    """Find the file that ``backbone.weights`` names; one of the hub is downloaded once.

    Raises:
        WSSSError: there is no such file.
    """
    if weights.startswith(HUB):
        return hub_weights(weights)
    path = Path(weights).expanduser()
    if weights.startswith("package:"):
        path = PACKAGE / weights.removeprefix("package:")
    if not path.is_file():
        raise WSSSError(
            f"backbone.weights={weights}: no such file; put the weights there, or use "
            "backbone.weights=timm (needs internet once) or backbone.weights=random"
        )
    return path


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash sorted names, shapes and float32 values of a state dict with SHA-256."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
