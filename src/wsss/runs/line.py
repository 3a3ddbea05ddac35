"""From what follows a verb to a composed configuration whose keys and values are checked.

Nothing here imports torch, so that what is wrong on a line is said at once. Hydra composes; its
errors become one line.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from wsss.core.errors import WSSSError
from wsss.core.failures import one_line
from wsss.core.places import config_root, declared_folders
from wsss.core.schema import nearest, nearest_key, plain, targets
from wsss.runs.checkpoint_paths import check_path, start_key
from wsss.runs.choice import choice_of
from wsss.runs.encoders import DERIVED, SOURCE, check_encoders, dependents
from wsss.runs.keys import check_keys, with_overrides
from wsss.runs.targets import with_current_targets
from wsss.runs.trackers import check_trackers
from wsss.runs.trainer_settings import check_budget_decides, check_trainer, with_trainer_keys

#: chooses an experiment beside the one that holds a sweep over experiments
OVERLAY = "+experiments@_global_"
#: the word that most Hydra programs use for an experiment, with and without its plus
EXPERIMENT = re.compile(r"^\+?experiments?=")
#: keys that a word alone may have been meant for -> the groups of their choices
MEANT = {"method": "method", "experiment": "experiments", "data": "data"}
SEARCH_PATH = "hydra.searchpath"
OF_JOBS = (f"{SEARCH_PATH}=", "hydra/job_logging=", "hydra.job_logging.", "hydra.verbose=")
# choices of Hydra's own groups that further packages bring -> the extra that installs them
HYDRA_PLUGINS = {"submitit_slurm": "slurm", "submitit_local": "slurm"}
#: what ``backbone=`` takes beside the files of its group
NAMED = "or a name of timm with its tag, as vit_small_patch16_224.dino, or hf_hub:ORG/NAME"
#: settings of Hydra's that a run sets itself -> what it has, and what is to be set instead
OF_RUNS = {
    "run.dir": (".", "a run's folder is runs_dir/study/METHOD-DATA-sSEED-HASH: set runs_dir="),
    "sweep.dir": (".", "a sweep's folder is runs_dir/sweeps/TIME-PID: set runs_dir="),
    "sweep.subdir": (".", "a run's folder is runs_dir/study/METHOD-DATA-sSEED-HASH: set study="),
    "output_subdir": (None, "the run folder has config.yaml itself: set runs_dir= or study="),
    "job.chdir": (False, "paths are relative to where the command is run: set runs_dir="),
}


class Composed(NamedTuple):
    """A configuration that Hydra has composed.

    Attributes:
        config: it.
        hydra: Hydra's own settings.
        further: overrides that follow from the name of an encoder, and are in it.
    """

    config: DictConfig
    hydra: DictConfig
    further: list[str]


def compose_line(overrides: Sequence[str]) -> DictConfig:
    """Give the configuration of :func:`composed_line`."""
    return composed_line(overrides).config


def composed_line(overrides: Sequence[str]) -> Composed:
    """Compose the configuration of ``wsss train`` and check its keys and values.

    Raises:
        WSSSError: unknown group or key, missing value, wrong type, with the nearest valid key; an
            experiment that only sweeps over others.
    """
    overrides = canonical(overrides)
    _refuse_bare_sweeps(overrides)
    composed = _compose(overrides, "train")
    config = composed.config
    content = plain(config)
    check_encoders(content)
    check_keys(content)
    config.choice = choice_of(content["choice"], overrides)
    check_trainer(content["trainer"])
    check_budget_decides(content)
    return composed


def check_surroundings(content: Mapping[str, Any]) -> None:
    """Refuse a resolved configuration that lacks a file or a package which its run needs.

    Raises:
        WSSSError: it names the key.
    """
    check_paths(content)
    start_key(content)
    check_trackers(content["logger"])


def check_paths(content: Mapping[str, Any]) -> None:
    """Refuse folders and files of a resolved configuration that are not there.

    Raises:
        WSSSError: it names the key.
    """
    data, weights = content["data"], content["backbone"].get("weights")
    if content.get("maps"):
        check_path(content["maps"]["run"], "maps.run")
    check_root(data)
    is_file = isinstance(weights, str) and weights.endswith((".pth", ".safetensors"))
    if is_file and not weights.startswith("package:") and not Path(weights).expanduser().is_file():
        raise WSSSError(
            f"backbone.weights={weights}: no such file; put the weights there, or use "
            "backbone.weights=timm (needs internet once) or backbone.weights=random"
        )


def check_root(data: Mapping[str, Any]) -> None:
    """Raise WSSSError unless the folder of a data set is there."""
    if data["_target_"].startswith("wsss.") and data["root"] != "builtin":
        if not data["root"]:
            raise WSSSError("data.root is empty; set it to where the data lies")
        root = Path(data["root"]).expanduser()
        if not root.is_dir():
            raise WSSSError(f"data folder {root} is missing; set data.root to where the data lies")


def check_run_line(run: str, overrides: Sequence[str], device: str = "auto") -> None:
    """Check what a line says of a trained run, as far as that needs no checkpoint.

    Overrides are checked against the ``config.yaml`` of a run folder. A lone ``.ckpt`` file has its
    configuration inside, so there they are checked when it is read.

    Args:
        run: run folder or checkpoint.
        overrides: changes to the run's configuration.
        device: where it is to run.

    Raises:
        WSSSError: no such run, key or device, or a value of another type.
    """
    check_device(device)
    check_path(run, "run")
    stored = Path(run) / "config.yaml"
    if not overrides or not stored.is_file():
        return
    try:
        text = stored.read_text(encoding="utf-8")
        config = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except Exception:  # damaged: reading the run names it
        return
    if "${" in text or not isinstance(config, dict) or not all(map(_is_ours, targets(config))):
        return  # not a configuration of ours: it is looked at with care when it is read
    try:
        changed = plain(with_overrides(with_current_targets(config), overrides))
        check_keys(changed)
    except WSSSError as error:
        if any(str(error).startswith(one.partition("=")[0]) for one in overrides):
            raise
        return
    if any(one.startswith("data.root=") for one in overrides):
        check_root(changed["data"])


def _is_ours(place: tuple[str, dict[str, Any]]) -> bool:
    return str(place[1]["_target_"]).startswith(("wsss.", "lightning."))


def check_device(name: str) -> None:
    """Raise WSSSError for what is no name of a device; whether it is there only torch can say."""
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d+)?", name):
        raise WSSSError(f"device={name}: expected auto, cpu, cuda or cuda:N")


def compose_open(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose a configuration that may lack values (``???``), to look at it.

    Raises:
        WSSSError: an unknown group or key.
    """
    config = _compose(overrides, "train").config
    try:
        content = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:  # one that refers to a missing value
        content = OmegaConf.to_container(config)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def canonical(overrides: Sequence[str]) -> list[str]:
    """Write what the line has as Hydra takes it, and add where groups are looked for.

    ``experiment=NAME`` becomes ``+experiments=NAME``, and ``trainer.KEY=`` may be any argument.
    An ``experiment`` folder on a search path of the user's keeps its name.

    Raises:
        WSSSError: an argument that has no value.
    """
    _check_values(overrides)
    folders = search_folders(overrides)
    own = any((folder / "experiment").is_dir() for folder in folders)
    renamed = [
        one
        if own and one.lstrip("+").startswith("experiment=")
        else EXPERIMENT.sub("+experiments=", one)
        for one in overrides
    ]
    rest = [one for one in renamed if not one.startswith(f"{SEARCH_PATH}=")]
    return [*with_trainer_keys(rest), search_path(overrides)]


