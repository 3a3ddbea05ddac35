"""Arguments of ``lightning.Trainer`` as keys: all of them, typed, and what a run decides itself."""

import inspect
import json
from typing import Any

import lightning
import pytest
from omegaconf import DictConfig, OmegaConf

from wsss.core.errors import WSSSError
from wsss.runs.compose import compose_config, compose_run
from wsss.runs.config import check_config, plain
from wsss.runs.trainer_settings import GIVEN_BY_RUN, ends, limits, with_trainer_keys

ARGUMENTS = inspect.signature(lightning.Trainer).parameters
#: given by the key after it, and no argument of older releases
ELSEWHERE = {"max_steps", "strategy"}


@pytest.fixture(scope="module")
def config() -> DictConfig:
    return OmegaConf.create(plain(compose_config(["data=minivoc"])))


def test_every_argument_is_a_key_without_plus() -> None:
    keys = [name for name in ARGUMENTS if name not in {*GIVEN_BY_RUN, *ELSEWHERE}]
    defaults = {name: ARGUMENTS[name].default for name in keys}
    line = [f"trainer.{key}={json.dumps(value)}" for key, value in defaults.items()]
    found = compose_run(["data=minivoc", *line])["trainer"]
    assert {key: found[key] for key in keys} == defaults
    assert {"fast_dev_run", "limit_train_batches", "overfit_batches"} < {*keys}


def test_a_known_key_is_no_addition() -> None:
    line = ["trainer.devices=1", "trainer=cpu", "trainer.max_time=null", "+trainer.benchmark=true"]
    assert with_trainer_keys(line) == [*line[:2], "++trainer.max_time=null", line[3]]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fast_dev_run", "maybe", "trainer.fast_dev_run='maybe': expected bool or int"),
        ("limit_train_batches", 1.5, "trainer.limit_train_batches=1.5"),
        ("limit_val_batches", -1, "trainer.limit_val_batches=-1"),
        ("gradient_clip_algorithm", "most", "expected 'norm' or 'value' or null"),
        ("max_time", "soon", "written as DD:HH:MM:SS"),
        ("benchmark", 3, "trainer.benchmark=3: expected bool"),
        ("limit_train_batche", 1, "did you mean trainer.limit_train_batches?"),
        *((key, None, f"trainer.{key}: {text}") for key, text in GIVEN_BY_RUN.items()),
    ],
)
def test_wrong_values_and_what_a_run_decides_are_named(
    key: str, value: Any, message: str, config: DictConfig
) -> None:
    changed = OmegaConf.merge(config, {"trainer": {key: value}})
    with pytest.raises(WSSSError) as refused:
        check_config(changed)  # type: ignore[arg-type]
    assert message in str(refused.value)


def test_the_budget_decides_the_steps() -> None:
    with pytest.raises(WSSSError, match=r"^trainer\.max_steps=3: .* give budget\.max_steps="):
        compose_config(["data=minivoc", "trainer.max_steps=3"])


def test_what_limits_a_run() -> None:
    whole: dict[str, Any] = {
        "fast_dev_run": False,
        "limit_train_batches": 1.0,
        "limit_val_batches": 0,
        "overfit_batches": 0.0,
        "max_epochs": -1,
    }
    assert limits(whole) == ends(whole) == []
    assert limits({"fast_dev_run": 1}) == ["trainer.fast_dev_run=1"]
    assert limits({"limit_train_batches": 1}) == ["trainer.limit_train_batches=1"]
    assert limits({"limit_val_batches": 0.5}) == ["trainer.limit_val_batches=0.5"]
    assert limits({"overfit_batches": 1.0}) == ["trainer.overfit_batches=1.0"]
    assert ends({"max_epochs": 3}) == ["trainer.max_epochs=3"]
