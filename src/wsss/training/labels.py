"""Training labels from another run's maps, as ``maps`` of a configuration says.

Maps are computed once a run and labels once a refinement, however many runs learn from them:
``RUN/maps`` and ``RUN/pseudo_labels`` are named after all that decides their content.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from wsss.core.errors import WSSSError
from wsss.core.files import file_sha256, make_writable
from wsss.core.lock import lock
from wsss.evaluation.protocol import Protocol
from wsss.runs.config import MapsConfig
from wsss.runs.folder import Run, load_run
from wsss.runs.label_writer import write_pseudo_labels
from wsss.runs.map_cache import FOLDER, MapCache
from wsss.runs.stored import trusted_packages
from wsss.training.random_walk import trained_walk


def with_labels(config: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Give a configuration that trains on labels of the maps that it names, made where missing.

    Args:
        config: resolved configuration; without ``maps`` it is given back.
        device: where maps are computed.

    Returns:
        The configuration with ``data.train_masks``; its ``maps`` say what run they are of.

    Raises:
        WSSSError: no such run, an unfinished one, or one of other classes.
    """
    if not config.get("maps"):
        return dict(config)
    chosen = MapsConfig(**config["maps"])
    run = _source(chosen, config).to(device)
    folder = run.folder / FOLDER
    make_writable(folder)
    # other jobs of a sweep use the same maps: the first one makes them
    with lock(folder, "making labels", patient=True):
        cache, walk = MapCache(run), None
        if chosen.refine == "random_walk":
            assert chosen.random_walk is not None  # the settings see to it
            walk = trained_walk(run, chosen.random_walk, alone=True, maps=cache)
        protocol = refined_protocol(run.protocol, chosen)
        labels = write_pseudo_labels(replace(run, protocol=protocol), walk=walk, maps=cache)
    said = {
        "name": run.home.name,
        "study": run.config["study"],
        "method": run.module.title,
        "sha256": file_sha256(run.checkpoint),
    }
    return {
        **config,
        "maps": {**config["maps"], **said},
        "data": {**config["data"], "train_masks": str(labels)},
    }


def refined_protocol(protocol: Protocol, chosen: MapsConfig) -> Protocol:
    """Say as a protocol how maps become labels; a walk leaves it as it is.

    The thresholds are the run's own; where it has one, that one is both.

    Args:
        protocol: of the run.
        chosen: the refinement.
    """
    if chosen.refine == "random_walk":
        return protocol
    if chosen.refine == "crf":
        return replace(protocol, refine=None, cam_high=None, cam_low=None, crf=chosen.crf)
    high, low = protocol.cam_high, protocol.cam_low
    if high is None or low is None:
        high = low = protocol.cam_threshold
    return replace(
        protocol, refine=chosen.refine, cam_high=high, cam_low=low, crf=None, crf_prune=False
    )


def _source(chosen: MapsConfig, config: Mapping[str, Any]) -> Run:
    """Read the run whose maps are used, with the data where the line says that it lies.

    Raises:
        WSSSError: no such run, an unfinished one, or one of other classes.
    """
    try:
        trusted = trusted_packages(config)
        run = load_run(chosen.run, trust=trusted)
        root = str(config["data"]["root"])
        if run.config["data"]["root"] != root and run.data.name == config["data"]["name"]:
            moved = load_run(chosen.run, [f"data.root={json.dumps(root)}"], trust=trusted)
            run = replace(moved, overrides=())  # it must be the run's data all the same
    except WSSSError as error:
        raise WSSSError(f"maps.run: {error}") from error
    if run.unfinished:
        raise WSSSError(f"maps.run={chosen.run}: is not a finished run ({run.unfinished})")
    names = config["data"].get("class_names")
    if names and list(names) != list(run.data.class_names):
        raise WSSSError(
            f"maps.run={chosen.run}: has the classes {', '.join(run.data.class_names)}; this run "
            f"has {', '.join(names)}"
        )
    return run
