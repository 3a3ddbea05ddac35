"""From a configuration to a run that can be trained, checked before anything is written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning

from wsss.core.errors import WSSSError
from wsss.core.schema import arguments_of, target_class
from wsss.data.datamodule import ImageDataModule
from wsss.evaluation.holdout import Holdout
from wsss.evaluation.protocol import Protocol
from wsss.maps.refine.dense_crf import import_pydensecrf
from wsss.methods.settings import Settings
from wsss.results.store import RESULTS_FILE, look_up, print_table, read_results
from wsss.runs.folder import Run, build_data, build_module, run_folder
from wsss.runs.starts import take_weights
from wsss.runs.trackers import check_trackers


def prepare(config: Mapping[str, Any]) -> Run:
    """Build data and module of a resolved configuration, and check what can be checked.

    Bad data and missing packages are named here, before anything is written and not after hours.
    The global random generators are seeded first, so that the same weights are drawn.

    Args:
        config: resolved configuration.

    Returns:
        The untrained run; nothing of it is on disk yet.

    Raises:
        WSSSError: bad configuration or data.
    """
    lightning.seed_everything(config["seed"], workers=True, verbose=False)
    _settings_of(config).check_schedule()
    data, settings = _open_data(config)
    data.setup("fit")
    data.check_contents()
    protocol = Protocol(**settings["eval"])
    if protocol.holdout_per_class:
        Holdout(data, protocol)
    starts = bool(settings.get("init_from"))
    module = build_module(settings, data.num_classes, with_weights=not starts)
    if starts:
        take_weights(module, settings)
    module.check_classes(data.class_names)
    crop, patch = settings["budget"]["crop_size"], module.backbone.patch_size
    if patch > crop:
        raise WSSSError(f"budget.crop_size={crop}: smaller than one patch of {patch} px")
    module.settings.check_crop(crop, patch)
    if protocol.crf and protocol.crf_backend == "pydensecrf":
        import_pydensecrf()
    check_trackers(settings["logger"])
    return Run(module, data, protocol, settings, run_folder(settings))


def _settings_of(config: Mapping[str, Any]) -> Settings:
    """Make the settings of a configuration's method."""
    target = target_class(config["method"]["_target_"], "method")
    settings: Settings = arguments_of(target, config["method"])["settings"]
    return settings


def finished_folder(config: Mapping[str, Any]) -> Path | None:
    """Give the run folder of a configuration if it holds this run's results, which are printed.

    Raises:
        WSSSError: it holds results of other images under the same configuration.
    """
    data, settings = _open_data(config)
    folder = run_folder(settings)
    if not (folder / RESULTS_FILE).is_file():
        return None
    results = read_results(folder / RESULTS_FILE)
    if results.get("status") != "finished":
        return None
    for split, metrics in results["splits"].items():
        if look_up(metrics, ("protocol", "list_sha256")) != data.list_hash(split):
            raise WSSSError(
                f"{folder} holds results of another list {split!r} than data.root has; give "
                "another study= or runs_dir="
            )
    print_table(results)
    print(f"{folder} is finished; change the configuration, or remove the folder")
    return folder


def _open_data(config: Mapping[str, Any]) -> tuple[ImageDataModule, dict[str, Any]]:
    """Make the DataModule; give it with the configuration that names its classes.

    A table may name its classes only in its file, which `wsss predict` need not have.
    """
    data = build_data(dict(config))
    named = {**config["data"], "class_names": list(data.class_names)}
    return data, {**config, "data": named}
