"""A run's development, put together from what it measured itself and from its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megagamma.config.schema import NEED_TEXT
from megagamma.dynamics.measure import record
from megagamma.dynamics.rebuilt import activations_of_checkpoint, activations_of_huggingface, frequent_tokens
from megagamma.dynamics.sources import of_checkpoint, snapshot_of
from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.runs.folder import RunFolder, is_checkpoint


def records(run: RunFolder) -> list[dict[str, Any]]:
    """Lines of dynamics.jsonl and analysis.jsonl by ascending step, one a step: numbers of both, the latter's last.

    A line that is not of this form is left out.
    """
    found: dict[int, dict[str, Any]] = {}
    for line in [*run.dynamics().read(), *run.analysis().read()]:
        step, matrices = line.get("step"), line.get("matrices")
        if not isinstance(step, int) or not isinstance(matrices, dict) or not isinstance(line.get("roles"), dict):
            continue
        known = found.get(step)
        if known is None:
            found[step] = line
            continue
        for name, values in matrices.items():
            known["matrices"].setdefault(name, {}).update(values)
        for role, values in line["roles"].items():
            known["roles"].setdefault(role, {}).update(values)
        known["baselines"] = {**known.get("baselines", {}), **line.get("baselines", {})}
        if "activations" in line:
            known["activations"] = line["activations"]
        known["instruments"] = sorted({*known.get("instruments", []), *line.get("instruments", [])})
    return [found[step] for step in sorted(found)]


def missing(run: RunFolder, instruments: Sequence[str], steps: Sequence[int] | None) -> list[int]:
    """Steps of the run's checkpoints that have not been measured with all of these instruments.

    Raises:
        MegagammaError: the run has no checkpoint, or not one of a step that is asked for.
    """
    saved = run.steps()
    if not saved:
        raise MegagammaError(
            f"{run.path}: has no checkpoints to measure; --dynamics.log_spaced true measures a run as it trains"
        )
    for step in steps or ():
        if step not in saved:
            raise MegagammaError(f"{run.path}: has no checkpoint of step {step}: it has {', '.join(map(str, saved))}")
    done = {line["step"] for line in records(run) if set(instruments) <= set(line.get("instruments", []))}
    return [step for step in (steps or saved) if step not in done]


def analyze(
    run: RunFolder, instruments: Sequence[str], steps: Sequence[int] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Measure what is missing from the run's checkpoints, and append it to analysis.jsonl; yields (step, line).

    A kill loses the step at hand only. The run may still be training: its own files are not touched.

    Raises:
        MegagammaError: see `missing`; or a checkpoint is corrupt.
    """
    todo = missing(run, instruments, steps)
    frequent = frequent_tokens(run.read_config(), run.path) if todo and "embeddings" in instruments else None
    for step in todo:
        line = record(of_checkpoint(run.checkpoint(step)), instruments, frequent)
        if "activations" in instruments:
            line["activations"] = activations_of_checkpoint(run.checkpoint(step))
        run.analysis().write(line)
        yield step, line


def analyze_folder(path: Path, instruments: Sequence[str], text: RunFolder | None = None) -> dict[str, Any]:
    """A line of a checkpoint, or of a Hugging Face folder of anybody's.

    Args:
        path: the folder.
        text: the run whose held-out text `embeddings` and `activations` read; None: the one that the folder lies in.

    Raises:
        MegagammaError: it is neither, or there is no text for an instrument that needs it.
    """
    snapshot = snapshot_of(path)
    run = text or RunFolder.of_checkpoint(path)
    wanting = [name for name in NEED_TEXT if name in instruments]
    if wanting and run is None:
        raise ConfigurationError(
            f"{path}: {' and '.join(wanting)} need held-out text, and it lies in no run: give --text RUN of the same "
            "tokenizer, or leave them out of --instruments"
        )
    frequent = frequent_tokens(run.read_config(), path) if run is not None and "embeddings" in wanting else None
    line = record(snapshot, instruments, frequent)
    if "activations" in wanting and run is not None:
        if is_checkpoint(path):
            line["activations"] = activations_of_checkpoint(path, text)
        else:
            line["activations"] = activations_of_huggingface(path, run)
    return line


def turning_point(steps: Sequence[int], values: Sequence[float]) -> int | None:
    """The step of the largest value, if it lies inside: where condensation ends and expansion begins. None: no such step."""
    if len(values) < 3:
        return None
    highest = max(range(len(values)), key=values.__getitem__)
    return steps[highest] if 0 < highest < len(values) - 1 else None
