"""The second stage: a DeepLab trained on masks, be they pseudo labels or the ground truth.

Idea: a two-stage method ends with an ordinary segmentation network that learns from the first
stage's pseudo labels. It needs no image labels at test time and smooths over the labels' mistakes.
Trained on the ground truth instead (``data.train_masks=ground_truth``) it is the upper bound of
full supervision, and is recorded as such.

Paper: Chen, Papandreou, Kokkinos, Murphy, Yuille, "DeepLab" (TPAMI 2018), and "Rethinking Atrous
Convolution" (2017) for ``head="v3"``. Settings after kazuto1011/deeplab-pytorch, as tkp_pcl.md
section 3 gives them: SGD, poly, rates 6/12/18/24, head ten times the rate, cross-entropy at three
scales and their maximum.

Departures:
    * The ResNet is torchvision's (its stride lies in the 3 x 3 convolutions), dilated to stride 8.
    * Logits are resized to the labels; the cited code resizes the labels to the logits.
    * The encoder may also be the shared ViT, which gives every data set a start that is at hand.
    * COCO-pretrained segmentation weights are possible and recorded as pixel supervision.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from wsss.core.errors import WSSSError
from wsss.maps.pixels import IGNORE_INDEX
from wsss.methods.base import Batch, Outputs, WSSSModule, check_not_negative, check_positive
from wsss.methods.schedules import poly_warmup
from wsss.models.backbone import Backbone, Features
from wsss.models.conv_backbone import ConvBackbone
from wsss.models.decoders import ASPPSum


class Segmenter(WSSSModule):
    """DeepLab V2 or V3 on a convolutional encoder or on the shared ViT.

    Args:
        backbone: the encoder.
        num_classes: K, foreground classes.
        max_steps: optimiser steps of the run.
        head: ``v2`` (sum of dilated convolutions) or ``v3`` (torchvision's head).
        rates: dilations of the head, in features of the encoder's stride.
        optimiser: ``sgd`` with momentum 0.9, or ``adamw``, which transformers want.
        lr: learning rate of the encoder.
        head_lr_factor: times ``lr`` for the head's weights, twice that for its biases.
        weight_decay: on all but the head's biases.
        loss_scales: scales of the input whose predictions are trained, and their maximum where
            there are several.
        freeze_batch_norm: keep the encoder's batch norms as pretrained; not for a random start.
    """

    def __init__(
        self,
        *,
        backbone: Backbone | ConvBackbone,
        num_classes: int,
        max_steps: int,
        head: Literal["v2", "v3"] = "v2",
        rates: Sequence[int] = (6, 12, 18, 24),
        optimiser: Literal["sgd", "adamw"] = "sgd",
        lr: float = 2.5e-4,
        head_lr_factor: float = 10.0,
        weight_decay: float = 5e-4,
        loss_scales: Sequence[float] = (1.0, 0.75, 0.5),
        freeze_batch_norm: bool = True,
    ) -> None:
        # the base keeps the encoder and asks nothing of it
        super().__init__(backbone=backbone, num_classes=num_classes, max_steps=max_steps)  # type: ignore[arg-type]
        if not loss_scales:
            raise WSSSError("method.loss_scales=[]: expected one scale at least")
        check_positive(lr=lr, head_lr_factor=head_lr_factor, loss_scales=loss_scales)
        check_not_negative(weight_decay=weight_decay)
        self.optimiser = optimiser
        self.lr, self.head_lr_factor, self.weight_decay = lr, head_lr_factor, weight_decay
        self.loss_scales = tuple(loss_scales)
        self.frozen_norms: list[nn.BatchNorm2d] = []
        if freeze_batch_norm:
            self.frozen_norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in self.frozen_norms:
            norm.requires_grad_(False)
        self.head: nn.Module
        if head == "v2":
            self.head = ASPPSum(in_channels=backbone.dim, num_outputs=num_classes + 1, rates=rates)
        else:
            self.head = DeepLabHead(backbone.dim, num_classes + 1, atrous_rates=list(rates))

    # ---- what an evaluator sees -------------------------------------------------------------

    def forward(self, images: Tensor) -> Outputs:
        """Class logits (B, K) and segmentation logits (B, K+1, h, w) at the encoder's stride.

        A class's image-level logit is its largest log-odds against the background.
        """
        logits = self._logits(images)
        return Outputs((logits[:, 1:] - logits[:, :1]).amax((2, 3)), logits)

    @torch.no_grad()
    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Probability of each class against the background alone, (B, K, H, W) in [0, 1]."""
        logits = self._logits(images)
        share = (logits[:, 1:] - logits[:, :1]).float().sigmoid()
        share = F.interpolate(share, images.shape[-2:], mode="bilinear", align_corners=False)
        return share * labels[..., None, None]

    def _logits(self, images: Tensor) -> Tensor:
        encoded = self.backbone(images)
        return self.head(encoded.patch_map if isinstance(encoded, Features) else encoded)

    # ---- training ----------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "Segmenter":
        """Training mode for all but frozen batch norms."""
        super().train(mode)
        for norm in self.frozen_norms:
            norm.eval()
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy at every scale and of their maximum; see :meth:`compute_losses`."""
        with self.own_draws(batch_idx, enabled=True):
            losses = self.compute_losses(batch)
        total = torch.stack(list(losses.values())).sum()
        self.require_finite(losses, total, batch)
        self.log_losses(losses, total, len(batch["image"]))
        return total

    def compute_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of a batch: ``image`` (B, 3, H, W), ``target`` (B, H, W) class ids and 255."""
        images, target = batch["image"], batch["target"]
        if len(images) == 1 and isinstance(self.head, DeepLabHead) and self.head.training:
            raise WSSSError(
                "method.head=v3 normalises pooled features over the batch and needs at least 2 "
                "images a device and step; raise budget.global_batch_size or use method.head=v2"
            )
        every: list[Tensor] = []
        losses = {}
        for scale in self.loss_scales:
            with self.phase("forward"):
                size = [max(self.backbone.patch_size, int(scale * s)) for s in images.shape[-2:]]
                scaled = images
                if scale != 1:
                    scaled = F.interpolate(images, size, mode="bilinear", align_corners=False)
                logits = self._logits(scaled).float()
                full = F.interpolate(logits, target.shape[-2:], mode="bilinear")
            losses[f"seg_{scale:g}_loss"] = masked_cross_entropy(full, target)
            every.append(full)
        if len(every) > 1:
            losses["seg_max_loss"] = masked_cross_entropy(torch.stack(every).amax(0), target)
        return losses

    def compiled_parts(self) -> list[nn.Module]:
        """The convolutional encoder, or the transformer's blocks."""
        if isinstance(self.backbone, ConvBackbone):
            return [self.backbone.body]
        return super().compiled_parts()

    def param_groups(self) -> list[dict[str, Any]]:
        """Encoder, head's weights, head's biases (no decay), as in the cited code."""
        head = list(self.head.named_parameters())
        head_lr = self.lr * self.head_lr_factor
        return [
            {
                "name": "encoder",
                "params": [p for p in self.backbone.parameters() if p.requires_grad],
                "lr": self.lr,
            },
            {
                "name": "head",
                "params": [p for n, p in head if not n.endswith("bias")],
                "lr": head_lr,
            },
            {
                "name": "head_biases",
                "params": [p for n, p in head if n.endswith("bias")],
                "lr": 2 * head_lr,
                "weight_decay": 0.0,
            },
        ]

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """SGD with momentum 0.9, or AdamW."""
        if self.optimiser == "adamw":
            return torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)

    def lr_multiplier(self, step: int) -> float:
        """(1 - step / max)^0.9."""
        return poly_warmup(step, max_steps=self.max_steps, warmup_steps=0)


def masked_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that are not 255; 0 where all are.

    Args:
        logits: (B, C, H, W).
        target: (B, H, W) class ids and 255.
    """
    total = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (target != IGNORE_INDEX).sum().clamp_min(1)
