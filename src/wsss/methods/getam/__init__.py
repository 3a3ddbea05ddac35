"""GETAM; read method.py."""

from wsss.methods.getam.method import GETAM, GETAMSettings

__all__ = ["GETAM", "GETAMSettings"]
