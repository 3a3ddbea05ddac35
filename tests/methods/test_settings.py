"""A setting is declared once: YAML, command line and Python are checked by it, in its words."""

import pickle
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from omegaconf import OmegaConf

from wsss.core.errors import WSSSError
from wsss.core.schema import arguments_of, check_value, parameters_of, plain, target_class
from wsss.methods.settings import (
    BelowOne,
    Count,
    Fraction,
    NotNegative,
    Number,
    Positive,
    QuirkSwitches,
    Settings,
    Share,
    Some,
)
from wsss.methods.toco import ToCoSettings
from wsss.methods.toco.official import CORRECTED, OFFICIAL, Quirks
from wsss.models.conv_backbone import ConvBackbone
from wsss.runs.compose import compose_config, compose_run
from wsss.runs.config import config_hash
from wsss.runs.prepare import prepare

CONF = Path(__file__).parents[2] / "conf" / "method"
VARIANTS = {"segmenter_vit"}  # which have the settings of the method that they overlay
METHODS = sorted({path.stem for path in CONF.glob("*.yaml")} - VARIANTS)
# what has no default
NEEDED: dict[str, dict[str, Any]] = {m: {"text": "random"} for m in ("weclip", "clip_cam")}


def target_of(method: str) -> type:
    return target_class(OmegaConf.load(CONF / f"{method}.yaml").method["_target_"], "method")


def settings_of(method: str) -> type[Settings]:
    found = get_type_hints(target_of(method).__init__)["settings"]  # type: ignore[misc]
    assert issubclass(found, Settings)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_settings_file_states_the_defaults(method: str) -> None:
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{method}.yaml").method)
    stated = {key: value for key, value in node.items() if "${" not in str(value)}
    del stated["_target_"]
    compat = stated.pop("official_compat", None)
    needed = {"max_steps": 10, **NEEDED.get(method, {})}
    assert all(stated.pop(key, "???") == "???" for key in needed)
    chosen = settings_of(method)(**{**needed, **stated})
    default = settings_of(method)(**needed)
    assert chosen == default
    hints = get_type_hints(target_of(method).__init__)  # type: ignore[misc]
    assert (compat is False) is ("quirks" in hints)
    own = {field.name for field in fields(default)}
    assert own == node.keys() - {"_target_", "official_compat"}


@pytest.mark.parametrize("method", METHODS)
def test_settings_are_frozen_and_by_keyword(method: str) -> None:
    kind = settings_of(method)
    settings = kind(max_steps=10, **NEEDED.get(method, {}))
    with pytest.raises(FrozenInstanceError):
        settings.max_steps = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        kind(10)  # type: ignore[misc]
    hints = get_type_hints(kind, include_extras=True)
    assert not [name for name, hint in hints.items() if hint in (float, list)], "without a range"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("lr", -1.0, r"method\.lr=-1\.0: expected a number greater than 0"),
        ("lr", 0.0, r"method\.lr=0\.0: expected a number greater than 0"),
        ("lr", "fast", r"method\.lr='fast': expected float"),
        ("lr", True, r"method\.lr=True: expected float"),
        ("momentum", 1.5, r"method\.momentum=1\.5: expected a number less than or equal to 1"),
        ("warmup_steps", -1, r"method\.warmup_steps=-1: .* greater than or equal to 0"),
        ("seg_after", 2.0, r"method\.seg_after=2\.0: expected a number less than or equal to 1"),
        ("contrast_after", -0.1, r"method\.contrast_after=-0\.1: .* equal to 0, or null"),
        ("scales", [], r"method\.scales=\[\]: expected a list of float, at least 1 of them$"),
        (
            "scales",
            [1.0, 0.0],
            r"method\.scales=\[1\.0, 0\.0\]: expected a number greater than or equal to 0.05",
        ),
        ("energy_kernel", "box", r"method\.energy_kernel='box': expected .*'lattice'"),
        ("max_steps", 0, r"method\.max_steps=0: .* greater than or equal to 1"),
        (
            "low_threshold",
            0.9,
            r"method: expected low_threshold <= high_threshold, got 0\.9 > 0\.7",
        ),
    ],
)
def test_words_are_the_same_everywhere(key: str, value: object, words: str) -> None:
    with pytest.raises(WSSSError, match=words) as python:
        ToCoSettings(**{"max_steps": 10, key: value})
    text = str(value) if isinstance(value, list) else value
    line = ["method=toco", "data=voc", "data.root=unset", f"method.{key}={text}"]
    with pytest.raises(WSSSError, match=words) as command:
        compose_config(line)
    assert str(python.value) == str(command.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_are_finite(value: float) -> None:
    with pytest.raises(WSSSError, match=r"method\.lr=(nan|inf): expected a finite number"):
        ToCoSettings(max_steps=10, lr=value)


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [
        (Positive, [1e-9, 5], [0, -1]),
        (NotNegative, [0, 3.5], [-1e-9]),
        (Fraction, [0, 0.5, 1], [-0.1, 1.1]),
        (BelowOne, [0, 0.99], [1, -0.1]),
        (Share, [0.1, 1], [0, 1.1]),
        (Count, [1, 7], [0, -3]),
        (Number, [0, 7], [-1]),
        (Some[Count], [[1], (2, 3)], [[], [0]]),
    ],
)
def test_ranges_have_their_ends(kind: Any, inside: list[Any], outside: list[Any]) -> None:
    for value in inside:
        given = check_value("key", value, kind)
        assert given == (tuple(value) if isinstance(value, list) else value)
    for value in outside:
        with pytest.raises(WSSSError, match="key="):
            check_value("key", value, kind)


