"""Measures a run as it trains: `dynamics.interval`, `dynamics.log_spaced`."""

from __future__ import annotations

import math
import time
from typing import Any

from torch import Tensor

from megagamma.config.schema import NEED_TEXT, DynamicsConfig
from megagamma.dynamics.activations import measure_activations, probe_batches
from megagamma.dynamics.embeddings import Signatures, signatures
from megagamma.dynamics.measure import line, measure
from megagamma.dynamics.sources import of_engine
from megagamma.errors import ConfigurationError
from megagamma.training.callbacks.base import Callback, Step


class Dynamics(Callback):
    """Writes dynamics.jsonl, and the means by role as dynamics/<role>/<number> beside a step's other numbers.

    Which steps are measured follows from the config alone, so that every rank does it alike.
    """

    def __init__(self, options: DynamicsConfig) -> None:
        self.options = options
        self._gradients: dict[str, float] = {}
        self._seconds = 0.0
        self._frequent: Signatures | None = None

    @property
    def _is_on(self) -> bool:
        return bool(self.options.interval) or self.options.log_spaced

    def is_due(self, step: int, is_last: bool = False) -> bool:
        """Whether a step is measured."""
        interval, log_spaced = self.options.interval, self.options.log_spaced
        power_of_two = step & (step - 1) == 0  # 0 too
        return bool(interval and step % interval == 0) or (log_spaced and (power_of_two or is_last))

    def begin(self) -> None:
        """Measure the untrained model; drop lines of steps that will be made again.

        Raises:
            ConfigurationError: an instrument needs what the run does not have.
        """
        if not self._is_on:
            return
        held_out = next(iter(self.session.data.validation.values()), None)
        for name in NEED_TEXT:
            if name in self.options.instruments and held_out is None:
                raise ConfigurationError(
                    f"dynamics.instruments: {name} needs held-out data, and this run has none: leave it out, or give "
                    "--validation.paths"
                )
        if "embeddings" in self.options.instruments:
            assert held_out is not None and self.config.model.vocab_size is not None
            self._frequent = signatures(held_out, self.config.model.vocab_size)
        if self.session.runtime.is_main:
            self.session.folder.dynamics().keep_until(self.session.step if self.session.step else -1)
        if self.session.step == 0 and self.is_due(0):
            self._measure(0)

    def before_update(self, step: Step) -> bool:
        """Norm of the gradient by role, before it is clipped."""
        if "motion" in self.options.instruments and self.is_due(step.number, step.is_last):
            self._gradients = self._gradient_norms()
        return True

    def after_step(self, step: Step) -> None:
        """Measure when it is due."""
        if not self.is_due(step.number, step.is_last):
            return
        roles = self._measure(step.number)
        step.values |= {f"dynamics/{role}/{key}": value for role, keys in roles.items() for key, value in keys.items()}

    def end(self) -> None:
        """Say what it cost."""
        if self._is_on:
            share = self._seconds / max(self.session.seconds + self._seconds, 1e-9)
            self.session.reporter.print(f"  dynamics took {self._seconds:.1f}s, {share:.1%} of the run")

    def _gradient_norms(self) -> dict[str, float]:
        """L2 norm of the gradient of each role's matrices together; a collective."""
        engine = self.engine
        squares: dict[str, float] = {}
        for tensor in engine.map:
            gradient = engine.state.gradient(tensor)
            if gradient is None or tensor.is_copy or not (tensor.is_split or engine.runtime.tensor_rank == 0):
                continue
            for part in tensor.parts:
                view: Tensor = part.view(gradient.view(tensor.shape))
                square = float(view.double().square().sum())
                squares[part.logical.role] = squares.get(part.logical.role, 0.0) + square
        total: dict[str, float] = {}
        for one in engine.runtime.gather_over_model(squares):
            for role, square in one.items():
                total[role] = total.get(role, 0.0) + square
        return {role: math.sqrt(square) for role, square in total.items()}

    def _measure(self, step: int) -> dict[str, dict[str, float]]:
        """Every rank measures the matrices that it owns; returns the means by role, on rank 0."""
        session, config, began = self.session, self.config, time.perf_counter()
        own = measure(of_engine(self.engine, step), self.options.instruments, self._frequent)
        activations = None
        if "activations" in self.options.instruments:
            probe = probe_batches(next(iter(session.data.validation.values())), config.parallel.pipeline)
            activations = measure_activations(self.engine, probe)
        everyone: dict[str, dict[str, Any]] = {}
        for one in session.runtime.gather(own):
            everyone |= one
        seconds = time.perf_counter() - began
        self._seconds += seconds
        if not session.runtime.is_main:
            return {}
        found = line(step, self.options.instruments, everyone, seconds, activations, self._frequent)
        for role, norm in self._gradients.items():
            found["roles"].setdefault(role, {})["gradient_norm"] = norm
        self._gradients = {}
        session.folder.dynamics().write({**found, "tokens": session.consumed * config.data.sequence_length})
        roles: dict[str, dict[str, float]] = found["roles"]
        return roles
