"""Any layout, one result: the same seed and config on many layouts, compared with one process.

Each layout really runs, on processes of this machine: its initial weights by hash, then the loss and gradient norm of
some steps.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from megagamma.reporting.tables import markdown_table
from megagamma.testing.ranks import RankPool


@dataclass(frozen=True)
class Layout:
    """A way to lay a model over ranks."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 0
    sequence: bool = False
    virtual: int = 1
    extra: tuple[str, ...] = ()
    """Further flags, such as a recomputation, which must not change the result either."""

    @property
    def world(self) -> int:
        """Processes."""
        return self.tensor * self.pipeline * self.data

    def flags(self) -> list[str]:
        """The layout on the command line."""
        found = [
            *("--parallel.tensor", str(self.tensor), "--parallel.pipeline", str(self.pipeline)),
            *("--deepspeed_config", f"configs/deepspeed/zero{self.zero}.json", *self.extra),
        ]
        if self.sequence:
            found += ["--parallel.sequence", "true"]
        if self.virtual > 1:
            found += ["--parallel.virtual_pipeline", str(self.virtual)]
        return found

    def __str__(self) -> str:
        name = f"TP{self.tensor} PP{self.pipeline} DP{self.data} ZeRO{self.zero}"
        name += " SP" if self.sequence else ""
        name += f" VP{self.virtual}" if self.virtual > 1 else ""
        return f"{name} {' '.join(self.extra)}".strip()


def all_layouts(worlds: tuple[int, ...] = (1, 2, 4)) -> list[Layout]:
    """Every legal combination of tensor {1, 2, 4}, pipeline {1, 2}, data {1, 2, 4} and ZeRO 0 to 3 for those numbers of
    processes, and with sequence parallelism and virtual stages where they apply."""
    found = []
    for world in worlds:
        for tensor in (1, 2, 4):
            for pipeline in (1, 2):
                if world % (tensor * pipeline):
                    continue
                data = world // (tensor * pipeline)
                for zero in (0, 1) if pipeline > 1 else (0, 1, 2, 3):
                    found.append(Layout(tensor, pipeline, data, zero))
                if tensor > 1:
                    found.append(Layout(tensor, pipeline, data, 1, sequence=True))
                if pipeline > 1:
                    found.append(Layout(tensor, pipeline, data, 1, virtual=2))
    return found


@dataclass
class Trace:
    """What a run on a layout gave."""

    weights: dict[str, str]
    """Hash of each whole initial matrix, by logical name."""
    losses: list[float]
    norms: list[float]


def trace(arguments: list[str], steps: int) -> Trace:
    """Build, fill and train on this rank of a pool; the weights are hashed before the first step."""
    from megagamma.checkpoint.saver import whole_tensors
    from megagamma.config.io import parse_config
    from megagamma.data.contracts import rank_microbatches
    from megagamma.data.sources import open_data
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import world_from_environment
    from megagamma.training.assembly import fresh_engine

    world = world_from_environment()
    config = parse_config(arguments, world_size=world.size)
    runtime = Runtime(config, world)
    data = open_data(config)
    config.model.vocab_size = data.vocab_size
    engine = fresh_engine(config, runtime)
    mine = {
        name: hashlib.sha256(values.numpy().tobytes()).hexdigest()
        for kind, name, values in whole_tensors(engine, ("weight",))
    }
    weights = {name: digest for one in runtime.gather(mine) for name, digest in one.items()}
    size, micro = config.data.global_batch_size, config.data.micro_batch_size
    losses, norms = [], []
    for step in range(steps):
        engine.set_learning_rate(config.optimizer.lr)
        batches = rank_microbatches(data.train, step * size, size, micro, runtime.data_rank, runtime.data_size)
        losses.append(engine.forward_backward(batches))
        engine.step()
        norms.append(engine.grad_norm)
    engine.close()
    return Trace(weights, losses, norms)


def compare(found: Trace, reference: Trace) -> dict[str, Any]:
    """Whether the initial weights are equal to the bit, and the largest relative differences over the steps."""
    return {
        "weights equal": found.weights == reference.weights,
        "loss": max(abs(a - b) / b for a, b in zip(found.losses, reference.losses, strict=True)),
        "norm": max(abs(a - b) / b for a, b in zip(found.norms, reference.norms, strict=True)),
    }


def equality_table(rows: list[tuple[str, str, dict[str, Any]]]) -> str:
    """Markdown table of (variant, layout, comparison)."""
    columns = ("model", "layout", "initial weights", "loss, largest relative difference", "gradient norm, the same")
    weights = {True: "equal to the bit", False: "DIFFERENT"}
    return markdown_table(
        columns,
        [
            (variant, layout, weights[row["weights equal"]], f"{row['loss']:.1e}", f"{row['norm']:.1e}")
            for variant, layout, row in rows
        ],
    )


class Pools:
    """Pools of ranks by size, started when first needed."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def of(self, size: int) -> RankPool:
        """The pool of that many ranks; others are closed, to leave the machine to it."""
        if size not in self._pools:
            self.close()
            self._pools[size] = RankPool(size)
        return self._pools[size]

    def close(self) -> None:
        """End all processes."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
