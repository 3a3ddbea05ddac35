r"""Pretrain ViT-Pico, the small backbone that ships with wsss, from image-level labels only.

Images are composites made on the fly from the cut-outs and backgrounds that MiniVOC's ``train``
split uses. No mask is ever a target. The training never reads val_unseen cut-outs, nor the
backgrounds of both validation splits.

* Stage ``objects``: one cut-out fills most of a small image. The target is *which* cut-out it is
  (some 800 identities, most of them of no class), as ImageNet's 1000 classes teach more than eight
  would, plus the eight classes as multi-label.
* Stage ``scenes``: one to three objects in a wider range of sizes; the same two targets.
* Stage ``mosaics``: in turn 3 x 3 or 2 x 2 pictures side by side on one canvas, and one scene; some
  pictures are empty; each keeps its own image-level label and is pooled by itself. A token then
  has to say what is near it, which is what a CAM is read from.
* Stage ``distil``: scenes and mosaics; every token learns the features and class probabilities
  that a convolutional teacher (``teacher.py``, itself fine-tuned from the same image-level labels)
  has at its place. It is what makes tokens local: a ViT that learns from image-level labels alone
  spreads what it knows over the whole image.

    python tools/pico/pretrain.py --debs CACHE --out runs/pico --resume \
        --teacher-start efficientnet-lite0-57934424.pth
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import cv2
import torch

# The command is run by its path: the folder above has cutouts.py and this package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cutouts import CLASSES

from pico.composites import Composites, Pool, batches, build_pool
from pico.holdout import make_holdout
from pico.pooling import TOP
from pico.probe import probe
from pico.stages import DISTIL_TILES, MOSAIC_TILES, Stage
from pico.teacher import Teacher, train_teacher
from pico.trainer import Trainer


def get_teacher(
    pool: Pool, out: Path, start: Path | None, steps: int, seed: int, device: str, workers: int
) -> Teacher:
    """Load the fine-tuned teacher, ``OUT/teacher.pt``; train it from ``start`` if missing."""
    path = out / "teacher.pt"
    teacher = Teacher(len(pool.cutouts), len(CLASSES), None if path.exists() else start)
    if path.exists():
        teacher.load_state_dict(torch.load(path, map_location="cpu"))
        return teacher.to(device).eval().requires_grad_(False)
    batch = 32
    stage = Stage("mosaics", steps * batch, 96, batch, 0.0, 0, tiles=MOSAIC_TILES)
    losses = train_teacher(
        teacher,
        batches(Composites(pool, stage, seed + 77), batch, 0, workers),
        steps,
        TOP,
        device=device,
    )
    print(json.dumps({"teacher": losses}))
    out.mkdir(parents=True, exist_ok=True)
    torch.save(teacher.state_dict(), path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
    return teacher


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--debs",
        type=Path,
        default=Path.home() / ".cache" / "wsss-debs",
        help="folder for the two Debian packages; filled when it lacks them",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/pico"), help="folder for checkpoint and log"
    )
    parser.add_argument("--weights", type=Path, help="export the averaged backbone here")
    parser.add_argument("--objects", type=int, default=160_000, help="images of stage one")
    parser.add_argument("--scenes", type=int, default=64_000, help="images of stage two")
    parser.add_argument("--mosaics", type=int, default=32_000, help="images of stage three")
    parser.add_argument("--distil", type=int, default=32_000, help="images of stage four")
    parser.add_argument(
        "--teacher-start",
        type=Path,
        help="efficientnet-lite0-57934424.pth; see tools/pico/teacher.py",
    )
    parser.add_argument("--teacher-steps", type=int, default=330)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch threads on the CPU")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--every", type=float, default=240.0, help="seconds between reports")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument(
        "--probe",
        type=Path,
        metavar="VOC2012",
        help="no training: fine-tune --weights (or, without it, a random start) "
        "on this MiniVOC folder, print image mAP and CAM mIoU",
    )
    parser.add_argument("--probe-steps", type=int, default=150)
    parser.add_argument("--resume", action="store_true", help="continue if OUT has a checkpoint")
    return parser.parse_args()


def schedule(args: argparse.Namespace) -> list[Stage]:
    """Make the four stages that the command line describes."""
    return [
        Stage("objects", args.objects, 64, args.batch, args.lr, 150, keep=36),
        Stage("scenes", args.scenes, 96, args.batch, args.lr * 0.7, 50, 80, (12, 20)),
        Stage("mosaics", args.mosaics, 144, 24, args.lr * 0.7, 60, 0, (18, 18, 24), MOSAIC_TILES),
        Stage("distil", args.distil, 144, 24, args.lr * 0.75, 60, 0, (18, 18, 24), DISTIL_TILES),
    ]


def main() -> None:
    """Pretrain, or probe, as the command line says."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    cv2.setNumThreads(0)
    if args.probe:
        print(json.dumps(probe(args.weights, args.probe, args.probe_steps, args.seed, args.device)))
        return
    pool, held, facts = build_pool(args.debs)
    stages = schedule(args)
    teacher = None
    if args.distil:
        if not (args.teacher_start or (args.out / "teacher.pt").exists()):
            raise SystemExit(
                "--teacher-start FILE is needed, or --distil 0; see tools/pico/teacher.py"
            )
        teacher = get_teacher(
            pool,
            args.out,
            args.teacher_start,
            args.teacher_steps,
            args.seed,
            args.device,
            args.workers,
        )
    trainer = Trainer(
        pool,
        stages,
        args.out,
        args.seed,
        args.device,
        make_holdout(pool, held, args.seed + 7),
        args.workers,
        args.weights,
        args.compile,
        teacher,
    )
    if args.resume and (args.out / "last.pt").exists():
        trainer.resume()

    def stop(*_: object) -> None:
        trainer.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    trainer.log(start=facts, stages=[asdict(s) for s in stages])
    trainer.run(args.every)


if __name__ == "__main__":
    main()
