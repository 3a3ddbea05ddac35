"""``wsss dashboard``: a study's W&B workspace, made of what its runs logged.

Panels are those that an ablation of weakly-supervised segmentation needs, as far as the study has
their numbers: nothing in a workspace points to a key that no run has. Runs are grouped by method
and by the settings that vary in the study, so a line or bar is the mean over seeds.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsss.comparison.compare import CompareArguments, compare
from wsss.comparison.entries import is_finished, logged_series
from wsss.comparison.grids import FORMATS, Grid
from wsss.comparison.tables import tables
from wsss.core.errors import WSSSError
from wsss.results.store import CONFIG_FILE, MAP_NAMES, RESULTS_FILE, read_results
from wsss.runs.folder import method_name
from wsss.runs.naming import read_config, varying
from wsss.runs.wandb import CONFUSION_COLUMNS, ID_FILE, numbers

if TYPE_CHECKING:
    import wandb_workspaces.workspaces as ws

SPECIFICATION_FILE = "dashboard.json"
#: what a group's line or bar shows: the mean of its runs, with a band of their deviation
OVER_SEEDS = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
SEGMENTATIONS = ("seg_miou", "seg_miou_crf", "seg_miou_ms", "seg_miou_ms_crf")
SEEDS = ("seed_miou", "seed_miou_holdout", "seed_miou_oracle", "seed_miou_predicted_labels")
#: title of a panel -> final numbers in it
FINALS = {
    "segmentation mIoU": SEGMENTATIONS,
    "CAM seed mIoU": SEEDS,
    "pseudo labels": (
        "pseudo_label_miou_ignored_as_background",
        "pseudo_label_miou_excluded",
        "pseudo_label_coverage",
    ),
    "image level": ("image_map", "image_f1"),
}
ERRORS = ("precision", "recall", "over", "under")
COSTS = ("train_wall_hours", "train_gpu_hours", "train_peak_memory_bytes")


@dataclass(frozen=True)
class LoggedRun:
    """What a run folder says about its W&B run.

    Attributes:
        folder: the run folder.
        config: resolved configuration.
        method: its short name.
        logged: keys of its history while it trained, such as ``train/ptc_loss``.
        splits: evaluated splits -> their entry in ``results.json``; none before the end.
        final: keys of its summary, such as ``final/val/seg_miou``.
        cost: what its training cost.
    """

    folder: Path
    config: dict[str, Any]
    method: str
    logged: list[str]
    splits: Mapping[str, Mapping[str, Any]]
    final: list[str]
    cost: Mapping[str, Any]


def read_runs(folder: Path) -> list[LoggedRun]:
    """Read all runs of a study, wherever they were logged.

    Raises:
        WSSSError: there is none.
    """
    runs = [_read_run(path.parent) for path in sorted(folder.glob(f"*/{CONFIG_FILE}"))]
    if not runs:
        raise WSSSError(
            f"{folder}: no runs there; give study=NAME and runs_dir=FOLDER as the study was run, "
            "and logger=wandb then to have its workspace"
        )
    return runs


def runs_of_wandb(runs: Iterable[LoggedRun]) -> list[LoggedRun]:
    """Give the runs of a study that were logged to W&B.

    Raises:
        WSSSError: they have logged nothing.
    """
    known = [run for run in runs if (run.folder / ID_FILE).is_file()]
    if known and not any(run.logged or run.final for run in known):
        raise WSSSError(
            f"{known[0].folder.parent}: no run there has logged anything to W&B; run the study "
            "with logger=wandb first, and give study=NAME and runs_dir=FOLDER as it was run"
        )
    return known


def _read_run(folder: Path) -> LoggedRun:
    config = read_config(folder / CONFIG_FILE)
    finished = is_finished(folder)
    results = read_results(folder / RESULTS_FILE) if finished else {"splits": {}}
    final = [*numbers(results["splits"]), *numbers({"cost": results.get("cost") or {}})]
    return LoggedRun(
        folder,
        config,
        method_name(config),
        sorted(logged_series(folder)),
        results["splits"],
        [f"final/{key}" for key, _ in final],
        results.get("cost") or {},
    )


def build_workspace(
    runs: Sequence[LoggedRun], *, name: str, project: str, entity: str
) -> "ws.Workspace":
    """Build the workspace of a study's runs; nothing is sent.

    Raises:
        WSSSError: wandb-workspaces is not installed.
    """
    ws, _ = _import_workspaces()
    varied = varying([run.config for run in runs])
    sections = [
        _section("Mean over seeds, 95 % intervals", _tables(runs, varied)),
        _section("Validation while training", _validation(runs)),
        _section("Final numbers", _finals(runs)),
        _section("CAM threshold curves", _curves(runs)),
        _section("Precision, recall, activation", _errors(runs)),
        *(_section(f"Losses of {method}", _losses(runs, method)) for method in _methods(runs)),
        _section("Learning rates", [_lines("learning rates", _logged(runs, "train/lr"))]),
        _section("Mixing scalars", [_lines("lambda", _logged(runs, "train/mixing_"))]),
        _section("Per class", _per_class(runs)),
        _section("Gallery", _gallery(runs)),
        _section("Settings against the result", _settings(runs, varied)),
        _section("Cost", _costs(runs)),
    ]
    studies = sorted({run.config["study"] for run in runs})
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[section for section in sections if section.panels],
        settings=ws.WorkspaceSettings(x_axis="trainer/global_step", max_runs=50),
        runset_settings=ws.RunsetSettings(
            filters=[ws.Config("study").isin(studies)],
            groupby=[ws.Config(key) for key in ("method_name", *_supervision(runs), *varied)],
        ),
    )


def _supervision(runs: Sequence[LoggedRun]) -> list[str]:
    """Give the key that W&B has the supervision under, where a study has more than one."""
    protocols = [split.get("protocol") or {} for run in runs for split in run.splits.values()]
    found = {protocol.get("supervision") for protocol in protocols}
    return ["supervision"] if len(found) > 1 else []


def _import_workspaces() -> tuple[Any, Any]:
    """Import workspaces and their panels.

    Raises:
        WSSSError: the package is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise WSSSError(
            "wsss dashboard needs the package wandb-workspaces (pip install wandb-workspaces)"
        ) from error
    return workspaces, panels


