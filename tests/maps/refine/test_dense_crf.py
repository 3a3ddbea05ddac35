import multiprocessing
import sys

import numpy as np
import pytest
from series import GOLDEN

from wsss.core.errors import WSSSError
from wsss.maps.refine.dense_crf import CRF_PRESETS, CRFPool, dense_crf, dense_crf_pruned


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "j_crf.npz", allow_pickle=False) as content:
        return {key: content[key] for key in content.files}


@pytest.mark.parametrize(
    ("preset", "name"), [("toco", "seg"), ("toco_cam", "cam"), ("psa", "plain")]
)
def test_posterior_equals_the_reference(
    golden: dict[str, np.ndarray], preset: str, name: str
) -> None:
    posterior = dense_crf(golden["in_img"], golden["in_prob"], CRF_PRESETS[preset])
    np.testing.assert_allclose(posterior, golden[f"out_prob_{name}"], atol=1e-5)
    np.testing.assert_array_equal(posterior.argmax(0), golden[f"out_label_{name}"])


def test_rows_and_columns_are_not_mixed_up() -> None:
    image = np.zeros((12, 30, 3), np.uint8)
    image[:, 15:] = 255
    foreground = np.full((12, 30), 0.3, np.float32)
    foreground[:, 15:] = 0.7
    posterior = dense_crf(image, np.stack([1 - foreground, foreground]), CRF_PRESETS["psa"])
    expected = np.zeros((12, 30), int)
    expected[:, 15:] = 1
    np.testing.assert_array_equal(posterior.argmax(0), expected)
    np.testing.assert_allclose(posterior.sum(0), 1, atol=1e-5)


def test_pruning_leaves_out_the_other_classes(golden: dict[str, np.ndarray]) -> None:
    image, prob, preset = golden["in_img"], golden["in_prob"], CRF_PRESETS["toco"]
    posterior = dense_crf_pruned(image, prob, preset, [4, 2])
    assert posterior.shape == prob.shape
    assert not posterior[[1, 3, 5]].any()
    np.testing.assert_allclose(posterior.sum(0), 1, atol=1e-5)
    everything = dense_crf_pruned(image, prob, preset, range(1, 6))
    np.testing.assert_allclose(everything, dense_crf(image, prob, preset), atol=1e-4)
    nothing = dense_crf_pruned(image, prob, preset, [])
    np.testing.assert_allclose(nothing[0], 1)


def test_pool_gives_the_labels_of_the_single_calls(golden: dict[str, np.ndarray]) -> None:
    image, prob, preset = golden["in_img"], golden["in_prob"], CRF_PRESETS["toco"]
    with CRFPool(preset, jobs=1) as pool:
        futures = [pool.submit(image, prob), pool.submit(image, prob, [1])]
    labels = [future.result() for future in futures]
    assert labels[0].dtype == np.uint8
    np.testing.assert_array_equal(labels[0], golden["out_label_seg"])
    np.testing.assert_array_equal(labels[1], dense_crf_pruned(image, prob, preset, [1]).argmax(0))


def test_an_error_in_a_worker_comes_back() -> None:
    with CRFPool(CRF_PRESETS["toco"], jobs=1) as pool:
        future = pool.submit(np.zeros((4, 5, 3), np.uint8), np.zeros((2, 5, 4), np.float32))
        with pytest.raises(WSSSError, match="dense CRF wants"):
            future.result()


def _lose_a_worker() -> None:
    image, prob = np.zeros((4, 5, 3), np.uint8), np.full((2, 4, 5), 0.5, np.float32)
    with CRFPool(CRF_PRESETS["toco"], jobs=1) as pool:
        pool.submit(image, prob).result()
        (worker,) = multiprocessing.active_children()
        worker.kill()
        pool.submit(image, prob).result()


def test_a_killed_worker_is_one_clear_line() -> None:
    with pytest.raises(WSSSError, match="a process was killed, most likely out of memory; repeat"):
        _lose_a_worker()


def test_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(WSSSError, match="pip install pydensecrf2"):
        dense_crf(
            np.zeros((4, 5, 3), np.uint8), np.ones((2, 4, 5), np.float32), CRF_PRESETS["toco"]
        )


def test_presets_carry_their_own_names() -> None:
    assert all(name == preset.name for name, preset in CRF_PRESETS.items())
    toco = CRF_PRESETS["toco"]
    assert (toco.pos_xy, toco.pos_w, toco.bi_xy, toco.bi_rgb, toco.bi_w) == (1, 1, 121, 5, 4)
