"""The pretraining of ViT-Pico; ``pretrain.py`` is the command.

From the ground up:

* ``network``: the backbone, the heads that are thrown away, how the weights start.
* ``stages``, ``images``, ``composites``: the schedule, what a picture is made of, the data set.
* ``pooling``, ``objectives``: how tokens become logits, and the losses.
* ``teacher``: the convolutional net that the tokens learn from, and its fine-tuning.
* ``muon``: the optimiser of the blocks' matrices.
* ``scores``, ``holdout``: measures, and the evaluation during training.
* ``trainer``: the loop with its checkpoints.
* ``probe``: a short fine-tuning on MiniVOC, to compare weights.

``tools/cutouts.py``, which reads the media, serves ``tools/build_minivoc.py`` too.
"""
