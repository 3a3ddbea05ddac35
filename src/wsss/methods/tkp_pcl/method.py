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
shared out. Two terms are exceptions, since they join the images of one forward pass: the mosaics of
the equivariance term, and PCE with ``pce_scope=batch``.

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

from dataclasses import dataclass
from decimal import Decimal
from math import ceil
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.core.modes import evaluating
from wsss.maps.pixels import denormalise
from wsss.methods.base import Batch, Outputs, Step, WSSSModule
from wsss.methods.settings import (
    BelowOne,
    Count,
    NotNegative,
    Number,
    Positive,
    Settings,
    Share,
    Width,
)
from wsss.methods.tkp_pcl.equivariance import (
    in_patches,
    label_merge,
    mosaic,
    over_maximum,
    seen_as_views,
    tiles_of,
)
from wsss.methods.tkp_pcl.patches import (
    ConfidentSets,
    HVBiLSTM,
    PatchScores,
    across_images,
    confident_sets,
    mce_loss,
    pce_coverage,
    pce_loss,
    top_k_pool,
)
from wsss.models.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class TKPPCLSettings(Settings):
    """Settings of TKP-PCL; the defaults are those of tkp_pcl.md section 9, for VOC."""

    # optimiser
    warmup_steps: Number = 1322  # in which only BiLSTMs and classifier learn; 2 of 50 epochs
    warmup_lr: Positive = 1e-3  # of these steps
    lr: Positive = 1e-4  # afterwards; Adam starts afresh then, as in ViT-PCM
    trained_blocks: Number = 5  # last blocks that learn after the warm-up, with the final norm

    # network
    input_scaling: Literal["symmetric", "imagenet"] = "symmetric"  # see TKPPCL.score
    lstm_hidden: Width = 192  # width of each LSTM direction; e is four times that
    # what the classifier reads: the BiLSTMs' output, that added to the tokens, or the tokens
    bilstm: Literal["alone", "residual", "none"] = "alone"
    dropout: BelowOne = 0.2  # before the LSTMs, of their inputs, and before the classifier
    top_k: Count = 6  # patches that are pooled; 1 is ViT-PCM's max pooling
    top_k_fraction: Share | None = None  # of the patches, rounded up; None: top_k of them

    # losses
    pce_weight: NotNegative = 0.1  # alpha
    # probability above which a patch is sure; below 0.5 H and L overlap, 1 empties both
    epsilon: Annotated[float, Ge(0.5), Le(1)] = 0.85
    pce_embedding: Literal["bilstm", "encoder"] = "bilstm"  # whose output is compared
    pce_sets: Literal["training", "no_dropout"] = "training"  # the forward that gives H and L
    pce_background: bool = True  # compare patches of the background too
    pce_scope: Literal["image", "batch"] = "image"  # of the pairs; batch: of a forward pass
    l2_weight: NotNegative = 0.01  # of the classifier's squared weights, inside the loss
    equivariance_weight: NotNegative = 0.0  # ViT-PCM 1, with data.train_transform.view=true


