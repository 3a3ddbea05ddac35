"""What a run learnt from is told apart by its weights, whatever the method."""

from typing import Any

import pytest

from wsss.core.supervision import names_clip, supervision_on

CLIP = {"name": "vit_base_patch16_clip_quickgelu_224.openai", "source": "timm:x"}
PLAIN = {"name": "vit_base_patch16_224", "source": "file:a.pth"}


@pytest.mark.parametrize(
    ("training", "backbone", "expected"),
    [
        ("image labels", PLAIN, "image labels"),
        ("image labels", CLIP, "image labels + CLIP"),
        ("image labels", CLIP | {"source": "converted:voc.pth"}, "image labels + CLIP"),
        ("image labels", CLIP | {"source": "random"}, "image labels"),
        ("image labels", {"name": "vit_base_patch16_siglip_gap_224.webli"}, "image labels + CLIP"),
        ("image labels", PLAIN | {"pretraining": "MetaCLIP, 400 M pairs"}, "image labels + CLIP"),
        ("image labels", PLAIN | {"pretraining": "unstated (CLIP)"}, "image labels + CLIP"),
        ("pixel masks", CLIP, "pixel masks + CLIP"),
        ("image labels and saliency maps", CLIP, "image labels and saliency maps + CLIP"),
        # labels that a run on CLIP made, learnt by another encoder
        ("image labels + CLIP", PLAIN, "image labels + CLIP"),
        ("image labels + CLIP", CLIP, "image labels + CLIP"),
        ("image labels + CLIP", PLAIN | {"source": "random"}, "image labels + CLIP"),
        # an encoder that learnt to segment
        ("image labels", PLAIN | {"pretraining": "COCO (pixel masks)"}, "pixel masks"),
        (
            "image labels + CLIP",
            PLAIN | {"pretraining": "COCO (pixel masks)"},
            "pixel masks + CLIP",
        ),
        ("image labels", {}, "image labels"),
    ],
)
def test_weights_decide(training: str, backbone: dict[str, Any], expected: str) -> None:
    assert supervision_on(training, backbone) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("open_clip LAION-2B", True),
        ("SigLIP 2", True),
        ("vit_so400m_patch14_siglip_378.webli", True),
        ("ImageNet-1k classification", False),
        ("Clipart1k", False),
        ("", False),
    ],
)
def test_descendants_of_clip_are_known_by_name(text: str, expected: bool) -> None:
    assert names_clip("nothing", text) is expected
