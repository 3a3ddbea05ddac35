"""Cases with fewer arrays than the visible ones: what is there is compared, the rest named."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from series import GOLDEN

from wsss.parity.cases import read_case
from wsss.parity.run import Report, run_case

LIGHT = (
    *("toco/a_backbone", "toco/d_labels", "toco/e_par", "toco/e_refine", "toco/f_ctc"),
    *("toco/f_energy", "toco/f_ptc", "toco/f_seg", "toco/g_crops", "toco/j_crf"),
    *("clustercam/inference_merge", "clustercam/init_map", "clustercam/labels_from_cam"),
    *("clustercam/par", "clustercam/seg_loss"),
    *("getam/a_encoder_distilled", "getam/d_pamr", "getam/e_complete", "getam/e_pipeline"),
    *("mctformer/e_pool", "mctformer/f_loss", "mctformer/k_alpha", "mctformer/l_scan"),
    *("getam/f_ce", "getam/f_energy", "getam/f_saliency", "getam/h_optim", "getam/j_data"),
)
# without the array, how many of the file's arrays are not compared
HEAVY = [
    ("toco", "b_network", "in_locals", 2),
    ("toco", "h_optim", "param_names", 17),
    ("toco", "h_optim", "in_toy_param", 2),
    ("toco", "h_optim", "in_coco_iters", 1),
    ("toco", "i_train_step", "in_draws", 0),
    ("clustercam", "gradients", "seg_label", 28),
    ("clustercam", "gradients", "grad_names", 48),
    ("clustercam", "gradients", "group_of_param", 4),
    ("clustercam", "gradients", "zero_pat", 0),
    ("clustercam", "inference", "gt", 3),
    ("clustercam", "ms_cam_labels", "denorm", 7),
    ("clustercam", "ms_cam_labels", "pseudo_label", 1),
    ("clustercam", "rng_mix", "sequence_tiny_K4", 3),
    ("clustercam", "schedule", "wd_param_names", 2),
    ("clustercam", "schedule", "lr_voc", 0),
    ("clustercam", "stem", "image_80x112", 2),
    ("clustercam", "train_phase1", "image_step1", 7),
    ("clustercam", "train_phase2", "grad_names", 6),
    ("getam", "g_phase1", "out_lr_phase1", 0),
    ("getam", "g_phase2_weak", "in_dropout_keep", 3),
    ("getam", "g_phase2_weak", "in_guide", 0),
    ("getam", "i_inference", "in_gt", 2),
    ("mctformer", "j_init", "in_label", 4),
    ("mctformer", "i_schedule", "out_decayed", 0),
]


def golden(method: str, name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN.parent / method / f"{name}.npz", allow_pickle=False) as content:
        return {key: content[key] for key in content.files}


def report_of(method: str, path: Path, arrays: dict[str, np.ndarray]) -> Report:
    np.savez(path, **arrays)
    return run_case(path, import_module(f"wsss.parity.{method}").KINDS)


@pytest.mark.parametrize("case", LIGHT)
def test_no_missing_array_is_an_exception(case: str, tmp_path: Path) -> None:
    method, name = case.split("/")
    arrays = golden(method, name)
    kinds = import_module(f"wsss.parity.{method}").KINDS
    kind = kinds[max((stem for stem in kinds if name.startswith(stem)), key=len)]
    outputs = read_case(GOLDEN.parent / method / f"{name}.npz", kind.inputs).outputs
    path = tmp_path / f"{name}.npz"
    for key in arrays.keys() - outputs.keys():
        left = {other: array for other, array in arrays.items() if other != key}
        report = report_of(method, path, left)
        # what everything needs leaves nothing to compare; the line says so and names it
        assert report.problem in ("", "nothing could be compared"), (key, report.problem)
        missing = len(outputs) - report.compared
        assert (missing > 0) == bool(report.note), (key, report.note)
        if missing:
            lacking = "setting " if key in ("cfg", "config") else key
            assert report.note.startswith(f"the file lacks {lacking}"), (key, report.note)
            assert f"; {missing} arrays not compared: " in report.note
    for kept in (list(outputs)[::2], list(outputs)[:1]):
        fewer = {k: v for k, v in arrays.items() if k in kept or k not in outputs}
        report = report_of(method, path, fewer)
        assert (report.problem, report.compared) == ("", len(kept)), report.line()


@pytest.mark.parametrize(("method", "name", "key", "count"), HEAVY)
def test_the_rest_is_compared(method: str, name: str, key: str, count: int, tmp_path: Path) -> None:
    arrays = golden(method, name)
    del arrays[key]
    report = report_of(method, tmp_path / f"{name}.npz", arrays)
    assert report.problem == ""
    assert report.compared > 0
    if count:
        assert report.note.startswith(f"the file lacks {key}; {count} arrays not compared: ")
        assert report.line().endswith(f"ok ({report.note})")
    else:
        assert report.note == ""


def test_a_number_that_is_there_still_fails(tmp_path: Path) -> None:
    arrays = golden("toco", "f_ptc")
    del arrays["in_label_mixed"]
    arrays["out_loss_one_class"] = arrays["out_loss_one_class"] * np.float32(1.0001)
    report = report_of("toco", tmp_path / "f_ptc.npz", arrays)
    assert report.problem.startswith("out_loss_one_class is off by")
    assert report.note.startswith("the file lacks in_label_mixed; 5 arrays not compared: ")


def test_groups_of_a_net_without_the_auxiliary_layer(tmp_path: Path) -> None:
    """Two blocks, and the auxiliary layer of the settings would be the third from the end."""
    arrays = golden("toco", "h_optim")

    def kept(name: str) -> bool:
        return not name.startswith(("encoder.blocks.2.", "encoder.blocks.3."))

    names = arrays["param_names"].tolist()
    shapes = json.loads(str(arrays["param_shapes"]))
    pairs = [pair for pair in zip(names, shapes, strict=True) if kept(pair[0])]
    arrays["param_names"] = np.array([name for name, _ in pairs])
    arrays["param_shapes"] = np.array(json.dumps([shape for _, shape in pairs]))
    for group in ("out_group0", "out_group1"):
        arrays[group] = np.array([name for name in arrays[group].tolist() if kept(name)])
    report = report_of("toco", tmp_path / "h_optim_tiny.npz", arrays)
    assert (report.problem, report.note) == ("", "")
    assert report.compared == 22
