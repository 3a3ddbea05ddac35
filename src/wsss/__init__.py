"""Weakly-supervised semantic segmentation methods, compared on equal terms.

The names below are imported on first use, so that ``import wsss`` and ``wsss --help`` stay light.
``docs/python.md`` shows them at work.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

#: public name -> the module that holds it
_PLACES = {
    "Backbone": "wsss.models.backbone",
    "ConvBackbone": "wsss.models.conv_backbone",
    "VOCDataModule": "wsss.data.voc_module",
    "TableDataModule": "wsss.data.table_module",
    "ToCo": "wsss.methods.toco",
    "ClusterCAM": "wsss.methods.clustercam",
    "GETAM": "wsss.methods.getam",
    "TKPPCL": "wsss.methods.tkp_pcl",
    "Segmenter": "wsss.methods.segmenter",
    "WSSSModule": "wsss.methods.base",
    "Outputs": "wsss.methods.base",
    "Protocol": "wsss.evaluation.protocol",
    "Evaluator": "wsss.evaluation.evaluator",
    "evaluate": "wsss.evaluation.evaluator",
    "load_run": "wsss.runs.folder",
    "train": "wsss.training.run",
    "WSSSError": "wsss.core.errors",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module 'wsss' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
