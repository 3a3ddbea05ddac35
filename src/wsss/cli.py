"""The ``wsss`` command. Every verb imports its code only when it is called.

``wsss --help`` answers without importing torch or Hydra.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from wsss import __version__
from wsss.errors import WSSSError
from wsss.places import choices

#: in the environment of a sweep's job: its files without their suffix
JOB_STEM = "WSSS_JOB"


@dataclass(frozen=True)
class Verb:
    """One sub-command: how it is called, what it says about itself, what it runs."""

    usage: str
    summary: str
    details: str
    run: Callable[[list[str]], int]


def _train(arguments: list[str]) -> int:
    from wsss.training import main

    return main(arguments)


def _eval(arguments: list[str]) -> int:
    from wsss.evaluate import main

    return main(arguments)


def _compare(arguments: list[str]) -> int:
    from wsss.results.compare import main

    return main(arguments)


def _report(arguments: list[str]) -> int:
    from wsss.results.report import main

    return main(arguments)


def _sync(arguments: list[str]) -> int:
    from wsss.sync import main

    return main(arguments)


def _dashboard(arguments: list[str]) -> int:
    from wsss.dashboard import main

    return main(arguments)


def _predict(arguments: list[str]) -> int:
    from wsss.predict import main

    return main(arguments)


def _pseudo(arguments: list[str]) -> int:
    from wsss.pseudo import main

    return main(arguments)


def _parity(arguments: list[str]) -> int:
    from pathlib import Path

    method, folder = _exactly("parity METHOD DIR", arguments, 2)
    from wsss.parity import run_parity

    return run_parity(method, Path(folder))


def _convert(arguments: list[str]) -> int:
    if len(arguments) < 3:
        raise WSSSError("usage: wsss convert METHOD OFFICIAL.pth OUT.ckpt [KEY=VALUE ...]")
    from wsss.convert import convert

    return convert(*arguments[:3], overrides=arguments[3:])


def _benchmark(arguments: list[str]) -> int:
    from wsss.benchmark import main

    return main(arguments)


def _data(arguments: list[str]) -> int:
    what, *rest = arguments or [""]
    if what == "check":
        from wsss.data.doctor import main

        return main(rest)
    if what == "prepare" and rest and rest[0] in ("voc", "coco"):
        if rest[0] == "voc":
            from wsss.data.prepare_voc import main
        else:
            from wsss.data.prepare_coco import main
        return main(rest[1:])
    raise WSSSError("usage: wsss data prepare voc|coco root=... or wsss data check data=...")


def _submit(arguments: list[str]) -> int:
    from wsss.submit import main

    return main(arguments)


def _exactly(usage: str, arguments: list[str], count: int) -> list[str]:
    if len(arguments) != count:
        raise WSSSError(f"usage: wsss {usage}")
    return arguments


VERBS = {
    "data": Verb(
        "data prepare voc|coco root=FOLDER [KEY=VALUE ...]  |  data check data=NAME [root=...]",
        "make masks, lists and labels from what was downloaded; look a data set over",
        """\
prepare voc   SegmentationClassAug from SBD's .mat files and VOC's PNGs, train_aug.txt, labels.
  sbd=FOLDER (searched beside root) or none    labels=xml|mask    jobs=N
prepare coco  index masks, lists and labels from instances_{train,val}2014.json.
  annotations=FILE    overlap=smallest|last (which instance is on top)
  crowd=paint|ignore|skip (as its class, as 255, not at all)    jobs=N
Both also take an export of labelme or CVAT in these styles and write wsss/labels.csv for
data=table. What is there stays; a stopped call goes on where it was.

check         counts, missing files, broken images, ids, modes and sizes of masks, labels against
masks, images in two splits, hashes; exit status 1 if a run would stumble. --fast looks into 100
images a split.

Examples:
  wsss data prepare voc root=/data/VOCdevkit
  wsss data prepare coco root=/data/coco
  wsss data check data=voc root=/data/VOCdevkit
  wsss data check data=table root=photos csv=labels.csv --fast""",
        _data,
    ),
    "train": Verb(
        "train [KEY=VALUE ...] [-m] [--cfg job]",
        "train a method, evaluate it, write table and gallery into a run folder",
        """\
Hydra composes the run from groups; any value can be set on the line:
  method=<choices>
  data=<choices>
  backbone=<choices>
  trainer=<choices>
  logger=<choices>  +experiments=toco/minivoc
  seed=0  study=NAME  runs_dir=runs  budget.max_steps=600  method.ptc_weight=0 ...
