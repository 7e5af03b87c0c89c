"""Checkpoints compared as a whole.

Adam moves an element whose gradient is rounding noise by the full learning rate, up on one layout and down on another, and
which elements those are depends on the CPU. So weights are compared by norms; the moments, which are sums of gradients and
of their squares, by narrower ones.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from megagamma.checkpoint.reader import CheckpointReader


def distance(left: Path, right: Path, kind: str = "weight") -> float:
    """L2 norm of the difference over all tensors of a kind; both must hold the same ones."""
    ours, theirs = CheckpointReader(left), CheckpointReader(right)
    assert sorted(ours.names()) == sorted(theirs.names())
    return math.hypot(
        *(
            float(torch.linalg.vector_norm(ours.read(kind, name).double() - theirs.read(kind, name).double()))
            for name in ours.names()
        )
    )


def size(folder: Path, kind: str) -> float:
    """L2 norm of all tensors of a kind."""
    reader = CheckpointReader(folder)
    return math.hypot(*(float(torch.linalg.vector_norm(reader.read(kind, name).double())) for name in reader.names()))


def assert_same_training(ours: Path, theirs: Path, before: Path) -> None:
    """Two checkpoints that trainings on two layouts wrote, after the same steps from the weights of `before`."""
    update = distance(theirs, before)
    assert update > 0
    assert distance(ours, theirs) < 0.1 * update
    for kind in ("exp_avg", "exp_avg_sq"):
        assert distance(ours, theirs, kind) < 1e-4 * size(theirs, kind)
