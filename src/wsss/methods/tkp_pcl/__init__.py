"""TKPPCL; read method.py."""

from wsss.methods.tkp_pcl.method import TKPPCL

__all__ = ["TKPPCL"]
