"""Where classes that stored configurations name lie today.

A run folder or checkpoint of an earlier version names classes by places that have moved. One table
says where to; it is applied when a stored configuration is read, and backwards when a hash is
taken, so that a finished run is still found finished.

The same is done to what an earlier version said of an encoder in a sentence of its own,
``backbone.pretraining``: today it follows from the weights.
"""

from collections.abc import Callable
from typing import Any

#: target in a stored configuration -> target today
MOVED = {
    "wsss.backbone.Backbone": "wsss.Backbone",
    "wsss.conv_backbone.ConvBackbone": "wsss.ConvBackbone",
    "wsss.data.datamodule.WSSSDataModule": "wsss.VOCDataModule",
    "wsss.data.datamodule.TableDataModule": "wsss.TableDataModule",
    "wsss.data.transforms.ToCoViews": "wsss.data.views.toco.ToCoViews",
    "wsss.data.transforms.ClusterCAMView": "wsss.data.views.clustercam.ClusterCAMView",
    "wsss.data.transforms.GETAMViews": "wsss.data.views.getam.GETAMViews",
    "wsss.data.square_views.SquareViews": "wsss.data.views.tkp_pcl.SquareViews",
    "wsss.data.labelled_crops.LabelledCrops": "wsss.data.views.segmenter.LabelledCrops",
}
#: Lightning's key of a data module's state in a checkpoint: the class's name -> its name today
STATE_KEYS = {"WSSSDataModule": "VOCDataModule"}
FORMER = {new: old for old, new in MOVED.items()}
_IN21K = "ImageNet-21k, then ImageNet-1k classification"
#: encoder of a preset -> the sentence that stood beside it
SENTENCES = {
    "deit_base_patch16_224.fb_in1k": "ImageNet-1k classification",
    "deit_small_patch16_224.fb_in1k": "ImageNet-1k classification",
    "resnet101": "ImageNet-1k classification",
    "vit_base_patch16_224.orig_in21k_ft_in1k": _IN21K,
    "vit_base_patch16_384.orig_in21k_ft_in1k": _IN21K,
    "vit_base_r50_s16_384.orig_in21k_ft_in1k": _IN21K,
    "vit_base_patch16_clip_quickgelu_224.openai": "CLIP, 400 million image-text pairs",
    "vit_small_patch14_dinov2.lvd142m": "LVD-142M self-supervised",
    "vit_tiny_patch16_224": (
        "ImageNet-1k classification through a teacher (EfficientNet-Lite0), and composites made "
        "with MiniVOC's training cut-outs: cut-out identity and class labels of each picture"
    ),
}
ENCODERS = ("wsss.Backbone", "wsss.ConvBackbone")


def with_current_targets(node: Any) -> Any:
    """Give a stored configuration with every ``_target_`` as it is called today.

    A sentence on the pretraining is left out where it is the preset's or weights are known;
    elsewhere it is what the user declared.
    """
    return _each_encoder(_renamed(node, MOVED), _without_sentence)


def with_former_targets(node: Any) -> Any:
    """Give a configuration as the first version wrote it, for hashes."""
    return _renamed(with_sentences(node), FORMER)


def with_current_state_keys(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Give a checkpoint's content with the states of data modules under their names of today."""
    return {STATE_KEYS.get(key, key): value for key, value in checkpoint.items()}


def _renamed(node: Any, names: dict[str, str]) -> Any:
    if isinstance(node, dict):
        return {
            key: names.get(value, value)
            if key == "_target_" and isinstance(value, str)
            else _renamed(value, names)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_renamed(value, names) for value in node]
    return node


def with_sentences(node: Any) -> Any:
    """Give a configuration with what the first version said of each encoder, for digests."""
    return _each_encoder(node, _with_sentence)


def _each_encoder(node: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Give a configuration with every group of an encoder changed."""
    if isinstance(node, dict):
        inner = {key: _each_encoder(value, change) for key, value in node.items()}
        return change(inner) if inner.get("_target_") in ENCODERS else inner
    if isinstance(node, list):
        return [_each_encoder(value, change) for value in node]
    return node


def _without_sentence(node: dict[str, Any]) -> dict[str, Any]:
    said, rest = node.get("pretraining"), {k: v for k, v in node.items() if k != "pretraining"}
    known = node.get("weights") in ("timm", "random") or said == SENTENCES.get(
        str(node.get("name"))
    )
    return rest if said is None or known else {**rest, "declared_pretraining": said}


def _with_sentence(node: dict[str, Any]) -> dict[str, Any]:
    said = node.get("pretraining", SENTENCES.get(str(node.get("name"))))
    said = node.get("declared_pretraining", said)
    rest = {key: value for key, value in node.items() if key != "declared_pretraining"}
    return rest if said is None else {**rest, "pretraining": said}
