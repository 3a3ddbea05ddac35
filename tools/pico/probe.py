"""The probe: fine-tune the backbone shortly on MiniVOC and measure image mAP and CAM mIoU."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from cutouts import CLASSES
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from pico.composites import MEAN, STD
from pico.network import PATCH, pico, tokens
from pico.scores import average_precision, cam_miou


def read_split(root: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read a MiniVOC split: images ``(n, s, s, 3)``, masks ``(n, s, s)``, labels ``(n, 8)``."""
    names = (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
    images, masks, labels = [], [], []
    for name in names:
        with Image.open(root / "JPEGImages" / f"{name}.jpg") as image:
            images.append(np.array(image.convert("RGB")))
        with Image.open(root / "SegmentationClass" / f"{name}.png") as mask:
            masks.append(np.array(mask))
        text = (root / "Annotations" / f"{name}.xml").read_text()
        labels.append([float(f"<name>{c}</name>" in text) for c in CLASSES])
    return np.stack(images), np.stack(masks), np.array(labels, np.float32)


def normalised(images: np.ndarray) -> Tensor:
    """Turn uint8 ``(n, s, s, 3)`` into the net's float32 input ``(n, 3, s, s)``."""
    return torch.from_numpy(((images - MEAN) / STD).transpose(0, 3, 1, 2).copy())


def probe_crop(image: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """Resize an image by 0.8 to 1.25 and cut a random, maybe mirrored, square of ``side``."""
    size = int(image.shape[0] * rng.uniform(0.8, 1.25))
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    y, x = rng.integers(0, size - side + 1, 2)
    crop = image[y : y + side, x : x + side]
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def finetune(vit: nn.Module, root: Path, steps: int, seed: int, device: str) -> nn.Linear:
    """Train backbone and classifier on MiniVOC ``train``, image-level labels, in place.

    A crop keeps the image's labels even where it has cut an object off, as in WSSS training.

    Args:
        vit: the backbone.
        root: MiniVOC's ``VOC2012``.
        steps: updates, 16 crops of 128 pixels each, AdamW, peak rate 3e-4 (classifier 3e-3).
        seed: of crops and classifier.
        device: torch device.

    Returns:
        The classifier on max-pooled patch tokens, without bias, as the methods use.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images, _, labels = read_split(root, "train")
    head = nn.Linear(vit.embed_dim, len(CLASSES), bias=False).to(device)
    optimiser = torch.optim.AdamW(
        [{"params": vit.parameters(), "lr": 3e-4}, {"params": head.parameters(), "lr": 3e-3}],
        weight_decay=0.05,
    )
    ramp = torch.optim.lr_scheduler.OneCycleLR(optimiser, [3e-4, 3e-3], steps, pct_start=0.1)
    for _ in range(steps):
        chosen = rng.choice(len(images), 16, replace=False)
        crops = normalised(np.stack([probe_crop(images[i], 128, rng) for i in chosen])).to(device)
        logits = head(tokens(vit, crops, grid=16)[:, 1:].amax(1))
        loss = F.multilabel_soft_margin_loss(logits, torch.from_numpy(labels[chosen]).to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        ramp.step()
    return head


@torch.no_grad()
def activation_maps(
    vit: nn.Module, head: nn.Linear, images: np.ndarray, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Give class scores ``(n, 8)`` and raw CAMs ``(n, 8, 20, 20)`` of whole images."""
    scores, cams = [], []
    for chunk in normalised(images).split(20):
        out = tokens(vit, chunk.to(device), grid=chunk.shape[-1] // PATCH)[:, 1:]
        side = int(out.shape[1] ** 0.5)
        scores.append(head(out.amax(1)).cpu())
        cams.append(head(out).transpose(1, 2).unflatten(2, (side, side)).cpu())
    return torch.cat(scores).numpy(), torch.cat(cams).numpy()


def probe(weights: Path | None, root: Path, steps: int, seed: int, device: str) -> dict[str, float]:
    """Fine-tune shortly, then measure image mAP and CAM mIoU.

    Args:
        weights: safetensors file, or ``None`` for timm's random start.
        root: MiniVOC's ``VOC2012``.
        steps: see :func:`finetune`.
        seed: of the random start, the crops and the classifier.
        device: torch device.

    Returns:
        Scores by name. The CAM threshold is the best of nine on the ``train`` masks.
    """
    torch.manual_seed(seed)
    vit = pico()
    if weights:
        vit.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    vit.to(device)
    head = finetune(vit, root, steps, seed, device)
    images, masks, labels = read_split(root, "train")
    _, cams = activation_maps(vit, head, images[:200], device)
    grid = [t / 10 for t in range(1, 10)]
    best = max(grid, key=lambda t: cam_miou(cams, masks[:200], labels[:200], t))
    result = {"cam_threshold": best}
    for split in ("val", "val_unseen"):
        images, masks, labels = read_split(root, split)
        scores, cams = activation_maps(vit, head, images, device)
        result[f"{split}_map"] = round(average_precision(scores, labels), 4)
        result[f"{split}_cam_miou"] = round(cam_miou(cams, masks, labels, best), 4)
    return result
