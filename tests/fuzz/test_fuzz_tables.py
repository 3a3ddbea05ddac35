"""Altered tables, VOC folders, masks: named by the doctor, or read as a training reads them.

The doctor and the data modules must agree: what it finds healthy, a training can use.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzzing import bytes_altered, outcome, seeds, text_altered
from PIL import Image

from wsss.core.errors import WSSSError
from wsss.data.datamodule import ImageDataModule
from wsss.data.doctor import Report, examine, examine_table
from wsss.data.table_module import TableDataModule
from wsss.data.voc_module import VOCDataModule

CASES = 350
CLASSES = ("cat", "dog", "Ärzte")
SIDE = 12
TABLE = """image,labels,mask,split
i/0.png,cat;dog,m/0.png,train
i/1.png,dog,m/1.png,train
i/2.png,,m/2.png,train
i/3.png,Ärzte|cat,m/3.png,val
i/4.png,dog,m/4.png,val
"""


def ids_of(number: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE + number), np.uint8)
    for row, shown in enumerate([(1, 2), (2,), (), (1, 3), (2,)][number]):
        mask[2 + 4 * row : 5 + 4 * row, 2:8] = shown
    mask[0] = 255
    return mask


def write_pair(image: Path, mask: Path, number: int) -> None:
    pixels = np.random.default_rng(number).integers(0, 255, (SIDE, SIDE + number, 3), np.uint8)
    for path, content in ((image, pixels), (mask, ids_of(number))):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(path)


def make_table(root: Path) -> None:
    for number in range(5):
        write_pair(root / f"i/{number}.png", root / f"m/{number}.png", number)
    (root / "labels.csv").write_text(TABLE, encoding="utf-8")
    (root / "classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")


def make_voc(root: Path) -> None:
    for folder in ("Annotations", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for number in (0, 1, 3, 4):  # an image of VOC shows something
        image = root / f"JPEGImages/a{number}.jpg"
        write_pair(image, root / f"SegmentationClass/a{number}.png", number)
        names = [CLASSES[k - 1] for k in np.unique(ids_of(number)) if 0 < k < 255]
        objects = "".join(f"<object><name>{name}</name></object>" for name in names)
        xml = root / f"Annotations/a{number}.xml"
        xml.write_text(f"<annotation>{objects}</annotation>", encoding="utf-8")
    lists = root / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("a0\na1\n")
    (lists / "val.txt").write_text("a3\na4\n")


def swapped(mask: np.ndarray, rng: random.Random) -> Image.Image:
    """A mask of another size, mode or meaning."""
    kind = rng.randrange(9)
    if kind == 0:
        return Image.fromarray(mask.T.copy())
    if kind == 1:
        return Image.fromarray(mask[1:])
    if kind == 2:
        return Image.fromarray(mask).convert("RGB")
    if kind == 3:
        return Image.fromarray(mask.astype(np.uint16))
    if kind == 4:
        return Image.fromarray(mask).convert("1")
    if kind == 5:
        return Image.fromarray(np.where(mask > 0, 255, 0).astype(np.uint8))
    if kind == 6:
        return Image.fromarray(mask + np.uint8(rng.choice([1, 3, 200])))
    if kind == 7:
        return Image.fromarray(mask).convert("LA")
    image = Image.fromarray(mask, mode="P")
    image.putpalette([rng.randrange(256) for _ in range(768)])
    return image


def spoil(rng: random.Random, root: Path) -> str:
    """Alter one or two files below a folder, and say how."""
    said = []
    for _ in range(rng.choice([1, 1, 2])):
        texts = [
            path for path in sorted(root.rglob("*")) if path.suffix in (".csv", ".txt", ".xml")
        ]
        pictures = [path for path in sorted(root.rglob("*")) if path.suffix in (".png", ".jpg")]
        kind = rng.choice(["text", "text", "lines", "lines", "bytes", "gone", "mask", "mask"])
        path = rng.choice(pictures if kind == "mask" else texts + pictures)
        if kind in ("text", "lines"):
            path = rng.choice(texts)
        said.append(f"{kind} of {path.relative_to(root)}")
        content = path.read_bytes()
        if kind == "gone":
            path.unlink()
        elif kind == "bytes":
            changed, how = bytes_altered(rng, content) if content else (b"", "empty")
            path.write_bytes(changed)
            said.append(how)
        elif kind == "mask":
            number = int(path.stem.strip("a"))
            swapped(ids_of(number), rng).save(path, format="PNG")
        elif kind == "text":
            encoding = rng.choice(["utf-8", "utf-8", "utf-8", "utf-16", "latin-1"])
            text = text_altered(rng, content.decode("utf-8", "replace"))
            path.write_bytes(text.encode(encoding, "replace"))
        else:
            lines = content.decode("utf-8", "replace").splitlines(keepends=True) or [""]
            at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
            if rng.random() < 0.5:
                lines.insert(at, lines[other])
            else:
                lines[at] = text_altered(rng, lines[at])
            path.write_text("".join(lines), encoding="utf-8")
    return ", ".join(said)


def look_over(data: Callable[..., ImageDataModule], **options: object) -> Report:
    """Do what `wsss data check` does."""
    report = Report()
    group = examine_table(
        {"root": options["root"], "class_names": options["class_names"]}
        | ({"csv": "labels.csv"} if data is TableDataModule else {}),
        report,
    )
    if group is not None:
        report.findings += examine(data(**options | {"class_names": group["class_names"]})).findings
    return report


def use(data: ImageDataModule) -> list[frozenset[int]]:
    """Read what a training and its evaluation read, and give the ids of each mask."""
    data.setup("fit")
    data.setup("test")
    data.check_contents()
    shown = []
    for dataset in (data.unmasked_dataset(data.train_split), data.eval_dataset(data.val_split)):
        for index in range(len(dataset)):
            item = dataset[index]
            assert {*np.unique(item["labels"])} <= {0.0, 1.0}
            if "mask" in item:
                assert item["image"].shape[1:] == item["mask"].shape
                shown.append(frozenset(int(v) for v in np.unique(item["mask"])))
    return shown


def as_drawn(image: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Give a picture as it is: a training transform that does nothing."""
    return {"image": image}


