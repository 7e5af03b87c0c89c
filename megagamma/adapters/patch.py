"""A hook that draws every Megatron-core model as it is built."""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

from torch import nn

from megagamma.adapters.initialize import checked_options, initialize
from megagamma.adapters.report import Report
from megagamma.errors import InitializationError

_NOT_OF_THE_RULE = ("roles", "hidden_size", "num_layers")


class patched_initialization:
    """Within its block every Megatron-core GPTModel is drawn as soon as it is built, however deep inside other code.

        with megagamma.patched_initialization(gamma=1.0, seed=1234) as drawn:
            model = get_model(model_provider, ModelType.encoder_or_decoder)
        print(drawn.reports[0])

    A model that was built before stays as it is. After the block nothing of the patch is left.
    """

    _active = False

    def __init__(self, gamma: float = 1.0, seed: int = 1234, **options: Any) -> None:
        """Args: those of `megagamma.initialize`.

        Raises:
            ConfigurationError, InitializationError: an option that cannot be.
        """
        for name in ("dry_run", "optimizer"):
            if name in options:
                raise InitializationError(f"{name}: has no meaning here: a model that is just built has no optimizer")
        checked_options(seed, gamma=gamma, **{k: v for k, v in options.items() if k not in _NOT_OF_THE_RULE})
        self._options = {"gamma": gamma, "seed": seed, **options}
        self.reports: list[Report] = []
        """One per model, in the order in which they were built; of this rank."""

    def __enter__(self) -> patched_initialization:
        from megatron.core.models.gpt import GPTModel

        if patched_initialization._active:
            raise InitializationError("patched_initialization: is active already: leave the other block first")
        build = GPTModel.__init__

        @functools.wraps(build)
        def build_and_draw(model: nn.Module, *args: Any, **kwargs: Any) -> None:
            build(model, *args, **kwargs)
            self.reports.append(initialize(model, **self._options))

        self._restore = functools.partial(setattr, GPTModel, "__init__", build)
        GPTModel.__init__ = build_and_draw
        patched_initialization._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        patched_initialization._active = False
