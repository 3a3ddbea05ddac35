r"""Measure and check all that wsss computes on a GPU, in one command of at most eight minutes.

    python tools/device_check.py --out device.json

needs no network. Each part runs in a process of its own, with a share of the time; what it has
measured is in the file a moment later, so that a run that is cut short keeps what it has. A part
that fails or takes too long is recorded, and the next one begins. docs/speed.md says how to run it
on a machine that is lent for minutes.

* ``ceilings``: matrix products and copies, the most that the device gives.
* ``step METHOD``: a training step at the paper's size and batch, in bfloat16 and float32, ours and
  then the official way (`wsss.benchmark`): images a second, peak memory, share of the ceiling.
* ``crf``: our dense CRF beside pydensecrf on a core, at 21 and 81 classes.
* ``evaluation``: CAMs of every method, and a whole evaluation, in images a second.
* ``tests``: the tests that need a device (`tests/test_device.py`).
* ``compiled METHOD``: our step again with ``trainer.compile``.
* ``pico``: the pretraining of ViT-Pico for the time that remains, where its cut-outs are at hand.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from wsss.benchmark.arguments import BenchmarkConfig
from wsss.benchmark.crf import compare_crfs, scenes
from wsss.benchmark.runner import REQUIRED, Side, TimedSide, make_batch
from wsss.benchmark.steps import groups
from wsss.core.devices import choose_device
from wsss.core.errors import WSSSError
from wsss.core.files import first_line, write_atomically
from wsss.core.modes import evaluating
from wsss.core.stopwatch import Stopwatch, device_name
from wsss.evaluation.evaluator import evaluate
from wsss.evaluation.protocol import Protocol
from wsss.maps.refine.dense_crf import CRF_PRESETS, import_pydensecrf
from wsss.maps.refine.mean_field import mean_field
from wsss.runs.compose import compose_run
from wsss.runs.folder import build_data, build_module
from wsss.training.trainer import accelerate

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480.0  # of a whole run
GRACE = 5.0  # seconds in which a part may end after its time
#: method -> the experiment with the paper's settings, and its encoder
PAPERS = {
    "toco": ("toco/voc_vitb", "vit_base"),
    "clustercam": ("clustercam/voc_deits", "deit_small"),
    "getam": ("getam/voc_vitb", "vit_base"),
    "tkp_pcl": ("tkp_pcl/voc", "vit_base"),
    "mctformer": ("mctformer/voc", "deit_small"),
    "more": ("more/voc", "vit_base"),
    "weclip": ("weclip/voc", "clip_base"),
}
# of a dry run; WeCLIP reads the last eight blocks
TINY = {"weclip": "vit_tiny_patch16_224.augreg_in21k"}
PRELOADED = ["wsss.training.trainer", "wsss.benchmark.crf", "wsss.benchmark.steps"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a run is asked for.

    Attributes:
        device: ``cuda`` or ``cpu``.
        tiny: sizes of seconds on a CPU, to see that everything runs.
        debs: folder with the packages of ViT-Pico's cut-outs, or None.
    """

    device: str
    tiny: bool
    debs: Path | None

    def config(self, method: str, dtype: str) -> BenchmarkConfig:
        """Give the benchmark's arguments for a method at the paper's size and batch."""
        experiment, backbone = PAPERS[method]
        lines = [f"+experiments={experiment}", "data.root=unset", *REQUIRED.get(method, [])]
        run = compose_run(lines)
        images = run["budget"]["global_batch_size"] // run["trainer"]["accumulate_grad_batches"]
        return BenchmarkConfig(
            method=method,
            backbone=TINY.get(method, "vit_pico") if self.tiny else backbone,
            image_size=64 if self.tiny else run["budget"]["crop_size"],
            batch_size=2 if self.tiny else images,
            num_classes=4 if self.tiny else 20,
            repeats=1 if self.tiny else 15,
            warmup=0 if self.tiny else 3,
            device=self.device,
            dtype=dtype,
        )


@dataclass(frozen=True)
class Part:
    """One part of the run.

    Attributes:
        name: in the file.
        seconds: its share of the time; the last part gets what remains.
        run: gives records; the seconds that it has are its second argument.
    """

    name: str
    seconds: float
    run: Callable[[Settings, float], Iterator[Record]]


