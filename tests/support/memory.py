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


def give_back_freed_memory() -> None:
    """Tell glibc to give freed memory back to the system, see docs/memory.md."""
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 65536)
        libc.mallopt(mmap_threshold, 65536)


def kept_by_autograd(cases: list[tuple[str, str]]) -> list[int]:
    """Inside a rank: what a second layer adds to what autograd keeps of a forward pass on a CPU in fp32.

    Args:
        cases: `model.recompute` and `model.attention_gate` of each.

    Returns:
        Unit: bytes.
    """
    import torch

    from megagamma.config.resolve import resolve
    from megagamma.config.schema import Config, ModelConfig
    from megagamma.distributed.runtime import Runtime
    from megagamma.model.gpt import build_model

    def kept(layers: int, recompute: Any, gate: Any) -> int:
        config = Config()
        config.data.corpus, config.run.device, config.data.sequence_length = "tiny", "cpu", 128
        config.model = ModelConfig(
            hidden_size=256, num_layers=layers, num_attention_heads=4, num_query_groups=2,
            ffn_hidden_size=640, vocab_size=512, recompute=recompute, attention_gate=gate,
        )  # fmt: skip
        runtime = Runtime(resolve(config))
        model: Any = next(iter(build_model(config, torch.float32, runtime.device))).train()
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        found = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        tokens = torch.zeros(2, 128, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(tokens, torch.arange(128).expand(2, -1), None, labels=tokens)
        assert loss.requires_grad
        runtime.close_groups()
        return sum(size for size, _ in found.values())

    return [kept(2, *case) - kept(1, *case) for case in cases]


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

    give_back_freed_memory()
    world = world_from_environment()
    config = parse_config(["--config", "configs/smoke.yaml", *arguments], world_size=world.size)
    runtime = Runtime(config, world)
    import_deepspeed(on_cpu=True)
    import torch._dynamo  # optimizers import it when they are made

    torch.mm(torch.ones(256, 256), torch.ones(256, 256))
    runtime.gather(0)
    baseline, files = resident(), resident("RssFile")
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    chunks, parameter_map = build(config, runtime, dtype)
    fill(parameter_map, config, partition_writer(runtime))
    engine = Engine(config, runtime, chunks, parameter_map, parameter_groups(parameter_map, config))
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
    # A forked process maps anew what it touches of the libraries' files: no part of a plan.
    found["peak"] = max(found["backward"], found["step"]) - (resident("RssFile") - files)
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

    give_back_freed_memory()
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
