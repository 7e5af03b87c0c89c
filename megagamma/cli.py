"""What every command does around its work. Exit codes of all commands:

| code | meaning |
|---|---|
| 0 | done |
| 1 | what was checked is not so: checkpoints differ, a task could not be scored, data is missing, a layout is unequal |
| 2 | the command line, the config, the data or the machine must be fixed: one line on standard error says what |
| 3 | stopped by the guard: a loss or gradient that is not finite, or a spike, under the policy `stop` |
| 70 | a failure that was not foreseen: one line names the file of its report |
| 75 | stopped by SIGTERM, SIGINT or SIGUSR1 after saving a checkpoint: start it again to resume |
| 130 | interrupted (Ctrl-C) |
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from megagamma.crash import without_secrets, write_report
from megagamma.environment import launcher_rank, let_waiting_threads_sleep
from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.files import advice

_LONGEST = 4000  # of a message; unit: characters
_RESOURCES = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EROFS)


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
        The exit code: the function's (0 for None), the error's `exit_code`, 130 after an interrupt, or 70 for what was not
        foreseen, whose report is in a file. MEGAGAMMA_DEBUG=1 prints the traceback too.
    """
    let_waiting_threads_sleep()
    ignore_library_warnings()
    try:
        return function() or 0
    except MegagammaError as error:
        rank = _rank()
        if rank == 0 or error.on_one_rank:
            sys.stdout.flush()
            print(f"error: {f'rank {rank}: ' if rank else ''}{one_line(str(error))}", file=sys.stderr, flush=True)
        return error.exit_code
    except (MemoryError, RecursionError) as error:
        return _say(error, _out_of_space(error), 2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the last one that could say what it is
        return _unforeseen(error)


def one_line(text: str) -> str:
    """A message on one line, however long and with whatever characters a value in it has."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(text.split("\n")))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def _say(error: BaseException, text: str, code: int) -> int:
    """Print the line of an error that this rank alone may have; returns the exit code."""
    if os.environ.get("MEGAGAMMA_DEBUG") == "1":
        traceback.print_exception(error)
    rank = _rank()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(f"error: {f'rank {rank}: ' if rank else ''}{one_line(text)}", file=sys.stderr, flush=True)
    return code


def _out_of_space(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "the input is nested too deep: make it flatter (MEGAGAMMA_DEBUG=1 shows where)"
    return (
        f"out of memory ({str(error)[:200] or 'of the host'}): use a smaller model or batch (data.micro_batch_size), "
        "model.recompute, more ranks, or a machine with more memory"
    )


def _unforeseen(error: Exception) -> int:
    """One line for a failure that nobody foresaw; but a disk or memory that is full is a user's to fix."""
    text = str(error)
    # torch's own, which cannot be imported here.
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in text:
        return _say(error, _out_of_space(error), 2)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _RESOURCES):
        name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
        return _say(error, f"{name}{error.strerror or error}: {advice(error)}", 2)
    path = write_report(error, _rank())
    where = (
        f"the report is {path}" if path else "its report could not be written: MEGAGAMMA_DEBUG=1 shows the traceback"
    )
    text = without_secrets(text)
    return _say(error, f"not foreseen: {type(error).__name__}: {text[:400]}: {where}", 70)


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
