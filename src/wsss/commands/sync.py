"""``wsss sync``: upload what runs logged to W&B while they were offline."""

import subprocess
import sys
from pathlib import Path

from wsss.core.errors import WSSSError


def main(arguments: list[str]) -> int:
    """Run the verb."""
    folders = [Path(argument) for argument in arguments or ["runs"]]
    for folder in folders if arguments else []:
        if not folder.is_dir():
            raise WSSSError(f"{folder}: no such folder; give run or study folders")
    from wsss.runs.wandb import has_key, import_wandb, offline_runs

    waiting = offline_runs(folders)
    where = ", ".join(map(str, folders))
    if not waiting:
        print(f"{where}: nothing waits to be uploaded")
        return 0
    import_wandb("wsss sync", mend="")
    if not has_key():
        raise WSSSError(
            f"{len(waiting)} offline runs wait below {where}, and there is no W&B key; log in with "
            "`wandb login`, or set WANDB_API_KEY"
        )
    # sessions of a resumed run go one after the other: W&B sorts them by their start
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *map(str, waiting)]
    subprocess.run(command, check=False)
    if left := offline_runs(folders):  # its exit status is 0 even when the server refuses all
        raise WSSSError(
            f"{len(left)} of {len(waiting)} runs were not uploaded, see above; the same command "
            f"tries again (first: {left[0]})"
        )
    return 0
