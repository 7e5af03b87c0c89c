"""The pool of ranks that tests run on."""

from megagamma.testing.ranks import RankPool, free_port

__all__ = ["RankPool", "free_port"]
