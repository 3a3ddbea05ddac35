"""Where classes that stored configurations name lie today.

A run folder or checkpoint of an earlier version names classes by places that have moved. One table
says where to; it is applied when a stored configuration is read, and backwards when a hash is
taken, so that a finished run is still found finished.
"""

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


def with_current_targets(node: Any) -> Any:
    """Give a stored configuration with every ``_target_`` as it is called today."""
    return _renamed(node, MOVED)


def with_former_targets(node: Any) -> Any:
    """Give a configuration with every ``_target_`` as the first version called it, for hashes."""
    return _renamed(node, FORMER)


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