@pytest.mark.parametrize(
    ("make", "kind"), [(make_table, TableDataModule), (make_voc, VOCDataModule)]
)
def test_fuzz_tables(
    make: Callable[[Path], None], kind: type[ImageDataModule], tmp_path: Path
) -> None:
    options = {
        "root": tmp_path / "d", "class_names": CLASSES, "name": "fuzz", "seed": 0, "num_workers": 0,
        "global_batch_size": 1, "train_split": "train", "val_split": "val", "label_source": "xml",
        "train_transform": as_drawn,
    }  # fmt: skip
    if kind is TableDataModule:
        options |= {"csv": "labels.csv", "class_names": None}
    make(tmp_path / "whole")
    counts = {"healthy": 0, "ill": 0}
    for seed in seeds(CASES):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "d")
        rng = random.Random(seed)
        case = f"seed {seed}: {spoil(rng, tmp_path / 'd') if seed else 'nothing'}"
        report = outcome(case, lambda: look_over(kind, **options))
        used = outcome(case, lambda: use(kind(**options)))
        healthy = not isinstance(report, WSSSError) and report.healthy
        counts["healthy" if healthy else "ill"] += 1
        if healthy:
            assert not isinstance(used, WSSSError), f"{case}: the doctor is content, but: {used}"
            assert all(ids <= {0, 1, 2, 3, 255} for ids in used), case
        else:
            assert seed, f"{case}: {report}"
        for text in (
            [f.text for f in report.findings] if isinstance(report, Report) else [str(report)]
        ):
            assert "\n" not in text, f"{case}: {text!r}"
            assert len(text) < 2000, f"{case}: {text[:300]}"
    assert min(counts.values()) > CASES // 20, f"nothing was tried: {counts}"
