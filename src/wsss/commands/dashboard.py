"""``wsss dashboard``: a study as a local page, and as a W&B workspace."""

import json
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from wsss.core.arguments import parse_arguments
from wsss.core.errors import WSSSError
from wsss.core.files import write_atomically
from wsss.core.ranges import FolderName


@dataclass
class DashboardArguments:
    """Arguments of ``wsss dashboard``.

    Attributes:
        study: the study, a folder below ``runs_dir``.
        runs_dir: where runs lie.
        project: W&B project; null: the runs' own.
        entity: account or team; null: the runs' own, else the key's.
    """

    study: FolderName = MISSING
    runs_dir: str = "runs"
    project: str | None = None
    entity: str | None = None


def main(arguments: list[str]) -> int:
    """Run the verb."""
    chosen, _ = parse_arguments(DashboardArguments, arguments)
    folder = Path(chosen.runs_dir) / chosen.study
    if not folder.is_dir():
        raise WSSSError(f"{folder}: no such folder; expected runs_dir/study of finished runs")
    from wsss.comparison.dashboard import (
        SPECIFICATION_FILE,
        build_workspace,
        read_runs,
        runs_of_wandb,
    )
    from wsss.comparison.local import PAGE_FILE, local_dashboard
    from wsss.runs.config import LoggerConfig
    from wsss.runs.wandb import has_key

    everything = read_runs(folder)
    page = folder / PAGE_FILE
    write_atomically(page, local_dashboard(chosen.study, everything).encode())
    print(page)
    runs = runs_of_wandb(everything)
    if not runs:
        print("no run was logged to W&B (logger=wandb), so there is no workspace beside the page")
        return 0
    settings = runs[0].config["logger"]
    workspace = build_workspace(
        runs,
        name=chosen.study,
        project=chosen.project or settings.get("project") or LoggerConfig.project,
        entity=chosen.entity or settings.get("entity") or "",
    )
    specification = workspace._to_model().spec.model_dump(by_alias=True, exclude_none=True)
    path = folder / SPECIFICATION_FILE
    write_atomically(path, f"{json.dumps(specification, indent=2)}\n".encode())
    print(path)
    if not has_key():
        print("no W&B key, so nothing is uploaded; with one, the same command makes the workspace")
        return 0
    import wandb

    if not workspace.entity:
        workspace.entity = wandb.Api().default_entity
    workspace.save()
    print(workspace.url)
    return 0
