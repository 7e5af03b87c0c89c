"""What every command does around its work. Exit codes of all commands:

| code | meaning |
|---|---|
| 0 | done |
| 1 | what was checked is not so: checkpoints differ, a task could not be scored, data is missing, a layout is unequal |
| 2 | the command line, the config, the data or the machine must be fixed: one line on standard error says what |
| 3 | stopped by the guard: a loss or gradient that is not finite, a spike, unequal results; or the last steps did nothing |
| 75 | stopped by SIGTERM, SIGINT or SIGUSR1 after saving a checkpoint: start it again to resume |
| 130 | interrupted (Ctrl-C) |
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from megagamma.environment import launcher_rank, let_waiting_threads_sleep
from megagamma.errors import ConfigurationError, MegagammaError


def _rank() -> int:
    """Rank of this process; 0 where the launcher's variables themselves are wrong."""
    try:
        return launcher_rank()
    except ConfigurationError:
        return 0


def ignore_library_warnings() -> None:
    """Without what Megatron-core and DeepSpeed warn of on import, extensions that are not there, and the deprecations that
    they cause inside torch: nothing that a user could fix."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed)\.")


def main_guard(function: Callable[[], int | None]) -> int:
    """Run a program: a user's error becomes one line on standard error and its exit code.

    Of several ranks with the same error only the first prints it; so does one that is alone with it (`on_one_rank`).

    Returns:
        The exit code: the function's (0 for None), the error's `exit_code`, or 130 after an interrupt.
    """
    let_waiting_threads_sleep()
    ignore_library_warnings()
    try:
        return function() or 0
    except MegagammaError as error:
        rank = _rank()
        if rank == 0 or error.on_one_rank:
            sys.stdout.flush()
            print(f"error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def leave(code: int) -> None:
    """End a process of a run whose exit code is not 0, at once.

    Other ranks may wait for this one in a collective, and the launcher ends them only when this process is gone, which
    threads of the communication libraries can put off for good.
    """
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def source_tree() -> Path:
    """The checkout that this package runs from, for commands that need its configs/.

    Raises:
        ConfigurationError: it does not run from one, as after an installation from a wheel.
    """
    tree = Path(__file__).resolve().parents[1]
    if not (tree / "configs" / "smoke.yaml").is_file():
        raise ConfigurationError(
            f"this command needs configs/ of the source tree, and {tree} has none: get the source and run it there"
        )
    return tree
