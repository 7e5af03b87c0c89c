"""Are a run's checkpoints what they say: the seed's draw at step 0, and then one after the other?

Published suites of checkpoints had steps that were copies of others, starts of another seed, and wrong revisions; all of
that shows in the weights themselves.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from megagamma.checkpoint.manifest import stored_config
from megagamma.checkpoint.reader import CheckpointReader
from megagamma.config.resolve import resolve
from megagamma.dynamics.sources import drawn_of, of_huggingface, true_parameters
from megagamma.errors import MegagammaError
from megagamma.model.parameters import LogicalParameter
from megagamma.runs.folder import RunFolder


@dataclass
class Lineage:
    """What was found."""

    shown: list[str] = field(default_factory=list)
    """What holds."""
    problems: list[str] = field(default_factory=list)
    not_shown: list[str] = field(default_factory=list)
    """What cannot be told, and why."""


def _read(reader: CheckpointReader, parameter: LogicalParameter) -> torch.Tensor:
    return reader.read("weight", parameter.name)[: parameter.shape[0]]


def _check_start(reader: CheckpointReader, found: Lineage) -> None:
    """Step 0 is the seed's draw to the bit; of a run in bf16, rounded to it once."""
    config = resolve(stored_config(reader.folder, reader.manifest))
    if "imported_from" in reader.manifest:
        found.not_shown.append("step 0 is an imported model: how it was drawn is not known")
        return
    drawn, rounded = drawn_of(config), True
    for parameter in true_parameters(config):
        expected, weight = drawn.redraw(parameter), _read(reader, parameter)
        if not torch.equal(weight, expected):
            rounded = rounded and torch.equal(weight, expected.bfloat16().float())
            if not rounded:
                largest = float((weight - expected).abs().max()) / drawn_scale(expected)
                found.problems.append(
                    f"step 0: {parameter.name} is not the draw of run.seed={config.run.seed}: it differs by up to "
                    f"{largest:.3g} of its rms: another seed, another init, or weights of a later step"
                )
                return
    found.shown.append(f"step 0 is the draw of run.seed={config.run.seed}, to the bit")


def drawn_scale(values: torch.Tensor) -> float:
    """Root mean square, or 1 where all are 0."""
    return float(values.square().mean().sqrt()) or 1.0


def _check_counters(readers: list[CheckpointReader], found: Lineage) -> None:
    for reader in readers:
        named = int(reader.folder.name.removeprefix("step_"))
        if reader.manifest["step"] != named:
            found.problems.append(f"{reader.folder.name}: its content says step {reader.manifest['step']}")
    for first, second in itertools.pairwise(readers):
        for key in ("adam_step", "consumed_samples"):
            if second.manifest[key] < first.manifest[key]:
                found.problems.append(
                    f"{second.folder.name}: {key}={second.manifest[key]}, and {first.folder.name} has {first.manifest[key]} "
                    "already"
                )


def _check_copies(readers: list[CheckpointReader], found: Lineage) -> None:
    """No two steps share a file's content, nor a matrix: a training step changes every one."""
    seen: dict[str, str] = {}
    for reader in readers:
        for entry in reader.manifest["files"]:
            if entry["kind"] == "weight" or reader.manifest["step"] > 0:
                other = seen.setdefault(entry["xxh3_128"], reader.folder.name)
                if other != reader.folder.name:
                    found.problems.append(f"{reader.folder.name} and {other} share the content of {entry['file']}")


def _distances(readers: list[CheckpointReader], parameters: Iterable[LogicalParameter]) -> dict[tuple[int, int], float]:
    """Distance of the weights of each step to the two after it, over all matrices; three matrices in memory at a time."""
    squares: dict[tuple[int, int], float] = {}
    for parameter in parameters:
        before: deque[torch.Tensor] = deque(maxlen=2)
        for second, reader in enumerate(readers):
            values = _read(reader, parameter).double()
            for back, other in enumerate(reversed(before), 1):
                pair = (second - back, second)
                squares[pair] = squares.get(pair, 0.0) + float((values - other).square().sum())
            before.append(values)
            reader.close_files()
    return {pair: math.sqrt(square) for pair, square in squares.items()}


