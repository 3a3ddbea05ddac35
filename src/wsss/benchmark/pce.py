"""``wsss benchmark part=pce``: TKP-PCL's contrast against the number of patches.

The loss is computed in two ways: in the closed form that trains, and from the matrix of all
cosines, as its definition reads. Both are timed forward and backward on random patches.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wsss.benchmark.arguments import PCEArguments, parse_pce
from wsss.benchmark.report import figures_file, write_figures
from wsss.core.devices import choose_device
from wsss.methods.tkp_pcl.patches import ConfidentSets, confident_sets, pce_loss


def main(arguments: Sequence[str]) -> int:
    """Time both ways, print the table, write ``out``."""
    config = parse_pce(arguments)
    out = figures_file(config.out)
    if config.threads:
        torch.set_num_threads(config.threads)
    summary = measure(config, choose_device(config.device))
    show(summary, Console())
    if out:
        write_figures(out, summary)
    return 0


def pce_matrix(embeddings: Tensor, sets: ConfidentSets) -> Tensor:
    """Give the loss of :func:`wsss.methods.tkp_pcl.patches.pce_loss` from all N x N cosines.

    Args:
        embeddings: F, (B, N, e).
        sets: H and L of each image and category.
    """
    unit = F.normalize(embeddings, dim=-1)
    cosines = unit @ unit.transpose(1, 2)  # (B, N, N)
    high, low = (part.to(cosines) for part in sets)  # (B, C, N)
    h, n_low = high.sum(-1), low.sum(-1)
    near = high @ cosines  # (B, C, N): sums of a set's cosines with every patch
    diagonal = (high * cosines.diagonal(dim1=1, dim2=2)[:, None]).sum(-1)
    alike = ((near * high).sum(-1) - diagonal) / (h * (h - 1)).clamp_min(1)
    unlike = (near * low).sum(-1) / (h * n_low).clamp_min(1)
    has_positive, has_negative = h >= 2, (h >= 1) & (n_low >= 1)
    total = 0.5 * (1 - alike) * has_positive + 0.5 * (1 + unlike) * has_negative
    valid = (has_positive | has_negative).sum(1).clamp_min(1)
    return (total.sum(1) / valid).mean()


def measure(config: PCEArguments, device: torch.device) -> dict[str, Any]:
    """Measure the seconds of every token count, and how they grow.

    Returns:
        What ``out=`` holds: ``rows`` and ``exponent`` of each way, the slope of log time over log
        tokens across the upper half of the counts, where fixed costs no longer show.
    """
    ways: dict[str, Callable[[Tensor, ConfidentSets], Tensor]] = {"closed form": pce_loss}
    if config.matrix:
        ways["all pairs"] = pce_matrix
    rows: list[dict[str, Any]] = []
    for tokens in config.tokens:
        patches, sets = make_patches(config, tokens, device)
        row: dict[str, Any] = {"tokens": tokens}
        for name, way in ways.items():
            row[name] = min(_seconds(way, patches, sets, device) for _ in range(config.repeats))
            row[f"{name}, value"] = way(patches, sets).item()
        rows.append(row)
    upper = rows[len(rows) // 2 :] if len(rows) > 2 else rows
    exponents = {}
    for name in ways:
        first, last = upper[0], upper[-1]
        growth = math.log(last[name] / first[name])
        exponents[name] = growth / math.log(last["tokens"] / first["tokens"])
    return {
        "arguments": asdict(config),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
        "exponents": exponents,
        "exponents_from": upper[0]["tokens"],
    }


def make_patches(
    config: PCEArguments, tokens: int, device: torch.device
) -> tuple[Tensor, ConfidentSets]:
    """Draw patches (B, N, e), and sets of mostly confident scores: every category has pairs."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, tokens)
    patches = torch.randn(*shape, config.width, generator=generator)
    scores = (12 * torch.randn(*shape, config.num_classes + 1, generator=generator)).softmax(-1)
    present = torch.ones(config.batch_size, config.num_classes + 1, dtype=torch.bool)
    sets = confident_sets(scores, present, config.epsilon)
    moved = ConfidentSets(sets.high.to(device), sets.low.to(device))
    return patches.to(device).requires_grad_(), moved


def _seconds(
    way: Callable[[Tensor, ConfidentSets], Tensor],
    patches: Tensor,
    sets: ConfidentSets,
    device: torch.device,
) -> float:
    """Seconds of one forward and backward pass."""
    start = _now(device)
    torch.autograd.grad(way(patches, sets), patches)
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def show(summary: dict[str, Any], console: Console) -> None:
    """Print milliseconds by token count, and the exponents."""
    ways = list(summary["exponents"])
    table = Table(
        title=f"patch contrastive error, forward and backward, ms ({summary['device']}, "
        f"{summary['threads']} threads)",
        title_justify="left",
    )
    table.add_column("patches", justify="right")
    for name in ways:
        table.add_column(name, justify="right")
    for row in summary["rows"]:
        table.add_row(str(row["tokens"]), *(f"{1000 * row[name]:.2f}" for name in ways))
    console.print(table)
    for name in ways:
        console.print(
            f"{name}: time grows with patches ^ {summary['exponents'][name]:.2f} "
            f"(from {summary['exponents_from']} patches on)"
        )
