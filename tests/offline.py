"""What lies in the offline run files of W&B.

wandb reads these files only in its own binary, hence this reader.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32768
FULL, FIRST, LAST = 1, 2, 4


def offline_records(path: Path) -> Iterator[Any]:
    """Records of an offline run file: LevelDB's log format around protobuf messages."""
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


@dataclass
class Offline:
    """What the offline sessions of a run folder hold.

    Attributes:
        runs: the run's own records: name, group, tags, ...
        rows: history, values as JSON text.
        summary: latest value of each key, as JSON text.
        config: the same of the configuration.
        metrics: key -> key of its x axis, for those that say so.
        artifacts: their records.
        statistics: keys of system metrics.
        exits: exit codes.
    """

    runs: list[Any] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)
    summary: dict[str, str] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    statistics: set[str] = field(default_factory=set)
    exits: list[int] = field(default_factory=list)

    @property
    def keys(self) -> set[str]:
        """Every key of history and summary; of tables and pictures without what is inside."""
        names = {name for row in self.rows for name in row} | set(self.summary)
        return names | {name.rpartition(".")[0] for name in names if name.endswith("._type")}


def read_offline(folder: Path) -> Offline:
    """Everything of all offline sessions in a run folder."""
    found = Offline()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in offline_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                found.runs.append(record.run)
                found.config |= _items(record.run.config.update)
            elif kind == "config":
                found.config |= _items(record.config.update)
            elif kind == "history":
                found.rows.append(_items(record.history.item))
            elif kind == "summary":
                found.summary |= _items(record.summary.update)
            elif kind == "metric" and record.metric.step_metric:
                found.metrics[record.metric.name] = record.metric.step_metric
            elif kind == "artifact":
                found.artifacts.append(record.artifact)
            elif kind == "stats":
                found.statistics |= {item.key for item in record.stats.item}
            elif kind == "exit":
                found.exits.append(record.exit.exit_code)
    return found


def _items(items: Any) -> dict[str, str]:
    return {".".join(item.nested_key) or item.key: item.value_json for item in items}
