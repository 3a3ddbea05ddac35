"""``wsss benchmark``: time a training step by phases, dense CRFs, loading, a contrast."""

from wsss.benchmark import main

__all__ = ["main"]
