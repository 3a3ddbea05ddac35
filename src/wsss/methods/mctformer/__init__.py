"""MCTformer+; read method.py."""

from wsss.methods.mctformer.method import MCTformerPlus, MCTformerPlusSettings

__all__ = ["MCTformerPlus", "MCTformerPlusSettings"]
