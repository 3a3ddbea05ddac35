"""Parity of the dense energy, which several methods share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wsss.methods.losses import (
    dense_energy_from_prob,
    dense_energy_loss,
    energy_features,
    energy_inputs,
    filter_maps,
)
from wsss.parity.cases import Case, Produced
from wsss.parity.inputs import as_tensor, loss_and_gradients
from wsss.parity.tolerances import GRADIENT, LOSS, Tolerance

ENERGY_TOLERANCES = {
    # The C++ filter itself moves by 3e-7 with the compiler's settings, and more on other machines.
    "lattice_AS": Tolerance(relative=1e-5),
    "exact_AS": Tolerance(relative=1e-5),
    "exact_grad_logits": GRADIENT,
    "lattice_over_exact": LOSS,
    "relative_difference": LOSS,
    "grad_correlation": LOSS,
    "AS_correlation": LOSS,
}


def energy_outputs(
    case: Case, images: Tensor, boxes: Tensor, *, mean: Sequence[float], std: Sequence[float]
) -> Produced:
    """Compute the dense energy through lattice and exact Gaussian, and their inputs.

    Args:
        case: gives ``in_logits`` (B, C, h, w), ``in_label`` (B, H, W) and the settings.
        images: (B, 3, H, W), normalised with ``mean`` and ``std``.
        boxes: (B, 4) real pixels.
        mean: of the normalisation.
        std: of the normalisation.
    """
    cfg, label = case.settings, as_tensor(case.inputs["label"])
    scale = cfg.get("scale_factor", 0.5)
    sigma_rgb, sigma_xy = cfg.get("sigma_rgb", 15.0), cfg.get("sigma_xy", 100.0)
    settings: dict[str, Any] = {
        "mean": mean,
        "std": std,
        "weight": cfg.get("weight", 1e-7),
        "sigma_rgb": sigma_rgb,
        "sigma_xy": sigma_xy,
        "scale_factor": scale,
    }
    logits = as_tensor(case.inputs["logits"]).requires_grad_()
    results = [
        loss_and_gradients(
            dense_energy_loss(images, logits, label, boxes, kernel=kernel, **settings), logits
        )
        for kernel in ("lattice", "gaussian")
    ]
    (loss, gradient), (exact_loss, exact_gradient) = results
    prob = logits.detach().softmax(1).requires_grad_()
    from_prob, grad_prob = loss_and_gradients(
        dense_energy_from_prob(images, prob, label, boxes, **settings), prob
    )
    colours, reduced, roi, gate = energy_inputs(
        images,
        prob.detach(),
        label,
        boxes,
        scale_factor=scale,
        mean=mean,
        std=std,
    )
    features = energy_features(colours, sigma_rgb=sigma_rgb, sigma_xy=sigma_xy * scale)
    masked = reduced * roi
    lattice, exact = (filter_maps(features, masked, k) for k in ("lattice", "gaussian"))
    return {
        "loss": loss,
        "grad_logits": gradient,
        "loss_from_prob": from_prob,
        "grad_prob": grad_prob,
        "small_img": colours,
        "small_S": masked,
        "small_gate": gate[:, 0],
        "lattice_AS": lattice,
        "exact_AS": exact,
        "exact_loss": exact_loss,
        "exact_grad_logits": exact_gradient,
        "lattice_over_exact": float(loss / exact_loss),
        "relative_difference": float((loss - exact_loss) / exact_loss),
        "grad_correlation": _correlation(gradient, exact_gradient),
        "AS_correlation": _correlation(lattice, exact),
    }


def _correlation(first: Tensor, second: Tensor) -> float:
    pair = torch.stack([first.flatten(), second.flatten()]).double()
    return float(torch.corrcoef(pair)[0, 1])
