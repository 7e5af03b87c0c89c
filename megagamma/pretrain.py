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

from megagamma.cli import leave, main_guard
from megagamma.config.io import parse_config


def world_size() -> int:
    """Processes of the run, as the launcher says; read before torch is imported, so that `--help` is quick."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_STEP_ID" in os.environ else 1


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit code."""
    size = world_size()
    config = parse_config(arguments, program=os.path.basename(sys.argv[0]), world_size=size)
    from megagamma.planning.memory import check_fits

    check_fits(config, size)
    from megagamma.distributed.peers import explain_lost_contact
    from megagamma.training.loop import Trainer
    from megagamma.training.setup import prepare_session

    with explain_lost_contact(config.run.timeout_minutes):
        session = prepare_session(config)
        code = Trainer(session).run()
        session.runtime.close()
        return code


if __name__ == "__main__":
    leave(main_guard(main))
