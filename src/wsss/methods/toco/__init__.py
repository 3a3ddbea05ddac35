"""ToCo; read method.py."""

from wsss.methods.toco.method import ToCo, ToCoSettings

__all__ = ["ToCo", "ToCoSettings"]
