"""The training loop, with checkpoints from which a run continues exactly."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pico.composites import Composites, Pool, batches
from pico.holdout import evaluate
from pico.muon import Muon
from pico.network import Pupil, seed_positions, whiten_patches
from pico.objectives import distillation, objective
from pico.stages import Stage
from pico.teacher import Teacher


def optimisers(model: Pupil) -> list[torch.optim.Optimizer]:
    """Make Muon for the blocks' matrices and AdamW for all else."""
    matrices = [p for p in model.vit.blocks.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.05},
        {"params": [p for p in rest if p.ndim != 2], "weight_decay": 0.0},
    ]
    return [Muon(matrices, 1e-3, 0.05), torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))]


def export(model: Pupil, path: Path) -> str:
    """Write the backbone as float16 safetensors, whole or not at all; give the sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().half().contiguous() for k, v in model.vit.state_dict().items()}
    part = path.with_suffix(".part")
    save_file(state, part)
    os.replace(part, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Trainer:
    """A run of the stages, with checkpoints from which it continues exactly."""

    def __init__(
        self,
        pool: Pool,
        stages: list[Stage],
        out: Path,
        seed: int = 0,
        device: str = "cpu",
        holdout: dict[str, Tensor] | None = None,
        workers: int = 0,
        weights: Path | None = None,
        compiled: bool = False,
        teacher: Teacher | None = None,
    ) -> None:
        """Build model, optimisers and average; see :meth:`run`.

        Args:
            pool: what to paste.
            stages: the schedule.
            out: folder for checkpoint and log.
            seed: of weights and images.
            device: torch device.
            holdout: fixed batch to evaluate on.
            workers: loader processes.
            weights: where to export the averaged backbone at each evaluation and at the end.
            compiled: use ``torch.compile``.
            teacher: fine-tuned; a stage ``distil`` needs it.
        """
        torch.manual_seed(seed)
        out.mkdir(parents=True, exist_ok=True)
        self.pool, self.stages, self.out, self.seed = pool, stages, out, seed
        self.device, self.workers, self.weights = device, workers, weights
        self.teacher = teacher
        self.model = Pupil(len(pool.cutouts))
        sample = next(
            batches(Composites(pool, stages[0], seed + 99), min(256, stages[0].images), 0, 0)
        )
        whiten_patches(self.model.vit, sample["image"])
        seed_positions(self.model.vit)
        self.model.to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimisers = optimisers(self.model)
        self.holdout = holdout and {k: v.to(device) for k, v in holdout.items()}
        self.forward = torch.compile(self.model) if compiled else self.model
        self.stage_index = self.step = self.done = 0
        self.seconds = 0.0
        self.stopping = False

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "place": (self.stage_index, self.step, self.done),
            "seconds": self.seconds,
            "stages": [asdict(s) for s in self.stages],
        }
        torch.save(state, self.out / "last.part")
        os.replace(self.out / "last.part", self.out / "last.pt")

    def resume(self) -> None:
        """Continue from the checkpoint of an earlier run."""
        state = torch.load(self.out / "last.pt", map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.stage_index, self.step, self.done = state["place"]
        self.seconds = state["seconds"]

    def log(self, **values: object) -> None:
        """Append one JSON line to ``log.jsonl`` and print it."""
        line = json.dumps({"images": self.done, "seconds": round(self.seconds), **values})
        with (self.out / "log.jsonl").open("a") as handle:
            handle.write(line + "\n")
        print(line, flush=True)

    def train_step(self, batch: dict[str, Tensor], stage: Stage) -> dict[str, float]:
        """Make one update and give the loss terms."""
        batch = {k: v.to(self.device) for k, v in batch.items()}
        grid = stage.grids[self.step % len(stage.grids)]
        tiles = math.isqrt(batch["classes"].shape[1])
        out = self.forward(batch["image"], batch["window"], batch["patches"], grid, tiles)
        terms = objective(out, batch, stage.name)
        if stage.name == "distil":
            targets = self.teacher.targets(batch["image"], batch["classes"])
            terms |= distillation(self.model.teacher, out, targets)
        self.model.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = stage.rate(self.step)
            optimiser.step()
        # A short memory at first, or the random start would linger in the average.
        keep = min(0.998, (1 + self.done / stage.batch) / (10 + self.done / stage.batch))
        with torch.no_grad():
            mine, theirs = list(self.average.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(mine, theirs, 1 - keep)
        return {k: float(v.detach()) for k, v in terms.items()}

    def report(self, stage: Stage, means: dict[str, float]) -> None:
        """Log the mean losses, evaluate the average, save and export."""
        scores = evaluate(self.average, self.holdout) if self.holdout else {}
        self.save()
        if self.weights:
            export(self.average, self.weights)
        short = {k: round(v, 4) for k, v in means.items()}
        marks = {f"map_{k.split('_')[1]}": round(v, 4) for k, v in scores.items()}
        self.log(stage=stage.name, step=self.step, lr=stage.rate(self.step), **short, **marks)

    def run(self, every: float = 240.0, limit: int | None = None) -> None:
        """Train until the schedule ends, a signal comes or ``limit`` steps are made.

        Args:
            every: seconds between reports and checkpoints.
            limit: steps to make at most.
        """
        while self.stage_index < len(self.stages) and not self.stopping:
            stage = self.stages[self.stage_index]
            data = Composites(self.pool, stage, self.seed + 1000 * (self.stage_index + 1))
            sums: dict[str, float] = {}
            count, last, tick = 0, time.monotonic(), time.monotonic()
            for batch in batches(data, stage.batch, self.step, self.workers):
                for k, v in self.train_step(batch, stage).items():
                    sums[k] = sums.get(k, 0.0) + v
                self.step, self.done, count = self.step + 1, self.done + stage.batch, count + 1
                now = time.monotonic()
                self.seconds, tick = self.seconds + now - tick, now
                if limit is not None:
                    limit -= 1
                    self.stopping = self.stopping or limit <= 0
                if now - last > every or self.stopping:
                    self.report(stage, {k: v / count for k, v in sums.items()})
                    sums, count, last = {}, 0, now
                if self.stopping:
                    return
            self.stage_index, self.step = self.stage_index + 1, 0
            self.report(stage, {k: v / max(1, count) for k, v in sums.items()})