def _section(name: str, panels: Iterable[Any]) -> Any:
    ws, _ = _import_workspaces()
    return ws.Section(name=name, panels=[p for p in panels if p is not None], is_open=True)


def _logged(runs: Iterable[LoggedRun], *starts: str) -> list[str]:
    """Give the keys of the runs' histories that begin like that."""
    return sorted({key for run in runs for key in run.logged if key.startswith(starts)})


def _final(runs: Sequence[LoggedRun], split: str, names: Iterable[str]) -> list[str]:
    """Give the keys of those final numbers that some run has, in the order given."""
    known = {key for run in runs for key in run.final}
    return [key for key in (f"final/{split}/{name}" for name in names) if key in known]


def _methods(runs: Iterable[LoggedRun]) -> list[str]:
    return sorted({run.method for run in runs})


def _splits(runs: Iterable[LoggedRun]) -> list[str]:
    return list(dict.fromkeys(split for run in runs for split in run.splits))


def _having(runs: Iterable[LoggedRun], split: str, key: str) -> dict[str, Any]:
    """Give what some run of the split has under a key of ``results.json``; the first one's."""
    found = (run.splits[split].get(key) for run in runs if split in run.splits)
    return next((one for one in found if one), {})


def _lines(title: str, keys: Sequence[str], x: str = "trainer/global_step") -> Any:
    _, panels = _import_workspaces()
    return panels.LinePlot(title=title, x=x, y=list(keys), **OVER_SEEDS) if keys else None


def _bars(title: str, keys: Sequence[str]) -> Any:
    _, panels = _import_workspaces()
    return panels.BarPlot(title=title, metrics=list(keys), **OVER_SEEDS) if keys else None


def compared(
    runs: Sequence[LoggedRun], varied: Sequence[str]
) -> Iterator[tuple[list[str], list[Grid] | WSSSError]]:
    """Compare the finished runs as ``wsss compare`` does, one method at a time where keys vary.

    Args:
        runs: of a study.
        varied: keys by which they differ.

    Yields:
        Methods, and their numbers and differences or why there are none.
    """
    finished = [run for run in runs if run.splits]
    methods = _methods(finished)
    for chosen in ([[one] for one in methods] if varied else [methods]) if finished else []:
        members = [run for run in finished if run.method in chosen]
        by = ",".join(["method", *varying([run.config for run in members])])
        try:
            found = compare([run.folder for run in members], CompareArguments(by=by))
        except WSSSError as error:
            yield chosen, error
        else:
            yield chosen, [grid for one in found for grid in tables(one)[:2]]


