"""Draw what each search of the league found: the expected best of so many trials.

``python tools/league_searches.py [SEARCHES] [OUT]`` reads the committed records and writes the
figure of ``docs/league.md``.
"""

import argparse
import json
from pathlib import Path

import vl_convert

from wsss.comparison.search import expected_bests
from wsss.comparison.searches import read_searches

SEARCHES = Path("experiments/league_minivoc/searches")
OUT = Path("docs/images/league_searches.svg")
NAMES = {  # the study of a search: its row in the league
    "toco-minivoc": "ToCo",
    "more-minivoc": "MoRe",
    "clustercam-minivoc": "ClusterCAM",
    "getam-minivoc": "GETAM",
    "mctformer-minivoc": "MCTformer+",
    "tkp_pcl-minivoc": "TKP-PCL",
    "toco-minivoc-cam-only": "plain CAM",
    "few_shot-minivoc": "28 pixel masks",
    "segmenter-minivoc": "full supervision",
    "mctformer-minivoc-second": "MCTformer+",
    "tkp_pcl-minivoc-second": "TKP-PCL",
    "cam_only-minivoc-second": "plain CAM",
}
PARTS = ("maps of first stages", "segmentation", "second stages, full supervision")  # its frames


def rows(folder: Path) -> list[dict[str, object]]:
    """Read the searches below a folder: a row a number of trials, values in per cent."""
    found = read_searches(sorted(path.parent for path in folder.rglob("search.json")))
    return [
        {
            "search": NAMES[search.study],
            "part": _part(search.method, search.objective),
            "trials": best.trials,
            "value": round(100 * best.value, 2),
            "low": round(100 * best.low, 2),
            "high": round(100 * best.high, 2),
        }
        for search in found.values()
        for best in expected_bests(search.values)
    ]


def _part(method: str, objective: str) -> str:
    if method.startswith("segmenter"):
        return PARTS[2]
    return PARTS[0] if objective == "seed_miou" else PARTS[1]


def figure(values: list[dict[str, object]]) -> str:
    """Draw the rows, a frame a part; give the SVG."""
    axis = {"grid": False}
    x = {"field": "trials", "type": "quantitative", "title": "trials",
         "scale": {"type": "log", "base": 2},
         "axis": axis | {"values": [1, 2, 4, 8, 16]}}  # fmt: skip
    y = {"field": "value", "type": "quantitative", "axis": axis, "scale": {"zero": False},
         "title": "expected best mIoU on the holdout (%)"}  # fmt: skip
    color = {"field": "search", "type": "nominal", "title": None, "sort": list(NAMES.values()),
             "scale": {"scheme": "tableau10"}, "legend": {"symbolOpacity": 1}}  # fmt: skip
    dash = {key: color[key] for key in ("field", "type", "title", "sort")}
    specification = {
        "data": {"values": values},
        "facet": {"field": "part", "type": "nominal", "title": None, "sort": list(PARTS)},
        "spec": {
            "width": 190,
            "height": 190,
            "layer": [
                {"mark": {"type": "area", "opacity": 0.12},
                 "encoding": {"x": x, "color": color, "y": y | {"field": "low"},
                              "y2": {"field": "high"}}},
                {"mark": {"type": "line", "strokeWidth": 1.5},
                 "encoding": {"x": x, "y": y, "color": color, "strokeDash": dash}},
            ],
        },
        "config": {"background": "white"},
    }  # fmt: skip
    svg: str = vl_convert.vegalite_to_svg(json.dumps(specification), allowed_base_urls=[])
    return svg


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("searches", nargs="?", type=Path, default=SEARCHES)
    parser.add_argument("out", nargs="?", type=Path, default=OUT)
    arguments = parser.parse_args()
    arguments.out.write_text(figure(rows(arguments.searches)))
