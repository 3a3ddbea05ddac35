"""What MoRe's official code does otherwise, and how it names its parameters.

Q1 to Q13 are the numbered quirks of more.md section 7. Each departure of ours is a switch that
takes it back; ``official_compat=true`` takes all of them back, ``+method.quirks.NAME=true`` a
single one.

Same numbers, less work (always): the training pass is the unmirrored CAM of scale 1; CAM passes end
at the auxiliary block while its CAM alone is needed, and run neither decoder nor graph module; CLE
is one log-sum-exp over the labelled rows; UNE finds its tokens without a loop over cells; attention
is fused; one view is made instead of two.
Kept as official: the gate of the graph module multiplies two sums (Q2, ``method.gate``); registers'
positions are of unit scale (Q6, ``method.register_std``); the image for PAR is truncated to whole
grey levels; PTC is 0.5 without a pair; the learning rate jumps after warm-up. Nothing here
corresponds to Q11 (what is never used), Q12 (tooling) and Q13 (validation uses image labels: here
a number says whether it does).
"""

from dataclasses import dataclass

from wsss.methods.settings import StepQuirks
from wsss.models.weights import renamed


@dataclass(frozen=True, kw_only=True)
class Quirks(StepQuirks):
    """One boolean a quirk; True does as the official code."""

    # Q1: class tokens start equal and stay equal until CLE parts them; here noise parts them
    equal_start: bool = False
    # Q3: UNE takes the corner of an uncertain window; here its uncertain centre
    corner_token: bool = False
    # Q4: CLE exponentiates products that overflow; here everything stays in logarithms
    overflowing_exponentials: bool = False
    # Q5: padding counts as image; here it is ignored in labels and energy
    padding_counts: bool = False
    # Q7: a batch without any image label stops the run; here CLE is 0 then
    fails_without_labels: bool = False
    # PTC, UNE and the segmentation loss divide by the pairs, tokens and pixels of one process; here
    # by those of all
    rank_denominators: bool = False
    # Q8: terms of zero weight are computed, so the decoder's zero gradient lets AdamW decay it
    # before it is trained; here they are not
    zero_weight_terms: bool = False
    # Q9: one class has no neighbour in the graph; here it has one
    no_neighbour_of_one: bool = False
    # Q10: a grid that is not larger than UNE's windows stops the run; here UNE is 0 then
    fails_on_small_grids: bool = False


CORRECTED = Quirks()
OFFICIAL = Quirks.all_on()

# official MoRe name -> ours, by prefix (more.md section 1, "Checkpoint keys")
PREFIXES = {
    "encoder.": "backbone.vit.",
    "classifier.": "classifier.",
    "aux_classifier.": "aux_classifier.",
    "decoder.": "decoder.",
    "graph_layer.": "graph.",
}
# both exist and are never used
UNUSED = ("encoder.head.", "graph_layer._fc1.")


def our_name(official: str) -> str | None:
    """Give our name of an official MoRe parameter; None where the method never uses it."""
    name = official.removeprefix("module.")
    return None if name.startswith(UNUSED) else renamed(name, PREFIXES)


def official_name(ours: str) -> str:
    """Give the official MoRe name of a parameter of ours."""
    return renamed(ours, {own: theirs for theirs, own in PREFIXES.items()})