def _tables(runs: Sequence[LoggedRun], varied: Sequence[str]) -> list[Any]:
    """Write the tables of ``wsss compare`` over the finished runs, one a method where keys vary."""
    _, panels = _import_workspaces()
    layout = panels.Layout(w=24, h=12)
    return [
        panels.MarkdownPanel(
            markdown=f"no table: {found}"
            if isinstance(found, WSSSError)
            else FORMATS[".md"](found),
            layout=layout,
        )
        for _, found in compared(runs, varied)
    ]


def _validation(runs: Sequence[LoggedRun]) -> list[Any]:
    """Show how runs went: numbers for watching, of the protocol that is used while training."""
    return [_lines(key, [key]) for key in _logged(runs, "val/")]


def _finals(runs: Sequence[LoggedRun]) -> list[Any]:
    return [
        _bars(f"{split}: {title}", _final(runs, split, names))
        for split in _splits(runs)
        for title, names in FINALS.items()
    ]


def _curves(runs: Sequence[LoggedRun]) -> list[Any]:
    """Draw seed scores over the threshold; the top of the mIoU curve is the oracle."""
    return [
        _lines(f"{split}: {name}", [f"curve/{split}/seed_{name}"], f"curve/{split}/threshold")
        for split in _splits(runs)
        for name in ("miou", "precision", "recall")
        if _having(runs, split, "seed_curve")
    ]


def _errors(runs: Sequence[LoggedRun]) -> list[Any]:
    return [
        _bars(f"{split}: {title}", _final(runs, split, (f"maps/{kind}/{e}" for e in ERRORS)))
        for split in _splits(runs)
        for kind, title in MAP_NAMES.items()
    ]


def _losses(runs: Sequence[LoggedRun], method: str) -> list[Any]:
    """Draw each named loss of a method, and whatever else it alone logs."""
    runs_of_method = [run for run in runs if run.method == method]
    keys = _logged(runs_of_method, "train/")
    return [_lines(key, [key]) for key in keys if not key.startswith(("train/lr", "train/mixing_"))]


def _per_class(runs: Sequence[LoggedRun]) -> list[Any]:
    _, panels = _import_workspaces()
    found: list[Any] = []
    for split in _splits(runs):
        found.append(panels.WeavePanelSummaryTable(table_name=f"tables/{split}/per_class"))
        for kind in _having(runs, split, "confusion"):
            if kind in MAP_NAMES:
                found.append(_confusion(f"confusion/{split}/{kind}", f"{split}: {MAP_NAMES[kind]}"))
    return found


def _confusion(key: str, title: str) -> Any:
    _, panels = _import_workspaces()
    chart = panels.CustomChart.from_table(
        f"{key}_table",  # where wandb.plot_table puts it
        chart_fields={name: name for name in CONFUSION_COLUMNS},
        chart_strings={"title": title},
    )
    chart.chart_name = "wandb/confusion_matrix/v1"
    return chart


def _gallery(runs: Sequence[LoggedRun]) -> list[Any]:
    _, panels = _import_workspaces()
    drawn = any(run.splits and run.config["gallery"] > 0 for run in runs)
    return [
        panels.MediaBrowser(title=title, media_keys=[key], num_columns=2)
        for title, key in (("overlays", "gallery/images"), ("sheets", "gallery/sheets"))
        if drawn
    ]


def _settings(runs: Sequence[LoggedRun], varied: Sequence[str]) -> list[Any]:
    """Set the varied settings against the most final mIoU that the runs have."""
    _, panels = _import_workspaces()
    keys = [
        key
        for split in _splits(runs)[:1]
        for key in _final(runs, split, [*SEGMENTATIONS[::-1], *SEEDS])
    ]
    if not keys or not varied:
        return []
    columns = [panels.Config(key) for key in varied] + [panels.SummaryMetric(keys[0])]
    return [
        panels.ParallelCoordinatesPlot(
            title="settings",
            columns=[panels.ParallelCoordinatesPlotColumn(metric=column) for column in columns],
        ),
        panels.ParameterImportancePlot(with_respect_to=keys[0]),
        panels.RunComparer(diff_only="split"),
    ]


def _costs(runs: Sequence[LoggedRun]) -> list[Any]:
    training = [_bars(name, _final(runs, "cost", [name])) for name in COSTS]
    evaluation = [
        _bars(f"{split}: seconds an image", _final(runs, split, ["cost/seconds_per_image"]))
        for split in _splits(runs)
    ]
    return training + evaluation
