"""Every number of a label map against an independent computation: loops, NumPy, no OpenCV."""

import numpy as np
import pytest
import torch

from wsss.core.errors import WSSSError
from wsss.evaluation.label_maps import SIZE_LIMITS, LabelMapCounts, Regions, label_map_scores
from wsss.evaluation.per_image import co_occurrence, mean_iou, per_image_counts

C = 4
SHAPE = (80, 120)


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Truth with objects of all sizes and void, and a prediction that is off near them."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(SHAPE, np.uint8)
    truth[4:34, 6:50] = 1 + seed % 3  # 13.8 % of the image: large
    truth[50:64, 8:34] = 1 + (seed + 1) % 3  # 3.8 %: medium
    truth[50:56, 90:100] = 1 + seed % 3  # 0.6 %: small, of the same class as the large one
    truth[18:24, 88:96] = 1 + (seed + 1) % 3
    guess = np.roll(truth, (rng.integers(-3, 4), rng.integers(-3, 4)), (0, 1))
    for c in range(1, C):
        near = np.zeros(SHAPE, bool)
        for dr in range(-3, 4):
            for dc in range(-3, 4):
                near |= np.roll(truth == c, (dr, dc), (0, 1))
        # near its own objects, where exact and chamfer distances cannot disagree on the nearest
        guess[near & (rng.random(SHAPE) < 0.1)] = c
        guess[near & (rng.random(SHAPE) < 0.1)] = 0
    guess[70:76, 100:110] = 1 + (seed + 2) % 3  # a class that the image does not hold
    truth[33:35, 4:52] = 255  # void border below the large object
    truth[:2] = 255
    return truth, guess


def within(changed: np.ndarray, radius: int) -> np.ndarray:
    """For every pixel whether its window holds a True, window by window."""
    result = np.zeros(changed.shape, bool)
    for r, c in np.ndindex(*changed.shape):
        window = changed[max(0, r - radius) : r + radius + 1, max(0, c - radius) : c + radius + 1]
        result[r, c] = window.any()
    return result


def near_change(labels: np.ndarray, radius: int) -> np.ndarray:
    result = np.zeros(labels.shape, bool)
    for value in np.unique(labels):
        mine = labels == value
        result |= mine & within(~mine, radius)
    return result


def cheng_boundary(mask: np.ndarray, reach: int) -> np.ndarray:
    """Pixels of a mask that erosion with a 3 x 3 square takes away, zeros around the image."""
    eroded = mask
    for _ in range(reach):
        padded = np.pad(eroded, 1)
        eroded = np.ones_like(mask)
        for dr in range(3):
            for dc in range(3):
                eroded = eroded & padded[dr : dr + mask.shape[0], dc : dc + mask.shape[1]]
    return mask & ~eroded


