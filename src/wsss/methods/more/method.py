"""MoRe: class-patch attention needs regularization (AAAI 2025).

Idea: a ViT with one class token a class. Its attention to patches localises, but a class token also
attends to what merely comes along with its class. A graph module joins each class token with the
tokens nearest to it; the product of the result and the patch tokens is a second localisation map
(LAM) beside the class activation map (CAM). CAM regularises it: patches that the CAM is certain of
pull the class token of their class (CLE), uncertain patches between them are pulled towards the
image's class tokens and pushed from the others (UNE). Auxiliary classifier, patch token contrast,
PAR, decoder and energy are ToCo's.

Paper: Yang et al., "MoRe: Class Patch Attention Needs Regularization for Weakly Supervised Semantic
Segmentation", arXiv 2412.11076. Official code (read by the authors of our specification, more.md,
not by us): zwyang6/MoRe ``d733d34``. Departures: official.py, one switch each.
Several processes: the losses of classification, distinctness, CLE and the energy are means over
images. PTC divides by pairs, UNE by selected tokens and the segmentation loss by pixels, of one
forward pass of all processes. So a run is the same on any number of processes for which
``accumulate_grad_batches`` is the same. Which tokens UNE selects in an image depends on seed, step
and image alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.maps.cams import detached_activation, multiscale_cam
from wsss.maps.pixels import denormalise
from wsss.maps.pseudo_labels import (
    boxes_in_patches,
    refine_cam_to_label,
    token_labels,
    whole_boxes,
)
from wsss.maps.refine.par import PAR
from wsss.methods.base import Batch, Outputs, Step, WSSSModule
from wsss.methods.losses import (
    balanced_segmentation_loss,
    imagenet_energy_loss,
    pair_masks,
    ptc_loss,
)
from wsss.methods.more import contrast
from wsss.methods.more.graph import CategoryGraph
from wsss.methods.more.official import CORRECTED, Quirks
from wsss.methods.more.settings import MoReSettings
from wsss.methods.schedules import encoder_and_heads, poly_warmup
from wsss.models import aux_tokens
from wsss.models.backbone import Backbone, Features
from wsss.models.class_tokens import give_class_tokens, require_one_class_token
from wsss.models.decoders import LargeFOV

DISTINCT, TOKENS, LABELS = {"distinct_loss"}, {"cle_loss", "une_loss"}, {"seg_loss", "reg_loss"}


class MoRe(WSSSModule):
    """Class tokens on the shared ViT, joined by a graph, whose products with patches localise.

    Example:
        >>> backbone = Backbone(name="vit_tiny_patch16_224", weights="random")
        >>> settings = MoReSettings(max_steps=20000)
        >>> MoRe(backbone=backbone, num_classes=20, settings=settings).num_classes
        20

    Args:
        backbone: shared encoder with one class token, which becomes registers and one a class.
        num_classes: K, foreground classes.
        settings: see :class:`MoReSettings`.
        quirks: which of the official code's departures to keep.

    Raises:
        WSSSError: the backbone has not exactly one class token that has a position, or lacks the
            auxiliary block.
    """

    settings: MoReSettings
    further_map_names: tuple[str, ...] = ("lam",)

    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        settings: MoReSettings,
        quirks: Quirks = CORRECTED,
    ) -> None:
        super().__init__(backbone=backbone, num_classes=num_classes, settings=settings)
        s, dim, depth = settings, backbone.dim, backbone.depth
        require_one_class_token(backbone, "more")
        if not -depth <= s.aux_layer < depth:
            raise WSSSError(f"method.aux_layer={s.aux_layer}: the backbone has {depth} blocks")
        self.quirks = self.follow(quirks)
        self.over_ranks = not quirks.rank_denominators
        self.aux_block = s.aux_layer % depth

        backbone.position_offset = 0.1
        noise = 0.0 if quirks.equal_start else s.class_token_noise  # Q1
        give_class_tokens(
            backbone, num_classes, noise=noise, registers=s.registers, register_std=s.register_std
        )
        self.classifier = nn.Conv2d(dim, num_classes, kernel_size=1, bias=False)
        self.aux_classifier = nn.Conv2d(dim, num_classes, kernel_size=1, bias=False)
        least = 0 if quirks.no_neighbour_of_one else 1  # Q9
        neighbours = s.neighbours or max(least, num_classes // 2)
        graph = CategoryGraph(dim, neighbours=neighbours, gate=s.gate)
        self.graph = graph if s.graph else None
        self.decoder = LargeFOV(
            in_channels=dim,
            num_outputs=num_classes + 1,
            channels=s.decoder_channels,
            dilation=s.decoder_dilation,
        )
        self.par = PAR()

    # ---- what an evaluator sees -------------------------------------------------------------

    def forward(self, images: Tensor) -> Outputs:
        """Give class logits (B, K) and segmentation logits (B, K+1, h, w) at the patch stride."""
        tokens = self.backbone(images).patch_map
        return Outputs(aux_tokens.max_pooled_logits(self.classifier, tokens), self.decoder(tokens))

    @torch.no_grad()
    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Give multi-scale CAMs of the final tokens, (B, K, H, W) in [0, 1]; others zero."""
        cam, _ = multiscale_cam(self.raw_cams, images, scales=self.settings.scales)
        return cam * labels[..., None, None]

    @torch.no_grad()
    def further_cams(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Give ``lam``, the multi-scale LAMs (B, K, H, W) in [0, 1]; others zero."""
        (lam,) = multiscale_cam(
            self.raw_lam, images, scales=self.settings.lam_scales, cut_negative=False
        )
        return {"lam": lam * labels[..., None, None]}

    def gallery_maps(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Show the largest LAM of the labelled classes."""
        return {"LAM": self.further_cams(images, labels)["lam"].amax(dim=1)}

    def raw_cams(self, images: Tensor) -> list[Tensor]:
        """Give activations of final and auxiliary tokens, each (B, K, h, w), before any ReLU."""
        return self.activations(self.encode(images))

    def raw_lam(self, images: Tensor) -> list[Tensor]:
        """Give the products of class tokens and patch tokens alone, (B, K, h, w)."""
        features = self.encode(images)
        products = self.class_tokens(features) @ features.patch_tokens.transpose(1, 2)
        return [products.unflatten(2, features.grid)]

    # ---- training ----------------------------------------------------------------------------

    def losses(self, batch: Batch, step: int) -> Step:
        """Compute the eight terms of more.md section 2; those without weight are left out.

        Args:
            batch: ``image`` (B, 3, H, W), ``labels`` (B, K), ``box`` (B, 4: real pixels as row
                start, row end, column start, column end), and ``index`` (B,) of the images.
            step: decides the weights of the terms.
        """
        images, labels, s = batch["image"], batch["labels"], self.settings
        boxes = whole_boxes(images) if self.quirks.padding_counts else batch["box"]  # Q5
        weights, always = s.loss_weights(step), self.quirks.zero_weight_terms  # Q8
        wanted = {name for name, weight in weights.items() if weight > 0 or always}
        with self.phase("forward"):
            features = self.encode(images)
            tokens, aux = features.patch_map, aux_tokens.aux_map(features, self.aux_block)
            class_logits = aux_tokens.max_pooled_logits(self.classifier, tokens)
            aux_logits = aux_tokens.max_pooled_logits(self.aux_classifier, aux)
            losses = {
                "cls_loss": F.multilabel_soft_margin_loss(class_logits, labels),
                "cls_aux_loss": F.multilabel_soft_margin_loss(aux_logits, labels),
            }
            seen: dict[str, Any] = {"features": features, "aux_logits": aux_logits}
            if wanted & (DISTINCT | TOKENS):
                seen["class_tokens"] = self.class_tokens(features)
            if wanted & DISTINCT:
                share, own = s.mean_logit_share, seen["class_tokens"]
                losses["distinct_loss"] = contrast.distinctness(own, labels, share)
        if wanted - DISTINCT:
            seen |= self.maps(images, features, wanted, step)
            seen |= self.token_masks(seen, labels, boxes, step)
        with self.phase("forward"):
            if "ptc_loss" in wanted:
                pairs = pair_masks(seen["ptc_mask"])
                losses["ptc_loss"] = ptc_loss(tokens, *pairs, over_ranks=self.over_ranks)
            if "cle_loss" in wanted:
                losses["cle_loss"] = self.certain_tokens(seen, labels)
            if "une_loss" in wanted:
                seen["selected"] = self.select_tokens(seen["une_mask"], boxes, batch, step)
                own, selected = seen["class_tokens"], seen["selected"]
                losses["une_loss"] = contrast.une_loss(
                    own, tokens, selected, labels, over_ranks=self.over_ranks
                )
        seg_logits = None
        if wanted & LABELS:
            with self.phase("pseudo_labels"):
                label = self.pseudo_labels(images, seen["cam"], labels, boxes)
                seen["pseudo_label"] = label
            with self.phase("forward"):
                seg_logits = self.decoder(tokens)  # (B, K+1, h, w)
                full = F.interpolate(seg_logits, images.shape[-2:], mode="bilinear")
                if "seg_loss" in wanted:
                    losses["seg_loss"] = balanced_segmentation_loss(
                        full, label, eps=1e-6, over_ranks=self.over_ranks
                    )
            if "reg_loss" in wanted:
                with self.phase("energy"):
                    losses["reg_loss"] = self.energy(images, full, label, boxes)
        total = losses["cls_loss"] + losses["cls_aux_loss"]
        total = sum((w * losses[name] for name, w in weights.items() if name in losses), total)
        return Step(losses, total, Outputs(class_logits, seg_logits), seen)

    def param_groups(self) -> list[dict[str, Any]]:
        """Give encoder, its norms, classifiers, graph module and decoder."""
        lr, head_lr = self.settings.lr, self.settings.lr * self.settings.head_lr_factor
        heads: dict[str, nn.Module] = {
            "heads": nn.ModuleList([self.classifier, self.aux_classifier])
        }
        heads |= {} if self.graph is None else {"graph": self.graph}
        return encoder_and_heads(self.backbone, lr, head_lr, **heads, decoder=self.decoder)

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make AdamW, decay on biases, norms, tokens and positions too (more.md section 4)."""
        decay = self.settings.weight_decay
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=decay)

    def lr_multiplier(self, step: int) -> float:
        """Warm up linearly from 1e-6, then (1 - step/max)^0.9, not rebased."""
        s = self.settings
        return poly_warmup(step, max_steps=s.max_steps, warmup_steps=s.warmup_steps)

    # ---- tokens and maps -----------------------------------------------------------------------

    def encode(self, images: Tensor) -> Features:
        """Give features of images (B, 3, H, W), with the tokens of the auxiliary block."""
        return aux_tokens.encode_with_aux(self.backbone, images, self.aux_block)

    def class_tokens(self, features: Features) -> Tensor:
        """Give the class tokens C (B, K, D) that losses and LAM see."""
        tokens = features.cls_tokens[:, self.settings.registers :]
        return tokens if self.graph is None else self.graph(tokens, features.patch_tokens)

    def activations(self, features: Features) -> list[Tensor]:
        """Give raw final and auxiliary CAMs (B, K, h, w), detached."""
        aux = aux_tokens.aux_map(features, self.aux_block)
        pairs = (features.patch_map, self.classifier), (aux, self.aux_classifier)
        return [detached_activation(tokens, head.weight) for tokens, head in pairs]

    def aux_activation(self, images: Tensor) -> list[Tensor]:
        """Give the raw auxiliary CAM (B, K, h, w) alone; the blocks above are not run."""
        aux = aux_tokens.aux_map_alone(self.backbone, images, self.aux_block)
        return [detached_activation(aux, self.aux_classifier.weight)]

    # ---- targets -------------------------------------------------------------------------------

    @torch.no_grad()
    def maps(
        self, images: Tensor, features: Features, wanted: set[str], step: int
    ) -> dict[str, Tensor]:
        """Give multi-scale ``cam_aux`` and, where a term wants it, ``cam``, both (B, K, H, W)."""
        final = wanted & LABELS or (wanted & TOKENS and self.settings.masks_are_late(step))
        own, scales = self.activations(features), self.settings.scales
        with self.phase("cam"):
            if final:
                cam, aux = multiscale_cam(self.raw_cams, images, scales=scales, scale_one=own)
                return {"cam": cam, "cam_aux": aux}
            (aux,) = multiscale_cam(self.aux_activation, images, scales=scales, scale_one=own[1:])
            return {"cam_aux": aux}

    @torch.no_grad()
    def token_masks(
        self, seen: dict[str, Any], labels: Tensor, boxes: Tensor, step: int
    ) -> dict[str, Tensor]:
        """Give ``ptc_mask``, ``cle_mask`` and ``une_mask`` (B, h, w), of the maps that are there.

        They hold class + 1 where a token is certain, 0 for background, 255 where it is uncertain or
        does not lie wholly on real pixels.
        """
        grid, real = seen["features"].grid, boxes_in_patches(boxes, self.backbone.patch_size)
        return {
            name: token_labels(seen[rule.source], labels, grid, real, high=rule.high, low=rule.low)
            for name, rule in self.settings.mask_rules(step).items()
            if rule.source in seen
        }

    def certain_tokens(self, seen: dict[str, Any], labels: Tensor) -> Tensor:
        """Give CLE between the class tokens and the patches that ``cle_mask`` is certain of."""
        return contrast.cle_loss(
            seen["class_tokens"],
            seen["features"].patch_map,
            seen["cle_mask"],
            labels,
            self.settings.temperature,
            overflowing=self.quirks.overflowing_exponentials,  # Q4
            fails_without_labels=self.quirks.fails_without_labels,  # Q7
        )

    def select_tokens(self, mask: Tensor, boxes: Tensor, batch: Batch, step: int) -> list[Tensor]:
        """Give rows and columns (n, 2) of the tokens that UNE takes in each image.

        Args:
            mask: (B, h, w), 255 where uncertain.
            boxes: real pixels, (B, 4); tokens beyond them are not uncertain.
            batch: gives ``index`` (B,) of the images, by which tokens are drawn.
            step: of the optimiser.
        """
        quirks, real = self.quirks, boxes_in_patches(boxes, self.backbone.patch_size)
        draws: Sequence[torch.Generator | None] = [None] * len(mask)
        if not quirks.shared_draws:
            draws = contrast.image_generators(self.seed, step, batch["index"])
        return contrast.select_tokens(
            contrast.uncertainty_map(mask, real),
            draws,
            corner=quirks.corner_token,  # Q3
            fails_on_small_grids=quirks.fails_on_small_grids,  # Q10
        )

    @torch.no_grad()
    def pseudo_labels(self, images: Tensor, cam: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """Give PAR-refined pseudo labels (B, H, W), 255 where undecided or padded."""
        s, guide = self.settings, self.guide(images)
        high, low = s.high_threshold, s.low_threshold
        return refine_cam_to_label(self.par, guide, cam, labels, boxes=boxes, high=high, low=low)

    def energy(self, images: Tensor, logits: Tensor, label: Tensor, boxes: Tensor) -> Tensor:
        """Compute the gated dense-CRF energy of the prediction, ToCo's."""
        return imagenet_energy_loss(images, logits, label, boxes, self.settings.energy_kernel)

    def guide(self, images: Tensor) -> Tensor:
        """Give the images (B, 3, H, W) as PAR sees them: truncated grey levels over 255."""
        return denormalise(images).trunc().clamp(0, 255) / 255
