"""What ``wsss benchmark`` measures: a training step by phases, dense CRFs, loading, a contrast.

``steps.py`` names the sides of a step, ``runner.py`` times one of them, ``METHOD_official.py`` is a
method computed the official way. ``crf.py``, ``loading.py`` and ``pce.py`` are the other parts, and
``report.py`` prints. Nothing outside this folder knows of it.
"""
