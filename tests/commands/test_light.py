"""What is wrong on a line is said before torch, Lightning, timm or wandb is imported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from wsss.cli import VERBS
from wsss.commands import convert
from wsss.core.declarations import declared
from wsss.core.schema import parameters_of, target_class
from wsss.methods.official import CONVERTERS
from wsss.runs.keys import FURTHER, GROUPS, TOP

HEAVY = ["torch", "lightning", "timm", "wandb"]
#: runs lines one after the other in one process, and says of each what it imported
RUNNER = """
import contextlib, io, json, sys
from wsss.cli import main
sys.modules["mlflow"] = None  # as where it is not installed
for line in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(line)
        except SystemExit as leave:
            status = leave.code
    print(json.dumps([status, said.getvalue(), [name for name in %r if name in sys.modules]]))
"""
TRAIN = ["train", "data=minivoc"]
STOPPING = "callbacks=[early_stopping]"
WRONG = [
    (["trane"], "unknown verb 'trane'; did you mean 'train'"),
    (["train", "method=tocco"], "did you mean toco?"),
    ([*TRAIN, "backbone=deit_smal"], "did you mean deit_small?; or a name of timm"),
    ([*TRAIN, "experiment=toco"], "there are toco/ablation_aux_layer, toco/abl"),
    ([*TRAIN, "trainer.foo=1"], "trainer.precision, trainer.fast_dev_run, trainer.max_epochs"),
    ([*TRAIN, "trainer.plugins=[]"], "a precision is trainer.precision="),
    (["train", "--config-dir"], "--config-dir: a value is missing"),
    (["train", "data=table", "data.root="], "data.root is empty"),
    ([*TRAIN, "method.ptc_wieght=0"], "did you mean method.ptc_weight?"),
    ([*TRAIN, "+method.ptc_wieght=0"], "did you mean method.ptc_weight?"),
    ([*TRAIN, "method=more", "+method.quirks.any=true"], "method.quirks.any: unknown key"),
    ([*TRAIN, "method.ptc_weight=high"], "method.ptc_weight='high': expected float"),
    ([*TRAIN, "method.lr=-1"], "method.lr=-1: expected a number greater than 0"),
    ([*TRAIN, "method.energy_kernel=exact"], "expected 'lattice' or 'gaussian'"),
    ([*TRAIN, "method.scales=[]"], "method.scales=[]"),
    ([*TRAIN, "method.lr=nan"], "expected a finite number"),
    ([*TRAIN, "data.limmit=3"], "did you mean data.limit?"),
    ([*TRAIN, "data.train_transform.crop=3"], "did you mean data.train_transform.crop_size?"),
    ([*TRAIN, "+trainer.precisoin=16"], "did you mean trainer.precision?"),
    ([*TRAIN, "trainer.devices=0"], "trainer.devices=0"),
    ([*TRAIN, "eval.crff=toco"], "did you mean eval.crf?"),
    ([*TRAIN, "budget.max_steps=true"], "budget.max_steps=True: expected int"),
    ([*TRAIN, "logger=wandb", "logger.checkpoints=3"], "logger.checkpoints=3: expected bool"),
    ([*TRAIN, "logger=[csv,wandbb]"], "logger=wandbb: no such choice; did you mean wandb?"),
    ([*TRAIN, "seed=zero"], "seed='zero': expected int"),
    ([*TRAIN, "study=a/b"], "study='a/b'"),
    ([*TRAIN, "+budgett=3"], "budgett: unknown key"),
    (
        [*TRAIN, "experiment=toco/minivok"],
        "experiment=toco/minivok: no such choice; did you mean",
    ),
    ([*TRAIN, "hydra.run.dir=here"], "hydra.run.dir=here: a run's folder is runs_dir/study"),
    ([*TRAIN, "hydra.job.chdir=true"], "set runs_dir="),
    ([*TRAIN, "hydra.output_subdir=.hydra"], "config.yaml"),
    ([*TRAIN, "-m", "seed=0,1", "hydra.sweep.dir=here"], "a sweep's folder is"),
    ([*TRAIN, "-m", "seed=0,1", "method.lrr=1,2"], "did you mean method.lr?"),
    ([*TRAIN, "--frobnicate"], "unrecognized arguments: --frobnicate"),
    ([*TRAIN, "-m", "seed=0,1", "--cfg", "job"], "--cfg: not allowed with argument -m/--multirun"),
    ([*TRAIN, "--config-dir", "no/such"], "--config-dir no/such: there is no such folder"),
    ([*TRAIN, "hydra.searchpath=[file://no/such]"], "there is no folder no/such"),
    ([*TRAIN, "backbone.weights=no/such.pth"], "backbone.weights=no/such.pth: no such file"),
    ([*TRAIN, "init_from=no/run"], "no/run: no such checkpoint; init_from= takes"),
    ([*TRAIN, "ckpt_path=no/run"], "no/run: no such checkpoint; ckpt_path= takes"),
    ([*TRAIN, "init_from=RUN", "ckpt_path=RUN"], "init_from and ckpt_path exclude each other"),
    ([*TRAIN, "eval.crf=foo"], "eval.crf='foo': expected one of toco"),
    ([*TRAIN, "trainer.accelerator=gpuu"], "trainer.accelerator='gpuu': expected 'auto' or 'cpu'"),
    ([*TRAIN, STOPPING, "callbacks.early_stopping.monitor=val/seg_miou"], "one of holdout/seg"),
    ([*TRAIN, STOPPING, "eval.holdout_per_class=0"], "no holdout is declared"),
    ([*TRAIN, STOPPING, "+callbacks.early_stopping.patienc=3"], "callbacks.early_stopping.patienc"),
    (
        [*TRAIN, "+callbacks.own={_target_: own_stop.Stop, patienc: 3}"],
        "did you mean callbacks.own.patience?",
    ),
    ([*TRAIN, "method._target_=wsss.methods.toco.ToCoo"], "did you mean ToCo?"),
    ([*TRAIN, "method._target_=wsss.methods.tocoo.ToCo"], "wsss.methods has no tocoo"),
    ([*TRAIN, "data._target_=nowhere.Data"], "no such class (no module nowhere)"),
    ([*TRAIN, "logger=mlflow"], "logger=mlflow needs the package mlflow-skinny"),
    (["train", "data=voc"], "data.root is missing"),
    (["train", "data=voc", "data.root=no/VOC"], "data folder no/VOC is missing"),
    (["data", "check", "data=vok"], "did you mean voc?"),
    (["data", "check", "data=voc", "root=no/VOC"], "data folder no/VOC is missing"),
    (["data", "prepare", "voc", "rot=x"], "did you mean root?"),
    (["data", "prepare", "voc", "root=no/VOC"], "data folder no/VOC is missing"),
    (["data", "prepare", "coco", "root=x", "crowd=drop"], "crowd=drop: expected"),
    (["tune", "data=minivoc", "method=tocco"], "did you mean toco?"),
    (["tune", "-m", "data=minivoc"], "-m: wsss tune takes no such flag"),
    (["tune", "data=minivoc", "trial=3"], "trial: unknown key"),
    (["tune", "data=minivoc", "trails=3"], "trails: unknown key; did you mean trials?"),
    (["tune", "toco"], "toco: expected KEY=VALUE; did you mean method=toco?"),
    (["train", "toco/minivoc"], "did you mean experiment=toco/minivoc?"),
    (["train", "+minivoc"], "+minivoc: expected KEY=VALUE"),
    (["tune", "data=minivoc", "trials=0"], "trials=0: expected a number"),
    (["tune", "data=minivoc", "space=nothing"], "space=nothing: no such search space"),
    (["tune", "data=minivoc", "method.lr=0.9"], "method.lr=0.9: outside of 1e-05 to 0.001"),
    (["tune", "data=minivoc", "budget.max_steps=2,3"], "budget.max_steps is not the same for all"),
    (["tune", "data=minivoc", "eval.holdout_per_class=3,6"], "same for all (3 of toco, 6 of toco)"),
    (["tune", "--show", "no/search"], "no search.json there"),
    (["eval", "rum=x"], "did you mean run?"),
    (["eval", "run=no/run"], "no/run: no such checkpoint"),
    (["eval", "run=RUN", "eval.crff=null"], "did you mean eval.crf?"),
    (["eval", "run=RUN", "eval.cam_threshold=2"], "eval.cam_threshold=2"),
    (["eval", "run=RUN", "device=gpu"], "device=gpu: expected auto, cpu, cuda"),
    (["eval", "run=RUN", "data.root=no/VOC"], "data folder no/VOC is missing"),
    (["eval", "masks=.", "data=voc", "data.root=no/VOC"], "data folder no/VOC is missing"),
    (["eval", "masks=no/masks", "data=minivoc"], "masks=no/masks: no such folder"),
    (["eval", "masks=.", "kind=pseudo"], "kind=pseudo: expected one of"),
    (["predict", "run=RUN", "images=no/such", "out=o"], "no/such is missing; expected a folder"),
    (["predict", "run=RUN"], "images is missing"),
    (["predict", "run=RUN", "images=i", "out=o", "cams=foo"], "cams=foo: expected one of npy"),
    (["predict", "run=RUN", "images=i", "out=o", "soft=foo"], "soft=foo: expected one of npy"),
    (["pseudo", "run=RUN", "source=cams"], "source=cams: expected cam or seg"),
    (["pseudo", "run=RUN", "refine=random_walk", "random_walk=vitt"], "did you mean vit?"),
    (["export", "rum=x"], "did you mean run?"),
    (["export", "run=RUN"], "out is missing"),
    (["export", "run=no/run", "out=x.onnx"], "no/run: no such checkpoint"),
    (["export", "run=RUN", "out=x.onnx", "eval.crff=null"], "did you mean eval.crf?"),
    (["export", "run=RUN", "out=x.onnx", "format=onx"], "did you mean onnx?"),
    (["export", "run=RUN", "out=x.onnx", "size=abc"], "size=abc: expected SIDE"),
    (["export", "run=RUN", "out=x.pt", "size=dynamic"], "size=dynamic: TorchScript"),
    (["export", "run=RUN", "out=x.bin"], "out=x.bin: expected an ending of .onnx, .pt"),
    (["submit", "run=RUN", "competition=comp7"], "competition=comp7"),
    (["compare", "no/runs"], "no/runs: no such file or folder"),
    (["compare", "RUN", "bye=method"], "did you mean by?"),
    (["report", "RUN"], "out is missing"),
    (["report", "no/runs", "out=o"], "no/runs: no such file or folder"),
    (["sync", "no/runs"], "no/runs: no such folder"),
    (["dashboard", "study=none"], "runs/none: no such folder"),
    (["text", "out=x.txt"], "x.txt"),
    (["text", "out=x.npz", "data=vok"], "did you mean voc?"),
    (["parity", "tocco", "x"], "no parity cases for method 'tocco'"),
    (["parity", "toco", "no/cases"], "no/cases is not a folder"),
    (["convert", "tocco", "x.pth", "y.ckpt"], "no converter for 'tocco'"),
    (["convert", "toco", "no.pth", "y.ckpt"], "no.pth: no such checkpoint"),
    (["benchmark", "method=tocco"], "method=tocco: expected"),
    (["benchmark", "method=toco", "repeats=0"], "repeats=0: must be at least 1"),
    (["benchmark", "part=data", "cuont=3"], "did you mean count?"),
    (["benchmark", "part=pce", "tokens=[64]"], "tokens=[64]"),
]
#: a callback of the user's, in the folder where the lines are run
OWN_CALLBACK = """
from lightning.pytorch.callbacks import Callback
class Stop(Callback):
    def __init__(self, patience: int = 1) -> None:
        self.patience = patience
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str, list[str]]]:
    """What one process said to every wrong line, then to the help of every verb."""
    folder = tmp_path_factory.mktemp("lines")
    run = folder / "RUN"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").write_bytes(b"not read")
    composed = [
        sys.executable,
        "-m",
        "wsss.cli",
        "train",
        "data=minivoc",
        "--cfg",
        "job",
        "--resolve",
    ]
    text = subprocess.run(composed, capture_output=True, text=True, check=True).stdout
    (run / "config.yaml").write_text(text)
    (folder / "own_stop.py").write_text(OWN_CALLBACK)
    helps = [[verb, "--help"] for verb in VERBS]
    lines = [line for line, _ in WRONG] + helps + [["--help"]]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER % HEAVY],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={**os.environ, "WSSS_DEBUG": "0"},
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[" ".join(line) for line, _ in WRONG])
def test_a_wrong_line_is_refused_without_torch(
    number: int, answers: list[tuple[int, str, list[str]]]
) -> None:
    status, said, imported = answers[number]
    assert status == 2, said
    assert WRONG[number][1] in said
    assert len(said.splitlines()) == 1
    assert imported == []


