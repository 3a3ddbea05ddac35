"""TKP-PCL: top-K pooling with patch contrastive learning (arXiv 2310.09828; IEEE SMC 2024).

Idea: no class activation map. A ViT's patches, brought into contact along rows and columns by two
BiLSTMs, are each classified into C = K + 1 categories, the background included. The mean of the
top-K patch probabilities of a category is its image-level probability, so one misclassified patch
cannot decide alone as it does under max pooling (ViT-PCM, which is ``top_k=1``). A patch
contrastive error (PCE) draws confident patches of a category together and pushes the patches that
surely do not show it away from them.

Paper: Wu et al., "Top-K Pooling with Patch Contrastive Learning for Weakly-Supervised Semantic
Segmentation". There is no official code and its full text was not at hand: this is a
reconstruction after tkp_pcl.md, tested by the ten properties of that page's section 8 and not by
anybody's numbers. A score of this module is not a reproduction of the paper's.

What is known how:
    * From the paper: no CAM; patches classified and pooled to image labels; top-K in place of max
      pooling; a patch contrastive error.
    * Recollected, moderately sure: mean of K; PCE's two sets, epsilon 0.85; learning rates in two
      steps; batch 16; 50 epochs. Hardly sure: K = 6, the similarity (1 + cos) / 2.
    * Inherited from ViT-PCM's code: BiLSTM, bias-free classifier with N(0, 0.05^2), MCE, L2 on its
      weight, frozen blocks with live dropout, augmentation, label merge, the equivariance term.
    * Our choice (every gap of the page's tables): alpha 0.1; PCE on the BiLSTM's output, per image,
      over present categories, with sets taken from the same forward pass; annotation-level labels
      with the background always present; the last iterate is the result.

Several processes: every loss is a mean over images, so a step is the same however its images are
shared out; but for the equivariance term's mosaics and ``pce_scope=batch``, which join the images
of one forward pass.

Departures, from ViT-PCM and from the page:
    * PCE in closed form: O(N C e) sums, no N x N matrix; value and gradient are those of all pairs.
    * One dropout mask for both directions of a BiLSTM; Keras draws one for each.
    * Brightness is not jittered (ViT-PCM's is without effect) and jittered pixels are clipped.
    * The merged map reaches the evaluator as shares against the background (:meth:`TKPPCL.cams`),
      whose values do not depend on the other labels. On the patch grid argmax and CRF input are
      those of the merge. Between patches the shares are interpolated, the page interpolates the
      merged map: the same for one label, 1 % of the pixels' labels for two and 2 % for three (of
      random maps with sharp edges).
    * Image scores (mAP, predicted labels) pool the K best patches at the evaluation's size too; the
      page knows pooling in training only, where K is 6 of 576.
    * With fewer blocks than ``trained_blocks`` all of them are trained after the warm-up.
"""

from math import ceil
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.core.modes import evaluating
from wsss.maps.pixels import denormalise
from wsss.methods.base import Batch, Outputs, WSSSModule, check_not_negative, check_positive
from wsss.methods.tkp_pcl.equivariance import (
    apply_symmetry,
    label_merge,
    mosaic,
    over_maximum,
    tiles_of,
)
from wsss.methods.tkp_pcl.patches import (
    HVBiLSTM,
    PatchScores,
    across_images,
    confident_sets,
    mce_loss,
    pce_loss,
    top_k_pool,
)
from wsss.models.backbone import Backbone


class StepResult(NamedTuple):
    """Losses of a step; ``coverage`` is the share of present pairs of image and category with PCE.

    It is None where PCE is off.
    """

    losses: dict[str, Tensor]
    total: Tensor
    coverage: Tensor | None


