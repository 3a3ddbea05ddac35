"""What MCTformer+'s official code does otherwise, and how it names its parameters.

Q1 to Q13 are the numbered quirks of mctformer.md section 7. Each departure of ours is a switch that
takes it back; ``official_compat=true`` takes all of them back, ``+method.quirks.NAME=true`` a
single one.

Same numbers, less work (always): attention maps are made for maps alone and never kept, their sums
over blocks are accumulated row by row; patch head, class maps and everything after them are
computed for the classes that occur; an image and its mirror image are one batch, and their maps are
summed before they are enlarged; the threshold scan reads every map once.
Kept as official: CCT has no temperature, takes all blocks and all K classes; ranks are discounted
by rank, whatever the grid; each map is stretched by its own minimum and maximum; rows of the
affinity are not renormalised; the final norm exists and is never applied; the last step's weights
count. Settings that the switches leave alone: ``method.token_noise`` (officially 0, Q3),
``method.head_lr_factor`` (officially 1), ``method.cam_layers`` (12, Q10).
Nothing here corresponds to Q5, Q6 and Q7 (sizes at which the official code stops), Q11 (half
precision in the affinity product; ours stays float32) and Q13 (images without labels; our lists
lack them).
Q12: the official scan stops at the first threshold that does not improve; the evaluator reads the
whole curve and calls its best an oracle.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.methods.settings import StepQuirks


@dataclass(frozen=True, kw_only=True)
class Quirks(StepQuirks):
    """One boolean a quirk; True does as the official code."""

    # Q1: positions are decayed, as the list of exceptions names an unused parameter; here neither
    # they nor class tokens are
    decayed_positions: bool = False
    # Q2: the rate stays for a whole epoch and lags one behind; here it follows the step
    rate_by_epoch: bool = False
    # Q4: every pretrained position is repeated on 2 x 2 cells of the training grid; here they are
    # resized bicubically
    repeated_positions: bool = False
    # Q8: the remainder of an image that is no whole number of patches is dropped, and the maps are
    # stretched over it; here such an image is enlarged to whole patches
    dropped_remainder: bool = False
    # Q9: scales are merged at the size of the first one; here at the image's
    size_of_first_scale: bool = False


CORRECTED = Quirks()
OFFICIAL = Quirks.all_on()

# ---- names ---------------------------------------------------------------------------------------

POSITIONS = ("pos_embed_cls", "pos_embed_pat")  # official parts of our positions, in this order
JOINED = " + ".join(POSITIONS)  # what errors call them
OUR_POSITIONS = "backbone.vit.pos_embed"
UNUSED = ("pos_embed",)  # of the single-class network that the official one is made from


def our_name(official: str) -> str | None:
    """Give our name of an official MCTformer+ parameter; None where the method never uses it."""
    name = official.removeprefix("module.")
    if name in UNUSED:
        return None
    if name in (JOINED, *POSITIONS):
        return OUR_POSITIONS
    return f"patch_{name}" if name.startswith("head.") else f"backbone.vit.{name}"


def official_name(ours: str) -> str:
    """Give the official MCTformer+ name of a parameter of ours; that of positions is double."""
    if ours == OUR_POSITIONS:
        return JOINED
    return ours.removeprefix("backbone.vit.").replace("patch_head.", "head.")


def joined(state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Join the two parts of the positions of an official state dict.

    Args:
        state: under official names; without both parts it has no positions afterwards.
        origin: what to call the source in an error.

    Raises:
        WSSSError: the file is of MCTformer V1 or V2.
    """
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    parts = [plain.pop(name) for name in POSITIONS if name in plain]
    if not parts and "pos_embed" in plain:
        head = plain.get("head.weight")
        version = "V2" if head is not None and head.ndim == 4 else "V1"
        raise WSSSError(
            f"{origin}: is of MCTformer {version}, whose positions are one pos_embed; expected "
            f"MCTformer+ with {' and '.join(POSITIONS)}"
        )
    if len(parts) == len(POSITIONS):
        plain[JOINED] = torch.cat(parts, dim=1)
    return plain


def parted(named: Mapping[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """Give tensors of our parameters' names and shapes under their official names.

    Args:
        named: parameters or gradients; the positions are parted again.
        num_classes: K.
    """
    theirs = {official_name(name): value for name, value in named.items()}
    if JOINED in theirs:
        whole = theirs.pop(JOINED)
        parts = whole[:, :num_classes], whole[:, num_classes:]
        theirs |= dict(zip(POSITIONS, parts, strict=True))
    return theirs
