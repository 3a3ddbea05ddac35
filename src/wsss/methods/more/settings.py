"""What can be set of MoRe, and what is in force at which step (more.md sections 2 to 4)."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from wsss.core.errors import WSSSError
from wsss.methods.more.graph import Gate
from wsss.methods.settings import (
    Count,
    Fraction,
    NotNegative,
    Number,
    Positive,
    Scales,
    ThresholdSettings,
    Tokens,
    Width,
)


class MaskRule(NamedTuple):
    """How a token mask is made of a map: its name, foreground above, background up to."""

    source: str
    high: float
    low: float


@dataclass(frozen=True, kw_only=True)
class MoReSettings(ThresholdSettings):
    """Settings of MoRe; the defaults are the paper's for VOC."""

    # optimiser
    warmup_steps: Number = 1500  # of linear warm-up
    lr: Positive = 6e-5  # of the encoder
    head_lr_factor: Positive = 10.0  # times lr: classifiers, graph module, decoder
    weight_decay: NotNegative = 0.01  # AdamW's, decoupled, on everything

    # network
    registers: Tokens = 4  # tokens that no head reads
    register_std: Positive = 1.0  # deviation of their positions, cut at -2 and 2
    class_token_noise: NotNegative = 0.02  # deviation that parts the class tokens at the start
    graph: bool = True  # False: class tokens as the encoder gives them
    neighbours: Count | None = None  # of a class token in the graph; None: half the classes
    gate: Gate = "sums"  # of the graph's messages; dot: scaled dot products
    aux_layer: int = -3  # block of the auxiliary classifier; -3: third from last
    decoder_channels: Width = 512  # hidden width of LargeFOV
    decoder_dilation: Width = 5  # reach of its 3x3 convolutions in patches; 5 is for 28 x 28

    # maps, and the scores above which a token or pixel is foreground, up to which background
    scales: Scales = (1.0, 0.5, 0.75, 1.5)  # of the CAM; each with its mirror image
    lam_scales: Scales = (1.0,)  # of the LAM, the same
    high_threshold: Fraction = 0.7  # of pseudo labels, PTC and UNE; COCO 0.65
    low_threshold: Fraction = 0.25  # of the same and CLE
    cle_high_threshold: Fraction = 0.5  # of CLE
    late_high_threshold: Fraction = 0.6  # of CLE and UNE when their masks come from the final CAM
    late_low_threshold: Fraction = 0.35  # background up to it, in CLE then

    # losses and when they are in force; shares are of the run
    temperature: Positive = 0.5  # of CLE; COCO 0.1
    mean_logit_share: Fraction = 0.0  # of the soft margin in the distinctness loss; COCO's log 0.5
    distinct_weight: NotNegative = 1.0  # of the distinctness of class tokens
    ptc_weight: NotNegative = 0.3  # of patch token contrast
    cle_weight: NotNegative = 0.2  # COCO 0.1
    une_weight: NotNegative = 0.1  # COCO 0.01
    seg_weight: NotNegative = 0.12  # of the segmentation loss
    reg_weight: NotNegative = 0.05  # of the dense energy
    ptc_after: Fraction | None = None  # share before PTC; None: none; COCO 0.1
    tokens_after: Fraction | None = None  # share before CLE and UNE; None: none; COCO 0.15
    seg_after: Fraction = 0.1  # share before segmentation and energy; COCO 0.2
    late_masks_after: Fraction = 0.5  # share before CLE's and UNE's late masks; COCO 0.625
    energy_kernel: Literal["lattice", "gaussian"] = "lattice"  # the official filter, or the exact

    def check(self) -> None:
        """Raise WSSSError where a mask's background would end above where its classes begin."""
        super().check()
        for low, high in (
            ("low_threshold", "cle_high_threshold"),
            ("late_low_threshold", "late_high_threshold"),
        ):
            below, above = getattr(self, low), getattr(self, high)
            if below > above:
                raise WSSSError(f"method: expected {low} <= {high}, got {below} > {above}")

    def loss_weights(self, step: int) -> dict[str, float]:
        """Give weights of the last six terms at a 0-based step (more.md section 2, the table)."""

        def begun(share: float | None) -> bool:
            return share is None or step > round(share * self.max_steps)

        return {
            "distinct_loss": self.distinct_weight,
            "ptc_loss": self.ptc_weight * begun(self.ptc_after),
            "cle_loss": self.cle_weight * begun(self.tokens_after),
            "une_loss": self.une_weight * begun(self.tokens_after),
            "seg_loss": self.seg_weight * begun(self.seg_after),
            "reg_loss": self.reg_weight * begun(self.seg_after),
        }

    def masks_are_late(self, step: int) -> bool:
        """Tell whether CLE and UNE take their masks from the final CAM at a 0-based step."""
        return step > round(self.late_masks_after * self.max_steps)

    def mask_rules(self, step: int) -> dict[str, MaskRule]:
        """Give the rules of ``ptc_mask``, ``cle_mask`` and ``une_mask`` (more.md section 3)."""
        ptc = une = MaskRule("cam_aux", self.high_threshold, self.low_threshold)
        cle = MaskRule("cam_aux", self.cle_high_threshold, self.low_threshold)
        if self.masks_are_late(step):
            cle = une = MaskRule("cam", self.late_high_threshold, self.late_low_threshold)
        return {"ptc_mask": ptc, "cle_mask": cle, "une_mask": une}
