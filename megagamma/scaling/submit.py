"""A sweep as SLURM jobs."""

from __future__ import annotations

import argparse

from megagamma.scaling.folder import SweepFolder
from megagamma.scaling.points import Point
from megagamma.scaling.spec import Sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `submit`."""


def cancel_jobs(folder: SweepFolder) -> list[str]:
    """Cancel the sweep's jobs; returns their numbers."""
    return []


def submit_sweep(args: argparse.Namespace, sweep: Sweep, folder: SweepFolder, points: list[Point]) -> int:
    """Submit what is missing."""
    raise NotImplementedError
