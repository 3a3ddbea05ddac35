"""``KEY=VALUE`` arguments: text is literal, all else has its type."""

from dataclasses import dataclass, field

import pytest
from omegaconf import MISSING

from wsss.core.arguments import parse_arguments, split_arguments
from wsss.core.errors import WSSSError
from wsss.core.ranges import Count, FolderName


@dataclass
class Arguments:
    root: str = MISSING
    out: str | None = None
    study: FolderName = "study"
    jobs: Count | None = None
    splits: list[str] | None = None
    trust: list[str] = field(default_factory=list)
    fast: bool = False


TEXTS = [
    "007",
    "#x",
    "1e3",
    "null",
    "true",
    "[a, b]",
    "a: b",
    "${oc.env:HOME}",
    "???",
    "'a'",
    "a=b",
]


@pytest.mark.parametrize("text", [*TEXTS, "", "0x1F", "~", "2026-01-01", " a "])
def test_text_is_literal(text: str) -> None:
    chosen, others = parse_arguments(Arguments, [f"root={text}"])
    assert chosen == Arguments(root=text)
    assert others == []


@pytest.mark.parametrize("text", [text for text in TEXTS if text != "null"])
def test_text_that_may_be_absent_is_literal(text: str) -> None:
    assert parse_arguments(Arguments, ["root=r", f"out={text}"])[0].out == text


def test_null_is_none_where_text_may_be_absent() -> None:
    assert parse_arguments(Arguments, ["root=r", "out=null"])[0].out is None
    assert parse_arguments(Arguments, ["root=r", "out=a", "out=null"])[0].out is None
    assert parse_arguments(Arguments, ["root=r", "out=null", "out=a"])[0].out == "a"


def test_all_else_has_its_type() -> None:
    given = ["root=r", "jobs=3", "splits=[a,b]", "trust=[c]", "fast=true"]
    chosen, _ = parse_arguments(Arguments, given)
    assert chosen == Arguments("r", None, "study", 3, ["a", "b"], ["c"], True)
    assert parse_arguments(Arguments, ["root=r", "jobs=null"])[0].jobs is None


def test_text_has_its_rules_and_must_be_there() -> None:
    with pytest.raises(WSSSError, match=r"study='007/1': expected .*the name of one folder"):
        parse_arguments(Arguments, ["root=r", "study=007/1"])
    with pytest.raises(WSSSError, match="root is missing"):
        parse_arguments(Arguments, ["out=a"])
    with pytest.raises(WSSSError, match=r"jobs=007x: expected .*"):
        parse_arguments(Arguments, ["root=r", "jobs=007x"])


def test_literal_text_beside_paths() -> None:
    assert split_arguments(Arguments, ["run", "--root", "007"])[1].root == "007"


def test_keys_that_cannot_be_changed_name_those_that_can() -> None:
    with pytest.raises(WSSSError) as caught:
        parse_arguments(Arguments, ["root=r", "method.lr=-1"], passed_on=("eval", "data"))
    assert str(caught.value) == (
        "method.lr: cannot be changed here; give root, out, study, jobs, splits, trust, fast, or a "
        "key of the run's configuration that begins with eval or data"
    )
    with pytest.raises(WSSSError, match="rot: unknown key; did you mean root"):
        parse_arguments(Arguments, ["rot=r"], passed_on=("eval", "data"))


@pytest.mark.parametrize("value", ["!!python/x", "[", "{a: b: c}", "*a", "\x00"])
def test_what_is_no_yaml_is_one_line(value: str) -> None:
    with pytest.raises(WSSSError, match=r"^jobs=.*: (cannot be read|expected)") as caught:
        parse_arguments(Arguments, ["root=r", f"jobs={value}"])
    assert "\n" not in str(caught.value)
