"""``data.json``: what a run was trained and evaluated on, compared ever after.

A relative ``data.root`` means another folder elsewhere, and a folder changes. What is evaluated,
labelled or resumed later is compared with the hashes that the run left.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from wsss.core.errors import WSSSError
from wsss.core.failures import one_line
from wsss.core.files import read_json, write_atomically
from wsss.core.ranks import is_first_process
from wsss.core.records import Record, check_record
from wsss.runs.folder import Run, write_config

DATA_FILE = "data.json"
ROOT = "data.root"  # key beside the splits; no list has such a name
#: keys of the data that change nothing of what is read
HARMLESS = ("data.num_workers", "data.eval_batch_size", "data.seed")
#: key of a hash -> what it is of; beside the number of images
HASHES = {"list_sha256": "list", "labels_sha256": "labels", "masks_sha256": "masks"}

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Place(Record):
    """Where the data lay; an earlier version did not write it."""

    given: str
    absolute: str


class Fingerprint(Record):
    """What a split was; there may be no masks, and those of the training list are not opened."""

    images: int
    list_sha256: Hash
    labels_sha256: Hash
    masks_sha256: Hash | None


def write_origin(run: Run) -> None:
    """Write configuration and hashes of the data into the run folder."""
    write_config(run.folder, run.config)
    root = {"given": str(run.config["data"]["root"]), "absolute": str(run.data.root.absolute())}
    text = json.dumps({ROOT: root, **run.data.fingerprint()}, indent=2)
    write_atomically(run.folder / DATA_FILE, f"{text}\n".encode())


def check_origin(run: Run, splits: Sequence[str], *, with_masks: bool = True) -> None:
    """Compare splits with those that the run was trained and evaluated on.

    Where the user's own line changes the data, a difference is printed; else it is an error. What
    cannot be compared is named on stderr.

    Args:
        run: a loaded run.
        splits: lists that are about to be read.
        with_masks: compare masks too, where they decide a number.

    Raises:
        WSSSError: the data is not the run's, or what the run left of it is damaged.
    """
    stored = read_origin(run.home)
    _warn_of_unknown(run, stored, splits)
    known = [split for split in splits if split in stored]
    found = {split: _hashes(run, split, with_masks=with_masks) for split in known}
    forgiving = any(o.partition("=")[0] not in HARMLESS for o in run.overrides if o[:4] == "data")
    _settle(run, stored, found, forgiving=forgiving)


def check_resumed(run: Run) -> None:
    """Compare all splits before a run goes on.

    Raises:
        WSSSError: the data is not what the run began with, or what it left of it is damaged.
    """
    if run.checkpoint.is_file():
        stored, found = read_origin(run.home), run.data.fingerprint()
        _warn_of_unknown(run, stored, found)
        _settle(run, stored, found, forgiving=False)


def read_origin(folder: Path) -> dict[str, Any]:
    """Read a folder's ``data.json``; empty where there is none, as beside a lone checkpoint.

    Raises:
        WSSSError: it is damaged.
    """
    path = folder / DATA_FILE
    if not path.is_file():
        return {}
    damaged, mend = f"{path}: is damaged", "restore it, or remove it to go without"
    try:
        stored = read_json(path, mend)
    except WSSSError as error:
        raise WSSSError(f"{damaged}; {mend}") from error
    if not isinstance(stored, dict):
        raise WSSSError(f"{damaged}; {mend}")
    for key, value in stored.items():
        kind = Place if key == ROOT else Fingerprint
        check_record(kind, value, f"{damaged}: {one_line(key, 100)}", mend)
    return stored


def _warn_of_unknown(run: Run, stored: Mapping[str, Any], splits: Iterable[str]) -> None:
    """Name on stderr what no hash stands beside, so that nobody takes it for compared."""
    unknown = [split for split in splits if split not in stored]
    if not unknown or not is_first_process():
        return
    path = run.home / DATA_FILE
    why = f"{path} does not know {', '.join(unknown)}" if path.is_file() else f"there is no {path}"
    print(f"warning: not compared: {why}; see yourself that the data is the run's", file=sys.stderr)


def _hashes(run: Run, split: str, *, with_masks: bool) -> dict[str, Any]:
    """Take the hashes of a split as it is now; masks of the training list are never opened."""
    if not with_masks or split == run.data.train_split:
        dataset = run.data.unmasked_dataset(split)
        return {
            "list_sha256": run.data.list_hash(split),
            "labels_sha256": dataset.label_sha256(),
        }
    masked = run.data.eval_dataset(split)
    return {
        "list_sha256": run.data.list_hash(split),
        "labels_sha256": masked.label_sha256(),
        "masks_sha256": masked.mask_sha256(),
    }


def _settle(
    run: Run, stored: Mapping[str, Any], found: Mapping[str, Any], *, forgiving: bool
) -> None:
    """Say what differs between two sets of hashes."""
    different = []
    bare = [
        split
        for split, now in found.items()
        if now.get("masks_sha256") and stored.get(split, now)["masks_sha256"] is None
    ]
    if bare and is_first_process():
        text = f"masks of {', '.join(bare)}, which had none when the run was trained"
        print(f"warning: not compared: {text}", file=sys.stderr)
    for split, now in found.items():
        then = stored.get(split, {})
        words = [
            word
            for key, word in HASHES.items()
            if then.get(key) is not None and key in now and then[key] != now[key]
        ]
        if words:
            different.append(f"{split} has other {' and '.join(words)}")
    if not different:
        return
    root, now = stored.get(ROOT, {}).get("absolute"), str(run.data.root.absolute())
    place = f", which were in {one_line(root, 300)}" if root not in (None, now) else ""
    text = (
        f"{run.home / DATA_FILE}: the data in {now} is not the run's{place}: {'; '.join(different)}"
    )
    if forgiving:
        print(f"note: {text}")
        return
    raise WSSSError(f"{text}; give data.root=FOLDER with the run's data, or restore it")
