"""Images, image-level labels and masks: reading, checking, augmenting and batching.

Nothing is re-exported here on purpose: ``wsss.data.images`` stays usable without Lightning.
"""
