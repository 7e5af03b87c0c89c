"""What it means for a rank that another one went away in the middle of a collective."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import torch.distributed as dist

from megagamma.environment import launcher_rank
from megagamma.errors import DistributedError

# How gloo says it, in a plain RuntimeError; NCCL and the store have exceptions of their own.
_GLOO = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")


def is_peer_failure(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone or silent, and not that this one did something wrong."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _GLOO)


@contextlib.contextmanager
def explain_peer_failure(timeout_minutes: float) -> Iterator[None]:
    """Turn the communication library's exception into one line that says what to do.

    Args:
        timeout_minutes: `run.timeout_minutes`, after which a collective gives up.

    Raises:
        DistributedError: another rank is gone or silent.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_peer_failure(error):
            raise
        lost = DistributedError(
            f"on {socket.gethostname()}: another rank ended, or gave no answer within run.timeout_minutes="
            f"{timeout_minutes:g}; rank {launcher_rank()} cannot continue without it. Look for what that rank or its host "
            "said last; the same command resumes from the newest checkpoint. The library said: "
            f"{str(error).splitlines()[0]}"
        )
        lost.on_one_rank = True
        raise lost from error
