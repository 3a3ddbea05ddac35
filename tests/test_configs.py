"""Every method x data x experiment composes, passes the check, and builds."""

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from wsss.comparison.protocols import MEASURING
from wsss.core import places
from wsss.core.errors import WSSSError
from wsss.core.places import config_root
from wsss.core.schema import plain
from wsss.core.supervision import PIXEL_MASKS
from wsss.data.prepare.coco import COCO_CLASSES
from wsss.evaluation.protocol import Protocol
from wsss.runs.compose import compose_config
from wsss.runs.config import check_config, config_hash, override_config, second_stage_config
from wsss.runs.folder import build_data, build_module
from wsss.runs.line import sweep_jobs

ROOT = config_root()
EXPERIMENTS = sorted(
    str(path.relative_to(ROOT / "experiments").with_suffix(""))
    for path in (ROOT / "experiments").rglob("*.yaml")
    if path.stem != "second_stage" and path.parent.name != "table"  # parts of others
)
LEAGUES = [name for name in EXPERIMENTS if name.startswith("league_minivoc/")]  # of overlays
METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
DATA = sorted(path.stem for path in (ROOT / "conf" / "data").glob("*.yaml"))
# a value for what a user must give, and no download
GIVEN = ["data.root=unset", "backbone.weights=random"]
# what a method must be given besides
NEEDS = {
    "weclip": ["method.text=random"],
    "clip_cam": ["method.text=random"],
    "factorial": ["maps.run=unset"],
}
# the same on the small encoder, which has fewer blocks than they read
ON_PICO = {
    "weclip": [*NEEDS["weclip"], "method.static_layers=3", "method.rfm_layers=3"],
    "clip_cam": [*NEEDS["clip_cam"], "method.static_layers=3"],
}
# a table names its classes itself, where there is one
CLASSES = {"table": ["data.class_names=[apple,leaf,sky]"]}
# a study of a method under another name; what all methods share goes with the default one
STUDIES = {
    **{"vit_pcm": "tkp_pcl", "minivoc": "toco", "leagues": "toco"},
    **dict.fromkeys(("few_shot", "factorial"), "segmenter"),
}
SWEEPS = [
    name
    for name in EXPERIMENTS
    if "ablation" in name or name.startswith("leagues/") or name == "league_minivoc/all"
]


def needs(experiment: str) -> list[str]:
    return NEEDS.get(experiment.split("/")[0], [])


@pytest.mark.parametrize("experiment", sorted({*EXPERIMENTS} - {*LEAGUES}))
def test_experiments_compose_and_build(experiment: str) -> None:
    folder = experiment.split("/")[0]
    given = [*GIVEN, *needs(experiment)]
    config = plain(compose_config([f"+experiments={experiment}", *given]))
    if config["data"]["name"] == "table":
        assert config["data"]["long_side"] == config["eval"]["resize_long"]
        second = config["second_stage"] or config
        assert [stage["eval"]["crf"] for stage in (config, second)] == [None, None]
        assert second["eval"]["resize_long"] == config["eval"]["resize_long"]
        config["data"]["class_names"] = ["apple", "leaf"]  # which the table names
    assert STUDIES.get(folder, folder) in config["method"]["_target_"]
    if "base" not in config["backbone"]["name"]:  # ViT-B is built once, below
        build_module(config, len(config["data"]["class_names"]))


@pytest.mark.parametrize("experiment", SWEEPS)
def test_every_job_of_an_ablation_composes_and_builds(experiment: str) -> None:
    swept = "method.text:" in (ROOT / "experiments" / f"{experiment}.yaml").read_text()
    given = [] if swept else needs(experiment)
    every = sweep_jobs([f"+experiments={experiment}", *GIVEN, *given])
    jobs = [job for job in every.samples if "seed=0" in job]  # the others differ in that alone
    seeds = 5 if experiment in LEAGUES else 3
    assert every.count == len(every.samples) == seeds * len(jobs)
    configs = [plain(compose_config(job)) for job in jobs]
    assert len({config_hash(config) for config in configs}) == len(jobs) > 2
    for config in configs:
        assert config["study"] not in ("default", f"{experiment.split('/')[0]}-minivoc")
        if config["data"]["name"] == "minivoc":
            build_module(config, 1)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_may_be_the_base_of_another(experiment: str) -> None:
    """Its own base is written from the top: Hydra looks for another one beside the new one."""
    text = (ROOT / "experiments" / f"{experiment}.yaml").read_text()
    for default in yaml.safe_load(text).get("defaults", []):
        assert default == "_self_" or not isinstance(default, str) or default[0] == "/"


@pytest.mark.parametrize("experiment", LEAGUES)
def test_a_league_is_a_sweep_and_nothing_else(experiment: str) -> None:
    with pytest.raises(WSSSError, match=rf"\+experiments={experiment} sweeps .* with -m"):
        compose_config([f"+experiments={experiment}", *GIVEN])


