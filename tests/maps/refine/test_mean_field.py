import cv2
import numpy as np
import pytest
import torch
from series import GOLDEN

from wsss.benchmark.crf import scenes
from wsss.core.errors import WSSSError
from wsss.maps.refine.dense_crf import CRF_PRESETS, dense_crf, dense_crf_pruned
from wsss.maps.refine.mean_field import MeanFieldPool, mean_field


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "j_crf.npz", allow_pickle=False) as content:
        return {key: content[key] for key in content.files}


def run(image: np.ndarray, prob: np.ndarray, preset: str) -> np.ndarray:
    images, probs = torch.from_numpy(image)[None], torch.from_numpy(prob)[None]
    return mean_field(images, probs, CRF_PRESETS[preset])[0].numpy()


@pytest.mark.parametrize("preset", CRF_PRESETS)
def test_posterior_equals_pydensecrf(golden: dict[str, np.ndarray], preset: str) -> None:
    image, prob = golden["in_img"], golden["in_prob"]
    expected = dense_crf(image, prob, CRF_PRESETS[preset])
    np.testing.assert_allclose(run(image, prob, preset), expected, atol=2e-4)


def test_posterior_equals_the_reference(golden: dict[str, np.ndarray]) -> None:
    found = run(golden["in_img"], golden["in_prob"], "toco")
    np.testing.assert_allclose(found, golden["out_prob_seg"], atol=2e-4)
    np.testing.assert_array_equal(found.argmax(0), golden["out_label_seg"])


@pytest.mark.parametrize(("name", "preset"), [("MiniVOC", "toco"), ("MiniVOC", "psa")])
def test_labels_agree_on_real_images(name: str, preset: str) -> None:
    image, prob = scenes(20, 0)[name]
    expected = dense_crf(image, prob, CRF_PRESETS[preset]).argmax(0)
    assert (expected != prob.argmax(0)).mean() > 0.01, "the CRF must have something to do"
    assert (run(image, prob, preset).argmax(0) == expected).mean() >= 0.995


@pytest.mark.slow
def test_labels_agree_on_an_image_of_vocs_size_with_21_classes() -> None:
    image, prob = scenes(20, 0)["500 x 375"]
    assert prob.shape == (21, 375, 500)
    expected = dense_crf(image, prob, CRF_PRESETS["psa"]).argmax(0)
    assert (run(image, prob, "psa").argmax(0) == expected).mean() >= 0.995


def test_images_of_a_batch_do_not_see_each_other(golden: dict[str, np.ndarray]) -> None:
    image, prob = golden["in_img"], golden["in_prob"]
    other = cv2.flip(image, 1)
    images = torch.from_numpy(np.stack([image, other]))
    probs = torch.from_numpy(np.stack([prob, prob[:, ::-1].copy()]))
    both = mean_field(images, probs, CRF_PRESETS["toco"])
    for index in range(2):
        alone = mean_field(images[index : index + 1], probs[index : index + 1], CRF_PRESETS["toco"])
        torch.testing.assert_close(both[index], alone[0], atol=1e-5, rtol=0)


def test_pool_labels_and_prunes_like_the_other(golden: dict[str, np.ndarray]) -> None:
    image, prob, preset = golden["in_img"], golden["in_prob"], CRF_PRESETS["toco"]
    with MeanFieldPool(preset, device=torch.device("cpu")) as pool:
        plain, pruned = pool.submit(image, prob).result(), pool.submit(image, prob, [4, 2]).result()
    assert plain.dtype == np.uint8
    np.testing.assert_array_equal(plain, golden["out_label_seg"])
    expected = dense_crf_pruned(image, prob, preset, [4, 2]).argmax(0)
    np.testing.assert_array_equal(pruned, expected)


def test_what_does_not_fit_is_named() -> None:
    prob = torch.full((1, 2, 4, 5), 0.5)
    for images in (torch.zeros(1, 4, 5, 3), torch.zeros(1, 5, 4, 3, dtype=torch.uint8)):
        with pytest.raises(WSSSError, match="dense CRF wants"):
            mean_field(images, prob, CRF_PRESETS["toco"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_gives_the_same_labels() -> None:
    image, prob = scenes(20, 0)["500 x 375"]
    images, probs = torch.from_numpy(image)[None].cuda(), torch.from_numpy(prob)[None].cuda()
    found = mean_field(images, probs, CRF_PRESETS["toco"])[0].cpu().numpy()
    expected = dense_crf(image, prob, CRF_PRESETS["toco"])
    assert (found.argmax(0) == expected.argmax(0)).mean() >= 0.995
