"""TKPPCL; read method.py."""

from wsss.methods.tkp_pcl.method import TKPPCL, TKPPCLSettings

__all__ = ["TKPPCL", "TKPPCLSettings"]
