"""Copy the results of runs and searches, without the places where they lay on a machine.

    python tools/collect_results.py RUN_FOLDER ... experiments/league_minivoc/results
    python tools/collect_results.py SEARCH_FOLDER ... experiments/league_minivoc/searches

A run becomes ``NAME.json``. For :program:`wsss compare` with intervals the runs themselves are
needed: what each image adds (``images.npz``) is not copied. A search becomes
``NAME/search.json``, which :program:`wsss tune --show` and :program:`wsss report` read.
"""

import argparse
import json
from pathlib import Path

from wsss.results.search import SEARCH_FILE


def collect(folders: list[Path], out: Path) -> None:
    """Write a file below ``out`` for each folder, with paths relative to the folder of all runs."""
    for folder in folders:
        if (folder / SEARCH_FILE).is_file():
            path, text = out / folder.name / SEARCH_FILE, _search(folder.absolute())
        else:
            path, text = out / f"{folder.name}.json", _results(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def _results(run: Path) -> str:
    results = json.loads((run / "results.json").read_text())
    root = results["config"]["runs_dir"]
    results["config"]["runs_dir"] = "runs"
    return json.dumps(results, sort_keys=True).replace(f"{root}/", "")


def _search(folder: Path) -> str:
    search = json.loads((folder / SEARCH_FILE).read_text())
    own = ("runs_dir=", "hydra.searchpath=")
    search["overrides"] = [each for each in search["overrides"] if not each.startswith(own)]
    return json.dumps(search, indent=1).replace(f"{folder.parents[1]}/", "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    collect(arguments.folders, arguments.out)
