"""What tests/gpu/test_on_device.py asks of a device, in a process of its own: `python on_device.py cuda` prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

VARIANTS = {
    "fp32": ["--precision.dtype=fp32"],
    "fp32, drawn larger": ["--precision.dtype=fp32", "--init.gamma=0.5"],
    "bf16": ["--precision.dtype=bf16"],
    "bf16, ZeRO 2": ["--precision.dtype=bf16", "--deepspeed_config=configs/deepspeed/zero2.json"],
    "bf16, ZeRO 3": ["--precision.dtype=bf16", "--deepspeed_config=configs/deepspeed/zero3.json"],
    "bf16, full recomputation": ["--precision.dtype=bf16", "--model.recompute=full"],
    "bf16, offloaded optimizer": ["--precision.dtype=bf16", "--deepspeed_config=configs/deepspeed/zero2_offload.json"],
}


def backend(device: str) -> dict[str, Any]:
    """Name of the world's backend, and a sum over its one rank."""
    import torch
    import torch.distributed as dist

    value = torch.full((3,), 2.0, device=device)
    dist.all_reduce(value)
    return {"name": dist.get_backend(), "sum": value.tolist()}


def attention_kernels(device: str, masked: bool) -> list[str]:
    """Operators of torch that our attention calls in bf16, by the profiler."""
    import torch

    from megagamma.model.attention import SDPACoreAttention

    attention = SDPACoreAttention(None, 1)
    query, key, value = (torch.randn(128, 2, heads, 64, device=device, dtype=torch.bfloat16) for heads in (4, 2, 2))
    mask = torch.ones(2, 1, 128, 128, dtype=torch.bool, device=device).triu(1) if masked else None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(query, key, value, mask)
    return sorted({event.key for event in profile.key_averages() if "scaled_dot_product" in event.key})


def compiled_loss(device: str) -> dict[str, float]:
    """Mean loss and norm of the embedding's gradient in fp32, eager and compiled."""
    import torch
    from support.train import batches, build_engine

    config, engine = build_engine([f"--run.device={device}", "--precision.dtype=fp32"])
    batch = batches(config, engine, 1)[0].to(engine.runtime.device)
    chunk = engine.chunks[0]
    # On a CPU without what needs a C++ compiler.
    compiled = torch.compile(chunk, backend="inductor" if device == "cuda" else "aot_eager")
    found = {}
    for name, module in (("eager", chunk), ("compiled", compiled)):
        loss = module(batch.tokens, batch.position_ids, None, labels=batch.labels).mean()
        weight = next(tensor.parameter for tensor in engine.map if tensor.role == "embedding")
        (gradient,) = torch.autograd.grad(loss, weight)
        found[name], found[f"{name} gradient"] = float(loss), float(gradient.norm())
    engine.close()
    return found


def main(device: str, cache: str) -> None:
    """Everything, as one line of JSON at the end of standard output."""
    from support.train import train_steps

    common = [f"--run.device={device}", f"--data.cache={cache}"]
    found: dict[str, Any] = {"losses": {}}
    for name, arguments in VARIANTS.items():
        found["losses"][name] = train_steps([*common, *arguments], 3)
    found["backend"] = backend(device)
    found["kernels"] = attention_kernels(device, masked=False)
    found["masked kernels"] = attention_kernels(device, masked=True)
    found["compiled"] = compiled_loss(device)
    print(json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main(*sys.argv[1:])
