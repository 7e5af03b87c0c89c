"""What is needed of torch beyond its public names."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def process_groups() -> set[Any]:
    """Every process group of this process. torch's own list is private, and Megatron-core only forgets its groups, where
    each keeps threads and sockets until it is destroyed."""
    return set(dist.distributed_c10d._world.pg_map)
