"""What WeCLIP's official code does otherwise, and how it names its parameters.

Q1 to Q20 are the numbered quirks of weclip.md section 10. Each departure of ours is a switch that
takes it back; ``official_compat=true`` takes all of them back, ``+method.quirks.NAME=true`` a
single one.

Same numbers, less work (always): the classes of all images share one forward pass of the last
block, and only what the channel weights need of the backward pass is computed; attention is fused
in blocks whose maps nothing reads; T T v is two products with v; boxes are found on the device for
all maps at once; PAR runs once a batch; texts come from a file.
Kept as official: ImageNet's normalisation under CLIP's weights (Q1, ``method.normalisation``);
every present class is stretched to 1, however weak (Q4); maps are kept by their mass (Q7,
``method.rfm_filter``); pseudo labels have no undecided pixels (Q11, ``method.margin``); the
affinity saturates (Q13); warm-up starts at a ratio, and biases and norms are decayed (Q14); a map
of zeros leaves background alone (Q20). Settings instead of switches: RFM begins at a stated
iteration, whose default is where the official counter, which counts validation too, has it (Q8,
:func:`first_rfm_iteration`); how the second scale is sampled belongs to the protocol
(``eval.scale_by``, Q18).
Nothing here corresponds to Q3 (image labels from masks; ours are the data's, and an image without
a class is background), Q9 (validation in training mode), Q10 (half precision; here float32, under
autocast the CAM and its refinement too), Q15 (what is frozen; here the whole encoder), Q16 (77
tokens), Q17 (a stray table of positions in checkpoints; dropped by name) and Q19 (bugs of the
COCO tool).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.methods.settings import StepQuirks
from wsss.models.weights import renamed


@dataclass(frozen=True, kw_only=True)
class Quirks(StepQuirks):
    """One boolean a quirk; True does as the official code."""

    # Q2: padding is labelled and trained on like anything else; here it is 255
    labelled_padding: bool = False
    # Q5: no box reaches the last row and column of patches; here boxes hold their regions
    open_boxes: bool = False
    # Q6: boxes come from maps of 8 bits and a floored threshold; here from the floats themselves
    eight_bit_boxes: bool = False
    # Q12: without background or foreground pixels the segmentation loss is NaN; here that half is 0
    nan_without_pixels: bool = False
    # Q18: the remainder of an image that is no whole number of patches is dropped, and logits and
    # maps are stretched over it; here its edge is repeated to whole patches, and cut off again
    dropped_remainder: bool = False
    # the gradient is that of p_c, which vanishes where a class is sure; here that of its direction
    # alone, as every map is divided by its maximum (section 9, item 8)
    vanishing_gradient: bool = False


CORRECTED = Quirks()
OFFICIAL = Quirks.all_on()


def first_rfm_iteration(
    threshold: int, *, validate_every: int, validation_images: int, max_steps: int
) -> int | None:
    """Give the 1-based iteration from which RFM is on under the official counter (Q8).

    The counter counts forward calls, those of the validations before an iteration too, and RFM is
    on where it exceeds the threshold.

    Args:
        threshold: 15,000 on VOC, 40,000 on COCO.
        validate_every: iterations between validations; 0: there are none.
        validation_images: forward calls of one validation.
        max_steps: length of the run.

    Returns:
        The iteration; None where the run ends before.
    """
    for iteration in range(1, max_steps + 1):
        validations = (iteration - 1) // validate_every if validate_every else 0
        if iteration + validations * validation_images > threshold:
            return iteration
    return None


# ---- names ---------------------------------------------------------------------------------------

VISUAL, VIT = "encoder.visual.", "backbone.vit."
OUR_PROJECTION, OUR_SCALE = "backbone.projection", "texts.scale"
# official -> ours; of the encoder's stem, of the decoder, and of the leaves of any block
STEM = {
    "conv1.weight": "patch_embed.proj.weight",
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm.",
    "transformer.resblocks.": "blocks.",
}
DECODER = {
    "decoder_fts_fuse.linears_modulelist.": "decoder.mlps.",
    "decoder_fts_fuse.linear_fuse.": "decoder.fuse.",
    "decoder.transformer.resblocks.": "decoder.blocks.",
    "decoder.linear_pred.": "decoder.predict.",
}
LEAVES = {
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj.": ".attn.proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
TAPS = {".proj.": ".fc1.", ".proj_2.": ".fc2."}
CLASS, POSITIONS = "encoder.visual.class_embedding", "encoder.visual.positional_embedding"
PROJECTION = "encoder.visual.proj"
SCALE = "encoder.logit_scale"
OURS_ALONE = ("texts.foreground", "texts.background")  # they come from the file of text features
# the text tower, a table of positions that training leaves behind (Q17), PAR's kernel
UNUSED = (
    "encoder.positional_embedding",
    "encoder.text_projection",
    "encoder.token_embedding.",
    "encoder.ln_final.",
    "encoder.transformer.",
    "encoder.visual.positional_embedding_new",
    "par.kernel",
)


def _replaced(name: str, pairs: Mapping[str, str]) -> str:
    for theirs, ours in pairs.items():
        name = name.replace(theirs, ours)
    return name


def our_name(official: str) -> str | None:
    """Give our name of an official WeCLIP parameter; None where the method never uses it."""
    name = official.removeprefix("module.")
    if name.startswith(UNUSED):
        return None
    if name == SCALE:
        return OUR_SCALE
    if name == PROJECTION:
        return OUR_PROJECTION
    if name.startswith(VISUAL):
        return _replaced(VIT + renamed(name.removeprefix(VISUAL), STEM), LEAVES)
    name = renamed(name, DECODER)
    return _replaced(name, TAPS if name.startswith("decoder.mlps.") else LEAVES)


def official_name(ours: str) -> str:
    """Give the official WeCLIP name of a parameter of ours."""
    if ours == OUR_SCALE:
        return SCALE
    if ours == OUR_PROJECTION:
        return PROJECTION
    leaves = {own: theirs for theirs, own in LEAVES.items()}
    if ours.startswith(VIT):
        stem = {own: theirs for theirs, own in STEM.items()}
        return _replaced(VISUAL + renamed(ours.removeprefix(VIT), stem), leaves)
    if ours.startswith("decoder.mlps."):
        leaves = {own: theirs for theirs, own in TAPS.items()}
    ours = _replaced(ours, leaves)
    return renamed(ours, {own: theirs for theirs, own in DECODER.items()})


def reshaped(state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Give an official state dict with parameters shaped as ours, in float32.

    Positions and class token get an axis of images; the scale is exponentiated.

    Args:
        state: parameters under official names.
        origin: what to call the source in an error.

    Raises:
        WSSSError: the file is of another method.
    """
    state = {name.removeprefix("module."): value.float() for name, value in state.items()}
    for name in (CLASS, POSITIONS, PROJECTION, SCALE):
        if name not in state:
            raise WSSSError(f"{origin}: lacks {name}, which a checkpoint of WeCLIP has")
    return {
        **state,
        CLASS: state[CLASS].reshape(1, 1, -1),
        POSITIONS: state[POSITIONS][None],
        SCALE: state[SCALE].exp(),
    }
