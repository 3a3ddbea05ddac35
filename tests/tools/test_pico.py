"""The pretraining tool on a few drawn cut-outs: training, resuming, exporting, probing."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

# the tools are scripts, not an installed package
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import cutouts
from pico.composites import Composites, Pool, batches
from pico.muon import orthogonalise
from pico.network import Pupil, pico, tokens, whiten_patches
from pico.pooling import TOP
from pico.scores import average_precision, cam_miou
from pico.stages import Stage
from pico.teacher import DIM, Teacher, train_teacher
from pico.trainer import Trainer

OBJECTS = Stage("objects", images=16, size=32, batch=4, lr=1e-3, warmup=2, keep=10)
SCENES = Stage("scenes", images=8, size=48, batch=4, lr=1e-3, warmup=1, grids=(12, 20))


def disc(key: str, label: int, colour: tuple[int, int, int]) -> cutouts.CutOut:
    y, x = np.mgrid[:40, :30]
    inside = ((x - 15) / 14) ** 2 + ((y - 20) / 19) ** 2 < 1
    rgba = np.zeros((40, 30, 4), np.uint8)
    rgba[inside] = (*colour, 255)
    return cutouts.CutOut(key, rgba, label, key, "drawn", "test", "CC0-1.0")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make such small steps slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pool() -> Pool:
    objects = [disc(f"c{i}", i, (25 * i, 255 - 25 * i, 60)) for i in range(1, 9)]
    extras = [disc(f"x{i}", 0, (60, 60, 80 * i)) for i in range(3)]
    photo = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    return Pool(objects + extras, [photo])


def trainer(pool: Pool, out: Path) -> Trainer:
    return Trainer(pool, [OBJECTS, SCENES], out, seed=3, weights=out / "pico.safetensors")


def test_command_finds_its_parts_from_any_folder(tmp_path: Path) -> None:
    command = Path(cutouts.__file__).parent / "pico" / "pretrain.py"
    done = subprocess.run(
        [sys.executable, command, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--teacher-start" in done.stdout


def test_items_are_reproducible_and_say_what_is_pasted(pool: Pool) -> None:
    first, second = (Composites(pool, SCENES, seed=5) for _ in range(2))
    for i in (0, 7):
        assert all(np.array_equal(first[i][k], second[i][k]) for k in first[i])
    item = first[3]
    assert item["image"].shape == (3, 48, 48)
    assert item["patches"].shape == (36,)
    pasted = {pool.cutouts[i].label for i in item["identity"][0] if i >= 0} - {0}
    assert set(np.nonzero(item["classes"][0])[0] + 1) == pasted


def test_training_lowers_the_loss_on_a_repeated_batch(pool: Pool, tmp_path: Path) -> None:
    run = trainer(pool, tmp_path)
    run.step = OBJECTS.warmup
    batch = next(batches(Composites(pool, OBJECTS, 0), 4, 0, 0))
    losses = [sum(run.train_step(batch, OBJECTS).values()) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


def test_pictures_of_a_mosaic_are_labelled_and_pooled_apart(pool: Pool) -> None:
    stage = Stage("mosaics", images=12, size=96, batch=4, lr=1e-3, warmup=1, tiles=(2, 1, 3))
    data = Composites(pool, stage, 0)
    for index, tiles in ((0, 2), (4, 1), (8, 3)):
        assert data[index]["classes"].shape == (tiles**2, len(cutouts.CLASSES))
        assert data[index]["identity"].shape == (tiles**2, 3)
    model = Pupil(len(pool.cutouts)).eval()
    image = torch.randn(1, 3, 96, 96)
    local = tokens(model.vit, image)[0, 1:].unflatten(0, (12, 12))
    out = model(image, tiles=3)["classes_max"]
    # the picture in the middle of the second row
    middle = local[4:8, 4:8].flatten(0, 1).amax(0)
    torch.testing.assert_close(out[4], model.classes_max(middle))


def test_teacher_learns_and_its_targets_keep_to_the_labels(pool: Pool) -> None:
    torch.manual_seed(0)
    stage = Stage("mosaics", images=4, size=96, batch=4, lr=0, warmup=0, tiles=(3,))
    batch = next(batches(Composites(pool, stage, 0), 4, 0, 0))
    teacher = Teacher(len(pool.cutouts), len(cutouts.CLASSES))
    first = train_teacher(teacher, [batch] * 10, 10, TOP)
    last = train_teacher(teacher.requires_grad_(True), [batch] * 10, 10, TOP)
    assert sum(last.values()) < 0.9 * sum(first.values())
    features, probabilities = teacher.targets(batch["image"], batch["classes"])
    assert features.shape == (4, 144, DIM)
    shown = probabilities.unflatten(1, (3, 4, 3, 4)).amax((2, 4)).flatten(1, 2) > 0
    assert torch.equal(shown, batch["classes"] > 0)


def test_distillation_brings_the_tokens_to_the_teacher(pool: Pool, tmp_path: Path) -> None:
    stage = Stage("distil", images=4, size=48, batch=4, lr=1e-3, warmup=1, tiles=(1, 2))
    teacher = Teacher(len(pool.cutouts), len(cutouts.CLASSES)).eval().requires_grad_(False)
    run = Trainer(pool, [stage], tmp_path, seed=3, teacher=teacher)
    run.step = 1
    batch = next(batches(Composites(pool, stage, 0), 4, 0, 0))
    losses = [run.train_step(batch, stage) for _ in range(12)]
    for name in ("teacher_features", "teacher_classes"):
        assert losses[-1][name] < 0.9 * losses[0][name]


def test_resumed_run_equals_an_uninterrupted_one(pool: Pool, tmp_path: Path) -> None:
    whole = trainer(pool, tmp_path / "whole")
    whole.run()
    trainer(pool, tmp_path / "parts").run(limit=3)
    rest = trainer(pool, tmp_path / "parts")
    rest.resume()
    assert (rest.stage_index, rest.step, rest.done) == (0, 3, 12)
    rest.run()
    assert rest.done == 24
    for name in ("model", "average"):
        expected = getattr(whole, name).state_dict()
        for key, value in getattr(rest, name).state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)


def test_export_is_half_precision_and_loads_strictly(pool: Pool, tmp_path: Path) -> None:
    run = trainer(pool, tmp_path)
    run.run(limit=1)
    state = load_file(tmp_path / "pico.safetensors")
    assert {v.dtype for v in state.values()} == {torch.float16}
    pico().load_state_dict({k: v.float() for k, v in state.items()}, strict=True)


def test_tokens_equal_timms_own_on_a_whole_grid() -> None:
    vit = pico().eval()
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(tokens(vit, images), vit.forward_features(images))


def test_whitening_gives_patches_of_equal_variance() -> None:
    vit = pico()
    images = torch.nn.functional.avg_pool2d(torch.randn(64, 3, 192, 192), 2)
    whiten_patches(vit, images)
    out = vit.patch_embed.proj(images).flatten(2).transpose(1, 2).flatten(0, 1)
    assert out.mean(0).abs().max() < 0.05
    assert out.std(0).max() < 1.5 * out.std(0).min()


def test_orthogonalise_evens_out_singular_values() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(24, 60)))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_composite_masks_soft_edges_and_counts_what_shows() -> None:
    low, high = (np.zeros((4, 4, 4), np.float32) for _ in range(2))
    low[:, :3] = 255
    high[:, 2] = 60  # a soft edge over the lower object
    high[:, 3] = 255
    image, mask, visible = cutouts.composite(np.zeros((4, 4, 3), np.uint8), [low, high], [1, 2])
    assert mask[0].tolist() == [1, 1, 255, 2]
    assert visible == [8, 4]
    assert image[0, 0].tolist() == [255, 255, 255]


def test_average_precision_of_perfect_and_reversed_scores() -> None:
    truth = np.array([[1], [0], [1], [0]])
    assert average_precision(np.array([[4.0], [1], [3], [2]]), truth) == 1
    assert average_precision(np.array([[1.0], [3], [2], [4]]), truth) == pytest.approx(5 / 12)


def test_cam_miou_is_one_for_maps_equal_to_the_masks() -> None:
    masks = np.zeros((8, 16, 16), np.uint8)
    cams = np.zeros((8, 8, 16, 16), np.float32)
    for i in range(8):
        masks[i, 4:9, 3:12] = i + 1
        cams[i, i, 4:9, 3:12] = 2
    assert cam_miou(cams, masks, np.eye(8), threshold=0.5) == 1