def test_help_needs_no_torch(answers: list[tuple[int, str, list[str]]]) -> None:
    assert len(answers) == len(WRONG) + len(VERBS) + 1
    for status, _, imported in answers[len(WRONG) :]:
        assert (status, imported) == (0, [])


def classes() -> list[str]:
    """Every class that a configuration of this project names, and the groups without a target."""
    root = Path(__file__).parents[2]
    found = {TOP, *GROUPS.values(), *FURTHER.values()}
    for path in [*(root / "conf").rglob("*.yaml"), *(root / "experiments").rglob("*.yaml")]:
        if path.parent.name == "callbacks":  # which are checked once they are imported
            continue
        found |= {*re.findall(r"_target_: ((?:wsss|lightning)\.[\w.]+)", path.read_text())}
    return sorted(found)


@pytest.mark.parametrize("name", classes())
def test_a_source_says_what_the_class_takes(name: str) -> None:
    read = declared(name)
    assert read is not None
    real, found = parameters_of(target_class(name, "x")), parameters_of(read)
    assert real.keys() == found.keys()
    for key, parameter in real.items():
        assert repr(found[key].default) == repr(parameter.default) or is_made(found[key].default)
        ours, theirs = found[key].annotation, parameter.annotation
        # equal unions may print their members in another order
        assert ours == theirs or shape(ours) == shape(theirs), key


def is_made(default: object) -> bool:
    """A default that is an object of its own each time prints its address."""
    return "factory" in repr(default) or "Quirks" in repr(default)


def shape(annotation: object) -> str:
    """A type as text; of classes only the name, of checks not where they lie."""
    text = re.sub(r"<class '([\w.]+)'>", r"\1", str(annotation))
    text = re.sub(r"[\w.]+\.(\w+)", r"\1", text)
    return re.sub(r" at 0x\w+", "", text)


def test_converters_are_those_of_the_methods() -> None:
    assert sorted(CONVERTERS) == sorted(convert.METHODS)