--cfg job prints the composed configuration; -m sweeps over comma-separated values.

The run folder is runs_dir/study/METHOD-DATA-sSEED-HASH. A finished one is not run again; an
interrupted one (Ctrl-C, SIGTERM, kill) resumes from its last checkpoint if the command is repeated.

A sweep starts each job in processes of its own and lists failures at the end (docs/sweeps.md):
  hydra.launcher.jobs=1   at a time     hydra/launcher=submitit_slurm     hydra/sweeper=optuna

Examples:
  wsss train method=toco data=minivoc
  wsss train +experiments=toco/voc_vitb data.root=/data/VOCdevkit trainer=gpu
  wsss train -m +experiments=toco/minivoc seed=0,1,2""",
        _train,
    ),
    "eval": Verb(
        "eval run=RUN_DIR|CKPT|cams=FOLDER|masks=FOLDER [splits=[val]] [KEY=VALUE] [out=FOLDER]",
        "evaluate a run, or a folder of maps that somebody else made",
        """\
run is a run folder (its last checkpoint is read) or a checkpoint file, also a converted one.
Writes results.json, images.npz and the gallery into the run folder (below eval/ where splits or
the protocol are not the run's own), or into out=FOLDER. Every reading of a split's ground truth is
entered in the run's ledger.jsonl.
  splits=[holdout] eval.holdout_per_class=5   a declared holdout of the training data, on which
                                              thresholds and CRFs may be chosen
  device=auto   or cpu, cuda, cuda:1         gallery=16   images on the sheets, 0: none

cams=FOLDER holds NAME.npy or NAME.npz: {keys, high_res|cam} as IRN and CLIP-ES write them,
{class: map} as PSA and MCTformer do, or arrays (K, h, w); pickles are read without running code.
masks=FOLDER holds NAME.png or NAME.npy of class ids, 255 where undecided. Where names hold folders
(COCO: val2014/...) the files may also lie in FOLDER itself. Both take data=NAME,
data.KEY=VALUE, name=METHOD, supervision=LEAGUE, seed=N; masks also kind=pseudo_label|seg|...;
eval.seg_scales and the like are taken down as declared. out=FOLDER stores for compare and report.

Examples:
  wsss eval run=runs/default/toco-minivoc-s0-1a2b3c4d
  wsss eval run=official.ckpt data.root=/data/VOCdevkit eval.crf=null
  wsss eval cams=irn/cam data=voc data.root=/data/VOCdevkit splits=[train] name=IRN out=evals/irn
  wsss eval masks=irn/sem_seg data=voc data.root=/data/VOCdevkit splits=[train] name=IRN""",
        _eval,
    ),
    "compare": Verb(
        "compare RUNS... [by=method] [baseline=GROUP] [metric=KEY] [out=FILE.md|.csv|.tex|.html]",
        "runs side by side: mean and deviation over seeds, intervals, what may not be ranked",
        """\
RUNS are run folders, evaluations (out= of wsss eval), or folders that hold some. --key value is
the same as key=value, and --unranked as unranked=true.
  by=method       or study, run, or keys such as method.top_k,method.pce_weight; a group's runs
                  are its seeds
  baseline=GROUP  to which differences are taken; default the best
  split=val  metrics=[seed_miou,...]  metric=seed_miou (of the per-class table)  resamples=2000
  allow=[iterations]   training conditions that may differ among ranked runs: backbone, crop_size,
                  iterations, global_batch_size, selection, train_list_sha256
  unranked=true        list runs of different protocols without ranking them
Differences come with a paired bootstrap over images; ties are not set in bold. Supervision leagues
are kept apart.

Examples:
  wsss compare runs/toco-minivoc runs/getam-minivoc --baseline toco
  wsss compare runs by=study metrics=[seed_miou] out=table.md""",
        _compare,
    ),
    "report": Verb(
        "report RUNS... out=FOLDER [gallery=3] [arguments of compare]",
        "one self-contained HTML page about runs: tables, charts, the same images side by side",
        """\
Writes FOLDER/index.html (opens without a network) and the tables as .md, .csv and .tex. The
pictures are computed again from checkpoints and data; gallery=N is the number of images of each
kind (best, median, worst, largest disagreement), 0 leaves them out.

Example:
  wsss report runs/toco-minivoc runs/getam-minivoc out=report""",
        _report,
    ),
    "sync": Verb(
        "sync [FOLDER ...]",
        "upload what runs logged to W&B while there was no key or network",
        """\
FOLDERs are runs, studies, or what holds them; without any it is runs. What is up already is left
out, and the sessions of a resumed run become one. Needs `wandb login` or WANDB_API_KEY.

Example:
  wsss sync runs/toco-minivoc""",
        _sync,
    ),
    "dashboard": Verb(
        "dashboard study=NAME [runs_dir=runs] [project=NAME] [entity=NAME]",
        "make the W&B workspace of a study: curves, tables, overlays, by what was varied",
        """\
The study's runs must have been logged (logger=wandb). Panels, as far as the runs have the numbers:
validation, final mIoUs, CAM threshold curves, precision and recall, over- and under-activation,
each method's losses, learning rates, mixing scalars, per-class tables, confusion matrices, the
gallery, settings against the result, cost. Runs are grouped by method and by the settings that
vary, so that lines and bars are means over seeds.
The specification is written to runs_dir/NAME/dashboard.json; with a W&B key (`wandb login` or
WANDB_API_KEY) the workspace is made too, and its address printed. `wsss sync` uploads offline runs.

Example:
  wsss dashboard study=toco-ablation-losses""",
        _dashboard,
    ),
    "predict": Verb(
        "predict run=RUN_DIR|CKPT images=FOLDER out=FOLDER [eval.KEY=VALUE]",
        "segment one's own images",
        """\
Writes NAME.png (palette mask, pixel = class id) and NAME_overlay.jpg for every image of the
folder, and classes.txt with the class names. device=auto, or cpu, cuda, cuda:1.

Example:
  wsss predict run=runs/default/toco-minivoc-s0-1a2b3c4d images=photos out=masks""",
        _predict,
    ),
    "submit": Verb(
        "submit run=RUN_DIR|CKPT [data.root=VOC2012] [split=test] [out=FOLDER] [eval.KEY=VALUE]",
        "masks of VOC's test images in the archive that its evaluation server takes",
        """\
Writes results/VOC2012/Segmentation/comp6_test_cls/NAME.png (index PNGs of the images' own sizes)
and comp6_test_cls.tar.gz below out (the run folder's submission/), and reads the archive back.
competition=comp5 is for models that saw nothing but VOC. A stopped call goes on where it was.

Example:
  wsss submit run=runs/toco/toco-voc-s0-1a2b3c4d data.root=/data/VOCdevkit""",
        _submit,
    ),
    "pseudo": Verb(
        "pseudo run=RUN_DIR|CKPT [split=LIST] [source=cam|seg] [eval.KEY=VALUE] [out=FOLDER]",
        "write pseudo labels of a training list, for a second stage",
        """\
One index PNG an image, pixel = class id, 255 undecided; only classes of the image's labels.
  split=train_aug  the list; the run's training list where it is not given
  source=cam       from localisation maps. With eval.cam_high and eval.cam_low these are the
                   pseudo labels that are scored; with both null eval.cam_threshold decides,
                   and eval.crf refines
  source=seg       from the segmentation head, refined by eval.crf
  out=FOLDER       instead of pseudo_labels/LIST-HASH inside the run folder
  crf_jobs=N  device=auto
Repeating an interrupted command goes on where it stopped. pseudo_labels.json in the folder says
how the labels were made.

Examples:
  wsss pseudo run=runs/tkp_pcl-voc/tkppcl-voc-s0-1a2b3c4d
  wsss pseudo run=runs/toco-voc/toco-voc-s0-1a2b3c4d source=seg
  wsss train +experiments=segmenter/voc data.train_masks=FOLDER data.root=/data/VOCdevkit""",
        _pseudo,
    ),
    "parity": Verb(
        "parity METHOD DIR",
        "compare with numbers of the method's official code",
        """\
Runs every *.npz of DIR through the code that training uses (official_compat=true) and prints one
line a case. Exit status 0 only when every case is ok.

Examples:
  wsss parity toco tests/golden/toco
  wsss parity clustercam tests/golden/clustercam
  wsss parity getam tests/golden/getam""",
        _parity,
    ),
    "convert": Verb(
        "convert METHOD OFFICIAL.pth OUT.ckpt [KEY=VALUE ...]",
        "make an official checkpoint ours, for wsss eval and wsss predict",
        """\
KEY=VALUE are those of `wsss train` and say what the checkpoint was made with; the default is
data=voc backbone=deit_base. Missing, extra or misshapen keys are named and nothing is written.

Examples:
  wsss convert toco toco_vitb_voc.pth toco.ckpt backbone=vit_base
  wsss convert clustercam voc.pth clustercam.ckpt backbone=deit_small
  wsss convert getam hybrid.pth getam.ckpt backbone=vit_hybrid method.official_compat=true""",
        _convert,
    ),
    "benchmark": Verb(
        "benchmark method=METHOD|part=crf|part=data|part=pce [KEY=VALUE ...]",
        "time a training step by phases, dense CRFs, loading, or TKP-PCL's contrast",
        """\
  method=<choices>
  backbone=NAME  image_size=PIXELS   the method's own where they are not given
  batch_size=2  repeats=3  warmup=1  device=auto
  stage=after     after the start of segmentation, or before
  dtype=float32   or bfloat16 (autocast)      threads=N  num_classes=20  seed=0
  official=true   also run the step with every saving switched off, where an official way is
                  written down; the ratio is of one run
  ablate=true     also once per saving, with that one alone switched off
  out=FILE.json   write the figures
Weights are random, which changes no time; each side runs in a process of its own.
  part=crf        seconds an image and agreeing labels of the two dense CRFs, on a MiniVOC image
                  and one of 500 x 375 px with num_classes=20; crf=toco names the preset

part=data times loading and augmentation instead, images/s and core, beside plain Pillow and
torchvision: method=METHOD (all)  image_size=448  images=FOLDER  count=32  repeats=5  out=FILE.json
part=pce times TKP-PCL's contrast alone, against the number of patches:
  tokens=[64,256,576,1024,2304,4096]  width=768  num_classes=20  batch_size=1  matrix=true

Examples:
  wsss benchmark method=toco
  wsss benchmark method=clustercam stage=before
  wsss benchmark part=crf device=cuda
  wsss benchmark part=data
  wsss benchmark part=pce""",
        _benchmark,
    ),
}


def overview() -> str:
    """The text of ``wsss --help``."""
    lines = [
        f"wsss {__version__}: weakly-supervised semantic segmentation methods on equal terms",
        "",
        "usage: wsss VERB [ARGUMENTS]     wsss VERB --help     wsss --version",
        "",
    ]
    lines += [f"  {name:10} {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join([*lines, "", "WSSS_DEBUG=1 shows tracebacks."])


def main(argv: list[str] | None = None) -> int:
    """Run a verb; returns the exit status (0 fine, 1 failed, 2 bad input, 130 interrupted)."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    return run_verb(arguments[0], arguments[1:])


def run_verb(name: str, arguments: list[str]) -> int:
    """Run one verb with its arguments; returns the exit status."""

    def run() -> int:
        if name not in VERBS:
            import difflib

            near = difflib.get_close_matches(name, VERBS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise WSSSError(f"unknown verb {name!r}{hint} (wsss --help lists them)")
        verb = VERBS[name]
        if "-h" in arguments or "--help" in arguments:
            details = re.sub(r"(\w+)=<choices>", _listed, verb.details)
            print(f"usage: wsss {verb.usage}\n\n{verb.summary}\n\n{details}")
            return 0
        return verb.run(arguments)

    return telling_errors(name, run)


def _listed(match: re.Match[str]) -> str:
    """What a group offers in this installation; a method is known by its file."""
    return f"{match[1]}={'|'.join(choices(match[1]))}"


def telling_errors(name: str, run: Callable[[], int]) -> int:
    """Run something; what goes wrong becomes one line on standard error and an exit status."""
    try:
        return run()
    except KeyboardInterrupt:
        print("wsss: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("WSSS_DEBUG") == "1":
            raise
        if isinstance(error, WSSSError):
            _tell(name, str(error))
            return 2
        text = (str(error).splitlines() or [""])[0]
        _tell(name, f"{type(error).__name__}: {text} (WSSS_DEBUG=1 shows the traceback)")
        return 1


def _tell(name: str, text: str) -> None:
    """One line on standard error, and for the sweep that this process is a job of."""
    print(f"wsss {name}: {text}", file=sys.stderr)
    if stem := os.environ.get(JOB_STEM):
        with contextlib.suppress(OSError), open(f"{stem}.error", "w") as file:
            file.write(text)


if __name__ == "__main__":
    # after `python -m wsss.cli` Lightning would start further DDP processes as -m, without the verb
    sys.modules["__main__"].__spec__ = None
    sys.exit(main())
