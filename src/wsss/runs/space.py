"""What a search varies of a method: ``conf/space/METHOD.yaml``, a key and its range a line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from wsss.core.errors import WSSSError
from wsss.core.files import first_line
from wsss.core.places import choices, config_root, declared_folders
from wsss.core.records import check_record
from wsss.core.schema import nearest
from wsss.results.search import Range
from wsss.runs.choice import OF_RUN, SINGLE

#: more keys than this no short search can tell apart
MOST_KEYS = 8
#: keys that choose an encoder and what it was trained on
OF_ENCODER = ("backbone.name", "backbone.weights", "backbone.pretraining")
Space = dict[str, Range]


def read_space(name: str, further: Sequence[Path] = ()) -> Space:
    """Read a declared space, which a method's choice of ``conf/method`` names.

    Args:
        name: of its file, in ``space/`` of our ``conf/``, of an installed package's or of a folder
            of the user's.
        further: folders of the user's.

    Raises:
        WSSSError: there is none, a key has no range, or is none of a method's settings.
    """
    folders = (config_root() / "conf", *declared_folders(), *further)
    places = [folder / "space" / f"{name}.yaml" for folder in folders]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise WSSSError(
            f"space={name}: no such search space is declared (there are "
            f"{', '.join(choices('space', *further))}); write conf/space/{name}.yaml, or "
            f"DIR/space/{name}.yaml with --config-dir DIR"
        )
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise WSSSError(f"{path}: cannot be read ({first_line(error)}); mend it") from error
    if not isinstance(content, dict) or not 0 < len(content) <= MOST_KEYS:
        raise WSSSError(f"{path}: expected 1 to {MOST_KEYS} keys, each with its range")
    space = {}
    for name_of_key, node in content.items():
        key = str(name_of_key)
        # with other keys trials would read other lists, or differ in their terms
        if key not in SINGLE and not key.startswith(OF_RUN):
            varied = ", ".join((*OF_RUN, *SINGLE))
            raise WSSSError(f"{path}: {key}: a search varies no such key, only {varied}")
        if key.endswith("._target_") or key.startswith(OF_ENCODER):
            raise WSSSError(f"{path}: {key}: all trials have one method, and one encoder's weights")
        known = list(Range.model_fields)
        unknown = (
            [str(each) for each in node if each not in known] if isinstance(node, dict) else []
        )
        if unknown:
            raise WSSSError(f"{path}: {key}.{unknown[0]}: unknown key{nearest(unknown[0], known)}")
        check_record(Range, node, f"{path}: {key}", "give low and high, or choices")
        space[key] = Range.model_validate(node)
    return space


def settings_of(config: Mapping[str, Any], space: Space, origin: str) -> dict[str, Any]:
    """Give the values that a configuration has for the keys of a space.

    Raises:
        WSSSError: it lacks a key, or its value is outside of the range, where the search would
            begin outside of what it searches.
    """
    node = OmegaConf.create(dict(config))
    found = {key: OmegaConf.select(node, key, default=...) for key in space}
    for key, value in found.items():
        if value is ...:
            raise WSSSError(f"space={origin}: {key}: the method has no such setting")
    for key, choice in space.items():
        value = found[key]
        if not choice.contains(value):
            said = choice.choices or f"{choice.low:g} to {choice.high:g}"
            raise WSSSError(
                f"{key}={value}: outside of {said}, which space={origin} searches; "
                "widen it there, or begin elsewhere"
            )
    return found
