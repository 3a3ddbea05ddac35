"""The network behind a random walk: trained below the run whose maps walk.

``RUN/random_walk`` holds the labels that it learns from (``labels-HASH``) and the network itself
(``network-HASH``): checkpoint, configuration, logs and a card with what it cost. It is no run of
its own, since it has nothing to score. Repeating a command resumes it where it was interrupted.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import lightning

from wsss.core.errors import WSSSError
from wsss.core.files import file_sha256, make_writable, read_json, write_atomically
from wsss.core.lock import lock
from wsss.core.ranks import is_first_process
from wsss.core.records import Record, check_record
from wsss.maps.refine.random_walk import WalkSettings
from wsss.methods.affinity_net import AffinityNet
from wsss.models.backbone import WeightsInfo
from wsss.models.weights import load_state_dict_strictly, read_torch_file
from wsss.results.schema import Cost, Size
from wsss.runs.checkpoint_paths import LAST_CHECKPOINT
from wsss.runs.config import affinity_config, check_walk
from wsss.runs.folder import (
    Run,
    build,
    build_data,
    build_method,
    check_checkpoint,
    write_config,
)
from wsss.runs.label_folder import digest_of, plain_values
from wsss.runs.map_cache import Maps
from wsss.runs.random_walk import FOLDER, RandomWalk, write_confident_labels
from wsss.runs.targets import with_sentences
from wsss.training.trainer import accelerate, build_trainer, fit

CARD_FILE = "affinity_network.json"
#: of the configuration, what decides the network's weights beside its labels and its encoder
DECISIVE = ("method", "seed")
OF_BUDGET = ("max_steps", "global_batch_size", "crop_size", "scale_range")
OF_TRAINER = ("precision", "gradient_clip_val")
ONE_DEVICE = {"devices": 1, "num_nodes": 1, "accumulate_grad_batches": 1}


class _Cost(Cost):
    """What :func:`wsss.runs.costs.training_cost` gives."""

    train_peak_memory_kind: str
    device: str
    num_devices: Size
    sessions: Size


class _Card(Record):
    """What is said of a finished network beside what it was made from."""

    status: Literal["finished"]
    folder: str
    backbone: dict[str, str | None]
    steps: Size
    parameters: Size
    cost: _Cost | None
    checkpoint_sha256: str


def trained_walk(
    run: Run,
    node: Mapping[str, Any],
    *,
    crf_jobs: int | None = None,
    alone: bool = False,
    maps: Maps | None = None,
) -> RandomWalk:
    """Write confident labels, train the affinity network on them, and give both to walk with.

    What is finished is not done again.

    Args:
        run: a trained run, where its maps are to be computed.
        node: a choice of ``conf/random_walk``, resolved.
        crf_jobs: processes of the dense CRF.
        alone: train in this process on the run's device, whatever the run was trained on.
        maps: gives the run's maps of the training list; None: they are computed.

    Raises:
        WSSSError: bad settings, before anything is written; see also the method.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, with a checkpoint that resumes.
    """
    settings = check_walk(run.config, node)
    encoder, own = _encoder(run, node)
    config = affinity_config(run.config, node, "written below")
    if alone:
        where = "cpu" if run.device.type == "cpu" else "gpu"
        config["trainer"] = {**config["trainer"], **ONE_DEVICE, "accelerator": where}
    if own and config["backbone"].get("frozen"):  # the copy learns
        config["backbone"] = {**config["backbone"], "frozen": False}
    network = _network(config, encoder, run.data.num_classes)
    labels, made_from = write_confident_labels(run, settings, crf_jobs=crf_jobs, maps=maps)
    config["data"]["train_masks"] = str(labels)
    start = "the run's" if own else with_sentences(config["backbone"])
    identity = _identity(config, made_from, start)
    folder = run.folder / FOLDER / f"network-{digest_of(identity)}"
    card = _read_card(folder, identity)
    if card is None:
        card = _train(Run(network, build_data(config), run.protocol, config, folder), identity)
    else:
        print(f"{folder} is finished")
    return _walk(folder, card, network, run, settings)


def _encoder(run: Run, node: Mapping[str, Any]) -> tuple[Any, bool]:
    """Give the encoder that the network starts from, and whether it is the run's own, copied."""
    if node.get("backbone"):
        return build(dict(node["backbone"])), False
    encoder = deepcopy(run.module.backbone).cpu()
    encoder.thaw()  # the method may have kept it, or parts of it, as they were
    return encoder, True