class TKPPCL(WSSSModule):
    """Top-K pooled patch classifier with patch contrastive error; ViT-PCM is a setting of it.

    Args:
        backbone: shared encoder. Dropout inside its blocks (0.1) is a setting of the encoder,
            ``backbone.overrides.proj_drop_rate``, and stays alive in frozen blocks.
        num_classes: K, foreground classes; C = K + 1.
        max_steps: optimiser steps of the run.
        warmup_steps: steps in which only BiLSTMs and classifier learn (2 of 50 epochs).
        warmup_lr: learning rate of these steps.
        lr: learning rate afterwards; Adam starts afresh then, as in ViT-PCM.
        trained_blocks: last encoder blocks that learn after the warm-up, with the final norm.
        lstm_hidden: width of each LSTM direction; e is four times that.
        dropout: before the LSTMs, of their inputs, and before the classifier.
        top_k: patches that are pooled; 1 is ViT-PCM's max pooling.
        top_k_fraction: pool this share of the patches instead (rounded up); None: ``top_k``.
        pce_weight: alpha.
        epsilon: probability above which a patch is confident, 0.5 to 1; 1 empties all sets.
        pce_embedding: compare the BiLSTM's output or the encoder's tokens.
        pce_sets: take the sets from the training forward, or from one without dropout.
        pce_background: compare patches of the background too.
        pce_scope: pairs within an image, or within a device's whole batch.
        l2_weight: of the classifier's squared weights, inside the loss.
        equivariance_weight: of ViT-PCM's equivariance term; its second views come from
            ``data.train_transform.view=true``.
        input_scaling: ``symmetric`` maps pixels to [-1, 1] as the original ViT weights want it,
            ``imagenet`` keeps ImageNet's mean and deviation.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        max_steps: int,
        warmup_steps: int = 1322,
        warmup_lr: float = 1e-3,
        lr: float = 1e-4,
        trained_blocks: int = 5,
        lstm_hidden: int = 192,
        dropout: float = 0.2,
        top_k: int = 6,
        top_k_fraction: float | None = None,
        pce_weight: float = 0.1,
        epsilon: float = 0.85,
        pce_embedding: Literal["bilstm", "encoder"] = "bilstm",
        pce_sets: Literal["training", "no_dropout"] = "training",
        pce_background: bool = True,
        pce_scope: Literal["image", "batch"] = "image",
        l2_weight: float = 0.01,
        equivariance_weight: float = 0.0,
        input_scaling: Literal["symmetric", "imagenet"] = "symmetric",
    ) -> None:
        super().__init__(backbone=backbone, num_classes=num_classes, max_steps=max_steps)
        if not 0.5 <= epsilon <= 1:
            raise WSSSError(f"method.epsilon={epsilon}: expected 0.5 to 1, else H and L overlap")
        if top_k < 1 or trained_blocks < 0 or warmup_steps < 0:
            raise WSSSError(
                f"method: expected top_k >= 1, trained_blocks >= 0 and warmup_steps >= 0, got "
                f"{top_k}, {trained_blocks} and {warmup_steps}"
            )
        check_positive(warmup_lr=warmup_lr, lr=lr, lstm_hidden=lstm_hidden)
        check_not_negative(
            pce_weight=pce_weight, l2_weight=l2_weight, equivariance_weight=equivariance_weight
        )
        if top_k_fraction is not None and not 0 < top_k_fraction <= 1:
            raise WSSSError(f"method.top_k_fraction={top_k_fraction}: expected above 0, up to 1")
        self.warmup_steps, self.warmup_lr, self.lr = warmup_steps, warmup_lr, lr
        self.top_k, self.top_k_fraction = top_k, top_k_fraction
        self.pce_weight, self.epsilon = pce_weight, epsilon
        self.pce_embedding, self.pce_sets = pce_embedding, pce_sets
        self.pce_background, self.pce_scope = pce_background, pce_scope
        self.l2_weight, self.equivariance_weight = l2_weight, equivariance_weight
        self.input_scaling = input_scaling

        backbone.requires_grad_(False)
        blocks = list(backbone.vit.blocks)
        for module in (*blocks[max(0, len(blocks) - trained_blocks) :], backbone.vit.norm):
            module.requires_grad_(True)
        self.bilstm = HVBiLSTM(backbone.dim, lstm_hidden, dropout)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(4 * lstm_hidden, num_classes + 1, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.05)

    @property
    def title(self) -> str:
        """Its name in tables."""
        return "TKP-PCL"

    # ---- what an evaluator sees -------------------------------------------------------------

    def forward(self, images: Tensor) -> Outputs:
        """Pooled class logits (B, K), and patch logits (B, K+1, h, w) with the background first."""
        scores = self.score(images)
        pooled = self._pool(scores.probabilities)[:, 1:].clamp(1e-7, 1 - 1e-7)
        return Outputs(pooled.logit(), scores.as_map(scores.logits))

    @torch.no_grad()
    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Share of each class against the background, both over their maxima: (B, K, H, W).

        With M = Z / max Z the map of class c is M_c / (M_c + M_background). Above 0.5 the merged
        map (:func:`label_merge`) prefers the class to the background, and odds against the
        background give that map back (:func:`wsss.maps.pseudo_labels.cam_probabilities`).
        """
        scores = self.score(images)
        peaked = over_maximum(scores.as_map(scores.probabilities))
        background, classes = peaked[:, :1], peaked[:, 1:]
        total = classes + background
        share = torch.where(total > 0, classes / total, 0)
        share = F.interpolate(share, images.shape[-2:], mode="bilinear", align_corners=False)
        return share * labels[..., None, None]

    def score(self, images: Tensor, *, frozen: bool = False) -> PatchScores:
        """Run the network.

        Args:
            images: (B, 3, H, W), normalised.
            frozen: keep the whole encoder out of the gradient.
        """
        if self.input_scaling == "symmetric":
            images = denormalise(images) / 127.5 - 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features = self.backbone(images)
        embeddings = self.bilstm(features.patch_tokens, features.grid)
        logits = self.classifier(self.dropout(embeddings))
        return PatchScores(logits, embeddings, features.patch_tokens, features.grid)

    def _pool(self, probabilities: Tensor) -> Tensor:
        count = self.top_k
        if self.top_k_fraction is not None:
            count = ceil(self.top_k_fraction * probabilities.shape[1])
        return top_k_pool(probabilities, count)

    # ---- training ----------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Adam forgets the warm-up when the encoder's last blocks join (ViT-PCM)."""
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        if first and self.global_step == self.warmup_steps:
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of tkp_pcl.md section 2; see :meth:`compute_losses`."""
        with self.own_draws(batch_idx, enabled=True):
            result = self.compute_losses(batch, self.global_step)
        self.require_finite(result.losses, result.total, batch)
        self.log_losses(result.losses, result.total, len(batch["image"]))
        if result.coverage is not None:
            self.log("train/pce_coverage", result.coverage, batch_size=len(batch["image"]))
        return result.total

    def compute_losses(self, batch: Batch, step: int) -> StepResult:
        """All losses of a batch at a 0-based optimiser step: MCE + alpha PCE + L2 (+ equivariance).

        Args:
            batch: ``image`` (B, 3, H, H), ``labels`` (B, K); for equivariance also ``symmetry``
                (B, 3), ``view`` (B, 3, H/2, H/2), ``view_symmetry`` (B, 3) and ``view_box`` (B, 4),
                rows and columns of the upright image in pixels.
            step: decides whether the encoder learns.
        """
        images = batch["image"]
        targets = F.pad(batch["labels"], (1, 0), value=1.0)  # (B, C), the background always there
        frozen = step < self.warmup_steps
        with self.phase("forward"):
            scores = self.score(images, frozen=frozen)
            probabilities = scores.probabilities  # (B, N, C)
            losses = {"mce_loss": mce_loss(self._pool(probabilities), targets)}
            total = losses["mce_loss"]
            if self.l2_weight > 0:
                losses["l2_loss"] = self.classifier.weight.square().sum()
                total = total + self.l2_weight * losses["l2_loss"]
        coverage = None
        if self.pce_weight > 0:
            with self.phase("pce"):
                losses["pce_loss"], coverage = self._contrast(images, scores, targets)
                total = total + self.pce_weight * losses["pce_loss"]
        if self.equivariance_weight > 0:
            with self.phase("equivariance"):
                losses["equivariance_loss"] = self._equivariance(batch, targets, frozen=frozen)
                total = total + self.equivariance_weight * losses["equivariance_loss"]
        return StepResult(losses, total, coverage)

    def _contrast(
        self, images: Tensor, scores: PatchScores, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """PCE, and the share of present (image, category) pairs with at least two anchors."""
        probabilities = scores.probabilities
        if self.pce_sets == "no_dropout":
            with evaluating(self):
                probabilities = self.score(images).probabilities
        present = targets > 0
        if not self.pce_background:
            present = present & (torch.arange(present.shape[1], device=present.device) > 0)
        sets = confident_sets(probabilities, present, self.epsilon)
        coverage = (sets.high.sum(-1) >= 2).sum() / present.sum().clamp_min(1)
        embeddings = scores.embeddings if self.pce_embedding == "bilstm" else scores.tokens
        if self.pce_scope == "batch":
            embeddings, sets = across_images(embeddings, sets)
        return pce_loss(embeddings, sets), coverage

    def _equivariance(self, batch: Batch, targets: Tensor, *, frozen: bool) -> Tensor:
        """Cross-entropy of mosaic views against the whole image's map, seen the same way."""
        if "view" not in batch:
            raise WSSSError(
                f"method.equivariance_weight={self.equivariance_weight} needs second views: set "
                "data.train_transform.view=true"
            )
        scores = self.score(mosaic(batch["view"]), frozen=frozen)
        logits = tiles_of(scores.as_map(scores.logits)).float()  # (B, C, n, n)
        target = self.equivariance_target(batch, targets, (logits.shape[2], logits.shape[3]))
        return -(target * logits.log_softmax(1)).sum(1).mean()

    def equivariance_target(self, batch: Batch, targets: Tensor, size: tuple[int, int]) -> Tensor:
        """What the second views should show, (B, C, n, n): merged, without gradient or dropout.

        Args:
            batch: as in :meth:`compute_losses`.
            targets: (B, C), background first.
            size: (n, n), patches of a view.
        """
        boxes = self._in_patches(batch["view_box"])
        with evaluating(self):
            scores = self.score(batch["image"])
            maps = scores.as_map(scores.probabilities)
            upright = apply_symmetry(maps, batch["symmetry"], inverse=True)
            parts = [
                F.interpolate(one[None, :, r0:r1, c0:c1], size, mode="bilinear")
                for one, (r0, r1, c0, c1) in zip(upright, boxes.tolist(), strict=True)
            ]
            return label_merge(apply_symmetry(torch.cat(parts), batch["view_symmetry"]), targets)

    def _in_patches(self, boxes: Tensor) -> Tensor:
        """Boxes (B, 4) of pixels as such of this encoder's patches."""
        patch = self.backbone.patch_size
        if (boxes % patch).any():
            raise WSSSError(
                "data.train_transform.patch_size: second views do not lie on the encoder's "
                f"patches of {patch} px; set it to {patch}"
            )
        return boxes // patch

    def param_groups(self) -> list[dict[str, Any]]:
        """BiLSTMs with classifier, and what of the encoder learns after the warm-up."""
        heads = [*self.bilstm.parameters(), *self.classifier.parameters()]
        encoder = [p for p in self.backbone.parameters() if p.requires_grad]
        groups = [{"name": "heads", "params": [p for p in heads if p.requires_grad]}]
        if encoder:
            groups.append({"name": "encoder", "params": encoder})
        return [{**group, "lr": self.warmup_lr} for group in groups]

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Adam with Keras' epsilon and no decay (tkp_pcl.md section 4)."""
        return torch.optim.Adam(groups, eps=1e-7)

    def lr_multiplier(self, step: int) -> float:
        """1 during the warm-up, then constant at ``lr``."""
        return 1.0 if step < self.warmup_steps else self.lr / self.warmup_lr
