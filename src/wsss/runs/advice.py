"""The command that follows on a run, with what its data, encoder and budget need."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from wsss.core.places import choices, config_root
from wsss.data.table import read_table
from wsss.data.table_module import TableDataModule
from wsss.runs.compose import compose_run
from wsss.runs.folder import Run
from wsss.runs.line import quoted

#: data set -> second stages made for it, in ``experiments/``
SECOND_STAGES = {
    "voc": ["segmenter/voc"],
    "minivoc": ["segmenter/minivoc"],
    "table": ["segmenter/small", "segmenter/photos"],
}
#: data sets whose second stage has an encoder and a budget of its own
SETTLED = ("voc", "minivoc")
#: what a second stage has in another way, or derives
OF_FIRST_STAGE = re.compile(
    r"data\.(_target_|class_names|train_transform.*|train_masks|saliency_\w+|global_batch_size|seed)"
    r"|backbone\._target_"
)
#: a text that Hydra reads as the text that it is, without quotes
PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_/.][\w/.-]*", re.IGNORECASE | re.ASCII)


def second_stage_command(run: Run, labels: Path) -> str:
    """Write the ``wsss train`` line that trains a second network on a run's pseudo labels.

    Of the second stages that fit the data the one is chosen that needs the fewest changes.

    Args:
        run: the first stage.
        labels: folder of its pseudo labels.
    """
    data = _data_choice(run)
    bases = [[f"experiment={name}"] for name in SECOND_STAGES.get(data, [])]
    if data not in SETTLED:
        encoder = _backbone_choice(run.config["backbone"])
        bases.append(["method=segmenter_vit", f"data={data}", f"backbone={encoder}"])
    lines = [[*base, *_changes(run, base, settled=data in SETTLED)] for base in bases]
    words = [*min(lines, key=len), *_surroundings(run), f"data.train_masks={_value(str(labels))}"]
    return shlex.join(["wsss", "train", *words])


def _data_choice(run: Run) -> str:
    """Find the choice of ``conf/data`` that a run's data is of."""
    name = run.config["data"]["name"]
    if name in choices("data"):
        return str(name)
    return "table" if isinstance(run.data, TableDataModule) else "voc"


def _backbone_choice(backbone: Mapping[str, Any]) -> str:
    """Find the choice of ``conf/backbone`` that is nearest to an encoder."""

    def distance(name: str) -> int:
        other: Any = OmegaConf.load(config_root() / "conf" / "backbone" / f"{name}.yaml")
        own = dict(_leaves(backbone))
        its = dict(_leaves(OmegaConf.to_container(other)))
        return len([key for key in own.keys() | its.keys() if own.get(key) != its.get(key)])

    return min(choices("backbone"), key=distance)


def _changes(run: Run, base: Sequence[str], *, settled: bool) -> list[str]:
    """List what a base must be given to have a run's data, and its encoder and budget too."""
    root = f"data.root={_value(str(run.config['data']['root']))}"
    other = compose_run([*base, root, "data.train_masks=unset"])
    groups = ["data"] if settled else ["data", "budget", "backbone"]
    own = dict(_leaves({group: run.config[group] for group in groups}))
    its = dict(_leaves({group: other[group] for group in groups}))
    changes = [] if "builtin" in root else [root]
    for key in [*own, *(key for key in its if key not in own)]:
        if key == "data.root" or OF_FIRST_STAGE.fullmatch(key):
            continue
        if key not in own:
            changes.append(f"~{key}")
        elif key not in its:
            changes.append(f"+{key}={_value(own[key])}")
        elif own[key] != its[key]:
            changes.append(f"{key}={_value(own[key])}")
    names = list(run.config["data"]["class_names"])
    if names != other["data"]["class_names"] and not _names_itself(run, names):
        changes.append(f"data.class_names={_value(names)}")
    return changes


def _names_itself(run: Run, names: list[str]) -> bool:
    """Say whether a table gives these classes where nobody does."""
    if not isinstance(run.data, TableDataModule):
        return False
    table = read_table(Path(run.data.csv), Path(run.data.root), all_problems=True)
    return list(table.class_names) == names and not table.undeclared


def _surroundings(run: Run) -> list[str]:
    """Give seed, place and device where they are not the defaults."""
    config, given = run.config, []
    if config["seed"]:
        given.append(f"seed={config['seed']}")
    if config["runs_dir"] != "runs":
        given.append(f"runs_dir={_value(str(config['runs_dir']))}")
    accelerator = config["trainer"].get("accelerator")
    if accelerator in ("cpu", "gpu"):
        given.append(f"trainer={accelerator}")
    return given


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Give dotted keys and values of nested dictionaries; lists are values."""
    for key, value in node.items():
        inner = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, inner)
        else:
            yield inner, list(value) if isinstance(value, tuple) else value


def _value(value: Any) -> str:
    """Write a value as Hydra reads it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(_value, value))}]"
    text = str(value)
    return quoted(text) if isinstance(value, str) and not PLAIN.fullmatch(text) else text
