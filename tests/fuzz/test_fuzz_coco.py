"""Altered COCO files: a refusal that leaves nothing, or a table and masks that our reader takes."""

import json
import random
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import altered, bytes_altered, outcome, seeds
from PIL import Image

from wsss.core.errors import WSSSError
from wsss.data.images import read_mask
from wsss.data.prepare.coco import find_annotations, prepare_coco
from wsss.data.table import read_table

pytest.importorskip("pycocotools.mask")

CASES = 700
HEIGHT, WIDTH = 12, 16
NAMES = ["a.png", "sub/b.png", "ä.png"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    (tmp_path / "annotations").mkdir()
    return tmp_path


def polygon(rng: random.Random) -> list[float]:
    return [
        rng.randint(0, 2 * side) / 2 for _ in range(rng.randint(3, 6)) for side in (WIDTH, HEIGHT)
    ]


def runs(rng: random.Random) -> dict[str, Any]:
    cuts = sorted(rng.sample(range(1, HEIGHT * WIDTH), rng.randint(1, 6)))
    ends = [0, *cuts, HEIGHT * WIDTH]
    counts: Any = [end - start for start, end in pairwise(ends)]
    if rng.random() < 0.3:
        counts = compressed(counts)
    return {"size": [HEIGHT, WIDTH], "counts": counts}


def compressed(counts: list[int]) -> str:
    from pycocotools import mask

    shape = {"size": [HEIGHT, WIDTH], "counts": counts}
    return mask.frPyObjects(shape, HEIGHT, WIDTH)["counts"].decode()  # type: ignore[no-any-return]


def valid(rng: random.Random) -> dict[str, Any]:
    """A small file as tools write them."""
    text = rng.random() < 0.2
    key = str if text else int
    classes = rng.sample(["cat", "dog", "Ärzte", "stop sign"], rng.randint(1, 4))
    categories = [{"id": key(n + 1), "name": name} for n, name in enumerate(classes)]
    images = [
        {"id": key(n + 1), "file_name": name, "height": HEIGHT, "width": WIDTH}
        for n, name in enumerate(NAMES)
    ]
    annotations = []
    for number in range(rng.randint(1, 6)):
        shape: Any = (
            runs(rng) if rng.random() < 0.4 else [polygon(rng) for _ in range(rng.randint(1, 2))]
        )
        annotations.append(
            {
                "id": key(number + 1),
                "image_id": key(rng.randint(1, 3)),
                "category_id": key(rng.randint(1, len(classes))),
                "segmentation": shape,
                "area": rng.choice([1, 60.5, -3, None]),
                # seldom: a class of crowds alone is refused where those are left out
                "iscrowd": rng.choice([0, 0, 0, 0, 1]),
            }
        )
    return {"images": images, "annotations": annotations, "categories": categories}


def attempts(count: int) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    for seed in seeds(count):
        rng = random.Random(seed)
        content, what = valid(rng), "nothing"
        if seed % 10:
            content, what = altered(rng, content, rng.choice([1, 1, 1, 2, 4]))
        encoded = json.dumps(content).encode()
        if seed % 10 == 9:
            encoded, how = bytes_altered(rng, encoded)
            what = f"{what}; {how}"
        rules = {
            "overlap": rng.choice(["smallest", "last"]),
            "crowd": rng.choice(["paint", "ignore", "skip"]),
        }
        yield f"seed {seed}: {what}", encoded, rules


def test_fuzz_coco(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "annotations" / "instances_x.json"
    written = 0

    def prepare(rules: dict[str, str]) -> int:
        return prepare_coco(root, find_annotations(root, None), jobs=1, **rules)

    for case, content, rules in attempts(CASES):
        path.write_bytes(content)
        found = outcome(case, lambda rules=rules: prepare(rules))
        capsys.readouterr()
        if isinstance(found, WSSSError):
            assert str(root) in str(found), f"{case}: names no file: {found}"
            assert not (root / "wsss").exists(), f"{case}: leaves something: {found}"
            continue
        written += 1
        first = check_table(case, root)
        shutil.rmtree(root / "wsss")
        outcome(case, lambda rules=rules: prepare(rules))
        capsys.readouterr()
        for before, after in zip(first, check_table(case, root), strict=True):
            np.testing.assert_array_equal(before, after, err_msg=f"{case}: other pixels")
        shutil.rmtree(root / "wsss")
    assert written > CASES // 5, "hardly any alteration is harmless: nothing was tried"


def check_table(case: str, root: Path) -> list[np.ndarray]:
    """Read what was written as a training does, and give the masks."""
    table = outcome(case, lambda: read_table(root / "wsss" / "labels.csv", root))
    assert not isinstance(table, WSSSError), f"{case}: our reader refuses our table: {table}"
    masks = []
    shown: set[str] = set()
    for row in table.rows:
        assert row.sample.image.is_file(), case
        assert row.sample.mask is not None, case
        number = len(table.class_names)
        mask = read_mask(row.sample.mask, num_classes=number, size=(HEIGHT, WIDTH))
        ids = {int(value) for value in np.unique(mask)} - {0, 255}
        names = {table.class_names[k - 1] for k in ids}
        assert names <= {*row.labels}, f"{case}: {row.sample.name} shows {names}"
        shown |= names
        masks.append(mask)
    unseen = {label for row in table.rows for label in row.labels} - shown
    assert not unseen, f"{case}: no mask shows {unseen}"
    return masks
