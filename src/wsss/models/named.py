"""Encoders by name: what follows from timm's name and tag, or from a repository of the hub."""

from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import is_model, is_model_in_modules

from wsss.core.errors import WSSSError
from wsss.models.backbone import check_overrides
from wsss.models.hub import HUB, hub_config
from wsss.models.vit import check_name, create_vit

#: of timm, which have plain ViTs
MODULES = ("vision_transformer", "deit", "vision_transformer_hybrid")
COLOURS = "backbone={}: its colours are {}, expected three numbers each"


def encoder_named(choice: str) -> dict[str, Any]:
    """Make the group ``backbone`` of a name.

    Args:
        choice: timm's name with its tag, or ``hf_hub:ORG/NAME``.

    Raises:
        WSSSError: there is no such model or tag, it is no plain ViT, or the hub cannot be reached.
    """
    if not choice.startswith(HUB):
        check_vit(choice, pretrained=True)
        return {"_target_": "wsss.Backbone", "name": choice, "weights": "timm", **colours(choice)}
    found = hub_config(choice)
    check_overrides(found["overrides"], f"backbone={choice}")
    check_vit(found["architecture"], overrides=found["overrides"])
    node = {"_target_": "wsss.Backbone", "name": found["architecture"], "weights": choice}
    if found["overrides"]:
        node["overrides"] = found["overrides"]
    if found["mean"] is None or found["std"] is None:
        return node
    try:
        mean, std = ([float(v) for v in found[key]] for key in ("mean", "std"))
    except (TypeError, ValueError) as error:
        raise WSSSError(COLOURS.format(choice, str(found)[:60])) from error
    return node | _unless_imagenet(mean, std)


def colours(name: str) -> dict[str, list[float]]:
    """Give ``mean`` and ``std`` of timm's weights of a name; empty where they are ImageNet's."""
    config = timm.get_pretrained_cfg(name)
    return _unless_imagenet(list(config.mean), list(config.std)) if config else {}


def _unless_imagenet(mean: list[float], std: list[float]) -> dict[str, list[float]]:
    ours = (list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))
    return {} if (mean, std) == ours else {"mean": mean, "std": std}


def check_vit(
    name: str, *, pretrained: bool = False, overrides: dict[str, Any] | None = None
) -> None:
    """Raise WSSSError unless a name is a plain ViT's, without allocating its weights.

    Args:
        name: timm's.
        pretrained: it must have a tag.
        overrides: arguments of timm's constructor.
    """
    architecture = name.partition(".")[0]
    if is_model(architecture) and not is_model_in_modules(architecture, MODULES):
        raise WSSSError(
            f"backbone.name={name} is no plain ViT; what works is a ViT, DeiT or DINOv2 of timm "
            "(vit_small_patch16_224.augreg_in1k), or for method=segmenter backbone=resnet101"
        )
    check_name(name, pretrained=pretrained)
    with torch.device("meta"):
        create_vit(name, pretrained=False, overrides=dict(overrides or {}))
