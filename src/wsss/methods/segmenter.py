"""The second stage: a segmenter trained on masks, be they pseudo labels or the ground truth.

Idea: a two-stage method ends with an ordinary segmentation network that learns from the first
stage's pseudo labels. It needs no image labels at test time and smooths over the labels' mistakes.
Trained on the ground truth instead (``data.train_masks=ground_truth``) it is the upper bound of
full supervision, and is recorded as such.

Paper: Chen, Papandreou, Kokkinos, Murphy, Yuille, "DeepLab" (TPAMI 2018), and "Rethinking Atrous
Convolution" (2017) for ``head="v3"``. Settings after kazuto1011/deeplab-pytorch, as tkp_pcl.md
section 3 gives them: SGD, poly, rates 6/12/18/24, head ten times the rate, cross-entropy at three
scales and their maximum. The decoders and losses of ToCo and GETAM stand beside them (``head``,
``loss``, ``reg_weight``), so that a study can recombine parts (docs/factorial.md). The balanced
cross-entropy replaces the plain one at every scale; the energy is of the first scale's prediction.

Departures:
    * The ResNet is torchvision's (its stride lies in the 3 x 3 convolutions), dilated to stride 8.
    * Logits are resized to the labels; the cited code resizes the labels to the logits.
    * The encoder may also be the shared ViT, which gives every data set a start that is at hand.
    * COCO-pretrained segmentation weights are possible and recorded as pixel supervision.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from wsss.core.errors import WSSSError
from wsss.maps.pixels import IGNORE_INDEX
from wsss.methods.base import Batch, Outputs, Step, WSSSModule
from wsss.methods.losses import balanced_segmentation_loss, imagenet_energy_loss
from wsss.methods.schedules import poly_warmup
from wsss.methods.settings import NotNegative, Positive, Scales, Settings, Some, Width, check_scales
from wsss.models.backbone import Backbone, Features
from wsss.models.conv_backbone import ConvBackbone
from wsss.models.decoders import ASPPSum, DPTHead, LargeFOV


@dataclass(frozen=True, kw_only=True)
class SegmenterSettings(Settings):
    """Settings of the segmenter; the defaults are the cited recipe's for VOC."""

    # network
    # ASPP: a sum of dilated convolutions, or torchvision's; ToCo's decoder; GETAM's
    head: Literal["v2", "v3", "largefov", "dpt"] = "v2"
    rates: Some[Width] = (6, 12, 18, 24)  # dilations of v2 and v3, in features
    dilation: Width = 5  # of largefov, in features
    channels: Width | None = None  # of largefov and dpt; None: 512 and 256
    freeze_batch_norm: bool = True  # keep them as pretrained; not for a random start

    # optimiser
    optimiser: Literal["sgd", "adamw"] = "sgd"  # with momentum 0.9; transformers want AdamW
    lr: Positive = 2.5e-4  # of the encoder
    head_lr_factor: Positive = 10.0  # times lr: head's weights; twice that for its biases
    weight_decay: NotNegative = 5e-4  # on all but the head's biases

    # losses
    # mean cross-entropy of all pixels, or half that of the background, half of the foreground
    loss: Literal["plain", "balanced"] = "plain"
    loss_scales: Scales = (1.0, 0.75, 0.5)  # of the input; of several, the maximum too
    reg_weight: NotNegative = 0.0  # of the dense energy; ToCo 0.05

    def check_crop(self, crop_size: int, patch_size: int) -> None:
        """Raise WSSSError where a scale leaves nothing."""
        check_scales("method.loss_scales", self.loss_scales, crop_size, least=1)


