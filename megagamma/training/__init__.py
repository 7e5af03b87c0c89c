"""The loop, which knows when, and its callbacks, which know what."""
