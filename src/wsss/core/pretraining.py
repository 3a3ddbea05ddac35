"""What a backbone's weights were trained on: it follows from the weights, never from a sentence.

timm's tag says it (``augreg_in21k_ft_in1k``), or the hash of a known file. Whatever is neither is
``unknown``. A user may say what a file of their own was trained on; that is recorded as
``declared by the user: ...`` and is kept apart from the rest wherever it is shown.
"""

import re
from collections.abc import Mapping
from typing import Any

from wsss.core.errors import WSSSError

UNKNOWN = "unknown"
NOTHING = "none (random weights)"
DECLARED = "declared by the user: "
HUB_OF_TIMM = "hf_hub:timm/"  # timm's own repositories are called as its names and tags

DISTILLED = "ImageNet-1k classification, distilled from a RegNetY-16GF"
#: SHA-256 of a file, or its first eight digits where its maker put them into the file's name as
#: torch.hub checks them (deit_base_patch16_224-b5f2ef4d.pth) -> what is in it
FILES = {
    "09534d81405e4290533a1d525c9916f66f0d9295a2b5a5c0b05176710e3935d5": (  # vit_pico.safetensors
        "ImageNet-1k classification through a teacher (EfficientNet-Lite0), and composites made "
        "with MiniVOC's training cut-outs: cut-out identity and class labels of each picture"
    ),
    **dict.fromkeys(  # deit_{tiny,small,base}_patch16_224, deit_base_patch16_384
        ("a1311bcf", "cd65a155", "b5f2ef4d", "8de9b5d1"), "ImageNet-1k classification"
    ),
    # deit_{tiny,small,base}_distilled_patch16_224, deit_base_distilled_patch16_384
    **dict.fromkeys(("b40b3cf7", "649709d9", "df68dfff", "d0272ac0"), DISTILLED),
}

#: of timm's tags: a data set of labelled images
LABELLED = {
    "in1k": "ImageNet-1k classification",
    "in12k": "ImageNet-12k classification",
    "in21k": "ImageNet-21k classification",
    "in22k": "ImageNet-22k classification",
}
#: a recipe, which is no data: AugReg, the original ViT's, Facebook's, sharpness-aware, timm's own
RECIPE = re.compile(r"augreg2?|orig|fb|sam|sbb2?|sw|nadamuon|e\d+|\d+ep|r\d+|patch\d+")
#: what a tag begins with -> the training that is not classification
STARTS = {
    "dino": "DINO, self-supervised on ImageNet-1k",
    "mae": "MAE, self-supervised on ImageNet-1k",
    "lvd142m": "DINOv2, self-supervised on LVD-142M",
    "in1k_ijepa": "I-JEPA, self-supervised on ImageNet-1k",
    "in22k_ijepa": "I-JEPA, self-supervised on ImageNet-22k",
    "bamboo": "Bamboo classification",
    "openai": "CLIP on OpenAI's 400 million image-text pairs",
    "laion2b": "CLIP on LAION-2B image-text pairs",
    "laion400m_e32": "CLIP on LAION-400M image-text pairs",
    "datacompxl": "CLIP on DataComp-XL image-text pairs",
    "dfn2b": "CLIP on DFN-2B image-text pairs",
    "dfn2b_s39b": "CLIP on DFN-2B image-text pairs",
    "dfn5b": "CLIP on DFN-5B image-text pairs",
    "metaclip_400m": "MetaCLIP on 400 million image-text pairs",
    "metaclip_2pt5b": "MetaCLIP on 2.5 billion image-text pairs",
    "metaclip_altogether": "MetaCLIP (Altogether) on image-text pairs",
    "metaclip2_worldwide": "MetaCLIP 2 on worldwide image-text pairs",
    "apple_mclip2_dfndr2b": "MobileCLIP2 on DFNDR-2B image-text pairs",
    "tinyclip_laion400m": "TinyCLIP on LAION-400M image-text pairs",
    "tinyclip_yfcc15m": "TinyCLIP on YFCC-15M image-text pairs",
    "webli": "SigLIP on WebLI image-text pairs",
    "webli_i18n": "SigLIP on multilingual WebLI image-text pairs",
    "v2_webli": "SigLIP 2 on WebLI image-text pairs",
    "apple_pt": "AIMv2 on image-text pairs",
    "apple_pt_dist": "AIMv2 on image-text pairs, distilled",
    "ogvl_2pt5": "InternViT on image-text pairs",
    "ogvl_dist": "InternViT on image-text pairs, distilled",
    "c_radio": "C-RADIO, distilled from CLIP, DINOv2 and SAM (pixel masks)",
    "pt": "BEiT-3 on images, texts and image-text pairs",
    "indomain_pt": "BEiT-3 on images, texts and image-text pairs",
}
BEIT3 = f"{STARTS['pt']}, then {LABELLED['in22k']}"
#: part of an architecture, and a tag's beginning -> what it is there
ELSEWHERE = {
    ("tipsv2", "webli"): "TIPSv2 on WebLI image-text pairs",
    ("eva_large", "in22k"): "masked images of ImageNet-22k, with EVA-CLIP's features as targets",
    ("beit3", "in22k"): BEIT3,
    ("beit3", "indomain_in22k"): BEIT3,
    ("_distilled", "fb_in1k"): DISTILLED,
}
#: part of a name of torchvision -> what it says
TORCHVISION = {
    ".IMAGENET1K_": LABELLED["in1k"],
    ".COCO_WITH_VOC_LABELS_": "COCO with VOC's classes",
}
PALI = "SigLIP, then PaliGemma's tasks on image-text pairs, segmentation among them (pixel masks)"


