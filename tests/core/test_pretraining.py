"""What weights were trained on follows from them."""

from typing import Any

import pytest

from wsss.core.errors import WSSSError
from wsss.core.files import file_sha256
from wsss.core.places import PACKAGE
from wsss.core.pretraining import (
    FILES,
    pretraining_of,
    pretraining_of_file,
    pretraining_of_tag,
    stated_pretraining,
)
from wsss.core.supervision import supervision_on

IN1K, IN21K = "ImageNet-1k classification", "ImageNet-21k classification"
DISTILLED = f"{IN1K}, distilled from a RegNetY-16GF"
CLIP = "CLIP on OpenAI's 400 million image-text pairs"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_small_patch16_224.augreg_in1k", IN1K),
        ("vit_base_patch16_224.augreg_in21k", IN21K),
        ("vit_base_patch16_224.orig_in21k_ft_in1k", f"{IN21K}, then {IN1K}"),
        ("deit_base_patch16_224.fb_in1k", IN1K),
        ("deit_base_distilled_patch16_384.fb_in1k", DISTILLED),
        ("vit_small_patch16_224.dino", "DINO, self-supervised on ImageNet-1k"),
        ("vit_base_patch16_224.mae", "MAE, self-supervised on ImageNet-1k"),
        ("vit_small_patch14_dinov2.lvd142m", "DINOv2, self-supervised on LVD-142M"),
        ("vit_base_patch16_clip_224.openai", CLIP),
        (
            "vit_base_patch16_clip_224.laion2b_ft_in12k_in1k",
            "CLIP on LAION-2B image-text pairs, then ImageNet-12k classification, then " + IN1K,
        ),
        ("vit_base_patch16_siglip_224.v2_webli", "SigLIP 2 on WebLI image-text pairs"),
        ("vit_base_patch14_reg1_tipsv2.webli", "TIPSv2 on WebLI image-text pairs"),
        ("vit_medium_patch16_reg4_gap_256.sbb_in12k_ft_in1k",
         f"ImageNet-12k classification, then {IN1K}"),
        ("vit_base_patch16_224.new_in21k_in1k", "unknown (timm's tag new_in21k_in1k)"),
        ("vit_base_patch16_224.augreg_in21k_ft_new", "unknown (timm's tag augreg_in21k_ft_new)"),
        ("vit_base_patch16_224", "unknown"),
    ],
)  # fmt: skip
def test_a_tag_says_it(name: str, expected: str) -> None:
    assert pretraining_of_tag(name) == expected
    assert pretraining_of(name, "timm", None, None) == expected


@pytest.mark.parametrize(
    ("name", "supervision"),
    [
        ("eva_large_patch14_196.in22k_ft_in1k", "image labels + CLIP"),
        ("vit_base_patch14_reg1_tipsv2.webli", "image labels + CLIP"),
        ("aimv2_large_patch14_224.apple_pt", "image labels + CLIP"),
        ("vit_base_patch16_radio_v3.c_radio", "pixel masks + CLIP"),
        ("vit_so400m_patch14_siglip_gap_448.pali_refcoco_seg", "pixel masks + CLIP"),
        ("vit_base_patch16_224.mae", "image labels"),
    ],
)
def test_supervision_follows_from_the_tag(name: str, supervision: str) -> None:
    assert supervision_on("image labels", {"name": name, "source": f"timm:{name}"}) == supervision


def test_known_files_are_known_by_their_hash() -> None:
    shipped = file_sha256(PACKAGE / "weights" / "vit_pico.safetensors")
    assert pretraining_of_file(shipped).startswith("ImageNet-1k classification through a teacher")
    assert pretraining_of_file("b5f2ef4d" + 56 * "0") == IN1K
    assert pretraining_of_file("df68dfff" + 56 * "0") == DISTILLED
    assert pretraining_of_file(64 * "0") == pretraining_of_file("") == "unknown"
    assert all(len(digits) in (8, 64) for digits in FILES)


def test_only_an_unknown_file_is_declared() -> None:
    own = pretraining_of("vit_base_patch16_224.mae", "own.pth", 64 * "0", "iNaturalist\n2021")
    assert own == "declared by the user: iNaturalist 2021"
    for weights, digest in (
        ("timm", None),
        ("random", None),
        ("hf_hub:timm/vit_base_patch16_224.mae", 64 * "0"),
        ("ResNet50_Weights.IMAGENET1K_V1", None),
        ("deit.pth", "b5f2ef4d" + 56 * "0"),
    ):
        with pytest.raises(WSSSError, match=r"declared_pretraining='X'.*follows from them"):
            pretraining_of("vit_base_patch16_224.mae", weights, digest, "X")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("random", "none (random weights)"),
        ("own.pth", "unknown"),
        ("hf_hub:timm/vit_base_patch16_224.mae", "MAE, self-supervised on ImageNet-1k"),
        ("hf_hub:timm/vit_small_patch16_224.dino@main", "DINO, self-supervised on ImageNet-1k"),
        ("hf_hub:someone/vit_base_patch16_224.mae", "unknown"),
        ("ResNet50_Weights.IMAGENET1K_V1", IN1K),
        ("DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1", "COCO with VOC's classes"),
    ],
)
def test_the_source_says_it(weights: str, expected: str) -> None:
    name = "vit_base_patch16_224.augreg_in21k"  # whose tag is not of a file's weights
    digest = None if weights == "random" else 64 * "0"
    assert pretraining_of(name, weights, digest, None) == expected


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        # the sentence of a preset stayed when the name changed
        ({"source": "timm:vit_base_patch16_224.augreg_in21k", "pretraining": IN1K}, IN21K),
        ({"source": "random", "pretraining": IN1K}, "none (random weights)"),
        ({"source": "file:a.pth", "pretraining": IN1K}, f"declared by the user: {IN1K}"),
        ({"source": "file:a.pth", "pretraining": "unstated (CLIP)"}, "unknown (CLIP)"),
        ({"source": "file:a.pth", "pretraining": IN21K, "file_sha256": "b5f2ef4d"}, IN1K),
        ({"source": "converted:a.pth", "pretraining": IN1K}, f"declared by the user: {IN1K}"),
        ({"source": "converted:a.pth", "pretraining": "declared by the user: x"},
         "declared by the user: x"),
        ({"source": "hf_hub:timm/vit_base_patch16_224.mae", "pretraining": "MAE"}, "MAE"),
        ({}, "unknown"),
    ],
)  # fmt: skip
def test_stored_sentences_are_told_apart(stored: dict[str, Any], expected: str) -> None:
    assert stated_pretraining(stored) == expected
