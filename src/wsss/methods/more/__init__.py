"""MoRe; read method.py."""

from wsss.methods.more.method import MoRe
from wsss.methods.more.settings import MoReSettings

__all__ = ["MoRe", "MoReSettings"]
