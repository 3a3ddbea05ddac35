"""The public names for type checkers; at run time ``__init__.py`` imports them on first use."""

from wsss.comparison.frame import compare
from wsss.core.errors import WSSSError
from wsss.data.table_module import TableDataModule
from wsss.data.voc_module import VOCDataModule
from wsss.evaluation.arrays import evaluate_maps
from wsss.evaluation.evaluator import Evaluator, evaluate
from wsss.evaluation.protocol import Protocol
from wsss.methods.base import Outputs, Step, WSSSModule
from wsss.methods.clustercam import ClusterCAM, ClusterCAMSettings
from wsss.methods.getam import GETAM, GETAMSettings
from wsss.methods.mctformer import MCTformerPlus, MCTformerPlusSettings
from wsss.methods.more import MoRe, MoReSettings
from wsss.methods.segmenter import Segmenter, SegmenterSettings
from wsss.methods.tkp_pcl import TKPPCL, TKPPCLSettings
from wsss.methods.toco import ToCo, ToCoSettings
from wsss.methods.weclip import CLIPCAM, CLIPCAMSettings, WeCLIP, WeCLIPSettings
from wsss.models.backbone import Backbone
from wsss.models.conv_backbone import ConvBackbone
from wsss.runs.folder import Run, load_run
from wsss.runs.masks import predict_cams, predict_folder, predict_mask, predict_soft
from wsss.runs.scoring import score
from wsss.training.run import train

__version__: str
__all__ = [
    "CLIPCAM",
    "GETAM",
    "TKPPCL",
    "Backbone",
    "CLIPCAMSettings",
    "ClusterCAM",
    "ClusterCAMSettings",
    "ConvBackbone",
    "Evaluator",
    "GETAMSettings",
    "MCTformerPlus",
    "MCTformerPlusSettings",
    "MoRe",
    "MoReSettings",
    "Outputs",
    "Protocol",
    "Run",
    "Segmenter",
    "SegmenterSettings",
    "Step",
    "TKPPCLSettings",
    "TableDataModule",
    "ToCo",
    "ToCoSettings",
    "VOCDataModule",
    "WSSSError",
    "WSSSModule",
    "WeCLIP",
    "WeCLIPSettings",
    "__version__",
    "compare",
    "evaluate",
    "evaluate_maps",
    "load_run",
    "predict_cams",
    "predict_folder",
    "predict_mask",
    "predict_soft",
    "score",
    "train",
]
