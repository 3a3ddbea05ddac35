import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from wsss.tracking import has_key, log_results, make_wandb_logger, run_id

wandb = pytest.importorskip("wandb")

BLOCK = 32768
FULL, FIRST, LAST = 1, 2, 4


@pytest.fixture(autouse=True)
def _no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def offline_records(path: Path) -> Iterator[Any]:
    """Records of an offline run file: LevelDB's log format around protobuf messages.

    wandb reads these files only in its own binary, hence this reader.
    """
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, record = 7, b""
    while position < len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        part = data[position + 7 : position + 7 + length]
        position += 7 + length
        record = part if kind in (FULL, FIRST) else record + part
        if kind in (FULL, LAST) and record:
            yield wandb_internal_pb2.Record.FromString(record)


def history(folder: Path) -> list[dict[str, str]]:
    """History rows (values as JSON text) of all offline runs in a run folder."""
    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in offline_records(path):
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {
                        ".".join(item.nested_key) or item.key: item.value_json
                        for item in record.history.item
                    }
                )
    return rows


def test_offline_run_holds_config_losses_table_and_gallery(tmp_path: Path) -> None:
    folder = tmp_path / "toco-minivoc-s0"
    gallery = folder / "gallery"
    gallery.mkdir(parents=True)
    Image.new("RGB", (32, 32), (200, 30, 30)).save(gallery / "sheet_00.png")
    config = {"logger": {"project": "wsss-test"}, "study": "unit", "seed": 7}
    logger = make_wandb_logger(config, folder)
    for step in range(3):
        logger.log_metrics({"train/ptc_loss": 0.5 - step / 10}, step=step)
    per_class = {"class": ["background", "cat"], "seed_iou": [0.9, 0.4]}
    results = {"splits": {"val": {"seed_miou": 0.65, "seg_miou": None, "per_class": per_class}}}
    log_results(logger, results, gallery)
    logger.experiment.finish()
    wandb.teardown()  # ends the writing process, so that the file is complete

    rows = history(folder)
    losses = [float(row["train/ptc_loss"]) for row in rows if "train/ptc_loss" in row]
    assert losses == pytest.approx([0.5, 0.4, 0.3])
    tables = [key for row in rows for key in row if key.startswith("val/per_class")]
    assert tables
    tables_on_disk = list(folder.glob("wandb/offline-run-*/files/media/table/val/*.table.json"))
    assert json.loads(tables_on_disk[0].read_text())["data"] == [["background", 0.9], ["cat", 0.4]]
    assert list(folder.glob("wandb/offline-run-*/files/media/images/*.png"))
    text = b"".join(path.read_bytes() for path in folder.glob("wandb/offline-run-*/*.wandb"))
    assert b"wsss-test" in text
    assert b"seed_miou" in text
    assert run_id(folder).encode() in text


def test_the_id_stays_with_the_folder(tmp_path: Path) -> None:
    first = run_id(tmp_path / "a")
    assert run_id(tmp_path / "a") == first
    assert run_id(tmp_path / "b") != first


def test_a_key_is_found_in_the_environment_or_netrc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_key()
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text("machine example.org login user password x\n")
    assert not has_key()
    (home / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (home / ".netrc").chmod(0o600)
    assert has_key()
    (home / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_key()