def _check_values(overrides: Sequence[str]) -> None:
    """Raise WSSSError where an argument has no value, with the key whose choice it is."""
    for one in overrides:
        if "=" in one or one.startswith("~"):
            continue
        keys = [key for key, group in MEANT.items() if one in choices_of(group, overrides)]
        hint = f"; did you mean {keys[0]}={one}?" if keys else ""
        raise WSSSError(f"{one_line(one)}: expected KEY=VALUE{hint}")


def with_folders(overrides: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Add folders of ``--config-dir`` to the search path, behind those of ``hydra.searchpath=``."""
    if not folders:
        return list(overrides)
    places = [*_given_places(overrides), *(f"file://{Path(f).absolute()}" for f in folders)]
    rest = [one for one in overrides if not one.startswith(f"{SEARCH_PATH}=")]
    return [*rest, f"{SEARCH_PATH}=[{','.join(map(quoted, places))}]"]


def take_folders(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take ``--config-dir DIR`` out of a line; give what is left, and the folders.

    Raises:
        WSSSError: no folder follows, or there is none.
    """
    rest, folders, given = [], [], iter(arguments)
    for one in given:
        flag, equals, value = one.partition("=")
        if flag not in ("--config-dir", "-cd"):
            rest.append(one)
            continue
        folders.append(value if equals else next(given, ""))
        if not folders[-1]:
            raise WSSSError("--config-dir: a value is missing; expected a folder of groups")
        if not Path(folders[-1]).is_dir():
            raise WSSSError(f"--config-dir {folders[-1]}: there is no such folder")
    return rest, folders


def of_jobs(overrides: Sequence[str]) -> list[str]:
    """Give those of Hydra's own overrides that a sweep's jobs and a run's processes need too."""
    return [one for one in overrides if one.startswith(OF_JOBS)]


def search_path(overrides: Sequence[str]) -> str:
    """Give the override that says where groups are looked for beside ``conf/``.

    First what the user gives, then the ``conf`` folders of installed packages that declare
    methods, then the folder that holds ``experiments/``, then encoders by timm's names.
    """
    ours = [f"file://{folder}" for folder in (*declared_folders(), config_root())]
    places = dict.fromkeys([*_given_places(overrides), *ours, SOURCE])
    return f"{SEARCH_PATH}=[{','.join(map(quoted, places))}]"


def _given_places(overrides: Sequence[str]) -> list[str]:
    """Give the places of a ``hydra.searchpath=`` on the line."""
    given = [one for one in overrides if one.startswith(f"{SEARCH_PATH}=")]
    if not given:
        return []
    value = _parse(given)[-1].value()
    places = value if isinstance(value, list) else [value]
    return [str(getattr(place, "text", place)) for place in places]


def search_folders(overrides: Sequence[str]) -> list[Path]:
    """Give the folders that the user adds to the search path.

    Raises:
        WSSSError: there is no such folder.
    """
    folders = []
    for place in _given_places(overrides):
        address = urlparse(place)
        if address.scheme not in ("", "file"):
            continue
        path = Path(f"{address.netloc}{unquote(address.path)}")
        if not path.is_dir():
            raise WSSSError(f"{SEARCH_PATH}: there is no folder {path}; expected file://FOLDER")
        folders.append(path)
    return folders


def choices_of(group: str, overrides: Sequence[str] = ()) -> list[str]:
    """List what a group offers on a line, ``toco/minivoc`` of ``experiments`` for example."""
    root = config_root()
    roots = (root / "conf", root, *declared_folders(), *search_folders(overrides))
    found = {
        file.relative_to(place / group).with_suffix("").as_posix()
        for place in roots
        for file in (place / group).rglob("*.yaml")
    }
    return sorted(found)


def _refuse_bare_sweeps(overrides: Sequence[str]) -> None:
    """Refuse an experiment that only sweeps over others, unless one of them is chosen."""
    if any(override.startswith(f"{OVERLAY}=") for override in overrides):
        return
    for override in overrides:
        key, _, name = override.partition("=")
        file = config_root() / "experiments" / f"{name}.yaml"
        if key != "+experiments" or not file.is_file():  # composing reports it
            continue
        swept = OmegaConf.select(OmegaConf.load(file), "hydra.sweeper.params")
        if OVERLAY in (swept or {}):
            raise WSSSError(f"{override} sweeps over other experiments; begin it with -m")


def _compose(overrides: Sequence[str], config_name: str) -> Composed:
    GlobalHydra.instance().clear()
    root, overrides = config_root(), canonical(overrides)
    try:
        with initialize_config_dir(str(root / "conf"), version_base="1.3"):
            config = compose(config_name, overrides, return_hydra_config=True)
            if further := dependents(config, overrides):
                config = compose(config_name, [*overrides, *further], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, TypeError, ValueError) as error:
        path = root / "conf" / f"{config_name}.yaml"
        raise WSSSError(_one_line(error, path, overrides)) from error
    hydra = config.hydra
    if config_name == "train":
        _check_hydra(hydra)
    with open_dict(config):
        del config["hydra"]
    return Composed(config, hydra, further)


def _check_hydra(settings: DictConfig) -> None:
    """Refuse what would put files elsewhere than every verb looks for them."""
    for key, (usual, instead) in OF_RUNS.items():
        value = OmegaConf.select(settings, key)
        if value != usual:
            raise WSSSError(f"hydra.{key}={one_line(str(value), 200)}: {instead}")


def choices_made(overrides: Sequence[str]) -> Mapping[str, str]:
    """Say which file a composed configuration has of each group of ``conf/``: group -> choice."""
    made: Mapping[str, str] = _compose(overrides, "train").hydra.runtime.choices
    return made


def declared_reported(choice: str, overrides: Sequence[str]) -> list[str]:
    """List what a choice of ``data`` reports scores of, whatever the line makes of it."""
    data = _compose([f"data={choice}", search_path(overrides)], "train").config.data
    return [name for name in (data.val_split, *(data.get("test_splits") or ())) if name]


@dataclass(frozen=True)
class SweepJobs:
    """What ``-m`` will run, as far as that is known before.

    Attributes:
        samples: overrides of all jobs; where a sweeper chooses, of enough to meet every value.
        count: number of jobs.
    """

    samples: list[list[str]]
    count: int


def sweep_jobs(overrides: Sequence[str]) -> SweepJobs:
    """List the jobs that ``-m`` makes of comma-separated values and of ``hydra.sweeper.params``.

    Raises:
        WSSSError: an override that does not parse, or no such sweeper.
    """
    fixed = [str(o.input_line) for o in _parse(overrides) if not o.is_sweep_override()]
    sweeper = _compose(fixed, "train").hydra.sweeper
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    # what the line says takes the place of what a file says
    choices = {o.get_key_element(): _choices(o) for o in _parse([*params, *overrides])}
    if sweeper["_target_"].endswith(".BasicSweeper"):
        every = [list(job) for job in itertools.product(*choices.values())]
        return SweepJobs(every, len(every))
    first = {key: values[0] for key, values in choices.items()}
    others = [first | {key: value} for key, values in choices.items() for value in values[1:]]
    return SweepJobs([list(job.values()) for job in (first, *others)], sweeper.n_trials)


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise WSSSError(" ".join(str(error).split())) from error
    return parsed


def _choices(override: Override) -> list[str]:
    """List what one override of a sweep stands for; of an interval, its ends."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        return [f"{key}={value.start}", f"{key}={value.end}"]
    return [f"{key}={choice}" for choice in override.sweep_string_iterator()]


def quoted(value: str) -> str:
    """Quote a text so that Hydra reads it back from an override, whatever it holds."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _unquoted(overrides: Sequence[str]) -> str:
    """Say how to quote a value that Hydra reads as several, or cannot read; empty where none."""
    for override in overrides:
        key, equals, value = override.partition("=")
        try:
            (parsed,) = OverridesParser.create().parse_overrides([override])
            if not parsed.is_sweep_override():
                continue
        except HydraException:
            if not equals:
                continue
        line = one_line(f"{key}={quoted(value)}", 300)
        return (
            f"{one_line(override, 300)}: several values are swept with -m; a text with , = or "
            f'brackets is quoted twice, "{line}" (lists: [a,b])'
        )
    return ""


def _one_line(error: Exception, path: Path, overrides: Sequence[str]) -> str:
    """Put a Hydra error into one line, with the nearest valid key where a key was mistyped."""
    if text := _unquoted(overrides):
        return text
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        if match[1].endswith("backbone.pretraining"):
            return f"{match[1].removesuffix('pretraining')}{DERIVED}"
        if "backbone.overrides." in match[1]:  # arguments of timm: any, of which a preset sets some
            return f"{match[1]} is not set by this encoder; add it as +{match[1]}=VALUE"
        # what the others give: another method has other keys; the defaults where an experiment errs
        rest = [override for override in overrides if override.split("=")[0] != match[1]]
        config = _compose(rest if len(rest) < len(overrides) else [], path.stem).config
        return f"{match[1]}: unknown key{nearest_key(match[1], config)}"
    # "find" of one choice, "load" of one in a list
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        group, _, choice = match[1].partition("/")
        if group == "hydra":
            group, _, choice = match[1].rpartition("/")
            extra = HYDRA_PLUGINS.get(choice)
            hint = f"; it comes with pip install 'wsss[{extra}]'" if extra else ""
            return f"{group}={choice}: no such choice{hint}"
        options = choices_of(group, overrides)
        inside = [one for one in options if one.startswith(f"{choice}/")]
        hint = f"; there are {', '.join(inside)}" if inside else nearest(choice, options)
        base = choice.partition("/")[2]  # Hydra looks beside the experiment that begins from it
        if group == "experiments" and base in options:
            hint += f"; a base of a base is written /experiments/{base} in its defaults"
        word = "experiment" if group == "experiments" else group
        further = f"; {NAMED}" if group == "backbone" else ""
        found = f"{word}={choice}: no such choice{hint}{further}"
        return one_line(found, 600)
    return " ".join(text.split())[:300] or f"{path} does not compose"


def compose_walk(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose the settings of a random walk.

    Args:
        overrides: ``random_walk=NAME`` and ``random_walk.KEY=VALUE``.

    Raises:
        WSSSError: no such choice or key.
    """
    walk: dict[str, Any] = plain(_compose(overrides, "pseudo").config)["random_walk"]
    return walk
