"""What every command-line program of the project does around its work."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

from megagamma.environment import launcher_rank, let_waiting_threads_sleep
from megagamma.errors import ConfigurationError, MegagammaError


def _rank() -> int:
    """Rank of this process; 0 where the launcher's variables themselves are wrong."""
    try:
        return launcher_rank()
    except ConfigurationError:
        return 0


def main_guard(function: Callable[[], int | None]) -> int:
    """Run a program: a user's error becomes one line on standard error and its exit code.

    Of several ranks that meet the same error only the first speaks; one that is alone with it (`on_one_rank`) does.

    Returns:
        The exit code: the function's (0 for None), the error's `exit_code`, or 130 after an interrupt.
    """
    let_waiting_threads_sleep()
    # What Megatron-core and DeepSpeed say on import about extensions that are not there, and the deprecations that
    # they cause inside torch: nothing that a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed)\.")
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