@pytest.mark.parametrize(
    ("data", "steps", "box", "layers", "start"),
    [("voc", 30_000, 0.4, 6, 9145), ("coco", 80_000, 0.7, 10, 40_001)],
)
def test_weclips_overlays_have_the_papers_numbers(
    data: str, steps: int, box: float, layers: int, start: int
) -> None:
    config = plain(compose_config([f"+experiments=weclip/{data}", *GIVEN, *NEEDS["weclip"]]))
    method, budget = config["method"], config["budget"]
    assert (method["box_threshold"], method["rfm_layers"], method["rfm_start"]) == (
        box, layers, start,
    )  # fmt: skip
    assert (budget["max_steps"], method["max_steps"]) == (steps, steps)
    assert (budget["global_batch_size"], budget["crop_size"]) == (4, 320)
    assert budget["scale_range"] == [0.5, 2.0]


def test_the_demo_trains_every_method_briefly_in_one_study() -> None:
    every = sweep_jobs(["+experiments=league_minivoc/brief"])
    configs = [plain(compose_config(job)) for job in every.samples]
    names = {config["method"]["_target_"].rpartition(".")[2] for config in configs}
    assert names == {"ToCo", "ClusterCAM", "TKPPCL", "GETAM"}
    assert {config["study"] for config in configs} == {"demo"}
    assert {config["budget"]["max_steps"] for config in configs} == {150}


def test_a_factorial_study_crosses_parts() -> None:
    every = sweep_jobs(["+experiments=factorial/minivoc", "maps.run=A,B"])
    configs = [plain(compose_config(job)) for job in every.samples[::7]]
    assert every.count == len({tuple(sorted(job)) for job in every.samples}) == 2 * 4 * 3 * 2
    assert {config["study"] for config in configs} == {"factorial-minivoc"}
    assert {config["maps"]["run"] for config in configs} == {"A", "B"}
    assert len({config_hash(config) for config in configs}) == len(configs)
    for config in configs[:3]:
        build_module(config, 8)


def test_a_study_with_saliency_does_not_run_without() -> None:
    """Its quantile would change nothing."""
    config = plain(compose_config(["+experiments=getam/ablation_completion", *GIVEN]))
    assert not Path(config["data"]["saliency_folder"]).exists()


def test_the_line_replaces_what_a_study_sweeps() -> None:
    jobs = sweep_jobs(["+experiments=toco/ablation_losses", "method.ptc_weight=0.1", "seed=4,5"])
    assert jobs.count == len(jobs.samples) == 4
    for job in jobs.samples:
        config = compose_config(job)
        assert config.method.ptc_weight == 0.1
        assert config.seed in (4, 5)
        assert config.method.ctc_weight in (0.0, 0.02)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", DATA)
def test_every_method_with_every_data_set(method: str, data: str) -> None:
    config = plain(
        compose_config(
            [
                f"method={method}",
                f"data={data}",
                "backbone=vit_pico",
                *GIVEN,
                *ON_PICO.get(method, []),
                *CLASSES.get(data, []),
            ]
        )
    )
    data_module = build_data(config)
    assert data_module.global_batch_size == config["budget"]["global_batch_size"]
    module = build_module(config, data_module.num_classes)
    assert module.num_classes == len(config["data"]["class_names"])
    assert module.settings.max_steps == config["budget"]["max_steps"]


def test_overlays_of_minivoc_are_evaluated_alike() -> None:
    """Or `wsss compare` would not rank the methods."""
    keys = {*MEASURING["seg_miou_ms_crf"], *MEASURING["seg_miou"], "refine", "use_image_labels"}
    overlays = [name for name in EXPERIMENTS if name.endswith("/minivoc")]
    declared = [
        asdict(Protocol(**plain(compose_config([f"+experiments={name}", *needs(name)]))["eval"]))
        for name in overlays
    ]
    assert len(overlays) > 5
    for name, protocol in zip(overlays, declared, strict=True):
        assert {key: protocol[key] for key in keys} == {key: declared[0][key] for key in keys}, name


@pytest.mark.parametrize("group", ["backbone", "trainer", "logger", "callbacks", "eval"])
def test_every_choice_of_a_group_composes(group: str) -> None:
    for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
        # early stopping needs a declared holdout
        compose_config([f"{group}={path.stem}", "data.root=unset", "eval.holdout_per_class=5"])


def test_hash_ignores_where_a_run_lies_and_nothing_else() -> None:
    base = plain(compose_config(["data=minivoc"]))
    moved = plain(compose_config(["data=minivoc", "runs_dir=elsewhere", "logger=wandb"]))
    other = plain(compose_config(["data=minivoc", "method.ptc_weight=0.3"]))
    assert config_hash(base) == config_hash(moved)
    assert config_hash(base) != config_hash(other)


def test_coco_has_its_eighty_classes_in_the_order_of_their_ids() -> None:
    names = plain(compose_config(["data=coco", *GIVEN]))["data"]["class_names"]
    assert tuple(names) == COCO_CLASSES
    assert len(names) == 80


