"""Encoders of the Hugging Face hub: ``hf_hub:ORG/NAME``, as timm stores its models there.

A repository is a stranger's. Its ``config.json`` gives a name and sizes, which are checked like a
user's own; its weights are read as any file is, without running code.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from wsss.core.errors import WSSSError
from wsss.core.files import first_line, read_json

HUB = "hf_hub:"
CONFIG = "config.json"
SECONDS = 10  # until a network that is there has answered
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
#: of a model's arguments, those that say nothing of its tokens
OF_NO_USE = ("num_classes", "dynamic_img_size", "dynamic_img_pad")


def hub_config(reference: str) -> dict[str, Any]:
    """Read what a repository says of its model.

    Args:
        reference: ``hf_hub:ORG/NAME`` or ``hf_hub:ORG/NAME@REVISION``.

    Returns:
        ``architecture``, a text; ``overrides``, arguments of the constructor that are numbers,
        booleans or plain words; ``mean`` and ``std``, as they stand there, or None.

    Raises:
        WSSSError: it cannot be read, or describes no model of timm.
    """
    path = _download(reference, CONFIG)
    content = read_json(path, f"choose another repository than {reference}")
    wrong = f"backbone={reference}: its {CONFIG} describes no model of timm"
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        raise WSSSError(f"{wrong} (no architecture); expected a repository that timm saved")
    arguments, stored = content.get("model_args") or {}, content.get("pretrained_cfg") or content
    if not isinstance(arguments, dict) or not isinstance(stored, dict):
        raise WSSSError(f"{wrong} (model_args); expected a repository that timm saved")
    overrides = {key: value for key, value in arguments.items() if key not in OF_NO_USE}
    for key, value in {"architecture": content["architecture"], **overrides}.items():
        if not re.fullmatch(r"[\w.,+\- \[\]()]*", str(value)):  # nothing that Hydra would resolve
            raise WSSSError(f"{wrong} ({str(key)[:40]}); expected a repository that timm saved")
    return {
        "architecture": content["architecture"].partition(".")[0],
        "overrides": overrides,
        "mean": stored.get("mean"),
        "std": stored.get("std"),
    }


def hub_weights(reference: str) -> Path:
    """Give the file of a repository's weights, downloaded where it is not cached.

    Raises:
        WSSSError: there is none, or it can neither be found nor downloaded.
    """
    try:
        return _download(reference, WEIGHTS[0])
    except WSSSError as error:
        try:
            return _download(reference, WEIGHTS[1])
        except WSSSError:
            raise error from None


def _download(reference: str, name: str) -> Path:
    """Find a file of a repository in the cache, or download it."""
    repository, _, revision = reference.removeprefix(HUB).partition("@")
    which = revision or None
    try:
        with suppress(LocalEntryNotFoundError):
            found = hf_hub_download(repository, name, revision=which, local_files_only=True)
            return Path(found)
        # fails at once without a network, where a download would try for half a minute
        get_hf_file_metadata(hf_hub_url(repository, name, revision=which), timeout=SECONDS)
        return Path(hf_hub_download(repository, name, revision=which))
    except HFValidationError as error:
        raise WSSSError(f"backbone={reference}: expected hf_hub:ORG/NAME") from error
    except Exception as error:  # the hub's, the system's and those of HTTP share no base class
        raise WSSSError(
            f"backbone={reference}: {name} is not cached and cannot be downloaded "
            f"({first_line(error)}); fetch it on a machine with internet "
            f"(hf download {repository}), or pass backbone.weights=/path/to/file.safetensors"
        ) from error
