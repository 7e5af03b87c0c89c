"""megagamma/pretrain.py with one fault in it: a rank that crashes, hangs or runs out of something at a step.

    MEGAGAMMA_FAULTS='{"1": ["segfault", RANK, STEP], ...}' python faulty_rank.py megagamma/pretrain.py OPTIONS...

By attempt; "all" for every attempt. The rest of the run is the real one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any


def attempt() -> str:
    """Number of this attempt, from the name of its folder of logs."""
    return os.environ.get("MEGAGAMMA_LOGS", "-1").rpartition("-")[2]


def act(kind: str, trainer: Any) -> None:
    """Do what the fault is, without a core file."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if kind == "segfault":
        import ctypes

        ctypes.string_at(0)
    elif kind == "abort":
        os.abort()
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "sleep":
        time.sleep(10**6)
    elif kind == "error":
        raise RuntimeError("a fault of a test")
    elif kind == "memory":
        import torch

        torch.empty(1 << 50)  # more than the machine can address: refused, nothing is used up
    elif kind == "nan":
        engine = trainer.session.engine
        whole = engine.forward_backward
        engine.forward_backward = lambda batches: whole(batches) * float("nan")
    elif kind == "disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    elif kind == "slow":
        # A file system whose every write to the disk takes as long as a loaded NFS server's.
        whole_sync = os.fsync

        def sync(descriptor: int) -> None:
            time.sleep(1.0)
            whole_sync(descriptor)

        os.fsync = sync
    else:
        raise ValueError(kind)


def install() -> None:
    """Put the fault before the step that it belongs to."""
    faults = json.loads(os.environ.get("MEGAGAMMA_FAULTS", "{}"))
    fault = faults.get(attempt()) or faults.get("all")
    if fault is None:
        return
    kind, rank, step = fault
    from megagamma.distributed.compat.megatron import preload

    preload()
    from megagamma.training.loop import Trainer

    whole = Trainer._train_step

    def train_step(self: Any) -> None:
        if self.session.step + 1 == step and self.session.runtime.rank == rank:
            act(kind, self)
        whole(self)

    Trainer._train_step = train_step  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(sys.argv[0])))
    from megagamma.cli import leave, main_guard
    from megagamma.environment import let_waiting_threads_sleep
    from megagamma.launching.stacks import offer_stacks
    from megagamma.pretrain import main

    let_waiting_threads_sleep()
    offer_stacks()
    install()
    leave(main_guard(main))
