"""Weakly-supervised semantic segmentation methods, compared on equal terms.

The names below are imported on first use, so that ``import wsss`` and ``wsss --help`` stay light.
``docs/python.md`` shows them at work.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

#: module -> the public names that it defines; ``__init__.pyi`` tells type checkers the same
_NAMES = {
    "wsss.core.errors": ["WSSSError"],
    "wsss.models.backbone": ["Backbone"],
    "wsss.models.conv_backbone": ["ConvBackbone"],
    "wsss.data.voc_module": ["VOCDataModule"],
    "wsss.data.table_module": ["TableDataModule"],
    "wsss.methods.base": ["WSSSModule", "Outputs", "Step"],
    "wsss.methods.toco": ["ToCo", "ToCoSettings"],
    "wsss.methods.clustercam": ["ClusterCAM", "ClusterCAMSettings"],
    "wsss.methods.tkp_pcl": ["TKPPCL", "TKPPCLSettings"],
    "wsss.methods.getam": ["GETAM", "GETAMSettings"],
    "wsss.methods.more": ["MoRe", "MoReSettings"],
    "wsss.methods.mctformer": ["MCTformerPlus", "MCTformerPlusSettings"],
    "wsss.methods.weclip": ["WeCLIP", "WeCLIPSettings", "CLIPCAM", "CLIPCAMSettings"],
    "wsss.methods.segmenter": ["Segmenter", "SegmenterSettings"],
    "wsss.evaluation.protocol": ["Protocol"],
    "wsss.evaluation.evaluator": ["Evaluator", "evaluate"],
    "wsss.evaluation.arrays": ["evaluate_maps"],
    "wsss.runs.folder": ["Run", "load_run"],
    "wsss.runs.masks": ["predict_mask", "predict_cams", "predict_soft", "predict_folder"],
    "wsss.runs.scoring": ["score"],
    "wsss.training.run": ["train"],
    "wsss.comparison.frame": ["compare"],
}
_PLACES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module 'wsss' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