def components(mask: np.ndarray) -> list[np.ndarray]:
    """(n, 2) pixels of every 8-connected component, by flood fill."""
    left = {tuple(p) for p in np.argwhere(mask)}
    found = []
    while left:
        stack, members = [left.pop()], []
        while stack:
            r, c = stack.pop()
            members.append((r, c))
            around = {(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= around
            stack += around
        found.append(np.array(members))
    return found


def size_bin(pixels: np.ndarray) -> int:
    share = len(pixels) / np.prod(SHAPE)
    return sum(share >= limit for limit in SIZE_LIMITS)


def iou(hit: np.ndarray, truth: np.ndarray, guess: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.where(truth > 0, hit / (truth + guess - hit), np.nan)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    return [scene(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def result(scenes: list[tuple[np.ndarray, np.ndarray]]) -> tuple[dict, dict]:
    counts = LabelMapCounts(num_classes=C)
    for index, (truth, guess) in enumerate(scenes):
        counts.update(torch.from_numpy(guess), Regions.of(torch.from_numpy(truth), C), index)
    return label_map_scores(counts.compute())


def test_rates_of_the_confusion(scenes: list, result: tuple[dict, dict]) -> None:
    truth, guess = (np.stack(maps).ravel() for maps in zip(*scenes, strict=True))
    guess, truth = guess[truth != 255], truth[truth != 255]
    tp, fp, fn = (
        np.array([((guess == c) & (truth == c)).sum() for c in range(C)]),
        np.array([((guess == c) & (truth != c)).sum() for c in range(C)]),
        np.array([((guess != c) & (truth == c)).sum() for c in range(C)]),
    )
    values, columns = result
    np.testing.assert_allclose(columns["iou"], tp / (tp + fp + fn))
    np.testing.assert_allclose(columns["precision"], tp / (tp + fp))
    np.testing.assert_allclose(columns["recall"], tp / (tp + fn))
    np.testing.assert_allclose(columns["over"], fp / (tp + fn))
    np.testing.assert_allclose(columns["under"], fn / (tp + fn))
    assert values["miou"] == pytest.approx((tp / (tp + fp + fn)).mean())
    assert values["under"] == pytest.approx((fn / (tp + fn)).mean())
    assert values["pixel_accuracy"] == pytest.approx((truth == guess).mean())


def test_boundary_iou_is_that_of_cheng(scenes: list, result: tuple[dict, dict]) -> None:
    hit, of_truth, of_guess = np.zeros((3, C))
    reach = round(0.02 * np.hypot(*SHAPE))
    assert reach == 3
    for truth, guess in scenes:
        guess = np.where(truth == 255, 255, guess)
        for c in range(C):
            band = cheng_boundary(truth == c, reach)
            other = cheng_boundary(guess == c, reach)
            hit[c] += (band & other).sum()
            of_truth[c] += band.sum()
            of_guess[c] += other.sum()
    np.testing.assert_allclose(result[1]["boundary_iou"], iou(hit, of_truth, of_guess))


@pytest.mark.parametrize("width", [3, 5, 10])
def test_trimap_iou(scenes: list, result: tuple[dict, dict], width: int) -> None:
    matrix = np.zeros((C, C))
    for truth, guess in scenes:
        inside = near_change(truth, width) & (truth != 255)
        np.add.at(matrix, (truth[inside], guess[inside]), 1)
    expected = iou(matrix.diagonal(), matrix.sum(1), matrix.sum(0)).mean()
    assert result[0]["trimap_iou"][str(width)] == pytest.approx(expected)


def test_iou_by_size_gives_a_pixel_to_the_nearest_object(
    scenes: list, result: tuple[dict, dict]
) -> None:
    hit, of_truth, of_guess = np.zeros((3, 3, C))
    for truth, guess in scenes:
        for c in range(1, C):
            objects = components(truth == c)
            for pixels in objects:
                of_truth[size_bin(pixels), c] += len(pixels)
            for pixel in np.argwhere((guess == c) & (truth != 255)):
                if not objects:
                    continue
                distances = [((pixels - pixel) ** 2).sum(1).min() for pixels in objects]
                size = size_bin(objects[int(np.argmin(distances))])
                of_guess[size, c] += 1
                hit[size, c] += truth[tuple(pixel)] == c
    for size, name in enumerate(("small", "medium", "large")):
        expected = np.nanmean(iou(hit[size], of_truth[size], of_guess[size])[1:])
        assert result[0]["size_iou"][name] == pytest.approx(expected), name
    assert result[0]["size_pixels"] == of_truth.sum(1).tolist()


def test_single_images_and_co_occurrence(scenes: list, result: tuple[dict, dict]) -> None:
    of_images, invented, claimed = [], 0, 0
    taken, beside = np.zeros((C, C)), np.zeros((C, C))
    for truth, guess in scenes:
        valid = truth != 255
        present = [c for c in range(C) if (truth == c).any()]
        single = [
            ((truth == c) & (guess == c)).sum() / (((truth == c) | (guess == c)) & valid).sum()
            for c in present
        ]
        of_images.append(np.mean(single))
        for c in range(C):
            claim = (guess == c) & valid
            if c:
                claimed += claim.sum()
                invented += 0 if c in present else claim.sum()
            if c in present:
                for r in present:
                    taken[r, c] += (claim & (truth == r)).sum()
                    beside[r, c] += (truth == r).sum()
    values = result[0]
    assert values["image_miou"] == pytest.approx(np.mean(of_images))
    assert values["hallucinated"] == pytest.approx(invented / claimed)
    assert invented > 0
    expected = np.where(beside > 0, taken / np.maximum(beside, 1), np.nan)
    np.fill_diagonal(expected, np.nan)
    np.testing.assert_allclose(values["co_occurrence"], expected)


def test_abstentions_are_apart_in_cells_background_elsewhere() -> None:
    truth, guess = scene(0)
    holes = guess.copy()
    holes[10:20, 10:20] = 255
    filled = np.where(holes == 255, 0, holes).astype(np.uint8)
    regions = Regions.of(torch.from_numpy(truth), C)
    abstaining = LabelMapCounts(num_classes=C, allow_ignored_prediction=True)
    abstaining.update(torch.from_numpy(holes), regions, 7)
    plain = LabelMapCounts(num_classes=C)
    plain.update(torch.from_numpy(filled), regions, 7)
    one, other = label_map_scores(abstaining.compute()), label_map_scores(plain.compute())
    np.testing.assert_equal(one, other)
    cells = abstaining.compute().cells.numpy()
    assert (cells[:, 0] == 7).all()
    left_out = per_image_counts(cells, num_classes=C, exclude_ignored=True).values
    valid = (truth != 255) & (holes != 255)
    assert left_out[0, :, 1].tolist() == [((truth == c) & valid).sum() for c in range(C)]
    assert mean_iou(left_out.sum(0)) > one[0]["miou"]


def test_wrong_ids_are_named() -> None:
    regions = Regions.of(torch.zeros(8, 8, dtype=torch.long), 2)
    with pytest.raises(WSSSError, match="class id 5"):
        LabelMapCounts(num_classes=2).update(torch.full((8, 8), 5), regions, 0)
    with pytest.raises(WSSSError, match="class id 255"):
        LabelMapCounts(num_classes=2).update(torch.full((8, 8), 255), regions, 0)
    with pytest.raises(WSSSError, match="differ in size"):
        LabelMapCounts(num_classes=2).update(torch.zeros(4, 4), regions, 0)
    with pytest.raises(WSSSError, match="no label map"):
        label_map_scores(LabelMapCounts(num_classes=2).compute())


def test_a_class_beside_its_context_shows_in_co_occurrence() -> None:
    # two images hold 1 and 2; half of class 2 is called 1 there. A third image holds 2 alone.
    cells = np.array([[0, 2 * 4 + 1, 30], [0, 2 * 4 + 2, 30], [0, 1 * 4 + 1, 5],
                      [1, 2 * 4 + 2, 99], [1, 2 * 4 + 1, 1]])  # fmt: skip
    found = co_occurrence(cells, num_classes=3)
    assert found.shares[2, 1] == 0.5
    assert np.isnan(found.shares[0]).all()
    assert found.hallucinated == pytest.approx(1 / 165)
