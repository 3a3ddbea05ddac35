"""Nonsense as KEY=VALUE: refused in one line, or a configuration of a run in its folder."""

import json
import random
from pathlib import Path
from typing import Any

from fuzzing import STRANGE, outcome, seeds, text_altered

from wsss.core.errors import WSSSError
from wsss.runs.compose import compose_run
from wsss.runs.config import override_config
from wsss.runs.folder import run_folder

CASES = 150
METHODS = ["toco", "clustercam", "getam", "tkp_pcl", "segmenter_vit"]
TEXTS = [
    "", "null", "true", "-1", "0", "1", "1e9", "1e309", "nan", "-.inf", "0x10", "1_000", "007",
    "[]", "[1]", "[-1,2]", "[a]", "{}", "{a:1}", "{_target_:os.system}", "''", "' '", "'../../x'",
    "/etc", "a,b", "a=b", "[", "}", "'", '"', "\\", "${seed}", "${oc.env:SECRET}", "${nothing}",
    "${", "???", "choice(1,2)", "range(3)", "interval(0,1)", "glob(*)", "ä", "\u2028", "x" * 3000,
    "~", "!!python/x", "9" * 400, "[" * 50, "1:1", "2026-01-01", "@", "*a", "&a", "#x", "\t", "a b",
]  # fmt: skip


def settings_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """Values of a configuration by dotted key, groups included."""
    found = {}
    for key, value in config.items():
        found[f"{prefix}{key}"] = value
        if isinstance(value, dict):
            found |= settings_of(value, f"{prefix}{key}.")
    return found


def override(rng: random.Random, settings: dict[str, Any]) -> str:
    key = rng.choice(sorted(settings))
    value, kind = rng.choice(TEXTS), rng.random()
    if kind < 0.2:
        value = json.dumps(rng.choice(STRANGE))
    elif kind < 0.7 and type(settings[key]) in (int, float):
        value = str(settings[key] * rng.choice([-1, 0, 0.5, 1, 2, 1000]))
    elif kind < 0.7:
        value = rng.choice(["null", "true", "1", "2", "3", "0.5", "0.1", "text", "[1.0]", "[text]"])
    if rng.random() < 0.1:
        key = text_altered(rng, key)
    joint = rng.choice(["="] * 12 + ["", "==", ":", "+="])
    return f"{rng.choice([''] * 8 + ['+', '++', '~'])}{key}{joint}{value}"


def check_run(case: str, config: Any) -> None:
    """A configuration that is accepted can be stored, read back, and has a folder of its own."""
    assert not isinstance(config, WSSSError)
    runs = Path(config["runs_dir"])
    folder = run_folder(config)
    assert folder.parent.parent == runs, f"{case}: {folder} is not where runs are"
    assert ".." not in folder.relative_to(runs).parts, case
    text = json.dumps(config, default=str)
    assert "${" not in text.replace("${oc.env", ""), f"{case}: unresolved"


def test_fuzz_command_lines() -> None:
    bases = {method: [f"method={method}", "data=minivoc"] for method in METHODS}
    groups = {"experiments": None, "hydra": None}
    settings = {m: settings_of(compose_run(base)) | groups for m, base in bases.items()}
    accepted = 0
    for seed in seeds(CASES):
        rng = random.Random(seed)
        method = rng.choice(METHODS)
        line = [override(rng, settings[method]) for _ in range(rng.choice([1, 1, 2]))]
        case = f"seed {seed}: {method} {line!r}"[:600]
        found = outcome(case, lambda base=bases[method], line=line: compose_run([*base, *line]))
        if not isinstance(found, WSSSError):
            accepted += 1
            check_run(case, found)
    assert accepted > CASES // 20, "everything is refused: nothing was tried"


def test_fuzz_changes_of_a_stored_configuration() -> None:
    config = compose_run(["method=toco", "data=minivoc"])
    settings = settings_of(config)
    for seed in seeds(4 * CASES):
        rng = random.Random(seed)
        line = [override(rng, settings) for _ in range(rng.choice([1, 2]))]
        case = f"seed {seed}: {line!r}"[:600]
        found = outcome(case, lambda line=line: override_config(config, line))
        if not isinstance(found, WSSSError):
            check_run(case, found)
