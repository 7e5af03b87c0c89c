"""What every command does around its work. Exit codes of all commands:

| code | meaning |
|---|---|
| 0 | done |
| 1 | what was checked is not so: checkpoints differ or are false, a score fails, data is missing, a layout is unequal |
| 2 | the command line, the config, the data or the machine must be fixed: one line on standard error says what |
| 3 | stopped by the guard: a loss or gradient that is not finite, a spike, unequal results; or the last steps did nothing |
| 70 | a failure that was not foreseen: one line names the file of its report |
| 75 | stopped by a signal (TERM, INT, USR1, HUP, XCPU) after saving, or points are left to others: start it again to resume |
| 93 | a supervisor gave up: failures without progress, or too many; fix the cause before it is started again |
| 130 | interrupted (Ctrl-C) |
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from megagamma.crash import without_secrets, write_report
from megagamma.environment import launcher_rank, let_waiting_threads_sleep
from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.files import advice

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h

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


class _Console(io.RawIOBase):
    """A standard stream that drops what cannot be written: its reader is gone, the disk under it full, the terminal closed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data) -> int:  # type: ignore[no-untyped-def,override]
        with contextlib.suppress(OSError):
            return os.write(self._descriptor, data)
        return len(data)


def keep_console(*names: str) -> None:
    """From here on no text that this process writes on its console can stop it, or change its exit code.

    Args:
        names: "stdout", "stderr" or both. A stream that was put in their place, as by a test or a notebook, is left.
    """
    for name in names:
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
        with contextlib.suppress(OSError, ValueError):
            raw = _Console(stream.fileno())
            # A character that the terminal's encoding lacks is no reason to stop either.
            console = io.TextIOWrapper(
                io.BufferedWriter(raw), stream.encoding, "backslashreplace",
                line_buffering=stream.line_buffering, write_through=stream.write_through,
            )  # fmt: skip
            setattr(sys, name, console)


def open_standard_streams() -> None:
    """Open /dev/null in place of a standard stream that this process was started without, as by `>&-`.

    Else the next file that is opened gets its number, and what libraries print there is written into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            if null != number:
                os.close(null)
        if getattr(sys, name) is None:
            stream = open(number, "r" if name == "stdin" else "w", closefd=False)  # noqa: SIM115 - for the process
            setattr(sys, name, stream)


def main_guard(function: Callable[[], int | None]) -> int:
    """Run a program: a user's error becomes one line on standard error and its exit code.

    Of several ranks with the same error only the first prints it; so does one that is alone with it (`on_one_rank`).

    Returns:
        The exit code: the function's (0 for None), the error's `exit_code`, 130 after an interrupt, or 70 for what was not
        foreseen, whose report is in a file. MEGAGAMMA_DEBUG=1 prints the traceback too.
    """
    open_standard_streams()
    keep_console("stderr")
    let_waiting_threads_sleep()
    ignore_library_warnings()
    try:
        code = function() or 0
        sys.stdout.flush()  # here, and not at exit, where a reader that is gone would be an error
        return code
    except MegagammaError as error:
        rank = _rank()
        if rank == 0 or error.on_one_rank:
            _print_error(rank, str(error))
        return error.exit_code
    except ModuleNotFoundError as error:
        if not is_an_extra(error.name):
            return _unforeseen(error)
        _print_error(
            0, f"{error.name} is not installed: pip install 'megagamma[train]', or 'megagamma[eval]' for benchmarks too"
        )
        return 2
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


def is_an_extra(module: str | None) -> bool:
    """Whether a module that is missing belongs to the extras, without which only `megagamma.initialize` works."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = [
            line for line in requires("megagamma") or [] if "extra ==" in line and "test" not in line.split(";")[1]
        ]
    except PackageNotFoundError:
        return False
    names = {re.split(r"[\[<>=!~; ]", line)[0].replace("-", "_").lower() for line in lines}
    root = (module or "").split(".")[0].lower()
    return {"yaml": "pyyaml", "megatron": "megatron_core"}.get(root, root) in names


def one_line(text: str) -> str:
    """A message on one line, however long and with whatever characters a value in it has."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(text.split("\n")))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def _print_error(rank: int, text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(f"error: {f'rank {rank}: ' if rank else ''}{one_line(text)}", file=sys.stderr, flush=True)


def _say(error: BaseException, text: str, code: int) -> int:
    """Print the line of an error that this rank alone may have; returns the exit code."""
    if os.environ.get("MEGAGAMMA_DEBUG") == "1":
        traceback.print_exception(error)
    _print_error(_rank(), text)
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
        with contextlib.suppress(OSError):
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