def timed(
    work: Callable[[], Any], device: torch.device, *, repeats: int, warmup: int = 1
) -> list[float]:
    """Give the seconds of each repeat, after those that warm up."""
    watch, seconds = Stopwatch(device), []
    for _ in range(warmup + repeats):
        start = watch.now()
        work()
        seconds.append(watch.now() - start)
    return seconds[warmup:]


# ---- parts ---------------------------------------------------------------------------------------


def ceilings(settings: Settings, _: float) -> Iterator[Record]:
    """Measure products of random square matrices in each type, and copies on the device."""
    device, side = choose_device(settings.device), 256 if settings.tiny else 8192
    kinds = [*((name, "highest") for name in DTYPES), ("float32", "high")]
    for name, precision in kinds:
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
        seconds = median(timed(partial(torch.matmul, a, b), device, repeats=10, warmup=3))
        yield {
            "what": f"product {name}" + ", TF32 allowed" * (precision == "high"),
            "dtype": name if precision == "highest" else "tf32",
            "side": side,
            "flops_per_second": 2 * side**3 / seconds,
        }
    source = torch.randn(side * side // 2, device=device)
    target = torch.empty_like(source)
    seconds = median(timed(partial(target.copy_, source), device, repeats=10, warmup=3))
    moved = 2 * source.numel() * source.element_size()
    yield {"what": "copy", "bytes_per_second": moved / seconds}


def step(settings: Settings, seconds: float, method: str) -> Iterator[Record]:
    """Time ours and the official way in both types, one after the other on a quiet device."""
    ends = time.monotonic() + seconds
    for dtype in DTYPES:
        config = settings.config(method, dtype)
        for side in groups(config)[0]:
            yield _side(config, side, ends)


def compiled(settings: Settings, seconds: float, method: str) -> Iterator[Record]:
    """Time our step with compiled parts in both types; the first step compiles."""
    ends = time.monotonic() + seconds
    backend = "eager" if settings.tiny else "inductor"
    for dtype in DTYPES:
        yield _side(settings.config(method, dtype), Side("ours", None, ()), ends, backend)


def _side(config: BenchmarkConfig, side: Side, ends: float, backend: str | None = None) -> Record:
    """Time one side, until a moment at the latest, and count its operations."""
    record = {"name": side.name, "dtype": config.dtype, "compile": backend}
    sizes = ("method", "backbone", "image_size", "batch_size", "num_classes")
    record |= {name: getattr(config, name) for name in sizes}
    gc.collect()
    if config.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        timing = TimedSide(asdict(config), side)
        accelerate(timing.module, {"compile": backend})
        start = time.monotonic()
        timing.step()
        record["first_step_seconds"] = time.monotonic() - start
        for _ in range(config.warmup + config.repeats - 1):
            timing.step()
            if time.monotonic() > ends - GRACE and len(timing.steps) > config.warmup:
                break
        result = timing.result()
        if backend is None:
            record |= _operations(timing)
    except (WSSSError, torch.OutOfMemoryError) as error:  # the other type may fit
        return record | {"error": first_line(error)}
    took = [one["seconds"] for one in result["steps"]]
    phases = {
        name: median(one["phases"].get(name, 0.0) for one in result["steps"])
        for name in result["steps"][-1]["phases"]
    }
    return record | {
        "seconds": median(took),
        "seconds_range": [min(took), max(took)],
        "repeats": len(took),
        "images_per_second": config.batch_size / median(took),
        "phases": phases,
        "peak_memory_bytes": result["peak_memory_bytes"],
        "peak_memory_kind": result["peak_memory_kind"],
        "losses": result["losses"],
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _operations(timing: TimedSide) -> Record:
    """Count the operations of a step; none where the counter cannot follow, as in WeCLIP's."""
    try:
        with FlopCounterMode(display=False) as counter:
            timing.step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # its hooks refuse a gradient that is taken inside the step
        return {"flops_error": first_line(error)}
    return {"flops": counter.get_total_flops()}


def crf(settings: Settings, _: float) -> Iterator[Record]:
    """Time both dense CRFs on the same images; ours alone where pydensecrf is not installed."""
    device = choose_device(settings.device)
    for classes in (5,) if settings.tiny else (21, 81):
        config = asdict(
            BenchmarkConfig(part="crf", num_classes=classes - 1, device=settings.device)
        )
        config |= {"repeats": 1, "warmup": 0 if settings.tiny else 1, "batch_size": 1}
        try:
            import_pydensecrf()
        except WSSSError as error:
            for name, (image, prob) in scenes(classes - 1, 0).items():
                given = (torch.from_numpy(x)[None].to(device) for x in (image, prob))
                work = partial(mean_field, *given, CRF_PRESETS["toco"])
                seconds = median(timed(work, device, repeats=3))
                yield {"image": name, "classes": len(prob), "ours_seconds": seconds,
                       "pydensecrf": first_line(error)}  # fmt: skip
        else:
            yield from compare_crfs(config)["crfs"]


def evaluation(settings: Settings, _: float) -> Iterator[Record]:
    """Time the maps of each method at the paper's size, then a whole evaluation of ToCo."""
    device = choose_device(settings.device)
    for method in PAPERS:
        config = settings.config(method, "float32")
        timing = TimedSide(asdict(config), Side("ours", None, ()))
        batch = make_batch(asdict(config), device)
        given = batch["image"], batch["labels"]
        with evaluating(timing.module):
            seconds = timed(partial(timing.module.cams, *given), device, repeats=3)
        yield {"what": "cams", "method": method, "image_size": config.image_size,
               "batch_size": config.batch_size, "seconds": median(seconds),
               "images_per_second": config.batch_size / median(seconds)}  # fmt: skip
        del timing
    backbone = "vit_pico" if settings.tiny else "vit_base"
    run = compose_run(
        ["method=toco", "data=minivoc", f"backbone={backbone}", "backbone.weights=random"]
        + ["eval.crf_backend=torch", f"data.limit={2 if settings.tiny else 32}"]
        + (["data.num_workers=0", "budget.cam_size=32", "eval.seg_scales=[1.0]"] * settings.tiny)
    )
    data, protocol = build_data(run), Protocol(**run["eval"])
    result = evaluate(
        build_module(run, data.num_classes),
        data.eval_dataloader("val"),
        protocol,
        data.class_names,
        device=device,
    )
    cost = result["cost"]
    yield {
        "what": "evaluation",
        "method": "toco",
        "images": result["num_images"],
        "images_per_second": 1 / cost["seconds_per_image"],
        "phases": cost["phases"],
    }


def tests(settings: Settings, seconds: float) -> Iterator[Record]:
    """Run the tests of devices; on the CPU those of the tool that pretends to be one."""
    chosen = "gpu" if settings.device == "cuda" else "wait_is_named"
    command = [sys.executable, "-m", "pytest", "-q", "-k", chosen, "-p", "no:cacheprovider"]
    files = ["tests/test_device.py", "tests/maps/refine/test_mean_field.py"]
    done = subprocess.run(
        [*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
    )
    lines = done.stdout.strip().splitlines()
    yield {"command": " ".join(["pytest", "-k", chosen, *files]), "status": done.returncode,
           "summary": lines[-1] if lines else done.stderr[-500:],
           "failures": [line for line in lines if line.startswith("FAILED")]}  # fmt: skip


def pico(settings: Settings, seconds: float) -> Iterator[Record]:
    """Pretrain ViT-Pico and stop it in time; its folder beside the cut-outs resumes."""
    if settings.debs is None:
        yield {"skipped": "no --debs with the packages of the cut-outs"}
        return
    out = settings.debs / "pico"
    command = [sys.executable, str(ROOT / "tools/pico/pretrain.py"), "--debs", str(settings.debs)]
    command += ["--out", str(out), "--device", settings.device, "--resume", "--distil", "0"]
    command += ["--every", "20", "--workers", "8", "--weights", str(out / "vit_pico.safetensors")]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        text, _ = running.communicate(timeout=max(1.0, seconds - 20))
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGTERM)  # it saves
        text, _ = running.communicate(timeout=15)
    finally:
        running.kill()
    yield {"status": running.returncode, "reports": (text or "").strip().splitlines()[-20:]}


def parts(settings: Settings) -> list[Part]:
    """List the parts in the order of their worth."""
    return [
        Part("ceilings", 25, ceilings),
        *(Part(f"step {method}", 33, partial(step, method=method)) for method in PAPERS),
        Part("crf", 40, crf),
        Part("evaluation", 40, evaluation),
        Part("tests", 60, tests),
        *(Part(f"compiled {method}", 45, partial(compiled, method=method)) for method in PAPERS),
        Part("pico", SECONDS, pico),
    ]


# ---- the run -------------------------------------------------------------------------------------


def _serve(part: Part, settings: Settings, seconds: float, to: Connection) -> None:
    """Run a part in this process, a message a record; the last one is None, or an error."""
    try:
        for record in part.run(settings, seconds):
            to.send(record)
        to.send(None)
    except BaseException as error:  # whatever it is, the next part begins
        to.send(f"{type(error).__name__}: {first_line(error)}")
        raise


class Report:
    """The file: written anew, whole, after every record.

    Args:
        path: of the JSON file.
        settings: what was asked for.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.began = path, time.monotonic()
        self.content: dict[str, Any] = {
            "arguments": {**asdict(settings), "debs": settings.debs is not None},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"torch": torch.__version__, "python": platform.python_version()},
            "parts": {},
        }
        self.write()

    def write(self) -> None:
        """Write what is known."""
        self.content["seconds"] = round(time.monotonic() - self.began, 1)
        write_atomically(self.path, (json.dumps(self.content, indent=1) + "\n").encode())

    def run(self, part: Part, settings: Settings, seconds: float) -> None:
        """Run a part for so many seconds at most; record how it ended."""
        entry: dict[str, Any] = {"state": "cut", "budget": round(seconds, 1), "records": []}
        self.content["parts"][part.name] = entry
        start = time.monotonic()
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(part, settings, seconds, theirs))
        process.start()
        theirs.close()
        try:
            while ours.poll(max(0.0, start + seconds + GRACE - time.monotonic())):
                message = ours.recv()
                if not isinstance(message, dict):
                    entry["state"] = "done" if message is None else "failed"
                    entry |= {} if message is None else {"error": message}
                    break
                entry["records"].append(self.with_share(message))
                self.write()
        except EOFError:
            entry |= {"state": "failed", "error": "its process was killed"}
        if entry["state"] == "cut":
            process.kill()
        process.join()
        entry["seconds"] = round(time.monotonic() - start, 1)
        self.write()

    def with_share(self, record: Record) -> Record:
        """Add what share of the measured ceiling a step reaches."""
        for ceiling in self.content["parts"].get("ceilings", {}).get("records", []):
            if "flops" in record and ceiling.get("dtype") == record["dtype"]:
                rate = record["flops"] / record["seconds"]
                return record | {"share_of_ceiling": rate / ceiling["flops_per_second"]}
        return record


def main(arguments: list[str] | None = None) -> int:
    """Run all parts, or those that are named, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("device.json"), help="file to write")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes of seconds, as a dry run")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time of the whole run")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument("--debs", type=Path, help="folder with the packages of the cut-outs")
    given = parser.parse_args(arguments)
    settings = Settings(given.device, given.tiny, given.debs)
    chosen = [part for part in parts(settings) if not given.only or part.name in given.only]
    if not chosen:
        parser.error(f"--only: expected {', '.join(part.name for part in parts(settings))}")
    began = time.monotonic()
    context = multiprocessing.get_context("forkserver")
    # imported once, before any thread and any GPU
    context.set_forkserver_preload(PRELOADED)
    report = Report(given.out, settings)
    report.content["machine"]["device"] = device_name(choose_device(given.device))
    for part in chosen:
        left = given.seconds - (time.monotonic() - began) - GRACE
        if left < GRACE:
            report.content["parts"][part.name] = {"state": "skipped", "error": "no time was left"}
            report.write()
            continue
        # a dry run is not about time
        report.run(part, settings, left if given.tiny else min(part.seconds, left))
        entry = report.content["parts"][part.name]
        said = f"{entry['state']}, {entry['seconds']} s, {len(entry['records'])} records"
        print(f"{part.name}: {said}", entry.get("error", ""), flush=True)
    states = {entry["state"] for entry in report.content["parts"].values()}
    return 1 if "failed" in states else 0


if __name__ == "__main__":
    # parts are pickled by name: the processes that run them import this file as a module
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import device_check

    sys.exit(device_check.main())
