"""The pool of ranks that tests run on."""

from megagamma.testing.ranks import RankError, RankPool, free_port

__all__ = ["RankError", "RankPool", "free_port", "join_world"]


def join_world() -> None:
    """Form the pool's gloo world as a run does, on loopback alone; Megatron's groups are left to the caller."""
    from megagamma.config.io import parse_config
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import world_from_environment

    world = world_from_environment()
    batch = ["--data.corpus", "tiny", "--data.global_batch_size", str(8 * world.size)]
    Runtime(parse_config(["--config", "configs/smoke.yaml", *batch], world_size=world.size), world)
    Runtime.close_groups()
