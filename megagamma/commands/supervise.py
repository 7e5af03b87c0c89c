"""Run a training command and look after it: restarts, signals, hangs, requeues. What the batch scripts of launch/ start.

    megagamma supervise -- torchrun --nproc-per-node 2 megagamma/pretrain.py --config my.yaml
    megagamma supervise --hang_minutes 5 -- srun --output={logs}/rank-%t.log python megagamma/pretrain.py --config my.yaml

A run that crashes, hangs or loses a rank is started again and resumes from its newest checkpoint, until there are
--max_failures failures, or two in a row without a newer checkpoint. SIGUSR1 (preemption, or the time limit ahead) saves
and requeues the SLURM job, or without SLURM starts again; SIGTERM saves and leaves. Attempts are in RUN/attempts.jsonl,
what each rank printed is in RUN/logs/attempt-N/. Exit codes: 0; 2 and 3 of the run; 75 when it was stopped; 93 when it
came no further.
"""

from __future__ import annotations

import argparse
import itertools
import signal
from collections.abc import Sequence
from pathlib import Path

from megagamma.environment import slurm_job
from megagamma.errors import ConfigurationError
from megagamma.launching.supervisor import Rules, StopRequests, Supervisor
from megagamma.runs.folder import RunFolder


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megagamma supervise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--folder RUN] [--max_failures N] [--hang_minutes M] -- COMMAND ...",
    )  # fmt: skip
    rules = Rules()
    parser.add_argument("--folder", type=Path, help="folder of the run (default: run.folder of the COMMAND's options)")
    parser.add_argument(
        "--max_failures", type=int, default=rules.max_failures,
        help="failures after which the run is not started again; preemptions do not count (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--hang_minutes", type=float, default=rules.hang_minutes,
        help="without a step, an event or a byte of a checkpoint, after which the ranks' stacks are written, the silent "
        "ones named, and the run is killed and started again; 0: never (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--preempted", action="store_true", help="SIGUSR1 came before this process was there, as batch scripts report"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="what to start")
    return parser


def run_folder_of(command: Sequence[str]) -> Path:
    """The run's folder that a training command means.

    Raises:
        ConfigurationError: the command is no training, or its options are wrong.
    """
    programs = [i for i, word in enumerate(command) if Path(word).name in ("pretrain.py", "pretrain")]
    if not programs:
        raise ConfigurationError("--folder: the COMMAND is not megagamma/pretrain.py: give the folder of its run")
    arguments = list(command[programs[0] + 1 :])
    given = [after for word, after in itertools.pairwise(arguments) if word == "--run.folder"]
    if given and "{" not in given[-1]:
        return Path(
            given[-1]
        )  # so that a host needs no more than the standard library where training is in a container
    from megagamma.config.io import build_parser as options
    from megagamma.config.io import parse_namespace, to_config
    from megagamma.config.resolve import resolve

    return Path(resolve(to_config(parse_namespace(options("pretrain"), arguments))).run.folder)


def main(arguments: list[str] | None = None) -> int:
    """Supervise; returns the exit code."""
    args = build_parser().parse_args(arguments)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise ConfigurationError("COMMAND: is missing: give what to start after --")
    if args.max_failures < 1:
        raise ConfigurationError(f"--max_failures={args.max_failures}: must be 1 or more")
    if args.hang_minutes < 0:
        raise ConfigurationError(f"--hang_minutes={args.hang_minutes:g}: must be 0 (never) or more")
    requests = StopRequests()
    if args.preempted:
        requests.received.append(signal.SIGUSR1)
    try:
        folder = RunFolder(args.folder or run_folder_of(command))
        return Supervisor(folder, command, Rules(args.max_failures, args.hang_minutes), requests, slurm_job()).run()
    finally:
        requests.restore()