# ---- quirks --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TwoQuirks(QuirkSwitches):
    first: bool = False
    second: bool = False


class Quirky:
    def __init__(self, *, settings: Settings, quirks: TwoQuirks) -> None:
        self.settings, self.quirks = settings, quirks


@pytest.mark.parametrize(
    ("node", "on"),
    [
        ({}, set()),
        ({"official_compat": True}, {"first", "second"}),
        ({"quirks": {"second": True}}, {"second"}),
        ({"quirks": None}, set()),
        ({"official_compat": True, "quirks": {"first": False}}, {"second"}),
    ],
)
def test_keys_of_a_node_become_quirks(node: dict[str, Any], on: set[str]) -> None:
    made = Quirky(**arguments_of(Quirky, {"_target_": "x", "max_steps": 5, **node}))
    assert {f.name for f in fields(made.quirks) if getattr(made.quirks, f.name)} == on
    assert made.settings == Settings(max_steps=5)
    assert parameters_of(Quirky).keys() == {"max_steps", "official_compat", "quirks"}


def test_all_quirks_are_on_and_off() -> None:
    assert all(getattr(OFFICIAL, field.name) for field in fields(Quirks))
    assert not any(getattr(CORRECTED, field.name) for field in fields(Quirks))
    with pytest.raises(WSSSError, match=r"method\.quirks\.box_in_pixels=1: expected bool"):
        Quirks(box_in_pixels=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_a_mistyped_quirk_names_the_nearest(method: str) -> None:
    quirks = get_type_hints(target_of(method).__init__).get("quirks")  # type: ignore[misc]
    needed = [f"method.{key}={value}" for key, value in NEEDED.get(method, {}).items()]
    line = [f"method={method}", "data=voc", "data.root=unset", *needed]
    if not is_dataclass(quirks):
        with pytest.raises(WSSSError, match=r"method\.quirks: unknown key"):
            compose_config([*line, "+method.quirks.any=true"])
        return
    first = fields(quirks)[0].name
    with pytest.raises(WSSSError, match=rf"unknown key; did you mean method\.quirks\.{first}\?"):
        compose_config([*line, f"+method.quirks.{first}x=true"])
    config = plain(compose_config([*line, f"+method.quirks.{first}=true"]))
    assert config["method"]["quirks"] == {first: True}


@pytest.mark.parametrize("method", METHODS)
def test_a_mistyped_name_in_python_names_the_nearest(method: str) -> None:
    settings = settings_of(method)
    needed = NEEDED.get(method, {})
    with pytest.raises(WSSSError, match=r"method\.max_step: .* did you mean method\.max_steps\?"):
        settings(max_steps=1, max_step=1, **needed)
    made = settings(max_steps=1, **needed)
    assert pickle.loads(pickle.dumps(made)) == made == replace(made, max_steps=1)


def test_a_mistyped_quirk_in_python_names_the_nearest() -> None:
    with pytest.raises(WSSSError, match=r"method\.quirks\.box_in_pixel: .*box_in_pixels\?"):
        Quirks(box_in_pixel=True)  # type: ignore[call-arg]


def test_flips_of_the_views_follow_the_switches() -> None:
    """Q2, Q3 of ToCo act in the training transform."""
    for override, official in (
        ("seed=1", False),
        ("+method.quirks.box_in_pixels=true", False),
        ("+method.quirks.separate_flips=true", True),
        ("method.official_compat=true", True),
    ):
        config = plain(compose_config(["method=toco", "data=voc", "data.root=unset", override]))
        assert config["data"]["train_transform"]["official_compat"] is official, override


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("budget.warmup_steps=99999", r"method\.warmup_steps=99999: longer than the run"),
        ("~method._target_", r"method\._target_ is missing"),
        ("~data._target_", r"data\._target_ is missing"),
        ("+method.num_classes=3", r"method\.num_classes: unknown key"),
        ("method.high_threshold=nan", r"method\.high_threshold=nan: expected a finite number"),
        ("+method.quirks.separate_flips=null", r"method\.quirks\.separate_flips=None: expected"),
    ],
)
def test_methods_are_checked_before_data(line: str, words: str) -> None:
    with pytest.raises(WSSSError, match=words):
        prepare(compose_run(["method=toco", "data=voc", "data.root=/no/such/place", line]))


@pytest.mark.parametrize("method", sorted({*METHODS} - {"segmenter"}))
def test_convolutional_encoders_are_refused_by_name(method: str) -> None:
    settings = settings_of(method)(max_steps=9999, **NEEDED.get(method, {}))
    with pytest.raises(WSSSError, match=r"backbone\.name=mobilenet_v3_small: .* has none; give"):
        target_of(method)(
            backbone=ConvBackbone(name="mobilenet_v3_small"), num_classes=2, settings=settings
        )


def test_quirks_that_change_nothing_change_no_hash() -> None:
    def hashed(*lines: str) -> str:
        return config_hash(compose_run(["method=toco", "data=minivoc", *lines]))

    assert hashed() == hashed("+method.quirks={}") == hashed("+method.quirks.box_in_pixels=false")
    compat = hashed("method.official_compat=true")
    assert compat == hashed("method.official_compat=true", "+method.quirks.box_in_pixels=true")
    assert len({hashed(), compat, hashed("+method.quirks.box_in_pixels=true")}) == 3
