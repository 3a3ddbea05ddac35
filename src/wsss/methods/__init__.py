"""One readable file per method; see ``wsss.methods.base`` for the interface."""
