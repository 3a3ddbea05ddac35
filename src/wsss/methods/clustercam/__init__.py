"""ClusterCAM; read method.py."""

from wsss.methods.clustercam.method import ClusterCAM, ClusterCAMSettings

__all__ = ["ClusterCAM", "ClusterCAMSettings"]
