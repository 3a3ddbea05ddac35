"""The proof that training on image-level labels opens no mask, for every method and data set.

An audit hook of the interpreter sees every file that Python opens, in worker processes too (they
inherit it), and refuses those that are masks. What C code opened past it would fail to decode,
since the masks are no images.
"""

import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
from trees import CLASSES_OF_PHOTOS, make_photos
from voc_tree import CLASSES, make_voc

from wsss.core.places import config_root
from wsss.evaluation.protocol import Protocol
from wsss.runs.compose import compose_run
from wsss.runs.folder import Run, build_data, build_module
from wsss.training.trainer import build_trainer

METHODS = sorted(path.stem for path in (config_root() / "conf" / "method").glob("*.yaml"))
# what a method needs on the small encoder
ON_PICO = {
    "weclip": ["method.text=random", "method.static_layers=3", "method.rfm_layers=3"],
    "clip_cam": ["method.text=random", "method.static_layers=3"],
}
watched: list[Path] = []  # folders of masks; a hook cannot be taken off again, so it is emptied
opened: list[str] = []


class MaskOpenedError(Exception):
    pass


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watched and event == "open" and isinstance(arguments[0], str):
        opened.append(arguments[0])
        if any(Path(arguments[0]).is_relative_to(folder) for folder in watched):
            raise MaskOpenedError(arguments[0])


sys.addaudithook(watch)


@pytest.fixture
def forbid() -> Any:
    yield watched.append
    watched.clear()
    opened.clear()


def voc(folder: Path) -> tuple[list[str], Path]:
    root = make_voc(folder)
    masks = root / "SegmentationClass"
    lists = ["data.train_split=train", "data.train_mask_folder=null"]
    return [
        "data=voc",
        f"data.class_names=[{','.join(CLASSES)}]",
        *lists,
        f"data.root={root}",
    ], masks


def table(folder: Path) -> tuple[list[str], Path]:
    labels = make_photos(folder, 9)
    lines = ["image,labels,mask,split"]
    for number, label in enumerate(labels):
        split = "train" if number < 6 else "val"
        lines.append(f"photos/{number:03}.jpg,{label},masks/{number:03}.png,{split}")
    (folder / "masks").mkdir()
    for number in range(9):
        (folder / "masks" / f"{number:03}.png").touch()
    (folder / "labels.csv").write_text("\n".join(lines))
    names = ",".join(CLASSES_OF_PHOTOS)
    return ["data=table", f"data.root={folder}", f"data.class_names=[{names}]"], folder / "masks"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source", [voc, table])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_opens_no_mask(
    tmp_path: Path, method: str, source: Any, workers: int, forbid: Any
) -> None:
    overrides, masks = source(tmp_path)
    for path in masks.iterdir():
        path.write_bytes(b"no image")
    config = compose_run(
        [
            f"method={method}",
            *overrides,
            "backbone=vit_pico",
            "backbone.weights=random",
            f"data.num_workers={workers}",
            "budget.crop_size=64",
            "budget.local_size=16",
            "budget.global_batch_size=2",
            "budget.max_steps=4",
            "budget.warmup_steps=1",
            "trainer=cpu",
            *ON_PICO.get(method, []),
        ]
    )
    if "train_masks" in config["data"]:
        pytest.skip("a second stage, which is declared to learn from masks")
    lightning.seed_everything(0, verbose=False)
    forbid(masks)
    data = build_data(config)
    module = build_module(config, data.num_classes)
    if not module.trains:
        pytest.skip("nothing is trained")
    run = Run(module, data, Protocol(**config["eval"]), config, tmp_path / "run")
    trainer = build_trainer(run)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 4
    if workers == 0:  # four steps of two images, each opened once: one decode an image
        photos = [name for name in opened if name.endswith(".jpg")]
        assert len(photos) == 8


def test_the_proof_would_notice(tmp_path: Path, forbid: Any) -> None:
    overrides, masks = voc(tmp_path)
    config = compose_run(["method=toco", *overrides, "backbone=vit_pico", "data.num_workers=0"])
    data = build_data(config)
    forbid(masks)
    with pytest.raises(Exception, match=r"SegmentationClass.*\.png"):
        next(iter(data.eval_dataloader("val")))
