"""The pool of ranks that tests run on."""

from megagamma.testing.ranks import RankError, RankPool, free_port

__all__ = ["RankError", "RankPool", "free_port"]
