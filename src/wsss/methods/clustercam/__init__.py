"""ClusterCAM; read method.py."""

from wsss.methods.clustercam.method import ClusterCAM

__all__ = ["ClusterCAM"]
