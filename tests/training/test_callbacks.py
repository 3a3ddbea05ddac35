"""What a training writes beside its checkpoints, on a disk that is full."""

import csv
from pathlib import Path

import pytest

from wsss.core.errors import WSSSError
from wsss.training.callbacks import MetricsFile


def test_metrics_are_written(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path, name="logs")
    log.log_metrics({"train/loss": 0.5}, step=3)
    log.save()
    (path,) = tmp_path.glob("logs/version_0/metrics.csv")
    assert list(csv.DictReader(path.open())) == [{"step": "3", "train/loss": "0.5"}]


def test_metrics_on_a_full_disk_name_their_file(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path, name="logs")
    log.log_metrics({"train/loss": 0.5}, step=3)
    path = tmp_path / "logs" / "version_0" / "metrics.csv"
    path.symlink_to("/dev/full")
    with pytest.raises(WSSSError) as caught:
        log.save()
    assert str(caught.value) == (
        f"{path}: cannot be written (No space left on device); make room there, or choose another "
        "folder"
    )