class TKPPCL(WSSSModule):
    """Top-K pooled patch classifier with patch contrastive error; ViT-PCM is a setting of it.

    Example:
        >>> backbone = Backbone(name="vit_tiny_patch16_384", weights="random")
        >>> settings = TKPPCLSettings(max_steps=33050)
        >>> TKPPCL(backbone=backbone, num_classes=20, settings=settings).num_classes
        20

    Args:
        backbone: shared encoder. Dropout inside its blocks (0.1) is a setting of the encoder,
            ``backbone.overrides.proj_drop_rate``, and stays alive in frozen blocks.
        num_classes: K, foreground classes; C = K + 1.
        settings: see :class:`TKPPCLSettings`.
    """

    settings: TKPPCLSettings

    def __init__(self, *, backbone: Backbone, num_classes: int, settings: TKPPCLSettings) -> None:
        super().__init__(backbone=backbone, num_classes=num_classes, settings=settings)
        backbone.requires_grad_(False)
        backbone.take_as_given()  # input_scaling
        blocks = list(backbone.vit.blocks)
        trained = blocks[max(0, len(blocks) - settings.trained_blocks) :]
        for module in (*trained, backbone.vit.norm):
            module.requires_grad_(True)
        width = 4 * settings.lstm_hidden
        if settings.bilstm == "residual" and width != backbone.dim:
            raise WSSSError(
                f"method.bilstm=residual adds {width} values to tokens of {backbone.dim}: set "
                "method.lstm_hidden to a quarter of the encoder's width"
            )
        if settings.bilstm == "none":
            width = backbone.dim
        else:
            self.bilstm = HVBiLSTM(backbone.dim, settings.lstm_hidden, settings.dropout)
        self.dropout = nn.Dropout(settings.dropout)
        self.classifier = nn.Linear(width, num_classes + 1, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.05)

    @property
    def title(self) -> str:
        """Its name in tables."""
        return "TKP-PCL"

    # ---- what an evaluator sees -------------------------------------------------------------

    def forward(self, images: Tensor) -> Outputs:
        """Give pooled class logits (B, K), and patch logits (B, K+1, h, w), background first."""
        scores = self.score(images)
        return self.outputs(scores, self.pool(scores.probabilities))

    @torch.no_grad()
    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Give the share of each class against the background, over their maxima: (B, K, H, W).

        With M = Z / max Z the map of class c is M_c / (M_c + M_background). Above 0.5 the merged
        map (:func:`label_merge`) prefers the class to the background, and odds against the
        background give that map back (:func:`wsss.maps.pseudo_labels.cam_probabilities`).
        """
        scores = self.score(images)
        peaked = over_maximum(scores.as_map(scores.probabilities))  # (B, C, h, w)
        background, classes = peaked[:, :1], peaked[:, 1:]
        total = classes + background
        share = torch.where(total > 0, classes / total, 0)
        share = F.interpolate(share, images.shape[-2:], mode="bilinear", align_corners=False)
        return share * labels[..., None, None]

    # ---- patches -----------------------------------------------------------------------------

    def score(self, images: Tensor, *, frozen: bool = False) -> PatchScores:
        """Classify every patch.

        Pixels are mapped to [-1, 1], as the original ViT weights want them, or keep ImageNet's mean
        and deviation (``input_scaling=imagenet``).

        Args:
            images: (B, 3, H, W), normalised.
            frozen: keep the whole encoder out of the gradient.
        """
        if self.settings.input_scaling == "symmetric":
            images = denormalise(images) / 127.5 - 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features = self.backbone(images)
        embeddings = self.embed(features.patch_tokens, features.grid)  # (B, N, e)
        logits = self.classifier(self.dropout(embeddings))  # (B, N, C)
        return PatchScores(logits, embeddings, features.patch_tokens, features.grid)

    def embed(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Give what the classifier reads (B, N, e) of tokens (B, N, D): ``settings.bilstm``."""
        if self.settings.bilstm == "none":
            return tokens
        context = self.bilstm(tokens, grid)
        return tokens + context if self.settings.bilstm == "residual" else context

    def num_pooled(self, patches: int) -> int:
        """Give how many of an image's patches are pooled."""
        fraction = self.settings.top_k_fraction
        if fraction is None:
            return self.settings.top_k
        # as written: the float 0.07 times 100 is a little more than 7
        return ceil(Decimal(str(fraction)) * patches)

    def pool(self, probabilities: Tensor) -> Tensor:
        """Give image-level probabilities y (B, C) of patch probabilities Z (B, N, C)."""
        return top_k_pool(probabilities, self.num_pooled(probabilities.shape[1]))

    @staticmethod
    def outputs(scores: PatchScores, pooled: Tensor) -> Outputs:
        """Give logits of the classes' pooled probabilities (B, C), beside the patches' logits."""
        classes = pooled[:, 1:].clamp(1e-7, 1 - 1e-7)  # without the background
        return Outputs(classes.logit(), scores.as_map(scores.logits))

    # ---- training ----------------------------------------------------------------------------

    def losses(self, batch: Batch, step: int) -> Step:
        """Compute MCE + alpha PCE + L2 (+ equivariance), tkp_pcl.md section 2.

        A term without weight is not computed. ``scalars`` has ``pce_coverage`` where PCE is on.

        Args:
            batch: ``image`` (B, 3, H, H), ``labels`` (B, K); for equivariance also ``symmetry``
                (B, 3), ``view`` (B, 3, H/2, H/2), ``view_symmetry`` (B, 3) and ``view_box`` (B, 4),
                rows and columns of the upright image in pixels.
            step: decides whether the encoder learns.
        """
        s, frozen = self.settings, step < self.settings.warmup_steps
        images = batch["image"]
        targets = F.pad(batch["labels"], (1, 0), value=1.0)  # (B, C), the background always there
        seen: dict[str, Any] = {"targets": targets}
        scalars: dict[str, Tensor] = {}

        with self.phase("forward"):
            scores = self.score(images, frozen=frozen)
            probabilities = scores.probabilities  # (B, N, C)
            pooled = self.pool(probabilities)  # (B, C)
            losses = {"mce_loss": mce_loss(pooled, targets)}
            total = losses["mce_loss"]
            if s.l2_weight > 0:
                losses["l2_loss"] = self.classifier.weight.square().sum()
                total = total + s.l2_weight * losses["l2_loss"]
        if s.pce_weight > 0:
            with self.phase("pce"):
                present = self.contrasted(targets)  # (B, C)
                seen["sets"] = self.confident_patches(images, probabilities, present)
                losses["pce_loss"] = self.contrast(scores, seen["sets"])
                scalars["pce_coverage"] = pce_coverage(seen["sets"], present)
                total = total + s.pce_weight * losses["pce_loss"]
        if s.equivariance_weight > 0:
            with self.phase("equivariance"):
                losses["equivariance_loss"] = self.equivariance(batch, targets, frozen=frozen)
                total = total + s.equivariance_weight * losses["equivariance_loss"]
        return Step(losses, total, self.outputs(scores, pooled), seen, scalars)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Let Adam forget the warm-up when the encoder's last blocks join (ViT-PCM)."""
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        if first and self.global_step == self.settings.warmup_steps:
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

    def param_groups(self) -> list[dict[str, Any]]:
        """Give BiLSTMs with classifier, and what of the encoder learns after the warm-up."""
        bilstm = [] if self.settings.bilstm == "none" else self.bilstm.parameters()
        heads = [*bilstm, *self.classifier.parameters()]
        encoder = [p for p in self.backbone.parameters() if p.requires_grad]
        groups = [{"name": "heads", "params": [p for p in heads if p.requires_grad]}]
        if encoder:
            groups.append({"name": "encoder", "params": encoder})
        return [{**group, "lr": self.settings.warmup_lr} for group in groups]

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make Adam with Keras' epsilon and no decay (tkp_pcl.md section 4)."""
        return torch.optim.Adam(groups, eps=1e-7)

    def lr_multiplier(self, step: int) -> float:
        """Give 1 during the warm-up, then constant at ``lr``."""
        s = self.settings
        return 1.0 if step < s.warmup_steps else s.lr / s.warmup_lr

    # ---- patch contrastive error ---------------------------------------------------------------

    def contrasted(self, targets: Tensor) -> Tensor:
        """Give categories (B, C) that are compared, boolean: those present; never absent ones."""
        present = targets > 0
        if not self.settings.pce_background:
            present = present & (torch.arange(present.shape[1], device=present.device) > 0)
        return present

    def confident_patches(
        self, images: Tensor, probabilities: Tensor, present: Tensor
    ) -> ConfidentSets:
        """Give H and L of the present categories (B, C), after Z (B, N, C) of the forward pass."""
        if self.settings.pce_sets == "no_dropout":
            with evaluating(self):
                probabilities = self.score(images).probabilities
        return confident_sets(probabilities, present, self.settings.epsilon)

    def contrast(self, scores: PatchScores, sets: ConfidentSets) -> Tensor:
        """Compute PCE of what the classifier reads, or of the encoder's tokens."""
        s = self.settings
        embeddings = scores.embeddings if s.pce_embedding == "bilstm" else scores.tokens
        if s.pce_scope == "batch":
            embeddings, sets = across_images(embeddings, sets)
        return pce_loss(embeddings, sets)

    # ---- equivariance (ViT-PCM) ----------------------------------------------------------------

    def equivariance(self, batch: Batch, targets: Tensor, *, frozen: bool) -> Tensor:
        """Compute cross-entropy of mosaic views against the whole image's map, seen alike."""
        if "view" not in batch:
            raise WSSSError(
                f"method.equivariance_weight={self.settings.equivariance_weight} needs second "
                "views: set data.train_transform.view=true"
            )
        scores = self.score(mosaic(batch["view"]), frozen=frozen)
        logits = tiles_of(scores.as_map(scores.logits)).float()  # (B, C, n, n)
        target = self.equivariance_target(batch, targets, (logits.shape[2], logits.shape[3]))
        return -(target * logits.log_softmax(1)).sum(1).mean()

    def equivariance_target(self, batch: Batch, targets: Tensor, size: tuple[int, int]) -> Tensor:
        """Give what the second views should show, (B, C, n, n): merged, no gradient, no dropout.

        Args:
            batch: as in :meth:`losses`.
            targets: (B, C), background first.
            size: (n, n), patches of a view.
        """
        boxes = in_patches(batch["view_box"], self.backbone.patch_size)
        with evaluating(self):
            scores = self.score(batch["image"])
            maps = scores.as_map(scores.probabilities)  # (B, C, h, h)
            turns = batch["symmetry"], batch["view_symmetry"]
            return label_merge(seen_as_views(maps, *turns, boxes, size), targets)