def pretraining_of_tag(name: str) -> str:
    """Say what timm's weights of a name were trained on, from its tag; ``unknown`` without one.

    Args:
        name: timm's, such as ``vit_small_patch16_224.augreg_in21k_ft_in1k``.

    Returns:
        The stages in their order, joined by ``, then``; a stage that no rule knows makes all of it
        ``unknown (timm's tag ...)``.
    """
    architecture, _, tag = name.partition(".")
    if not tag:
        return UNKNOWN
    start, *later = tag.split("_ft_")
    words = [word for part in later for word in part.split("_")]
    stages = [_start(architecture, start), *map(LABELLED.get, words)]
    known = [stage for stage in stages if stage]
    return ", then ".join(known) if len(known) == len(stages) else f"{UNKNOWN} (timm's tag {tag})"


def _start(architecture: str, start: str) -> str | None:
    """Name the first stage of a tag; None where no rule knows it."""
    for (part, beginning), stage in ELSEWHERE.items():
        if part in architecture and start == beginning:
            return stage
    if start.startswith("pali"):
        return PALI
    if start in STARTS:
        return STARTS[start]
    data = [word for word in start.split("_") if word != "miil" and not RECIPE.fullmatch(word)]
    return LABELLED.get(data[0]) if len(data) == 1 else None


def pretraining_of_file(sha256: str) -> str:
    """Say what a known file's weights were trained on; ``unknown`` for any other file."""
    return FILES.get(sha256) or FILES.get(sha256[:8], UNKNOWN)


def declared(said: str) -> str:
    """Give what a user says of a file of their own, marked as such."""
    return f"{DECLARED}{' '.join(said.split())}"


def pretraining_of(name: str, weights: str, sha256: str | None, said: str | None) -> str:
    """Say what weights were trained on.

    Args:
        name: timm's name of the encoder.
        weights: ``timm``, ``random``, or the file, as ``backbone.weights`` has it.
        sha256: hash of the file, where there is one.
        said: what the user declares of a file of their own, or None.

    Raises:
        WSSSError: something is declared of weights that are known.
    """
    found = pretraining_of_file(sha256 or "")
    if weights in ("timm", "random"):
        found = NOTHING if weights == "random" else pretraining_of_tag(name)
    elif weights.startswith(HUB_OF_TIMM) and found == UNKNOWN:
        found = pretraining_of_tag(weights.removeprefix(HUB_OF_TIMM).partition("@")[0])
    elif "_Weights." in weights:  # torchvision's name
        found = next((data for part, data in TORCHVISION.items() if part in weights), UNKNOWN)
    if said is None:
        return found
    if weights in ("timm", "random") or "_Weights." in weights or found != UNKNOWN:
        raise WSSSError(
            f"backbone.declared_pretraining={said[:60]!r}: the pretraining of these weights "
            f"follows from them ({found}), only an unknown file's is declared; remove the key"
        )
    return declared(said)


def stated_pretraining(backbone: Mapping[str, Any]) -> str:
    """Give the pretraining of stored weights as it follows from them, whoever stored them.

    An earlier version stored a sentence of the configuration. Where tag or hash say what the
    weights are, that counts; the sentence itself is what a user declared.

    Args:
        backbone: where the weights came from, as ``WeightsInfo.as_dict()`` gives it.
    """
    source, said = str(backbone.get("source")), str(backbone.get("pretraining") or UNKNOWN)
    if said.startswith("unstated"):  # an earlier version's word
        said = UNKNOWN + said.removeprefix("unstated")
    if source == "random":
        return NOTHING
    if source.startswith("timm:"):
        return pretraining_of_tag(source.removeprefix("timm:"))
    known = pretraining_of_file(str(backbone.get("file_sha256")))
    # a network that segments is recorded so by the names of its parameters, in brackets
    if known != UNKNOWN or said.startswith((UNKNOWN, DECLARED)):
        return said if known == UNKNOWN else known
    if source.startswith(("hf_hub:", "torchvision:")):
        return said
    return declared(said)