def _network(config: dict[str, Any], encoder: Any, num_classes: int) -> AffinityNet:
    """Make the untrained network, always the same for a seed."""
    lightning.seed_everything(config["seed"], workers=True, verbose=False)
    network = build_method(config["method"], encoder, num_classes)
    if not isinstance(network, AffinityNet):
        raise WSSSError(
            f"random_walk.method._target_={config['method']['_target_']}: expected "
            "wsss.methods.affinity_net.AffinityNet"
        )
    network.settings.check_crop(config["budget"]["crop_size"], network.backbone.patch_size)
    network.run_config = config
    return network


def _identity(config: dict[str, Any], labels: dict[str, Any], encoder: Any) -> dict[str, Any]:
    """Gather all that decides the network, as JSON would give it back."""
    return plain_values(
        {
            "labels": labels,
            "encoder": encoder,
            "train_transform": config["data"]["train_transform"],
            **{key: config[key] for key in DECISIVE},
            "budget": {key: config["budget"][key] for key in OF_BUDGET},
            "trainer": {key: config["trainer"].get(key) for key in OF_TRAINER},
        }
    )


def _train(untrained: Run, identity: dict[str, Any]) -> dict[str, Any]:
    """Train the network, or go on with it; give its card."""
    folder, module = untrained.folder, untrained.module
    untrained.data.setup("fit")  # bad data is named before anything is written
    accelerate(module, untrained.config["trainer"])
    trainer = build_trainer(untrained, evaluated=False)
    make_writable(folder)
    with lock(folder, "training an affinity network"):
        if is_first_process():
            write_config(folder, untrained.config)
            print(f"affinity network: {folder}")
        run = fit(untrained, trainer)
        if run.unfinished:
            raise WSSSError(f"affinity network: {run.unfinished}; give pseudo labels whole runs")
        trainer.strategy.barrier()  # nobody hashes what another is still to write
        card = {
            "made_from": identity,
            "status": "finished",
            "folder": folder.name,
            "backbone": module.backbone.weights_info.as_dict(),
            "steps": run.step,
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "cost": run.cost,
            "checkpoint_sha256": file_sha256(run.checkpoint),
        }
        if is_first_process():
            write_atomically(folder / CARD_FILE, f"{json.dumps(card, indent=2)}\n".encode())
    return card


def _read_card(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Read the card of a finished network; None where there is none.

    Raises:
        WSSSError: it is damaged, or the checkpoint is not the one it names.
    """
    path, mend = folder / CARD_FILE, f"remove {folder}"
    if not path.is_file():
        return None
    card = read_json(path, mend)
    if not isinstance(card, dict) or card.get("made_from") != identity:
        raise WSSSError(f"{path}: is damaged; {mend}")
    check_record(_Card, card, f"{path}: is damaged", mend)
    checkpoint = folder / LAST_CHECKPOINT
    if not checkpoint.is_file() or file_sha256(checkpoint) != card.get("checkpoint_sha256"):
        raise WSSSError(f"{checkpoint}: is missing, or not what was trained; {mend}")
    return card


def _walk(
    folder: Path, card: dict[str, Any], network: AffinityNet, run: Run, settings: WalkSettings
) -> RandomWalk:
    """Read the trained weights into the network, beside the run's module."""
    path = folder / LAST_CHECKPOINT
    checkpoint = check_checkpoint(read_torch_file(path), path)
    load_state_dict_strictly(network, checkpoint["state_dict"], str(path))
    network.backbone.weights_info = WeightsInfo.stored(checkpoint["wsss"]["backbone"])
    network.to(run.device).eval()
    return RandomWalk(network, settings, card["checkpoint_sha256"], card)
