"""What has to be said beside a number for it to mean something (design.md, "A number")."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from wsss.core.errors import WSSSError
from wsss.core.ranges import Fraction, Number, Scales, Side, Some, one_of
from wsss.core.schema import check_fields
from wsss.maps.refine.dense_crf import CRF_PRESETS, CRFPreset

Merge = Literal["sum", "max", "mean"]
#: kind of label map -> key of its mIoU; abstentions of pseudo labels count as background there
LABEL_MAPS = {
    "seed": "seed_miou",
    "pseudo_label": "pseudo_label_miou_ignored_as_background",
    "seg": "seg_miou",
    "seg_crf": "seg_miou_crf",
    "seg_ms": "seg_miou_ms",
    "seg_ms_crf": "seg_miou_ms_crf",
}
ORACLE_THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(20))


@dataclass(frozen=True)
class Protocol:
    """How a trained module is turned into numbers.

    Attributes:
        resize: side of the square to which images are squashed before multi-scale segmentation;
            None keeps the native size. Scores are always taken at the mask's size.
        single_resize: the same for the single-scale forward pass, whose image-level scores count;
            ToCo's logged single-scale numbers are of images squashed to 448, its multi-scale ones
            of native size (toco.md section 5).
        cam_resize: the same for CAMs.
        resize_long: instead of squares, the long side to which images are resized before all else,
            their shape kept (WeCLIP: 512); None: native.
        seg_scales: scales of multi-scale segmentation.
        seg_sizes: instead of scales, sides of squares to which the 8-bit pixels are squashed for
            multi-scale segmentation (GETAM: 256, 320, 480); None: ``seg_scales`` count.
        flip: whether multi-scale segmentation adds the mirror image.
        flip_merge: how logits of an image and its mirror are merged.
        scale_merge: how logits of the scales or sizes are merged.
        merge_of: what the scales merge: ``logits``, or ``probabilities``, whose logarithm then
            stands for the logits (clustercam.md section 5). Image and mirror merge as logits.
        align_corners: whether images are resized to a scale with aligned corners.
        scale_by: how they are sampled then: by the ratio of the two ``size``s, which are whole
            numbers, or by the ``factor`` itself (WeCLIP).
        scale_from: what is sampled for a scale of the square ``resize``: the ``resized`` image
            once more, or the ``native`` one at once (MoRe).
        merge_at: where logits of scales, their mirror images merged, come together: at the size of
            the ``mask``, or of the first scale's ``logits`` (WeCLIP).
        crf: name of a dense CRF preset, or None for no CRF.
        crf_prune: let only background and the image's labelled classes into the CRF. It uses
            image labels, so it is refused unless ``use_image_labels`` is set.
        crf_backend: ``pydensecrf``, in worker processes on the CPU, or ``torch``, our own on the
            evaluation's device (`wsss.maps.refine.mean_field`); ``wsss benchmark part=crf``
            compares them.
        cam_threshold: declared background threshold of CAM seeds.
        cam_high: pseudo labels are foreground above it; None: no pseudo labels are scored.
        cam_low: pseudo labels are background up to it; 255 lies between.
        refine: refinement of pseudo labels: ``par`` (ToCo's, of scores against backgrounds),
            ``pamr`` (GETAM's, of the maps before they are thresholded) or None.
        use_image_labels: CAM seeds get the image's true classes (GT-known); otherwise those that
            the module itself predicts.
        oracle_thresholds: thresholds of the curve whose best value is the oracle.
        holdout_per_class: images a class of a holdout of the training data, whose masks choose a
            further CAM threshold; 0: none is chosen. Masks are then read: a declared budget.
        holdout_split: list that the holdout is taken from; None: the training list.
    """

    resize: Side | None = None
    single_resize: Side | None = None
    cam_resize: Side | None = None
    resize_long: Side | None = None
    seg_scales: Scales = (1.0,)
    seg_sizes: Some[Side] | None = None
    flip: bool = False
    flip_merge: Merge = "sum"
    scale_merge: Merge = "sum"
    merge_of: Literal["logits", "probabilities"] = "logits"
    align_corners: bool = False
    scale_by: Literal["size", "factor"] = "size"
    scale_from: Literal["resized", "native"] = "resized"
    merge_at: Literal["mask", "logits"] = "mask"
    crf: one_of(CRF_PRESETS) | None = None  # type: ignore[valid-type]
    crf_prune: bool = False
    crf_backend: Literal["pydensecrf", "torch"] = "pydensecrf"
    cam_threshold: Fraction = 0.5
    cam_high: Fraction | None = None
    cam_low: Fraction | None = None
    refine: Literal["par", "pamr"] | None = None
    use_image_labels: bool = True
    oracle_thresholds: Some[Fraction] = ORACLE_THRESHOLDS
    holdout_per_class: Number = 0
    holdout_split: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "eval")  # of YAML's lists it makes tuples, so that it can be hashed
        if self.crf_prune and not self.use_image_labels:
            raise WSSSError(
                "eval.crf_prune=true uses image labels, which eval.use_image_labels=false "
                "forbids; set one of the two"
            )
        squares = ("resize", "single_resize", "cam_resize", "seg_sizes")
        squashed = [name for name in squares if getattr(self, name) is not None]
        if self.resize_long is not None and squashed:
            raise WSSSError(
                f"eval.resize_long={self.resize_long} keeps the shape of an image and "
                f"eval.{squashed[0]}={getattr(self, squashed[0])} does not; set one of the two to "
                "null"
            )
        high, low = self.cam_high, self.cam_low
        if (high is None) != (low is None):
            raise WSSSError("eval.cam_high and eval.cam_low: give both, or neither (null)")
        if high is not None and low is not None and low > high:
            raise WSSSError(
                f"eval.cam_high={high}, eval.cam_low={low}: expected 0 <= low <= high <= 1"
            )

    @property
    def crf_preset(self) -> CRFPreset | None:
        """The parameters behind ``crf``."""
        return None if self.crf is None else CRF_PRESETS[self.crf]

    @property
    def multi_scale(self) -> bool:
        """Whether merged segmentation differs from the plain single-scale one."""
        return self.flip or self.seg_scales != (1.0,) or self.seg_sizes is not None

    @property
    def curve_thresholds(self) -> tuple[float, ...]:
        """Thresholds at which seeds are scored: the oracle's and the declared one, ascending."""
        return tuple(sorted({*self.oracle_thresholds, self.cam_threshold}))

    def during_training(self) -> Self:
        """Give the cheap form for validation: one scale, no flip, no CRF, no pseudo labels.

        Numbers under it are for watching a run and are not results.
        """
        return replace(
            self,
            seg_scales=(1.0,),
            seg_sizes=None,
            flip=False,
            crf=None,
            crf_prune=False,
            cam_high=None,
            cam_low=None,
            holdout_per_class=0,
        )
