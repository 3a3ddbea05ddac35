"""ToCo; read method.py."""

from wsss.methods.toco.method import ToCo

__all__ = ["ToCo"]
