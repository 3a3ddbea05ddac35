"""What GETAM's official code does otherwise, and how it names its parameters.

getam.md gives its quirks no numbers. Each departure of ours is a switch that takes it back;
``official_compat=true`` takes all of them back, ``+method.quirks.NAME=true`` a single one.

Settings that the switches leave alone: ``data.saliency_threshold`` (officially 0) and ``eval.crf``
(officially ``getam_bgr``). A run has T steps; the official loop makes one more, at the last one's
rate.
Same numbers, less work (always): one forward pass for maps and losses; one backward pass a class
*slot* of the batch, through activations of the last blocks only; the class token's row of attention
and gradient in closed form, so that attention stays fused; PAMR of present classes alone, batched;
labels where the images are.
Kept as official: a map is a product of two head means, not the mean of a squared gradient; its
maximum plus 1e-5 divides it; ImageNet's mean and deviation normalise the images of every backbone,
although two of them were trained with others. Nothing here corresponds to the official replicas,
which drift apart in the first phase, nor to the unseeded generator of its views.
"""

from dataclasses import dataclass

from wsss.methods.settings import StepQuirks
from wsss.models.weights import renamed


@dataclass(frozen=True, kw_only=True)
class Quirks(StepQuirks):
    """One boolean a quirk; True does as the official code."""

    # positions are resized bilinearly; here bicubically, as for all methods
    bilinear_positions: bool = False
    # the weight decay lands in SGD's momentum, and nothing decays; here it is a weight decay
    decay_in_momentum: bool = False
    # salient pixels shall be background, and only those that the completion adds foreground; here
    # background is where nothing is salient
    inverted_saliency: bool = False
    # the lower class wins a pixel outside the saliency that two claim; here it is undecided
    contested_to_lowest: bool = False
    # the opening of completed labels moves them by a pixel to the lower right; here it is centred
    shifted_opening: bool = False
    # what the opening removes from the labels stays in the completed saliency; here it leaves both
    unopened_saliency: bool = False
    # padding is labelled like any other pixel, so it is background; here it is ignored
    padding_as_background: bool = False
    # padding counts in the saliency loss, as not salient; here it does not count
    padding_in_saliency_loss: bool = False
    # a batch without background or foreground has a cross-entropy of NaN; here that half is 0
    nan_without_pixels: bool = False
    # the pixels for PAMR and energy are cut to integers, often one too low; here they are rounded
    truncated_guide: bool = False


CORRECTED = Quirks()
OFFICIAL = Quirks.all_on()

# official GETAM name -> ours, by prefix (../shared/methods/getam.md section 1); order matters
PREFIXES = {
    "pretrained.model.": "backbone.vit.",
    **{
        f"pretrained.act_postprocess{level}.{theirs}.": f"reassemble.{level}.{ours}."
        for level in (1, 2, 3, 4)
        for theirs, ours in (("0.project.0", "readout"), ("3", "narrow"), ("4", "resize"))
    },
    **{f"scratch.layer{level}_rn.": f"decoder.narrow.{level - 1}." for level in (1, 2, 3, 4)},
    **{
        f"scratch.refinenet{level}.{theirs}.": f"decoder.fusions.{level - 1}.{ours}."
        for level in (1, 2, 3, 4)
        for theirs, ours in (
            ("resConfUnit1", "skip_unit"),
            ("resConfUnit2", "unit"),
            ("out_conv", "out_conv"),
        )
    },
    "cam_module.body.": "decoder.squeeze.body.",
    "cam_module.fc.": "decoder.squeeze.gate.",
    "scratch.output_conv.": "decoder.head.",
    "cls_head.": "classifier.",
}
# the ImageNet classifiers, and a unit that waits for a skip which the coarsest level has not
UNUSED = (
    "pretrained.model.head.",
    "pretrained.model.head_dist.",
    "scratch.refinenet4.resConfUnit1.",
)


def our_name(official: str) -> str | None:
    """Give our name of an official GETAM parameter; None where the method never uses it."""
    name = official.removeprefix("module.")
    return None if name.startswith(UNUSED) else renamed(name, PREFIXES)


def official_name(ours: str) -> str:
    """Give the official GETAM name of a parameter of ours."""
    return renamed(ours, {own: theirs for theirs, own in PREFIXES.items()})
