"""Pretrain a model: config -> data, model, engine -> training loop.

    deepspeed megagamma/pretrain.py --config configs/demo.yaml --init.gamma 1.0

Also under torchrun, srun, or plain python for one process, and as `megagamma pretrain`. Exit codes: `megagamma.cli`.
"""

from __future__ import annotations

import os
import sys

# Run as a file, this folder is the first place that Python looks in, where `data`, `model` and others of ours would
# hide packages of those names.
if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path[0] = os.path.dirname(sys.path[0])

from megagamma.cli import keep_console, leave, main_guard
from megagamma.config.io import as_dict, parse_config
from megagamma.crash import attach
from megagamma.environment import keep_freed_memory, let_waiting_threads_sleep, world_size
from megagamma.launching.stacks import offer_stacks
from megagamma.preflight import check_early


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit code."""
    let_waiting_threads_sleep()  # before torch is imported
    keep_freed_memory()
    offer_stacks()
    size = world_size()
    config = parse_config(arguments, program=os.path.basename(sys.argv[0]), world_size=size)
    check_early(config, size)
    # A run is its files: it trains on without a console.
    keep_console("stdout", "stderr")
    try:
        from megagamma.planning.memory import check_fits

        check_fits(config, size)
        from megagamma.distributed.compat.megatron import preload
        from megagamma.distributed.peers import explain_peer_failure

        preload()
        from megagamma.distributed.runtime import Runtime
        from megagamma.job import train

        with explain_peer_failure(config.run.timeout_minutes):
            code = train(config)
            Runtime.close()
            return code
    except Exception as error:
        attach(error, config.run.folder, as_dict(config))
        raise


if __name__ == "__main__":
    leave(main_guard(main))
