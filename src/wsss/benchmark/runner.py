"""One side of the benchmark: build, make a batch, time steps. Runs in a process of its own."""

import inspect
import platform
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra.utils import get_class, instantiate
from torch import Tensor
from torch.utils.data import default_collate

from wsss.benchmark.arguments import with_config_dir
from wsss.core.devices import choose_device
from wsss.core.errors import WSSSError
from wsss.core.stopwatch import Stopwatch, device_name, peak_memory
from wsss.methods.base import Batch, WSSSModule
from wsss.runs.compose import compose_run
from wsss.runs.folder import build_module

#: method -> settings without which its configuration does not compose
REQUIRED = {"weclip": ["method.text=random"], "clip_cam": ["method.text=random"]}


@dataclass(frozen=True)
class Side:
    """One way of computing the step.

    Attributes:
        name: as printed.
        target: class that replaces the method's own, or None for the method as it trains.
        off: the savings that are switched off.
    """

    name: str
    target: str | None
    off: tuple[str, ...]


class TimedSide:
    """One way of computing, built and ready to be timed step by step.

    Args:
        config: fields of ``BenchmarkConfig``.
        side: which way of computing.

    Raises:
        WSSSError: no such device, out of GPU memory, a configuration that does not compose, a
            method that trains on masks.
    """

    def __init__(self, config: dict[str, Any], side: Side) -> None:
        if config["threads"]:
            torch.set_num_threads(config["threads"])
        self.config, self.side = config, side
        self.device = choose_device(config["device"])
        torch.manual_seed(config["seed"])
        self.module = build(config, side).to(self.device).train()
        self.batch = own_batch(config, self.module, self.device)
        self.module.phase = self.watch = Stopwatch(self.device)
        self.optimizer = self.module.optimizer(self.module.param_groups())
        self.losses: dict[str, float] = {}  # of the very first step
        self.steps: list[dict[str, Any]] = []

    def step(self) -> None:
        """Time one optimisation step.

        Raises:
            WSSSError: out of GPU memory.
        """
        try:
            self._step()
        except torch.cuda.OutOfMemoryError as error:
            raise WSSSError(
                f"{self.side.name}: out of GPU memory; lower batch_size or image_size"
            ) from error

    def _step(self) -> None:
        watch, half = self.watch, self.config["dtype"] == "bfloat16"
        number = 0 if self.config["stage"] == "before" else self.module.settings.max_steps - 1
        watch.reset()
        start = watch.now()
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            step = self.module.losses(self.batch, number)
        with watch("backward"):
            step.total.backward()
        with watch("optimiser"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        seconds = watch.now() - start
        self.losses = self.losses or {name: loss.item() for name, loss in step.losses.items()}
        # what no phase claims: token labels, crops and glue
        rest = seconds - sum(watch.seconds.values())
        self.steps.append({"seconds": seconds, "phases": {**watch.seconds, "rest": rest}})

    def result(self) -> dict[str, Any]:
        """Give seconds and phases of the steps that count, first losses, memory, the machine."""
        memory, kind = peak_memory(self.device)
        return {
            "name": self.side.name,
            "switched_off": list(self.side.off),
            "steps": self.steps[self.config["warmup"] :],
            "losses": self.losses,
            "peak_memory_bytes": memory,
            "peak_memory_kind": kind,
            "machine": {
                "device": device_name(self.device),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


class Worker:
    """The side of this process: opened, stepped and closed by calls from another one."""

    timed: TimedSide

    @classmethod
    def open(cls, config: dict[str, Any], side: Side) -> None:
        """Build the side; see :class:`TimedSide`."""
        cls.timed = TimedSide(config, side)

    @classmethod
    def step(cls) -> None:
        """Time one step."""
        cls.timed.step()

    @classmethod
    def result(cls) -> dict[str, Any]:
        """Give what was measured."""
        return cls.timed.result()


def saving_names(target: str) -> tuple[str, ...]:
    """Name what the class of an official way of computing can switch on."""
    return tuple(item.name for item in fields(get_class(target).savings))


def build(config: dict[str, Any], side: Side) -> WSSSModule:
    """Build the module of a side, with random weights drawn after the seed that is set."""
    # local crops keep the proportion of VOC's settings: 96 of 448 px, whole patches of 16
    local = max(16, round(config["image_size"] * 96 / 448 / 16) * 16)
    run = compose_run(
        with_config_dir(
            [
                f"method={config['method']}",
                "data=voc",
                "data.root=unset",
                f"backbone={config['backbone']}",
                "backbone.weights=random",
                f"budget.crop_size={config['image_size']}",
                f"budget.local_size={local}",
                *REQUIRED.get(config["method"], []),
            ],
            config["config_dir"],
        )
    )
    if side.target:
        run["method"]["_target_"] = side.target
    module = build_module(run, config["num_classes"])
    if side.target:
        on = {name: name not in side.off for name in saving_names(side.target)}
        official: Any = module
        official.savings = replace(official.savings, **on)
    return module


def make_batch(config: dict[str, Any], device: torch.device) -> Batch:
    """Make a random training batch: smooth images, every second padded.

    The shapes are those of ``wsss.data.views.toco.ToCoViews``, with a saliency map and numbers of
    the images; a method takes what it needs. Images show one to three classes in turn, or as many
    as ``pairs`` gives them.
    """
    size, count = config["image_size"], config["batch_size"]
    views = [_smooth_images(count, size) for _ in range(3)]
    boxes = torch.tensor([[0, size, 0, size]]).repeat(count, 1)
    boxes[1::2] = torch.tensor([size // 8, size - size // 8, 0, size - size // 16])
    for b, (r0, r1, c0, c1) in enumerate(boxes.tolist()):
        padding = torch.ones(size, size, dtype=torch.bool)
        padding[r0:r1, c0:c1] = False
        views[0][b, :, padding] = 0
    labels = torch.zeros(count, config["num_classes"])
    for b in range(count):
        shown = 1 + b % 3
        if config["pairs"] is not None:
            shown = config["pairs"] // count + (b < config["pairs"] % count)
        present = torch.randperm(config["num_classes"])[:shown]
        labels[b, present] = 1
    named = zip(("image", "view2", "local_view"), views, strict=True)
    saliency = torch.zeros(count, size, size, dtype=torch.uint8)
    saliency[:, size // 4 : -size // 4, size // 4 : -size // 4] = 1
    batch = {**dict(named), "labels": labels, "box": boxes, "saliency": saliency}
    batch["index"] = torch.arange(count)
    return {name: value.to(device) for name, value in batch.items()}


def own_batch(config: dict[str, Any], module: WSSSModule, device: torch.device) -> Batch:
    """Make a batch of what the method's training views give.

    This is the random batch where it has all of their keys; else they are views of random pixels.

    Raises:
        WSSSError: the method trains on masks.
    """
    transform = instantiate(module.run_config["data"]["train_transform"], _convert_="all")
    if "mask" in inspect.signature(transform).parameters:
        raise WSSSError(f"method={config['method']}: trains on masks, its step is not timed")
    batch = make_batch(config, device)
    draws = np.random.default_rng(config["seed"])

    def view() -> Batch:
        made: Batch = transform(draws.integers(0, 256, (375, 500, 3), np.uint8), draws)
        return made

    views = [view()]
    if views[0].keys() <= batch.keys():
        return batch
    views += [view() for _ in range(config["batch_size"] - 1)]
    stacked = {name: value.to(device) for name, value in default_collate(views).items()}
    return {**stacked, "labels": batch["labels"]}


def _smooth_images(count: int, size: int) -> Tensor:
    """Draw normalised images (B, 3, H, W) of broad colour patches with a little grain."""
    patches = F.interpolate(torch.randn(count, 3, 8, 8), size=(size, size), mode="bicubic")
    return patches + 0.05 * torch.randn(count, 3, size, size)
