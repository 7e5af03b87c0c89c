"""Checkpoints by logical name: writing, reading and looking at them."""
