"""Configurations: found from any directory, composed by Hydra, checked before anything runs.

Hydra refuses a mistyped key, but not one behind ``+`` and not a value of the wrong type. Both are
caught here against the constructors that the configuration names: a typed, keyword-only signature
is its own schema.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from wsss.core.errors import WSSSError
from wsss.core.ranges import (
    Count,
    FolderName,
    Number,
    Pictures,
    Positive,
    Scale,
    Seed,
    Side,
    Words,
    one_of,
)
from wsss.core.schema import (
    SUPPLIED,
    MissingKeyError,
    arguments_of,
    check_fields,
    check_finite,
    check_node,
    check_value,
    nearest,
    parameters_of,
    plain,
    target_class,
    targets,
)
from wsss.evaluation.protocol import Protocol
from wsss.maps.refine.dense_crf import CRF_PRESETS
from wsss.maps.refine.random_walk import WalkSettings
from wsss.models.backbone import Backbone, check_overrides
from wsss.results.store import NUMBERS
from wsss.runs.callback_settings import changing, check_callbacks
from wsss.runs.checkpoint_paths import STARTS
from wsss.runs.encoders import check_encoders
from wsss.runs.keys import with_overrides
from wsss.runs.stored import check_place
from wsss.runs.targets import with_former_targets
from wsss.runs.trainer_settings import (
    ACCELERATION,
    WATCHED,
    TrainerSettings,
    check_budget_decides,
    check_trainer,
)


@dataclass(frozen=True)
class Budget:
    """What a data set prescribes to every method trained on it.

    Attributes:
        max_steps: optimiser steps.
        warmup_steps: steps of learning-rate warm-up.
        global_batch_size: images a step over all devices.
        crop_size: side of a training crop in pixels.
        scale_range: bounds of the random scale before the crop.
        blur_radius: bounds of the radius of blurred views in pixels.
        local_size: side of a local crop in pixels.
        cam_size: side of the square to which images are squashed for CAM and single-scale scores;
            None: native.
        eval_every: steps between validations.
    """

    max_steps: Count
    warmup_steps: Number
    global_batch_size: Count
    crop_size: Side
    scale_range: tuple[Scale, Scale]
    blur_radius: tuple[Positive, Positive]
    local_size: Side
    cam_size: Side | None
    eval_every: Count

    def __post_init__(self) -> None:
        check_fields(self, "budget")
        if self.local_size >= self.crop_size:
            raise WSSSError(
                f"budget.local_size={self.local_size}: must be smaller than "
                f"budget.crop_size={self.crop_size}"
            )
        low, high = self.scale_range
        if not 0 < low <= high:
            raise WSSSError(f"budget.scale_range=[{low}, {high}]: expected 0 < low <= high")
        low, high = self.blur_radius
        if not 0 < low <= high:
            raise WSSSError(f"budget.blur_radius=[{low}, {high}]: expected 0 < low <= high")


@dataclass(frozen=True)
class LoggerConfig:
    """Where metrics go beside the CSV that is always written.

    Attributes:
        wandb: also log to Weights & Biases (offline without a key).
        tensorboard: also write event files of TensorBoard, ``tensorboard/`` in the run folder.
        mlflow: also log to MLflow.
        tracking_uri: MLflow's server or database; None: ``runs_dir/mlflow.db``.
        project: the W&B project, the MLflow experiment.
        entity: the account or team that it belongs to; None: the key's own.
        name: of the run; None: method, what varies in its study, and seed.
        group: of runs that are averaged; None: the study and what varies in it.
        job_type: kind of run; None: ``train`` or ``second-stage``.
        tags: beside method, data set, encoder and supervision; 1 to 64 characters each.
        checkpoints: also store the last checkpoint, as an artifact.
        varied: dotted keys that vary in the run's study; a sweep gives its own.
    """

    wandb: bool = False
    tensorboard: bool = False
    mlflow: bool = False
    tracking_uri: str | None = None
    project: str = "wsss"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: Sequence[str] = ()
    checkpoints: bool = False
    varied: Sequence[str] = ()

    def __post_init__(self) -> None:
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                raise WSSSError(f"logger.tags: {tag!r} has {len(tag)} characters, expected 1 to 64")


@dataclass(frozen=True)
class MapsConfig:
    """Whose localisation maps a segmenter's training labels are made from, and how.

    Attributes:
        run: run folder or checkpoint.
        refine: ``par`` or ``pamr`` before the run's thresholds, ``crf`` or ``random_walk`` in their
            place; None: the thresholds alone.
        crf: preset of ``refine=crf``.
        random_walk: settings of ``refine=random_walk``, a choice of ``conf/random_walk``.
        name: of the run folder; this and what follows is filled in once the run is read.
        study: of that run.
        method: of that run.
        sha256: of that run's checkpoint.
    """

    run: str
    refine: Literal["par", "pamr", "crf", "random_walk"] | None = None
    crf: one_of(CRF_PRESETS) = "toco"  # type: ignore[valid-type]
    random_walk: Mapping[str, Any] | None = None
    name: str | None = None
    study: str | None = None
    method: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "maps")
        if self.refine == "random_walk" and self.random_walk is None:
            raise WSSSError(
                "maps.refine=random_walk needs settings: give +random_walk@maps.random_walk=vit"
            )


#: a run folder or checkpoint; once looked at (:mod:`wsss.runs.starts`), what is known of it
STARTED = {"path", "sha256", "supervision"}
Start = str | dict[str, str | int | None] | None


@dataclass(frozen=True)
class TrainConfig:
    """Top level of ``conf/train.yaml``; groups are checked against their own targets."""

    method: Mapping[str, Any]
    backbone: Mapping[str, Any]
    data: Mapping[str, Any]
    trainer: Mapping[str, Any]
    eval: Protocol
    logger: LoggerConfig
    budget: Budget
    study: FolderName  # first folder below runs_dir; groups runs that belong together
    seed: Seed  # of weights, order and augmentation
    runs_dir: Path  # where runs lie, relative to where the command is run
    gallery: Pictures  # images on the gallery sheets; 0: none
    # number of data.val_split that a sweeper such as Optuna works on
    objective: one_of(NUMBERS) = "seed_miou"  # type: ignore[valid-type]
    choice: Words | None = None  # how the settings were chosen, as `paper`; null: not declared
    # what is trained on this run's pseudo labels; see experiments/minivoc/second_stage.yaml
    second_stage: Mapping[str, Any] | None = None
    # another run's maps, from which this run's data.train_masks are made; see docs/factorial.md
    maps: Mapping[str, Any] | None = None
    callbacks: Mapping[str, Any] = field(default_factory=dict)  # Lightning's, beside a run's own
    init_from: Start = None  # run or checkpoint whose weights the training starts from
    ckpt_path: Start = None  # checkpoint from which a training goes on
    # packages beside wsss whose classes those runs may name; their code is run
    trust: Sequence[str] = ()


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash, to eight hex digits, what makes a run another run.

    Left out are where things lie, how they are watched and how settings were chosen, so that moved
    data does not orphan an interrupted run; a second stage is a run of its own. The evaluation
    protocol is in: ``wsss eval`` takes other ones without training.
    """
    elsewhere = ("runs_dir", "logger", "gallery", "objective", "choice", "second_stage", "maps",
                 "trust", *LATER)  # fmt: skip
    relevant = {key: value for key, value in config.items() if key not in elsewhere}
    relevant |= _later(config)
    relevant["data"] = {
        key: value
        for key, value in config["data"].items()
        if key not in ("root", "num_workers", "eval_batch_size")
    }
    if masks := relevant["data"].get("train_masks"):  # a first stage's: named inside runs_dir
        inside = str(masks).removeprefix(str(config["runs_dir"]))
        # labels of maps are named after all that decides them, wherever the maps' run lies
        relevant["data"]["train_masks"] = Path(masks).name if config.get("maps") else inside
    elif config.get("maps"):  # the labels are still to be made
        relevant["maps"] = config["maps"]
    # a quirk that is as official_compat has it changes nothing, and none is as without the key
    compat, quirks = config["method"].get("official_compat"), config["method"].get("quirks") or {}
    quirks = {name: on for name, on in quirks.items() if on is not compat}
    later = LATER_SETTINGS.get(config["method"]["_target_"], {})
    relevant["method"] = {
        key: value
        for key, value in config["method"].items()
        if key != "quirks" and not (key in later and later[key] == value)
    }
    relevant["method"] |= {"quirks": quirks} if quirks else {}
    relevant["trainer"] = {
        key: value
        for key, value in config["trainer"].items()
        if key not in WATCHED and (value or key not in ACCELERATION)
    }
    text = json.dumps(with_former_targets(relevant), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


#: keys that earlier versions lacked: unset they change nothing
LATER = ("callbacks", *STARTS)
#: the same of a method's settings, with the values at which they change nothing
LATER_SETTINGS: dict[str, dict[str, Any]] = {
    "wsss.methods.segmenter.Segmenter": {
        "channels": None,
        "dilation": 5,
        "loss": "plain",
        "reg_weight": 0.0,
    },
    "wsss.methods.tkp_pcl.TKPPCL": {"bilstm": "alone"},
}


def _later(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give what makes a run another run of the keys that are unset in most."""
    found: dict[str, Any] = {}
    if callbacks := changing(config.get("callbacks") or {}):
        found["callbacks"] = callbacks
    for key in STARTS:
        start = config.get(key)
        if isinstance(start, Mapping) and not start.get("same_run"):
            found[key] = start["sha256"]  # wherever the file lies
    return found


#: what a second stage says for itself; all else is the first one's
SECOND_STAGE = (
    *("source", "refine", "random_walk"),
    *("method", "backbone", "data", "eval", "budget", "trainer"),
)
#: what a random walk says beside its own settings; all else is the run's whose maps walk
AFFINITY_RUN = ("method", "backbone", "data", "budget", "trainer")


def second_stage_config(config: Mapping[str, Any], train_masks: str) -> dict[str, Any]:
    """Make the resolved configuration of the run that follows on a run's pseudo labels.

    Args:
        config: resolved configuration with a ``second_stage``: its method, encoder and protocol
            take the first stage's places, its other keys are laid over the first stage's;
            ``source``, ``refine`` and ``random_walk`` say how `wsss pseudo` makes the labels.
        train_masks: the folder of pseudo labels.

    Raises:
        WSSSError: ``second_stage`` has unknown keys or lacks one.
    """
    second = config["second_stage"]
    for key in second:
        if key not in SECOND_STAGE:
            raise WSSSError(f"second_stage.{key}: unknown key{nearest(key, SECOND_STAGE)}")
    for key in ("method", "backbone", "eval"):
        if key not in second:
            raise WSSSError(f"second_stage.{key} is missing; see experiments/tkp_pcl/minivoc.yaml")
    return _on_masks(config, second, train_masks, replaced=("method", "backbone", "eval"))


def affinity_config(
    config: Mapping[str, Any], walk: Mapping[str, Any], train_masks: str
) -> dict[str, Any]:
    """Make the resolved configuration under which a random walk's network is trained.

    Args:
        config: resolved configuration of the run whose maps walk.
        walk: a choice of ``conf/random_walk``.
        train_masks: the folder of confident labels.
    """
    replaced = ("method", "backbone") if walk.get("backbone") else ("method",)
    return _on_masks(config, walk, train_masks, replaced=replaced)


def _on_masks(
    config: Mapping[str, Any], node: Mapping[str, Any], train_masks: str, replaced: Sequence[str]
) -> dict[str, Any]:
    """Make a configuration that trains on masks of a run: some groups replaced, others overlaid."""
    merged = {**config, **{key: node[key] for key in replaced}}
    for key in ("data", "budget", "trainer"):
        merged[key] = {**config[key], **(node.get(key) or {})}
    # these were read from the first stage's budget
    merged["data"]["global_batch_size"] = merged["budget"]["global_batch_size"]
    merged["trainer"]["max_steps"] = merged["budget"]["max_steps"]
    merged["data"]["train_masks"] = train_masks
    # what the first stage saw beside image labels is on its pseudo labels' card
    merged["data"].pop("saliency_folder", None)
    unset = dict.fromkeys(("second_stage", "maps", *STARTS))
    return merged | unset | {"callbacks": {}}


def check_walk(config: Mapping[str, Any], walk: Any, path: str = "random_walk") -> WalkSettings:
    """Check what a random walk is set to; give the walk's own settings.

    Args:
        config: resolved configuration of the run whose maps walk.
        walk: a choice of ``conf/random_walk``.
        path: its dotted key, for errors.

    Raises:
        WSSSError: a key that is unknown or missing, a wrong type, a value out of range.
    """
    own = {field.name for field in fields(WalkSettings)}
    if not isinstance(walk, Mapping):
        raise WSSSError(f"{path}={walk!r}: expected a choice of conf/random_walk")
    for key in walk:
        if key not in {*own, *AFFINITY_RUN}:
            known = sorted({*own, *AFFINITY_RUN})
            raise WSSSError(f"{path}.{key}: unknown key{nearest(key, known, f'{path}.')}")
    for key in ("method", "data", "budget"):
        if key not in walk:
            raise WSSSError(f"{path}.{key} is missing; see conf/random_walk/vit.yaml")
    for key in sorted(own & walk.keys()):
        check_value(f"{path}.{key}", walk[key], parameters_of(WalkSettings)[key].annotation)
    settings = WalkSettings(**{key: walk[key] for key in own & walk.keys()})
    for inner, node in targets(dict(walk)):
        check_node(
            node,
            parameters_of(target_class(node["_target_"], f"{path}.{inner}")),
            f"{path}.{inner}",
            supplied=SUPPLIED,
        )
    check_config(OmegaConf.create(affinity_config(config, walk, "written before")))
    return settings


def check_refinement(config: Mapping[str, Any]) -> None:
    """Check how a second stage's labels are refined.

    Raises:
        WSSSError: an unknown refinement, or one without its settings.
    """
    second = config["second_stage"]
    refine, walk = second.get("refine"), second.get("random_walk")
    if refine not in (None, "random_walk"):
        raise WSSSError(f"second_stage.refine={refine}: expected random_walk, or null")
    if (refine is None) != (walk is None):
        raise WSSSError(
            "second_stage.refine=random_walk and the settings in second_stage.random_walk need "
            "each other: give +second_stage.refine=random_walk "
            "+random_walk@second_stage.random_walk=vit"
        )
    if walk is not None and second.get("source", "cam") != "cam":
        raise WSSSError(f"second_stage.source={second['source']}: a random walk needs source=cam")
    if walk is not None:
        check_walk(config, walk, "second_stage.random_walk")


def check_maps(config: Mapping[str, Any]) -> None:
    """Check whose maps a run's labels are made from.

    Raises:
        WSSSError: an unknown key, a wrong type, further labels beside these.
    """
    maps = config["maps"]
    _check_group(maps, MapsConfig, "maps")
    # of a stored configuration they are those that were made
    if config["data"].get("train_masks") and not maps.get("sha256"):
        raise WSSSError(
            f"data.train_masks={config['data']['train_masks']}: labels are made from "
            f"maps.run={maps['run']}; set one of the two to null"
        )
    if maps.get("random_walk") is not None:
        check_walk(config, maps["random_walk"], "maps.random_walk")


def check_config(config: DictConfig) -> None:
    """Check every key and value against the constructor that will take it.

    Raises:
        WSSSError: one line naming the key, and the nearest valid one or the expected type.
    """
    content = plain(config)
    check_finite(content.get("method"), "method")  # what others refer to, first
    check_finite(content)
    check_node(content, parameters_of(TrainConfig), "", supplied=set())
    _check_group(content["budget"], Budget, "budget")  # before what refers to it
    for path in ("method", "backbone", "data", "trainer"):
        if not isinstance(content[path], dict) or "_target_" not in content[path]:
            raise WSSSError(f"{path}._target_ is missing; choose {path}=NAME")
    check_encoders(content)
    # the method first: data and eval refer to its settings
    for path, node in sorted(targets(content), key=lambda item: item[0] != "method"):
        target = target_class(node["_target_"], path)
        check_place(target, node["_target_"], path)
        if path.startswith("callbacks."):
            continue
        parameters = parameters_of(target)
        if path == "trainer":
            parameters |= parameters_of(TrainerSettings)
            check_trainer(node)
        check_node(node, parameters, path, supplied=SUPPLIED)
        if issubclass(target, Backbone):
            check_overrides(node.get("overrides") or {}, path)
        arguments_of(target, node)  # what settings say of each other
    _check_group(content["eval"], Protocol, "eval")
    check_callbacks(content.get("callbacks") or {}, content["eval"].get("holdout_per_class", 0))
    _check_group(content["logger"], LoggerConfig, "logger")
    if content.get("maps"):
        check_maps(content)
    for key in STARTS:
        if isinstance(start := content.get(key), dict) and not start.keys() >= STARTED:
            raise WSSSError(f"{key}: expected a run folder or a checkpoint")
    if content.get("second_stage"):
        check_config(OmegaConf.create(second_stage_config(content, "written by the first stage")))
        check_refinement(content)


def _check_group(node: Any, schema: type, path: str) -> None:
    """Check a group without a target against the dataclass that takes it."""
    check_node(node, parameters_of(schema), path, supplied=set())
    schema(**node)  # its own checks of values


def checked_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Check a whole configuration that Python code gives.

    Raises:
        WSSSError: a missing or unknown key, a wrong type.
    """
    node = OmegaConf.create(dict(config))
    try:
        check_config(node)
    except MissingKeyError as error:
        raise WSSSError(
            f"{error.key} is missing in the configuration given; add it, or give what follows "
            "`wsss train` as a list, ['method=toco', 'data=minivoc'], where all else has a default"
        ) from error
    content = plain(node)
    check_budget_decides(content)
    return content


def override_config(
    config: dict[str, Any], overrides: list[str], origin: str = ""
) -> dict[str, Any]:
    """Apply ``key=value`` changes to a stored configuration, checked like a fresh one.

    Args:
        config: as it is stored.
        overrides: the changes.
        origin: the file that holds it, for an error that no change is about.

    Raises:
        WSSSError: unknown key, wrong type.
    """
    node = with_overrides(config, overrides)
    try:
        check_config(node)
    except MissingKeyError as error:  # no verb takes every key of a configuration
        raise WSSSError(
            f"{error.key} is missing in the stored configuration: it was altered, or written by "
            "another version of wsss, which can still use it"
        ) from error
    except WSSSError as error:
        if not origin or any(str(error).startswith(o.partition("=")[0]) for o in overrides):
            raise
        raise WSSSError(f"{origin}: its {error}") from error
    return plain(node)
