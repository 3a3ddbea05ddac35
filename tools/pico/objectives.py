"""The losses: image-level labels, and the teacher at every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def identity_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Compute the cross-entropy, the probability shared by the objects of a picture.

    Args:
        logits: ``(m, n)``.
        ids: int64 ``(m, k)``, -1 where there is no object; a picture without any does not count.
    """
    present = (ids >= 0).float()
    count = present.sum(1, keepdim=True)
    target = torch.zeros_like(logits).scatter_add_(
        1, ids.clamp(min=0), present / count.clamp(min=1)
    )
    loss = F.cross_entropy(logits, target, label_smoothing=0.05, reduction="none")
    filled = (count[:, 0] > 0).float()
    return (loss * filled).sum() / filled.sum().clamp(min=1)


def objective(out: dict[str, Tensor], batch: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
    """Compute the weighted loss terms: identities share the probability, classes are independent.

    ``mosaics`` is about place. A term that asks for one answer about the whole canvas weighs little
    there, since it makes every token say the same.
    """
    identity, classes = batch["identity"], batch["classes"]
    local = classes.flatten(0, 1)
    terms = {
        "identity_mean": 0.5 * identity_loss(out["identity_mean"], identity.flatten(0, 1)),
        "classes_cls": F.binary_cross_entropy_with_logits(out["classes_cls"], classes.amax(1)),
        "classes_max": F.binary_cross_entropy_with_logits(out["classes_max"], local),
        "classes_token": F.binary_cross_entropy_with_logits(out["classes_token"], local),
    }
    weight = {"objects": 0.5, "scenes": 2.0, "mosaics": 2.0, "distil": 0.5}[stage]
    terms |= {name: weight * term for name, term in terms.items() if name != "identity_mean"}
    if stage in ("mosaics", "distil"):
        terms["classes_cls"] = 0.1 * terms["classes_cls"]
        return terms
    mean = F.binary_cross_entropy_with_logits(out["classes_mean"], local)
    return terms | {
        "identity_cls": 0.5 * identity_loss(out["identity_cls"], identity.flatten(1)),
        "classes_mean": weight * mean,
    }


def distillation(
    head: nn.Module, out: dict[str, Tensor], targets: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Compute the weighted terms that tie each token to the teacher at its place.

    Args:
        head: the pupil's map from its tokens to the teacher's features.
        out: what the pupil gave.
        targets: of :meth:`pico.teacher.Teacher.targets`.
    """
    features, probabilities = targets
    cosine = F.cosine_similarity(head(out["tokens"]), features, dim=-1)
    token = F.binary_cross_entropy_with_logits(out["token_logits"], probabilities)
    return {"teacher_features": 2 * (1 - cosine).mean(), "teacher_classes": 4 * token}
