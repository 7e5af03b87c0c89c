"""What is written into points' folders before they run, and what is noticed of those that ran before."""

from __future__ import annotations

from collections.abc import Callable

from megagamma.config.resolve import planned_dtype
from megagamma.config.rules import data_parallel_size
from megagamma.config.schema import Config
from megagamma.runs.folder import RunFolder
from megagamma.runs.provenance import source_commit
from megagamma.scaling.collect import machine_warnings
from megagamma.scaling.folder import FINAL, PointState, SweepFolder
from megagamma.scaling.points import Point

# A point of fewer FLOPs takes seconds, in which compiling cannot pay. Unit: FLOPs.
_SHORT_FLOPS = 6e11
_SAFE = {"dtype": "fp32", "compile": "off"}
Choose = Callable[[Config, int], dict[str, str]]


def notice_other_code(
    states: list[PointState], strict_code: bool, code: str, say: Callable[[str], None]
) -> list[PointState]:
    """Report points that another version of the code, or another kind of machine, finished or began.

    Returns:
        Those of another version, where they are to be run again.
    """
    for warning in machine_warnings(states):
        say(f"WARNING {warning}")
    others = [
        state
        for state in states
        if (state.status in FINAL or RunFolder(state.folder).steps())
        and state.status not in ("running", "queued")
        and set(state.codes) != {code}
    ]
    if not others:
        return []
    what = (
        "they are run again (--strict_code)"
        if strict_code
        else "they are kept, and unfinished ones go on; --strict_code runs them again"
    )
    say(
        f"WARNING {len(others)} points were trained, in whole or in part, by another version of the code "
        f"({others[0].point.name}, ...): {what}"
    )
    return others if strict_code else []


def register(
    folder: SweepFolder, states: list[PointState], code: str, on_cpus: bool, choose: Choose | None = None
) -> None:
    """Write what the points that will run are into their folders.

    Args:
        on_cpus: all run on CPUs: decide here, once, what `auto` is for their dtype and for compiling. Where points have begun
            without that, the others are left as open as those were.
        choose: says what is faster here for a config and its ranks; None: this machine is not like those that will run them,
            so that it is fp32 without compiling, which every machine can.
    """
    commit = source_commit()
    todo = [state for state in states if not state.is_final and state.status not in ("running", "queued")]
    if todo and on_cpus and not folder.choices and not any(state.attempts for state in states):
        folder.choose(_SAFE if choose is None else _choices([state.point for state in states], choose))
    for state in todo:
        folder.register(state, code, commit, folder.choices if on_cpus else {})


def _choices(points: list[Point], choose: Choose) -> dict[str, str]:
    """For all points alike: arms of a study must not differ in it. The largest says what is faster."""

    def planned(point: Point) -> str:
        replicas = data_parallel_size(point.config, point.launch.processes)
        return planned_dtype(point.config, replicas, "cpu")

    open_ones = [point for point in points if point.config.precision.dtype == "auto"]
    largest = max(open_ones or points, key=lambda point: point.flops)
    config = largest.sized
    if any(planned(point) == "fp32" for point in open_ones):
        config.precision.dtype = "fp32"  # one cannot, or should not, be bf16: none is
    if largest.flops < _SHORT_FLOPS and config.precision.dtype != "auto":
        return _SAFE  # what would be found, without loading torch
    return choose(config, largest.launch.processes)
