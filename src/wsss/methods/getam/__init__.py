"""GETAM; read method.py."""

from wsss.methods.getam.method import GETAM

__all__ = ["GETAM"]
