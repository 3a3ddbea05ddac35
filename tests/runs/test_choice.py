"""How settings were chosen: declared by overlays, lost by a line that changes them."""

import pytest
from omegaconf import OmegaConf

from wsss.core.errors import WSSSError
from wsss.core.places import config_root
from wsss.runs.choice import choice_of
from wsss.runs.compose import compose_run
from wsss.runs.config import config_hash

BY_HAND = "by hand on val"


@pytest.mark.parametrize(
    "override",
    [
        "method.lr=1e-3",
        "+method.quirks.box=true",
        "method=more",
        "data=voc",
        "budget.warmup_steps=5",
        "budget.scale_range=[0.9,1.0]",
        "budget.blur_radius=[0.1,0.2]",
        "budget.local_size=16",
        "backbone.frozen=true",
        "data.train_transform.area=[0.1,1.0]",
        "eval.cam_threshold=0.3",
        "second_stage.source=seg",
    ],
)
def test_a_line_that_sets_settings_says_so(override: str) -> None:
    assert choice_of(BY_HAND, ["seed=1", override]) == f"{BY_HAND}, then changed"
    assert choice_of(BY_HAND, [override, "choice=paper"]) == BY_HAND
    assert choice_of(None, [override]) is None


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "study=again",
        "budget.max_steps=9",
        "budget.crop_size=64",
        "budget.global_batch_size=4",
        "budget.cam_size=64",
        "budget.eval_every=9",
        "eval.crf=null",
        "data.root=/data",
        "second_stage=null",
        "trainer=gpu",
        "trainer.devices=2",
        "+experiments=toco/minivoc",
        "+experiments@_global_=toco/minivoc",
        "logger=wandb",
    ],
)
def test_other_lines_leave_the_choice(override: str) -> None:
    assert choice_of(BY_HAND, [override]) == BY_HAND


def test_composed_configurations_declare_their_choice() -> None:
    assert compose_run(["method=toco", "data=minivoc"])["choice"] is None
    config = compose_run(["+experiments=toco/minivoc"])
    assert config["choice"] == BY_HAND
    changed = compose_run(["+experiments=toco/minivoc", "method.lr=1e-3"])
    assert changed["choice"] == f"{BY_HAND}, then changed"
    assert compose_run(["+experiments=toco/voc_vitb", "data.root=/data"])["choice"] == "paper"
    assert config_hash(config) == config_hash(config | {"choice": None})
    with pytest.raises(WSSSError, match=r"choice=.*1 to 200 characters on one line"):
        compose_run(["method=toco", "data=minivoc", 'choice="two\nlines"'])


def test_every_overlay_of_a_method_declares_its_choice() -> None:
    smoke = {"weclip/minivoc"}  # none of its numbers means anything
    declaring = {"toco/minivoc", "segmenter/minivoc", "getam/voc_vitb", "tkp_pcl/voc", "more/coco"}
    for path in (config_root() / "experiments").glob("*/*.yaml"):
        name = f"{path.parent.name}/{path.stem}"
        if not path.stem.startswith(("minivoc", "voc", "coco")) or path.parent.name == "minivoc":
            continue
        config = OmegaConf.load(path)
        bases = [f"{base}".removeprefix("/experiments/") for base in config.get("defaults", [])]
        declares = "choice" in config or any(base in declaring for base in bases)
        assert declares != (name in smoke), name
