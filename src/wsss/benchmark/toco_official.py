"""ToCo's step computed the official way, so that what our step saves can be measured.

Only the benchmark uses this. It is written from our specification (toco.md section 7, "Speed"; item
numbers below are of that list), not from the official code. Parameters, random draws and losses are
those of :class:`wsss.methods.toco.ToCo`; only the way to them differs. Each saving can be switched
on by itself (:class:`Savings`).

Where the specification leaves open how much the official code does, the cheaper reading is taken:
crops of one size are encoded together, attention maps are not kept after a pass without gradient,
PAR gathers neighbours as ours does (the official one convolves with one-hot kernels), and the
energy uses our own lattice filter.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.benchmark.one_by_one import best_slots_one_by_one
from wsss.maps.cams import multiscale_cam
from wsss.maps.pseudo_labels import refine_cam_to_label, roi_mask
from wsss.methods.base import Batch, Outputs, Step
from wsss.methods.losses import balanced_segmentation_loss, pair_masks, ptc_loss
from wsss.methods.toco.contrast import (
    NEGATIVE_ROI,
    NUM_LOCALS,
    LocalCrops,
    ctc_loss,
)
from wsss.methods.toco.method import ToCo
from wsss.models.backbone import Features


@dataclass(frozen=True, kw_only=True)
class Savings:
    """What our step saves, one switch an item; False computes it the official way.

    Attributes:
        one_encoder_pass: item 1: input, both global views and the teacher's features come from one
            pass, not from separate passes over the input and twice over both global views.
        reuse_scale_one: item 1: that pass also gives the unmirrored CAM of scale 1.
        no_decoder_in_cams: item 2: CAM passes leave the decoder out.
        fused_attention: item 3: attention is never materialised.
        energy_on_device: item 4: the energy is filtered where the images are, not on the CPU.
        skip_zero_terms: items 4 and 5: terms of zero weight are not computed.
        shared_affinity: item 6: PAR's affinity once, not once an image and threshold.
        boolean_pairs: item 7: pair masks by an outer comparison, not through repeated int64 maps.
        closed_form_ctc: item 8: CTC in closed form, not in loops over images, views and crops.
        batched_crops: item 8: crops and flags from one box sum, not one by one with a sync each.
        one_cross_entropy: item 9: one cross-entropy for both halves of the segmentation loss.
    """

    one_encoder_pass: bool = False
    reuse_scale_one: bool = False
    no_decoder_in_cams: bool = False
    fused_attention: bool = False
    energy_on_device: bool = False
    skip_zero_terms: bool = False
    shared_affinity: bool = False
    boolean_pairs: bool = False
    closed_form_ctc: bool = False
    batched_crops: bool = False
    one_cross_entropy: bool = False


class OfficialToCo(ToCo):
    """ToCo with every saving switched off; :attr:`savings` switches single ones on."""

    savings = Savings()

    # ---- the step ------------------------------------------------------------------------------

    def losses(self, batch: Batch, step: int) -> Step:
        """Compute the losses of :meth:`ToCo.losses` as :attr:`savings` says."""
        images, labels, boxes = batch["image"], batch["labels"], batch["box"]
        weights, size = self.loss_weights(step), len(images)
        # items 4 and 5: officially every term is computed, whatever its weight
        always = self.quirks.zero_weight_terms or not self.savings.skip_zero_terms
        ptc, ctc, seg, reg = (weight > 0 or always for weight in weights.values())

        with self.phase("forward"):
            features = self._encode_views(batch, with_view2=ctc)
            seen: dict[str, Any] = {"features": features}
            tokens, aux_tokens = features.patch_map[:size], self.aux_map(features)[:size]
            class_logits = self.classify(self.classifier, tokens)
            aux_logits = self.classify(self.aux_classifier, aux_tokens)
            losses = {
                "cls_loss": F.multilabel_soft_margin_loss(class_logits, labels),
                "cls_aux_loss": F.multilabel_soft_margin_loss(aux_logits, labels),
            }
        if ptc or ctc or seg or reg:
            seen["cam"], seen["cam_aux"] = self._cams_for_training(images, features)
        if ptc:
            seen["token_label"] = self.token_labels(seen["cam_aux"], labels, boxes, features.grid)
            with self.phase("forward"):
                same, different = self._pairs(seen["token_label"])
                if self.quirks.half_without_pairs or bool((same | different).any()):
                    losses["ptc_loss"] = ptc_loss(tokens, same, different)
        if ctc:
            seen["local"] = self.local_crops(batch["local_view"], seen["cam_aux"], labels)
            with self.phase("forward"):
                if self.first_of_step:
                    self.update_teacher()
                losses["ctc_loss"] = self._contrast(batch, features, seen["local"])
        seg_logits = None
        if seg or reg:
            with self.phase("pseudo_labels"):
                source = seen["cam_aux" if self.labels_from_aux(step) else "cam"]
                seen["pseudo_label"] = self.pseudo_labels(images, source, labels, boxes)
            with self.phase("forward"):
                seg_logits = self.decoder(tokens)
                full = F.interpolate(seg_logits, images.shape[-2:], mode="bilinear")
        if seg:
            with self.phase("forward"):
                losses["seg_loss"] = self._segmentation_loss(full, seen["pseudo_label"])
        if reg:
            with self.phase("energy"):
                losses["reg_loss"] = self.energy(images, full, seen["pseudo_label"], boxes)
        total = losses["cls_loss"] + losses["cls_aux_loss"]
        for name, weight in weights.items():
            total = total + weight * losses[name] if name in losses else total
        return Step(losses, total, Outputs(class_logits, seg_logits), seen)

    # ---- encoder (items 1, 2, 3) ---------------------------------------------------------------

    def encode(self, images: Tensor) -> Features:
        """Encode images, with attention materialised where the saving is off (item 3)."""
        self._set_attention()
        return super().encode(images)

    def _set_attention(self) -> None:
        for block in self.backbone.vit.blocks:
            block.attn.fused_attn = self.savings.fused_attention

    def _encode_views(self, batch: Batch, *, with_view2: bool) -> Features:
        if self.savings.one_encoder_pass and with_view2:
            return self.encode(torch.cat([batch["image"], batch["view2"]]))
        return self.encode(batch["image"])

    def raw_cams(self, images: Tensor) -> list[Tensor]:
        """Compute raw CAMs, after a run of the decoder that nobody uses (item 2)."""
        features = self.encode(images)
        if not self.savings.no_decoder_in_cams:
            self.decoder(features.patch_map)
        return self.activations(features, len(images))

    @torch.no_grad()
    def _cams_for_training(self, images: Tensor, features: Features) -> list[Tensor]:
        shared = self.activations(features, len(images)) if self.savings.reuse_scale_one else None
        with self.phase("cam"):
            return multiscale_cam(
                self.raw_cams, images, scales=self.settings.scales, scale_one=shared
            )

    # ---- contrast (items 1, 7, 8) --------------------------------------------------------------

    def _pairs(self, token_label: Tensor) -> tuple[Tensor, Tensor]:
        if self.savings.boolean_pairs:
            return pair_masks(token_label)
        flat = token_label.flatten(1).long()
        count = flat.shape[1]
        rows = flat[:, None, :].repeat(1, count, 1)  # (B, N, N), int64
        columns = flat[:, :, None].repeat(1, 1, count)
        relation = (rows == columns).long()
        relation[(rows == 255) | (columns == 255)] = 255
        relation[:, torch.arange(count), torch.arange(count)] = 255
        return relation == 1, relation == 0

    def local_crops(self, local_view: Tensor, cam_aux: Tensor, labels: Tensor) -> LocalCrops:
        """Draw crops for CTC, one by one with a sync each where the saving is off (item 8)."""
        if self.savings.batched_crops:
            return super().local_crops(local_view, cam_aux, labels)
        s = self.settings
        roi = roi_mask(cam_aux, labels, high=s.high_threshold, low=s.low_threshold)
        images = local_view
        size, margin = s.local_size, s.local_size // 2
        batch = len(images)
        crops = images.new_empty(NUM_LOCALS, batch, 3, size, size)
        flags = torch.ones(batch, 2 + NUM_LOCALS, device=images.device)
        corners = torch.empty(batch, NUM_LOCALS, 2, dtype=torch.long)
        for b in range(batch):
            inner = roi[b, margin:-margin, margin:-margin]
            candidates = (inner <= 1).nonzero()
            if len(candidates) < NUM_LOCALS:
                candidates = torch.ones_like(inner).nonzero()
            for n, draw in enumerate(torch.randperm(len(candidates))[:NUM_LOCALS]):
                r, c = (int(value) for value in candidates[draw])  # a sync each on a GPU
                crops[n, b] = images[b, :, r : r + size, c : c + size]
                value = roi[b, r : r + size, c : c + size].sum() / size**2
                flags[b, 2 + n] = 0.0 if value.item() <= NEGATIVE_ROI else 1.0
                corners[b, n] = torch.tensor([r, c])
        return LocalCrops(crops, flags, corners)

    def _contrast(self, batch: Batch, features: Features, local: LocalCrops) -> Tensor:
        if self.savings.one_encoder_pass:
            student_cls = teacher_cls = features.cls_tokens[:, 0]  # (2B, D)
        else:
            # both global views, encoded once for the student and once more for the teacher, whose
            # graph is built as well and then dropped (item 1: "grad-enabled forwards")
            views = torch.cat([batch["image"], batch["view2"]])
            student_cls = self.encode(views).cls_tokens[:, 0]
            teacher_cls = self.encode(views).cls_tokens[:, 0].detach()
        local_cls = self.encode(local.crops.flatten(0, 1)).cls_tokens[:, 0]  # (8B, D)
        student = self.ctc_student(torch.cat([student_cls, local_cls]))
        with torch.no_grad():
            teacher = self.ctc_teacher(teacher_cls)
        contrast = ctc_loss if self.savings.closed_form_ctc else looped_ctc_loss
        return contrast(student, teacher, local.flags, self.settings.temperature)

    # ---- segmentation (items 4, 6, 9) ----------------------------------------------------------

    def pseudo_labels(self, images: Tensor, cam: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """Refine labels, an affinity an image and threshold where the saving is off (item 6)."""
        if self.savings.shared_affinity:
            return super().pseudo_labels(images, cam, labels, boxes)
        return refine_cam_to_label(
            self.par,
            self.guide(images),
            cam,
            labels,
            boxes=boxes,
            high=self.settings.high_threshold,
            low=self.settings.low_threshold,
            refine=best_slots_one_by_one,
        )

    def _segmentation_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        guard = not self.quirks.nan_without_pixels
        if self.savings.one_cross_entropy:
            return balanced_segmentation_loss(logits, label, guard=guard)
        background = label.masked_fill(label != 0, 255)
        foreground = label.masked_fill(label == 0, 255)
        return 0.5 * sum(
            (
                F.cross_entropy(logits, half, ignore_index=255)
                if not guard or bool((half != 255).any())
                else logits.sum() * 0
                for half in (background, foreground)
            ),
            start=logits.new_zeros(()),
        )

    def energy(self, images: Tensor, logits: Tensor, label: Tensor, boxes: Tensor) -> Tensor:
        """Compute the dense energy, on the CPU where the saving is off (item 4)."""
        if self.savings.energy_on_device:
            return super().energy(images, logits, label, boxes)
        on_cpu = [tensor.cpu() for tensor in (images, logits, label, boxes)]
        return super().energy(*on_cpu).to(images.device)


def looped_ctc_loss(student: Tensor, teacher: Tensor, flags: Tensor, temperature: float) -> Tensor:
    """Compute CTC in loops over images, teacher views and crops (item 8); see :func:`ctc_loss`.

    Exponentials are taken as they stand, so products beyond about 88 overflow.
    """
    batch, views = flags.shape
    students, teachers = student.split(batch), teacher.split(batch)
    total = student.new_zeros(())
    for b in range(batch):
        image = student.new_zeros(())
        for view in teachers:
            scores = [(view[b] * other[b]).sum() / temperature for other in students]
            negative = student.new_zeros(())
            for n in range(views):
                if flags[b, n] == 0:
                    negative = negative + scores[n].exp()
            for n in range(views):
                if flags[b, n] == 1:
                    score = scores[n].exp()
                    image = image - (score / (score + negative + 1e-4)).log()
            image = image + (1 + negative + 1e-4).log()
        total = total + image / (2 * (flags[b].sum() + 1e-4))
    return total / batch
