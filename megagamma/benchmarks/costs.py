"""What ours costs by size, without a contender: tokens per second and memory; and memory beside the peer's and the plan's."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from megagamma.benchmarks.contenders import Contender
from megagamma.benchmarks.training import COMMON, our_step, peer_step, shape_arguments

_MIB = 2**20
_TOKENS = 2048  # of a step, over sequence length


def _points(shape: str, presets: Sequence[str]) -> Iterator[tuple[str, str, int, list[str]]]:
    """(curve, label, ranks, options) of every point."""

    def options(length: int, samples: int, micro: int) -> list[str]:
        return [
            f"--data.sequence_length={length}", f"--data.global_batch_size={samples}", f"--data.micro_batch_size={micro}"
        ]  # fmt: skip

    for name in presets:
        yield "parameters", name, 1, [*shape_arguments(name), *options(256, 4, 4)]
    base = shape_arguments(shape)
    for length in (128, 256, 512, 1024, 2048):
        yield "sequence length", str(length), 1, [*base, *options(length, _TOKENS // length, _TOKENS // length)]
    for micro in (1, 2, 4, 8):
        yield "micro-batch", str(micro), 1, [*base, *options(256, 8, micro)]
    for ranks in (1, 2):
        yield "ranks", str(ranks), ranks, [*base, *options(256, 4 * ranks, 4), "--run.threads=1"]


def measure_curves(
    shape: str, presets: Sequence[str], steps: int, last_only: bool = False, extra: Sequence[str] = ()
) -> dict[str, Any]:
    """Tokens per second and peak resident memory of ours over parameters, sequence length, micro-batch and ranks.

    Args:
        shape: of all curves but the first, see `shape_arguments`.
        presets: shapes of the first.
        steps: measured at each point, one point after the other.
        last_only: the last point of each curve alone.
        extra: further options of ours.

    Returns:
        By curve its points: label, parameters, tokens of a step, median of tokens per second, peak of a process.
    """
    curves: dict[str, list[Any]] = {}
    for curve, *point in _points(shape, presets):
        curves.setdefault(curve, []).append(point)
    found: dict[str, Any] = {}
    for curve, points in curves.items():
        for label, ranks, arguments in points[-1:] if last_only else points:
            contender = Contender(
                f"{curve} {label}", our_step, [*arguments, *extra], ranks=ranks, sleeping_threads=True
            )
            seconds = statistics.median(contender.run(steps))
            contender.close()
            facts = contender.facts
            found.setdefault(curve, []).append({
                "at": label, "parameters": facts["parameters"], "tokens": facts["tokens"],
                "tokens_per_second": facts["tokens"] / seconds, "peak_mib": facts["peak_bytes"] / _MIB,
            })  # fmt: skip
    return {"shape": shape, "curves": found}


def measure_memory(shape: str, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Peak resident memory of three steps in fp32, beyond what was resident before the model was built. Unit: MiB.

    Args:
        shape: see `shape_arguments`.
        extra: options of ours alone.

    Returns:
        Of ours, of the peer (eager), and what `megagamma.planning.memory` plans for ours.
    """
    from megagamma.config.io import parse_config
    from megagamma.planning.memory import plan

    arguments = [*shape_arguments(shape), "--precision.dtype=fp32"]
    config = parse_config([*COMMON, "--run.device=cpu", *arguments, *extra])
    worst = plan(config, 1).worst
    found: dict[str, Any] = {
        "shape": shape,
        "tokens": config.data.micro_batch_size * config.data.sequence_length,
        "planned_mib": (worst.device_bytes - worst.overhead_bytes) / _MIB,
    }
    for contender in (
        Contender("ours", our_step, [*arguments, *extra], sleeping_threads=True),
        Contender("peer", peer_step, arguments, False, False),
    ):
        contender.close()
        facts = contender.facts
        found[f"{contender.name}_mib"] = (facts["peak_bytes"] - facts["before_bytes"]) / _MIB
    return found
