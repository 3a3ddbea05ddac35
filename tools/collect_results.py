"""Copy the results of runs to one folder, without the places where they lay on a machine.

    python tools/collect_results.py RUN_FOLDER ... experiments/league_minivoc/results

Each becomes ``NAME.json``. For :program:`wsss compare` with intervals the runs themselves are
needed: what each image adds (``images.npz``) is not copied.
"""

import argparse
import json
from pathlib import Path


def collect(runs: list[Path], out: Path) -> None:
    """Write ``out/NAME.json`` for each run folder, with paths relative to the folder of all."""
    out.mkdir(parents=True, exist_ok=True)
    for run in runs:
        results = json.loads((run / "results.json").read_text())
        root = results["config"]["runs_dir"]
        results["config"]["runs_dir"] = "runs"
        text = json.dumps(results, sort_keys=True).replace(f"{root}/", "")
        (out / f"{run.name}.json").write_text(text + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    collect(arguments.runs, arguments.out)
