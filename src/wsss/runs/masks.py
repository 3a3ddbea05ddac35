"""From a run and an image to a mask."""

import numpy as np
import torch

from wsss.evaluation.inference import localise, predict, predicted_labels, smoothed_label
from wsss.maps.pseudo_labels import cam_to_label
from wsss.runs.folder import Run


def predict_mask(run: Run, image: torch.Tensor, rgb: np.ndarray) -> np.ndarray:
    """Class ids of one image under the run's protocol.

    A method without a segmentation head gives the CAMs of the classes it predicts, thresholded.

    Args:
        run: the loaded run.
        image: (3, H, W), normalised.
        rgb: (H, W, 3), uint8.

    Returns:
        uint8 (H, W).
    """
    size, protocol = rgb.shape[:2], run.protocol
    prediction = predict(run.module, image[None], size, protocol)
    logits = prediction.single if prediction.merged is None else prediction.merged
    if logits is None:
        labels = predicted_labels(prediction.class_logits)
        cams = localise(run.module, image[None], labels, size, protocol)
        label = cam_to_label(cams, labels, bg_threshold=protocol.cam_threshold)
        return label[0].cpu().numpy().astype(np.uint8)
    return smoothed_label(rgb, logits[0], protocol)