def _check_order(readers: list[CheckpointReader], found: Lineage) -> None:
    """A step's nearest step is the one before it or after it."""
    if len(readers) < 3:
        found.not_shown.append(f"the order of steps: {len(readers)} checkpoints are too few")
        return
    config = resolve(stored_config(readers[-1].folder, readers[-1].manifest))
    distances = _distances(readers, true_parameters(config))

    def distance(one: int, two: int) -> float:
        return distances.get((min(one, two), max(one, two)), math.inf)

    wrong = []
    for index, reader in enumerate(readers):
        near = min(distance(index, index - 1), distance(index, index + 1))
        if near == 0.0:
            wrong.append(f"{reader.folder.name} has the weights of a step beside it")
        for other in (index - 2, index + 2):
            if 0 <= other < len(readers) and distance(index, other) < near:
                wrong.append(
                    f"{reader.folder.name} is nearer to {readers[other].folder.name} ({distance(index, other):.4g}) than to "
                    f"the steps beside it ({near:.4g}): steps are swapped"
                )
    found.problems += wrong
    if not wrong:
        found.shown.append(f"{len(readers)} steps are all different, and each is nearest to the one before or after it")


def _check_moments(readers: list[CheckpointReader], found: Lineage) -> None:
    """Second moments are finite and not negative, and there are some when Adam has stepped; one tensor in memory at a time."""
    for reader in readers:
        if "exp_avg_sq" not in reader.kinds:
            continue
        has_moved = False
        for name in reader.names():
            second = reader.read("exp_avg_sq", name)
            has_moved = has_moved or bool(second.any())
            if bool((second < 0).any()) or not bool(torch.isfinite(second).all()):
                found.problems.append(f"{reader.folder.name}: the second moment of {name} is negative or not finite")
                break
        if (reader.manifest["adam_step"] > 0) != has_moved:
            found.problems.append(
                f"{reader.folder.name}: adam_step={reader.manifest['adam_step']}, and its moments are "
                f"{'not zero' if has_moved else 'all zero'}"
            )
        reader.close_files()


def _check_exports(run: RunFolder, readers: list[CheckpointReader], found: Lineage) -> None:
    """Exported folders hold the weights of the step that they are named for, rounded to their dtype."""
    by_step = {reader.manifest["step"]: reader for reader in readers}
    for step in sorted(by_step):
        folder = run.export(step)
        if not (folder / "config.json").is_file():
            continue
        exported = of_huggingface(folder)
        if exported.step != step:
            found.problems.append(f"{folder}: its config.json says step {exported.step}")
        for parameter, state in exported.states():
            weight, other = by_step[step].read("weight", parameter.name)[: parameter.shape[0]], state["weight"]
            if parameter.role != "norm" and not any(
                torch.equal(weight.to(kind).float(), other) for kind in (torch.float32, torch.bfloat16, torch.float16)
            ):
                found.problems.append(f"{folder}: {parameter.name} is not that of step {step}")
                break
        else:
            found.shown.append(f"{folder.name} in {folder.parent.name}/ holds the weights of step {step}")


def lineage(run: RunFolder) -> Lineage:
    """Examine every checkpoint of a run, and its exported models.

    Raises:
        MegagammaError: it has no checkpoint, or one cannot be read.
    """
    steps = run.steps()
    if not steps:
        raise MegagammaError(f"{run.path}: has no checkpoints: there is nothing to examine")
    readers = [CheckpointReader(run.checkpoint(step)) for step in steps]
    found = Lineage()
    if steps[0] == 0:
        _check_start(readers[0], found)
    else:
        found.not_shown.append(
            "step 0 was not saved (--checkpoint.save_initial true): the start is not known to be the seed's"
        )
    _check_counters(readers, found)
    _check_copies(readers, found)
    _check_moments(readers, found)
    _check_order(readers, found)
    _check_exports(run, readers, found)
    return found