class Segmenter(WSSSModule):
    """DeepLab V2 or V3, LargeFOV or DPT on a convolutional encoder or on the shared ViT.

    Example:
        >>> settings = SegmenterSettings(max_steps=20000)
        >>> backbone = ConvBackbone(name="mobilenet_v3_small")
        >>> Segmenter(backbone=backbone, num_classes=20, settings=settings).num_classes
        20

    Args:
        backbone: the encoder.
        num_classes: K, foreground classes.
        settings: see :class:`SegmenterSettings`.

    Raises:
        WSSSError: ``head="dpt"`` on an encoder without a class token or four blocks.
    """

    settings: SegmenterSettings
    takes_frozen = True
    takes_convolutions = True

    def __init__(
        self,
        *,
        backbone: Backbone | ConvBackbone,
        num_classes: int,
        settings: SegmenterSettings,
    ) -> None:
        # the base keeps the encoder and asks nothing of it
        super().__init__(backbone=backbone, num_classes=num_classes, settings=settings)  # type: ignore[arg-type]
        if settings.freeze_batch_norm:
            self.freeze_batch_norms()
        self.head = self.make_head(backbone, num_classes + 1)

    def make_head(self, backbone: Backbone | ConvBackbone, width: int) -> nn.Module:
        """Make the decoder that the settings name, with so many outputs."""
        s, dim = self.settings, backbone.dim
        if s.head == "v2":
            return ASPPSum(in_channels=dim, num_outputs=width, rates=s.rates)
        if s.head == "v3":
            return DeepLabHead(dim, width, atrous_rates=list(s.rates))
        if s.head == "largefov":
            channels = s.channels or 512
            return LargeFOV(
                in_channels=dim, num_outputs=width, channels=channels, dilation=s.dilation
            )
        if isinstance(backbone, ConvBackbone):
            raise WSSSError(
                "method.head=dpt reads four blocks of a ViT, and this encoder is convolutional; "
                "use backbone=vit_base or another head"
            )
        return DPTHead(backbone=backbone, num_outputs=width, channels=s.channels or 256)

    # ---- what an evaluator sees -------------------------------------------------------------

    def forward(self, images: Tensor) -> Outputs:
        """Give class logits (B, K) and segmentation logits (B, K+1, h, w), of DPT (B, K+1, H, W).

        A class's image-level logit is its largest log-odds against the background.
        """
        return self.outputs(self.logits(images))

    @torch.no_grad()
    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Give each class's probability against the background alone, (B, K, H, W) in [0, 1]."""
        logits = self.logits(images)
        share = (logits[:, 1:] - logits[:, :1]).float().sigmoid()
        share = F.interpolate(share, images.shape[-2:], mode="bilinear", align_corners=False)
        return share * labels[..., None, None]

    def logits(self, images: Tensor) -> Tensor:
        """Give segmentation logits of images (B, 3, H, W), the background first.

        Returns:
            (B, K+1, h, w) at the stride, of DPT (B, K+1, H, W) of the whole patches.
        """
        if isinstance(self.head, DPTHead):
            return self.head(self.backbone(images, taps=tuple(self.head.taps.values())))
        encoded = self.backbone(images)
        return self.head(encoded.patch_map if isinstance(encoded, Features) else encoded)

    @staticmethod
    def outputs(logits: Tensor) -> Outputs:
        """Give segmentation logits (B, K+1, h, w), and what they say of the image."""
        return Outputs((logits[:, 1:] - logits[:, :1]).amax((2, 3)), logits)

    # ---- training ----------------------------------------------------------------------------

    def losses(self, batch: Batch, step: int) -> Step:
        """Compute the cross-entropy at every scale and of their maximum; the total is the sum.

        The energy of the first scale, where it has a weight, is added with that.

        Args:
            batch: ``image`` (B, 3, H, W), ``target`` (B, H, W) class ids and 255, ``box`` (B, 4).
            step: all steps are alike.

        Returns:
            The losses; the outputs are those of the first scale.

        Raises:
            WSSSError: a batch of one image, where the head normalises over the batch.
        """
        images, target = batch["image"], batch["target"]
        if len(images) == 1 and isinstance(self.head, DeepLabHead) and self.head.training:
            raise WSSSError(
                "method.head=v3 normalises pooled features over the batch and needs at least 2 "
                "images a device and step; raise budget.global_batch_size or use method.head=v2"
            )
        small: list[Tensor] = []  # each (B, K+1, h, w)
        every: list[Tensor] = []  # each (B, K+1, H, W)
        losses = {}
        for scale in self.settings.loss_scales:
            with self.phase("forward"):
                size = [max(self.backbone.patch_size, int(scale * s)) for s in images.shape[-2:]]
                scaled = images
                if scale != 1:
                    scaled = F.interpolate(images, size, mode="bilinear", align_corners=False)
                small.append(self.logits(scaled).float())
                full = F.interpolate(small[-1], target.shape[-2:], mode="bilinear")
            losses[f"seg_{scale:g}_loss"] = self.cross_entropy(full, target)
            every.append(full)
        if len(every) > 1:
            losses["seg_max_loss"] = self.cross_entropy(torch.stack(every).amax(0), target)
        total = torch.stack(list(losses.values())).sum()
        if self.settings.reg_weight > 0:
            with self.phase("energy"):
                energy = imagenet_energy_loss(images, every[0], target, batch["box"], "lattice")
            losses["reg_loss"] = energy
            total = total + self.settings.reg_weight * energy
        return Step(losses, total, self.outputs(small[0]), {"target": target})

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the cross-entropy of the settings, of logits (B, K+1, H, W)."""
        if self.settings.loss == "balanced":
            return balanced_segmentation_loss(logits, target)
        return masked_cross_entropy(logits, target)

    def compiled_parts(self) -> list[nn.Module]:
        """Give the convolutional encoder, or the transformer's blocks."""
        if isinstance(self.backbone, ConvBackbone):
            return [self.backbone.body]
        return super().compiled_parts()

    def param_groups(self) -> list[dict[str, Any]]:
        """Give encoder, head's weights, head's biases (no decay), as in the cited code."""
        lr, head_lr = self.settings.lr, self.settings.lr * self.settings.head_lr_factor
        encoder = [p for p in self.backbone.parameters() if p.requires_grad]
        head = list(self.head.named_parameters())
        weights = [p for n, p in head if not n.endswith("bias")]
        biases = [p for n, p in head if n.endswith("bias")]
        return [
            {"name": "encoder", "params": encoder, "lr": lr},
            {"name": "head", "params": weights, "lr": head_lr},
            {"name": "head_biases", "params": biases, "lr": 2 * head_lr, "weight_decay": 0.0},
        ]

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make SGD with momentum 0.9, or AdamW."""
        s = self.settings
        if s.optimiser == "adamw":
            return torch.optim.AdamW(groups, weight_decay=s.weight_decay)
        return torch.optim.SGD(groups, lr=s.lr, momentum=0.9, weight_decay=s.weight_decay)

    def lr_multiplier(self, step: int) -> float:
        """Give (1 - step / max)^0.9."""
        return poly_warmup(step, max_steps=self.settings.max_steps, warmup_steps=0)


def masked_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the mean cross-entropy over the pixels that are not 255; 0 where all are.

    Args:
        logits: (B, C, H, W).
        target: (B, H, W) class ids and 255.
    """
    total = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (target != IGNORE_INDEX).sum().clamp_min(1)
