"""Peak resident memory of a real training step, beyond what the imports take."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def resident(name: str = "VmRSS") -> int:
    """A line of this process's status: VmRSS now, VmHWM at most since the last `forget_peak`. Unit: bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def forget_peak() -> None:
    """Set VmHWM back to VmRSS. (ru_maxrss cannot be: it even outlives exec, so a child starts with its parent's.)"""
    Path("/proc/self/clear_refs").write_text("5")


def measure_step(arguments: list[str]) -> dict[str, Any]:
    """Build a model and make one step inside a rank that has made none yet; random tokens, no data.

    Returns:
        baseline: resident after the imports and a first product; built, peak: beyond it, after the model was laid out
        and at most during the step, the same at most in the backward pass and in the update alone. Unit: bytes.
    """
    import torch

    from megagamma.config.io import parse_config
    from megagamma.data.contracts import Batch
    from megagamma.distributed.compat.deepspeed import import_deepspeed
    from megagamma.distributed.engine import Engine
    from megagamma.distributed.runtime import Runtime
    from megagamma.distributed.state import partition_writer
    from megagamma.environment import world_from_environment
    from megagamma.model.initialize import fill
    from megagamma.training.assembly import build
    from megagamma.training.optimizer import parameter_groups

    world = world_from_environment()
    config = parse_config(["--config", "configs/smoke.yaml", *arguments], world_size=world.size)
    runtime = Runtime(config, world)
    import_deepspeed(on_cpu=True)
    import torch._dynamo  # optimizers import it when they are made

    torch.mm(torch.ones(256, 256), torch.ones(256, 256))
    runtime.gather(0)
    baseline = resident()
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    chunks, parameter_map = build(config, runtime, dtype)
    fill(parameter_map, config, partition_writer(runtime))
    engine = Engine(config, runtime, chunks, parameter_map, parameter_groups(parameter_map, config.optimizer))
    found: dict[str, Any] = {
        "baseline": baseline,
        "built": resident() - baseline,
        "building": resident("VmHWM") - baseline,
    }
    size = (config.data.micro_batch_size, config.data.sequence_length)
    tokens = torch.randint(0, config.model.vocab_size, size)
    batch = Batch(tokens, tokens, torch.ones(size), torch.arange(size[1]).expand(size))
    count = config.data.global_batch_size // (size[0] * runtime.data_size)
    forget_peak()
    engine.set_learning_rate(1e-3)
    engine.forward_backward([batch] * count)
    found["backward"] = resident("VmHWM") - baseline
    found["between"] = resident() - baseline
    forget_peak()
    assert engine.step()
    found["step"] = resident("VmHWM") - baseline
    found["after"] = resident() - baseline
    found["peak"] = max(found["backward"], found["step"])
    runtime.close_groups()
    return found


def measure_build(arguments: list[str], spread: bool) -> dict[str, int]:
    """Build and fill a model inside a rank; `spread`: as ZeRO 3 builds it, else whole.

    Returns:
        whole: the weights; largest: the largest tensor; peak: most resident beyond what was there. Unit: bytes.
    """
    import contextlib
    import gc

    import torch

    from megagamma.config.io import parse_config
    from megagamma.distributed.partitioned import building
    from megagamma.distributed.runtime import Runtime
    from megagamma.distributed.state import partition_writer
    from megagamma.environment import world_from_environment
    from megagamma.model.gpt import build_model
    from megagamma.model.initialize import fill
    from megagamma.model.parameters import ParameterMap

    world = world_from_environment()
    config = parse_config(["--config", "configs/smoke.yaml", *arguments], world_size=world.size)
    runtime = Runtime(config, world)
    context = building(config, runtime, torch.float32)
    runtime.gather(0)
    gc.collect()
    baseline = resident()
    forget_peak()
    with context if spread else contextlib.nullcontext():
        chunks = build_model(config, torch.float32, runtime.device)
    parameter_map = ParameterMap(list(chunks), config.model, runtime.tensor_rank, runtime.tensor_size)
    fill(parameter_map, config, partition_writer(runtime))
    sizes = [4 * torch.Size(tensor.shape).numel() for tensor in parameter_map]
    found = {"whole": sum(sizes), "largest": max(sizes), "peak": resident("VmHWM") - baseline}
    runtime.close_groups()
    return found