def test_data_chooses_the_backbone_unless_the_line_does() -> None:
    pico = compose_config(["data=minivoc"])
    assert "vit_pico" in pico.backbone.weights
    chosen = compose_config(["data=minivoc", "backbone=vit_base"])
    assert chosen.backbone.name.startswith("vit_base")


def test_an_overlay_that_overrides_no_group_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "experiments").mkdir()
    overlay = "# @package _global_\ndefaults:\n  - override /metod: toco\n"
    (tmp_path / "experiments" / "own.yaml").write_text(overlay)
    monkeypatch.setattr(places, "PACKAGE", tmp_path / "src" / "wsss")
    with pytest.raises(WSSSError, match=r"metod: unknown key; did you mean method\?"):
        compose_config(["+experiments=own"])


def test_stored_configuration_is_overridden_with_the_same_care() -> None:
    config = plain(compose_config(["data=minivoc"]))
    assert override_config(config, ["eval.crf=null"])["eval"]["crf"] is None
    with pytest.raises(WSSSError, match=r"eval\.crf"):
        override_config(config, ["eval.crff=null"])
    with pytest.raises(WSSSError, match=r"seed"):
        override_config(config, ["seed=zero"])


@pytest.mark.parametrize(
    "experiment",
    ["tkp_pcl/minivoc", "tkp_pcl/voc", "vit_pcm/voc", "mctformer/minivoc", "mctformer/voc"],
)
def test_second_stage_is_a_whole_configuration(experiment: str) -> None:
    config = plain(compose_config([f"+experiments={experiment}", "data.root=unset", "seed=3"]))
    second = second_stage_config(config, "somewhere")
    check_config(OmegaConf.create(second))
    assert second["data"]["train_masks"] == "somewhere"
    assert second["method"]["max_steps"] == second["trainer"]["max_steps"]
    assert second["method"]["max_steps"] == second["budget"]["max_steps"]
    assert second["data"]["train_transform"]["crop_size"] == second["budget"]["crop_size"]
    assert second["data"]["global_batch_size"] == second["budget"]["global_batch_size"]
    assert (second["seed"], second["study"]) == (3, config["study"])
    assert second["data"]["train_split"] == config["data"]["train_split"]
    assert second["method"]["optimiser"] == ("adamw" if "minivoc" in experiment else "sgd")
    assert second["second_stage"] is None


def test_second_stage_leaves_the_first_one_what_it_is() -> None:
    both = plain(compose_config(["+experiments=tkp_pcl/minivoc"]))
    alone = plain(compose_config(["+experiments=tkp_pcl/minivoc", "second_stage=null"]))
    assert config_hash(both) == config_hash(alone)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("+second_stage.methodd=3", r"second_stage\.method"),
        ("second_stage.method.optimiser=adam", "optimiser"),
        ("second_stage.budget.crop_size=0", r"budget\.crop_size"),
        ("+second_stage.data.limitt=3", r"data\.limit"),
        ("+second_stage.backbone.overrides.checkpoint_path=a", r"second_stage\.backbone\.weights"),
    ],
)
def test_second_stage_is_checked_before_the_first_begins(override: str, expected: str) -> None:
    with pytest.raises(WSSSError, match=expected):
        compose_config(["+experiments=tkp_pcl/minivoc", override])


def test_second_stage_sees_no_saliency_of_the_first() -> None:
    """Its crops have no place for it: the data module would refuse after the whole first stage."""
    config = plain(
        compose_config(["method=getam", "data=minivoc", "data.saliency_folder=somewhere"])
    )
    segmenter = plain(compose_config(["method=segmenter_vit", "data=minivoc"]))
    stage = {key: segmenter[key] for key in ("method", "backbone", "eval")}
    stage["data"] = {"train_transform": segmenter["data"]["train_transform"]}
    second = second_stage_config(config | {"second_stage": stage}, "ground_truth")
    assert build_data(second).supervision == PIXEL_MASKS


def test_masks_of_a_moved_first_stage_do_not_orphan_a_second() -> None:
    base = plain(compose_config(["method=segmenter", "data=minivoc"]))
    hashes = set()
    for runs in ("runs", "elsewhere"):
        masks = f"{runs}/study/run/pseudo_labels/train-1"
        hashes.add(
            config_hash({**base, "runs_dir": runs, "data": {**base["data"], "train_masks": masks}})
        )
    assert len(hashes) == 1


def test_few_yaml_files() -> None:
    """Nothing per backbone or GPU count; beside them one search space a method."""
    files = list((ROOT / "conf").rglob("*.yaml"))
    assert len([file for file in files if file.parent.name != "space"]) <= 52


def test_root_is_a_checkout_or_a_wheel() -> None:
    assert (ROOT / "experiments").is_dir()
    assert isinstance(ROOT, Path)
