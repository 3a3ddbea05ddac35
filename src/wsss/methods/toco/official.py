"""What ToCo's official code does otherwise, and how it names its parameters.

Q1 to Q9 are the numbered quirks of toco.md. Each departure of ours is a switch that takes it back;
``official_compat=true`` takes all of them back, ``+method.quirks.NAME=true`` a single one.

Same numbers, less work (always): one encoder pass serves the input, both global views and the
unflipped CAM of scale 1; the decoder is not run for CAMs; PAR's affinity is computed once for both
thresholds; CTC is a closed form; attention is fused.
Kept as official: the learning rate jumps after warm-up (the polynomial is not rebased), CTC's
second logarithm and same-view pairs (Q6), the teacher is a head only (Q7), auxiliary tokens are not
normed (Q8). Nothing here corresponds to Q9 (bugs of the official evaluation scripts), nor to its
GPUs' shared augmentation streams: every place in the global batch has random draws of its own.
"""

from dataclasses import dataclass

from wsss.methods.settings import StepQuirks
from wsss.models.weights import renamed


@dataclass(frozen=True, kw_only=True)
class Quirks(StepQuirks):
    """One boolean a quirk; True does as the official code."""

    # Q1: pixel coordinates of the crop box mask the 28 x 28 token grid; here it is scaled to it
    box_in_pixels: bool = False
    # Q2, Q3: image and local view are flipped apart and the box stays; here they share one flip
    separate_flips: bool = False  # acts in wsss.data.views.toco
    # Q4: without background or foreground pixels the segmentation loss is NaN; here that half is 0
    nan_without_pixels: bool = False
    # Q4b: terms of zero weight are computed, so the decoder's zero gradient lets AdamW decay it
    # from the first step; here they are not, and it has no gradient during warm-up
    zero_weight_terms: bool = False
    # Q5: without a single token pair PTC is 0.5 without gradient; here the term is left out
    half_without_pairs: bool = False
    # the image for PAR is truncated to integers, most often one too low; here it is rounded
    truncated_guide: bool = False


CORRECTED = Quirks()
OFFICIAL = Quirks.all_on()

# official ToCo name -> ours, by prefix (../shared/methods/toco.md section 1); order matters
PREFIXES = {
    "encoder.": "backbone.vit.",
    "classifier.": "classifier.",
    "aux_classifier.": "aux_classifier.",
    "decoder.": "decoder.",
    "proj_head.": "ctc_student.",
    "proj_head_t.": "ctc_teacher.",
}
# `encoder.head` is the unused ImageNet classifier; older files also hold `conv` and `aux_conv`
UNUSED = ("encoder.head.", "conv.", "aux_conv.")


def our_name(official: str) -> str | None:
    """Give our name of an official ToCo parameter; None where the method never uses it."""
    name = official.removeprefix("module.")
    if name.startswith(UNUSED):
        return None
    # torch's weight norm moved from weight_g / weight_v to a parametrisation
    name = renamed(name, PREFIXES).replace(".weight_g", ".parametrizations.weight.original0")
    return name.replace(".weight_v", ".parametrizations.weight.original1")


def official_name(ours: str) -> str:
    """Give the official ToCo name of a parameter of ours."""
    ours = renamed(ours, {own: theirs for theirs, own in PREFIXES.items()})
    ours = ours.replace(".parametrizations.weight.original0", ".weight_g")
    return ours.replace(".parametrizations.weight.original1", ".weight_v")
