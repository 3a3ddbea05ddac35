"""``data.json``: what a run was trained and evaluated on, compared ever after.

A relative ``data.root`` means another folder elsewhere, and a folder changes. What is evaluated,
labelled or resumed later is compared with the hashes that the run left.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wsss.core.errors import WSSSError
from wsss.core.files import write_atomically
from wsss.runs.folder import Run, write_config

DATA_FILE = "data.json"
ROOT = "data.root"  # key beside the splits; no list has such a name
#: keys of the data that change nothing of what is read
HARMLESS = ("data.num_workers", "data.eval_batch_size", "data.seed")
HASHES = {"list_sha256": "list", "labels_sha256": "labels", "masks_sha256": "masks"}


def write_origin(run: Run) -> None:
    """Write configuration and hashes of the data into the run folder."""
    write_config(run.folder, run.config)
    root = {"given": str(run.config["data"]["root"]), "absolute": str(run.data.root.absolute())}
    text = json.dumps({ROOT: root, **run.data.fingerprint()}, indent=2)
    write_atomically(run.folder / DATA_FILE, f"{text}\n".encode())


def check_origin(run: Run, splits: Sequence[str], *, with_masks: bool = True) -> None:
    """Compare splits with those that the run was trained and evaluated on.

    Where the user's own line changes the data, a difference is printed; else it is an error.

    Args:
        run: a loaded run.
        splits: lists that are about to be read; those that the run did not know are left out.
        with_masks: compare masks too, where they decide a number.

    Raises:
        WSSSError: the data is not the run's.
    """
    stored = read_origin(run.home)
    known = [split for split in splits if split in stored]
    found = {split: _hashes(run, split, with_masks=with_masks) for split in known}
    forgiving = any(o.partition("=")[0] not in HARMLESS for o in run.overrides if o[:4] == "data")
    _settle(run, stored, found, forgiving=forgiving)


def check_resumed(run: Run) -> None:
    """Compare all splits before a run goes on.

    Raises:
        WSSSError: the data is not what the run began with.
    """
    if run.checkpoint.is_file():
        _settle(run, read_origin(run.home), run.data.fingerprint(), forgiving=False)


def read_origin(folder: Path) -> dict[str, Any]:
    """Read a folder's ``data.json``; empty where there is none, as beside a lone checkpoint.

    Raises:
        WSSSError: it is damaged.
    """
    path = folder / DATA_FILE
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WSSSError(f"{path}: is damaged; restore it, or remove it to go without") from error
    if not isinstance(stored, dict) or not all(isinstance(v, dict) for v in stored.values()):
        raise WSSSError(f"{path}: is damaged; restore it, or remove it to go without")
    return stored


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
    place = f", which were in {root}" if root not in (None, now) else ""
    text = (
        f"{run.home / DATA_FILE}: the data in {now} is not the run's{place}: {'; '.join(different)}"
    )
    if forgiving:
        print(f"note: {text}")
        return
    raise WSSSError(f"{text}; give data.root=FOLDER with the run's data, or restore it")
