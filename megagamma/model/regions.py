"""What lies between a model's matrix products: torch's own kernels, or compiled into one kernel each way.

Only these regions are compiled. Around them the layers, the parallel linear layers, DeepSpeed's hooks and recomputation stay
as they are, and one compiled region serves all layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_compiled = False


def compile_regions(on: bool) -> None:
    """Choose for this process whether regions are compiled, each when it is first called."""
    global _compiled
    _compiled = on


def are_compiled() -> bool:
    """What `compile_regions` chose last."""
    return _compiled


class Region:
    """A function of tensors in two forms that differ in rounding only."""

    def __init__(self, eager: Callable[..., Any], formula: Callable[..., Any]) -> None:
        """Args: eager: for torch as it is; formula: what the compiler is given, derivative included."""
        self.eager, self.formula = eager, formula

    def __call__(self, *arguments: Any) -> Any:
        # Without gradients, lengths change from call to call, and each would be compiled anew.
        if not (_compiled and torch.is_grad_enabled()):
            return self.eager(*arguments)
        return self.kernel(*arguments)

    @functools.cached_property
    def kernel(self) -> Callable[..., Any]:
        """The formula, compiled for each set of shapes when it is first called with them."""
        compiled: Callable[..., Any] = torch.compile(self.formula, dynamic=False)
        return compiled
