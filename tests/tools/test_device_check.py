"""The device check, dry on the CPU: every kind of part, and how a part may end."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# the tools are scripts, not an installed package
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import device_check
from device_check import PAPERS, Part, Record, Report, Settings, parts

from wsss.core.errors import WSSSError

TINY = Settings("cpu", True, None)


def good(settings: Settings, seconds: float) -> Iterator[Record]:
    yield {"device": settings.device}
    yield {"seconds": seconds}


def failing(settings: Settings, seconds: float) -> Iterator[Record]:
    yield {"first": 1}
    raise WSSSError("out of patience\nin two lines")


def killed(settings: Settings, seconds: float) -> Iterator[Record]:
    yield {"first": 1}
    os.kill(os.getpid(), signal.SIGKILL)


def endless(settings: Settings, seconds: float) -> Iterator[Record]:
    yield {"first": 1}
    time.sleep(600)


def test_a_part_that_fails_or_hangs_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_check, "GRACE", 0.0)
    report = Report(tmp_path / "out.json", TINY)
    for work, seconds in ((failing, 60.0), (killed, 60.0), (endless, 10.0), (good, 60.0)):
        report.run(Part(work.__name__, seconds, work), TINY, seconds)
    written = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert {name: part["state"] for name, part in written.items()} == {
        "failing": "failed", "killed": "failed", "endless": "cut", "good": "done",
    }  # fmt: skip
    assert written["failing"]["error"] == "WSSSError: out of patience"
    assert written["killed"]["error"] == "its process was killed"
    assert written["good"]["records"] == [{"device": "cpu"}, {"seconds": 60.0}]
    # what was measured before the end is kept
    assert all(written[name]["records"] == [{"first": 1}] for name in ("failing", "killed"))
    assert written["endless"]["records"] in ([], [{"first": 1}])  # a busy machine may not get there
    assert written["endless"]["seconds"] < 60


def test_a_step_gets_its_share_of_the_ceiling_of_its_type(tmp_path: Path) -> None:
    report = Report(tmp_path / "out.json", TINY)
    step = {"dtype": "bfloat16", "flops": 300, "seconds": 2.0}
    assert report.with_share(step) == step
    rates = {"float32": 100.0, "bfloat16": 600.0}
    ceilings = [{"dtype": name, "flops_per_second": rate} for name, rate in rates.items()]
    report.content["parts"]["ceilings"] = {"records": ceilings}
    assert report.with_share(step)["share_of_ceiling"] == 0.25
    assert "share_of_ceiling" not in report.with_share({"dtype": "bfloat16", "seconds": 1.0})


@pytest.mark.parametrize("method", PAPERS)
def test_steps_are_of_the_papers_size_and_batch(method: str) -> None:
    config = Settings("cuda", False, None).config(method, "float32")
    sizes = {"toco": (448, 2), "clustercam": (448, 9), "getam": (256, 4), "tkp_pcl": (384, 16),
             "mctformer": (448, 32), "more": (448, 4), "weclip": (320, 4)}  # fmt: skip
    assert (config.image_size, config.batch_size) == sizes[method]
    assert config.num_classes == 20


def test_all_parts_together_fit_into_eight_minutes() -> None:
    *others, last = parts(Settings("cuda", False, None))
    assert last.name == "pico"
    assert last.seconds == device_check.SECONDS == 480
    every_step = sum(part.seconds for part in others if not part.name.startswith("compiled"))
    assert every_step <= 400  # then compiled ones, for as long as they may


def test_crf_is_timed_alone_without_the_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise WSSSError("the package is missing")

    every = device_check.scenes
    small = lambda *given: {"MiniVOC": every(*given)["MiniVOC"]}  # noqa: E731
    monkeypatch.setattr(device_check, "import_pydensecrf", missing)
    monkeypatch.setattr(device_check, "scenes", small)
    (record,) = device_check.crf(TINY, 60)
    assert record["pydensecrf"] == "the package is missing"
    assert record["ours_seconds"] > 0


@pytest.mark.slow
def test_a_dry_run_measures_every_kind_of_part(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    chosen = ["ceilings", "step toco", "evaluation", "compiled tkp_pcl", "pico"]
    arguments = ["--tiny", "--device", "cpu", "--seconds", "900", "--out", str(out)]
    assert device_check.main([*arguments, "--only", *chosen]) == 0
    written = json.loads(out.read_text())
    records: dict[str, Any] = {name: part["records"] for name, part in written["parts"].items()}
    assert list(records) == chosen
    assert {part["state"] for part in written["parts"].values()} == {"done"}
    assert [record["what"] for record in records["ceilings"]] == [
        "product bfloat16", "product float32", "product float32, TF32 allowed", "copy",
    ]  # fmt: skip
    sides = [(record["name"], record["dtype"]) for record in records["step toco"]]
    assert sides == [(side, dtype) for dtype in ("bfloat16", "float32")
                     for side in ("ours", "official way")]  # fmt: skip
    for record in records["step toco"]:
        assert record["images_per_second"] == pytest.approx(2 / record["seconds"])
        assert 0 < record["share_of_ceiling"] < 1
        assert record["peak_memory_bytes"] > 0
    assert [record["compile"] for record in records["compiled tkp_pcl"]] == ["eager", "eager"]
    assert [record["what"] for record in records["evaluation"]] == ["cams"] * 4 + ["evaluation"]
    assert "skipped" in records["pico"][0]
