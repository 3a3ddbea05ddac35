"""Names of ToCo's official parameters."""

from wsss.models.weights import renamed

# official ToCo name -> ours, by prefix (../shared/methods/toco.md section 1); order matters
TOCO_PREFIXES = {
    "encoder.": "backbone.vit.",
    "classifier.": "classifier.",
    "aux_classifier.": "aux_classifier.",
    "decoder.": "decoder.",
    "proj_head.": "ctc_student.",
    "proj_head_t.": "ctc_teacher.",
}
# `encoder.head` is the unused ImageNet classifier; older files also hold `conv` and `aux_conv`
TOCO_UNUSED = ("encoder.head.", "conv.", "aux_conv.")


def toco_name(official: str) -> str | None:
    """Our name of an official ToCo parameter; None where the method never uses it."""
    name = official.removeprefix("module.")
    if name.startswith(TOCO_UNUSED):
        return None
    # torch's weight norm moved from weight_g / weight_v to a parametrisation
    name = renamed(name, TOCO_PREFIXES).replace(".weight_g", ".parametrizations.weight.original0")
    return name.replace(".weight_v", ".parametrizations.weight.original1")


def toco_official_name(ours: str) -> str:
    """The official ToCo name of a parameter of ours."""
    ours = renamed(ours, {own: theirs for theirs, own in TOCO_PREFIXES.items()})
    ours = ours.replace(".parametrizations.weight.original0", ".weight_g")
    return ours.replace(".parametrizations.weight.original1", ".weight_v")
