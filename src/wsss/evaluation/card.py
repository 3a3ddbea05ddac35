"""What is stored with a number: protocol, commit, versions."""

import subprocess
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import wsss
from wsss.evaluation.label_maps import DEFINITIONS
from wsss.evaluation.protocol import Protocol

PACKAGES = ("torch", "timm", "lightning", "torchmetrics", "albumentations", "pydensecrf2")


def git_commit() -> str | None:
    """Read the commit of the source checkout with ``-dirty`` on local changes; None when installed.

    Only a checkout that tracks this very file counts, so that an installed package does not
    report the commit of whatever repository its environment happens to lie in.
    """
    here = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        commit = git("rev-parse", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def package_versions() -> dict[str, str | None]:
    """Read the versions of the packages that move numbers; None for one that is not installed."""
    versions: dict[str, str | None] = {"wsss": wsss.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def protocol_card(
    *,
    protocol: Protocol,
    split: str,
    list_hash: str,
    num_images: int,
    backbone: Mapping[str, Any],
    crop_size: int,
    iterations: int,
    global_batch_size: int,
    seed: int,
    supervision: str = "image labels",
    selection: str = "last checkpoint",
) -> dict[str, Any]:
    """Make the card that is stored beside every number (field.md D, "Fairness card").

    Args:
        protocol: how the module was evaluated.
        split: name of the evaluated split.
        list_hash: SHA-256 of its list.
        num_images: number of images that were counted.
        backbone: name, weights source, file hash and pretraining data, as the backbone says.
        crop_size: side of a training crop in pixels.
        iterations: optimiser steps of the evaluated weights.
        global_batch_size: images a step.
        seed: seed of the run.
        supervision: kind of the training signal, such as ``image labels`` or ``masks``.
        selection: how the checkpoint was chosen.

    Returns:
        Plain values, ready for JSON.
    """
    settings = asdict(protocol)
    preset = protocol.crf_preset
    return {
        "split": split,
        "list_sha256": list_hash,
        "num_images": num_images,
        **{field.name: settings[field.name] for field in fields(protocol) if field.name != "crf"},
        "crf": None if preset is None else asdict(preset),
        "cam_threshold_source": "declared in the configuration",
        "oracle_threshold_source": "ground truth of this split",
        "label_map_definitions": DEFINITIONS,
        "pseudo_labels_use_image_labels": True,
        "segmentation_uses_image_labels": protocol.crf_prune,
        "metric": "dataset-level confusion matrix, mean IoU over classes in the ground truth",
        "backbone": dict(backbone),
        "crop_size": crop_size,
        "iterations": iterations,
        "global_batch_size": global_batch_size,
        "seed": seed,
        "supervision": supervision,
        "selection": selection,
        "commit": git_commit(),
        "versions": package_versions(),
    }


#: settings that only whoever made the maps knows; a folder's card has them where they are declared
MADE_ELSEWHERE = (
    "resize", "single_resize", "cam_resize", "seg_scales", "seg_sizes", "flip", "flip_merge",
    "scale_merge", "merge_of", "align_corners", "crf", "crf_prune", "crf_backend",
    "resize_long", "scale_by", "scale_from", "merge_at",
)  # fmt: skip


def folder_card(
    *,
    protocol: Protocol,
    declared: Collection[str],
    split: str,
    list_hash: str,
    num_images: int,
    supervision: str,
    seed: int,
) -> dict[str, Any]:
    """Make the card of maps that somebody else made: what is not known is null.

    Args:
        protocol: thresholds that were applied here; other settings count only where declared.
        declared: names of the settings that the user stated.
        split: name of the evaluated split.
        list_hash: SHA-256 of its list.
        num_images: number of images that were counted.
        supervision: kind of the training signal, as stated.
        seed: seed of the maps, as stated.
    """
    card = protocol_card(
        protocol=protocol,
        split=split,
        list_hash=list_hash,
        num_images=num_images,
        backbone={},
        crop_size=0,
        iterations=0,
        global_batch_size=0,
        seed=seed,
        supervision=supervision,
    )
    unknown = [name for name in MADE_ELSEWHERE if name not in declared]
    unknown += ["backbone", "crop_size", "iterations", "global_batch_size", "selection"]
    return card | dict.fromkeys(unknown) | {"maps": "made elsewhere"}
