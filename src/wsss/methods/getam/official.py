"""Names of GETAM's official parameters."""

from wsss.models.weights import renamed

# official GETAM name -> ours, by prefix (../shared/methods/getam.md section 1); order matters
GETAM_PREFIXES = {
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
GETAM_UNUSED = (
    "pretrained.model.head.",
    "pretrained.model.head_dist.",
    "scratch.refinenet4.resConfUnit1.",
)


def getam_name(official: str) -> str | None:
    """Our name of an official GETAM parameter; None where the method never uses it."""
    name = official.removeprefix("module.")
    return None if name.startswith(GETAM_UNUSED) else renamed(name, GETAM_PREFIXES)


def getam_official_name(ours: str) -> str:
    """The official GETAM name of a parameter of ours."""
    return renamed(ours, {own: theirs for theirs, own in GETAM_PREFIXES.items()})
