"""Figures of the benchmark as a summary for JSON and as a table."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from wsss.core.errors import WSSSError
from wsss.core.files import write_atomically

UNEVEN = 0.2  # share by which two halves of a side may differ without a warning
ORDER = ("forward", "cam", "pseudo_labels", "energy", "backward", "optimiser", "rest")


def summarise(
    config: dict[str, Any], results: Sequence[Sequence[dict[str, Any]]]
) -> dict[str, Any]:
    """Add medians, images per second, and ratios to ours step by step.

    Args:
        config: arguments of the benchmark.
        results: one entry a group that ran in turn, ours first, as
            :func:`wsss.benchmark.steps.run_in_turn` returns them.

    Returns:
        What ``out=`` gets. A ratio is the median over pairs of neighbouring steps, beside it the
        least and the largest of them; ours of another group is compared and not listed.
    """
    sides = [_side(config, results[0][0])]
    for ours, *others in results:
        for other in others:
            side = _side(config, other)
            pairs = zip(other["steps"], ours["steps"], strict=True)
            ratios = [theirs["seconds"] / own["seconds"] for theirs, own in pairs]
            side["ratio"] = median(ratios)
            side["ratio_range"] = [min(ratios), max(ratios)]
            side["ratio_memory"] = other["peak_memory_bytes"] / ours["peak_memory_bytes"]
            side["largest_loss_difference"] = _loss_difference(other["losses"], ours["losses"])
            side["uneven"] = max(_unevenness(other), _unevenness(ours))
            sides.append(side)
    return {"arguments": config, "machine": results[0][0]["machine"], "sides": sides}


def _side(config: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Add figures of one side alone."""
    side = {key: value for key, value in result.items() if key != "machine"}
    fastest = min(result["steps"], key=lambda step: step["seconds"])
    side["fastest_seconds"] = fastest["seconds"]
    side["median_seconds"] = median(_seconds(result))
    side["images_per_second"] = config["batch_size"] / fastest["seconds"]
    # phases of one step, so that they add up to it
    side["fastest_phases"] = fastest["phases"]
    return side


def _seconds(result: dict[str, Any]) -> list[float]:
    return [step["seconds"] for step in result["steps"]]


def _unevenness(result: dict[str, Any]) -> float:
    """Give by which share the medians of the first and of the second half of steps differ."""
    seconds = _seconds(result)
    if len(seconds) < 2:
        return 0.0
    middle = (len(seconds) + 1) // 2  # the step in the middle counts in the first half
    first, second = median(seconds[:middle]), median(seconds[middle:])
    return max(first, second) / min(first, second) - 1


def _loss_difference(losses: dict[str, float], reference: dict[str, float]) -> float:
    """Find the largest difference of losses that both computed; relative for those above 1."""
    return max(
        abs(losses[name] - value) / max(abs(value), 1.0)
        for name, value in reference.items()
        if name in losses
    )


def figures_file(out: str | None) -> Path | None:
    """Check that ``out`` is a file that can be written, before any time is spent.

    Raises:
        WSSSError: it is a folder, or its folder is missing or not writable.
    """
    if not out:
        return None
    path = Path(out)
    if path.is_dir():
        raise WSSSError(f"out={out}: is a folder; name a .json file")
    if not os.access(path.parent, os.W_OK):
        raise WSSSError(f"out={out}: the folder {path.parent} is missing or not writable")
    return path


def write_figures(path: Path, summary: Mapping[str, Any]) -> None:
    """Write what was measured, and say where."""
    write_atomically(path, f"{json.dumps(summary, indent=2)}\n".encode())
    print(f"figures in {path}")


def show(summary: dict[str, Any], console: Console) -> None:
    """Print phases of ours beside the official way, then the single savings."""
    arguments, sides = summary["arguments"], summary["sides"]
    shown = [side for side in sides if len(side["switched_off"]) != 1]
    title = (
        f"{arguments['method']}, {arguments['backbone']}, {arguments['image_size']} px, "
        f"batch {arguments['batch_size']}, {arguments['dtype']}, stage {arguments['stage']}"
    )
    machine = summary["machine"]
    table = Table(
        title=title,
        caption=f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; "
        "phases of the fastest step",
    )
    table.add_column("phase")
    for side in shown:
        table.add_column(f"{side['name']}, s", justify="right")
        table.add_column("share", justify="right")
    if len(shown) == 2:
        table.add_column("saved, s", justify="right")
    own = {phase for side in shown for phase in side["fastest_phases"]} - {*ORDER}
    for phase in [*ORDER[:-1], *sorted(own), ORDER[-1]]:
        values = [side["fastest_phases"].get(phase, 0.0) for side in shown]
        if not any(values):
            continue
        cells = [phase.replace("_", " ")]
        for side, value in zip(shown, values, strict=True):
            cells += [f"{value:.3f}", f"{value / side['fastest_seconds']:.0%}"]
        if len(shown) == 2:
            cells.append(f"{values[1] - values[0]:+.3f}")
        table.add_row(*cells)
    table.add_section()
    for label, key, scale, form in (
        ("step, fastest", "fastest_seconds", 1, ".3f"),
        ("step, median", "median_seconds", 1, ".3f"),
        ("images/s", "images_per_second", 1, ".3f"),
        ("peak memory, GiB", "peak_memory_bytes", 2**-30, ".2f"),
    ):
        table.add_row(label, *[c for s in shown for c in (f"{s[key] * scale:{form}}", "")])
    console.print(table)
    for side in shown[1:]:
        least, largest = side["ratio_range"]
        line = (
            f"{side['name']}: {side['ratio']:.2f} times the time of ours (median of "
            f"{len(side['steps'])} pairs, {least:.2f} to {largest:.2f}), "
            f"{side['ratio_memory']:.2f} times the memory"
        )
        if arguments["dtype"] == "float32":  # in bfloat16 the order of operations shows
            line += f"; losses differ by at most {side['largest_loss_difference']:.1e}"
        console.print(line)
    for side in sides[1:]:
        if side["uneven"] > UNEVEN:
            console.print(
                f"warning: {side['name']}: the two halves of a side differ by {side['uneven']:.0%};"
                " something else was running: repeat it, or give more repeats"
            )
    _show_single(summary, console)


def _show_single(summary: dict[str, Any], console: Console) -> None:
    """Print our step with one saving switched off at a time."""
    ours = summary["sides"][0]
    single = [side for side in summary["sides"] if len(side["switched_off"]) == 1]
    if not single:
        return
    table = Table(
        title="one saving switched off at a time",
        caption="relative to ours, median over pairs of steps",
    )
    for name in ("saving switched off", "step, s", "more, s", "time", "memory"):
        table.add_column(name, justify="left" if name.startswith("saving") else "right")
    for side in sorted(single, key=lambda side: -side["ratio"]):
        table.add_row(
            side["switched_off"][0],
            f"{side['median_seconds']:.3f}",
            f"{side['median_seconds'] - ours['median_seconds']:+.3f}",
            f"x {side['ratio']:.2f}",
            f"x {side['ratio_memory']:.2f}",
        )
    console.print(table)
