"""What `auto` becomes on this machine: the dtype of a run, and whether its regions are compiled."""

from __future__ import annotations

import shutil
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megagamma.config.deepspeed import deepspeed_values, zero_stage
from megagamma.config.resolve import is_drawn_small, planned_dtype
from megagamma.config.rules import data_parallel_size
from megagamma.config.schema import Config
from megagamma.data.schedule import total_steps
from megagamma.distributed.runtime import Runtime
from megagamma.environment import choose_threads, has_fast_bf16
from megagamma.errors import ConfigurationError
from megagamma.model.layer import LayerShape, calls_whole_layers, layer_region
from megagamma.model.norm import NORM
from megagamma.model.regions import Region
from megagamma.model.swiglu import SWIGLU
from megagamma.planning.memory import microbatches

# Below this, passes over the fp32 master weights cost more than faster products save: models of 100,000 weights.
_PAYING_RATIO = 2.5
# Seconds of what would be compiled in a run, below which not even loading the compiler pays.
_SHORT = 30.0


@dataclass(frozen=True)
class Choices:
    """The same on every rank."""

    dtype: torch.dtype
    compiled: bool
    lines: tuple[str, ...] = ()
    """What was chosen and why, for the console."""

    def as_json(self) -> dict[str, Any]:
        """For resolved.json and `choose`'s `kept`."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "compiled": self.compiled}


def choose_for_sweep(config: Config, processes: int) -> dict[str, str]:
    """Values for `precision.dtype` and `run.compile` of all points that run on CPUs, decided on this machine.

    Args:
        config: of the largest point, vocabulary known.
        processes: of that point.
    """
    device = torch.device("cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(choose_threads(config.run.threads, processes))
    try:
        replicas = data_parallel_size(config, processes)
        found = _decide(config, replicas, device, compiler_problem(device), {})
    finally:
        torch.set_num_threads(before)
    return {
        "dtype": "bf16" if found["dtype"] == "bfloat16" else "fp32",
        "compile": "on" if found["compiled"] else "off",
    }


def choose(config: Config, runtime: Runtime, kept: Mapping[str, Any] | None = None) -> Choices:
    """Decide `precision.dtype` and `run.compile`; rank 0 measures, and all ranks take its word.

    Args:
        config: resolved and validated, vocabulary known.
        kept: what the run that is resumed had chosen; where an option is `auto`, that stays.

    Raises:
        ConfigurationError: run.compile is on, and a host lacks a compiler.
    """
    problems = [text for text in runtime.gather(compiler_problem(runtime.device)) if text]
    found = runtime.run_on_rank0(
        lambda: _decide(config, runtime.data_size, runtime.device, problems[0] if problems else "", kept or {})
    )
    return Choices(getattr(torch, found["dtype"]), found["compiled"], tuple(found["lines"]))


def _decide(
    config: Config, replicas: int, device: torch.device, lacking: str, kept: Mapping[str, Any]
) -> dict[str, Any]:
    if kept.get("device", device.type) != device.type:
        kept = {}  # it was begun on another kind of device
    dtype, why = _decide_dtype(config, replicas, device, kept.get("dtype"))
    compiled, why_compiled = _decide_compiled(config, replicas, device, dtype, lacking, kept.get("compiled"))
    return {**Choices(dtype, compiled).as_json(), "lines": [line for line in (why, why_compiled) if line]}


def _decide_dtype(config: Config, replicas: int, device: torch.device, kept: str | None) -> tuple[torch.dtype, str]:
    on_cpu = device.type == "cpu"
    planned = planned_dtype(config, replicas, "cpu" if on_cpu else "cuda")
    if config.precision.dtype != "auto":
        ratio = products_ratio(config) if on_cpu and planned == "bf16" else 1.0
        slow = f"precision.dtype: bf16: its matrix products run at {ratio:.2f} x fp32 on this CPU: use fp32"
        return _DTYPES[planned], slow if ratio < 1 else ""
    has_masters = zero_stage(deepspeed_values(config, replicas, bf16=True)) > 0
    if kept == "float32" or (kept == "bfloat16" and has_masters):
        return getattr(torch, kept), ""
    if on_cpu and has_fast_bf16() and is_drawn_small(config):
        return torch.float32, (
            "precision.dtype: fp32: bf16 was not shown to be as good for weights drawn with a gamma above 0.5 (docs/"
            "lab_notebook.md); --precision.dtype bf16 takes it"
        )
    if planned == "fp32" or not on_cpu:
        return _DTYPES[planned], ""
    ratio = products_ratio(config)
    chosen = "bf16" if ratio >= _PAYING_RATIO else "fp32"
    how = "with fp32 master weights" if chosen == "bf16" else f"bf16 pays from {_PAYING_RATIO} x on"
    return (
        _DTYPES[chosen],
        f"precision.dtype: {chosen}: this model's products run {ratio:.1f} x as fast in bf16 on this CPU; {how}",
    )


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def products_ratio(config: Config) -> float:
    """How many times as fast this CPU multiplies in bf16 as in fp32: the best of a few of the model's largest products."""
    model = config.model
    assert model.ffn_hidden_size is not None
    tokens = min(4096, config.data.micro_batch_size * config.data.sequence_length)
    wide = 2 * model.ffn_hidden_size // config.parallel.tensor

    def best(dtype: torch.dtype) -> float:
        x, weight = torch.ones(tokens, model.hidden_size, dtype=dtype), torch.ones(wide, model.hidden_size, dtype=dtype)
        return min(_seconds(lambda: torch.mm(x, weight.t())) for _ in range(9))

    return best(torch.float32) / best(torch.bfloat16)


def _seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def compiler_problem(device: torch.device) -> str:
    """Why this host cannot compile, as far as is known without loading torch's compiler; empty when it may."""
    if device.type == "cuda":
        return ""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "this host has no C++ compiler"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return "" if headers.exists() else f"this host lacks Python's headers ({headers})"


def _decide_compiled(
    config: Config, replicas: int, device: torch.device, dtype: torch.dtype, lacking: str, kept: bool | None
) -> tuple[bool, str]:
    wanted = config.run.compile
    if wanted == "on" and lacking:
        raise ConfigurationError(
            f"run.compile=on: {lacking}: install one (g++ or clang++, with Python's headers), or use --run.compile auto"
        )
    if wanted != "auto":
        return wanted == "on", ""
    if kept is not None and not (kept and lacking):
        return kept, ""
    calls = total_steps(config) * microbatches(config, replicas) * (config.model.num_layers // config.parallel.pipeline)
    stage = zero_stage(deepspeed_values(config, replicas, dtype == torch.bfloat16))
    what, kernels, regions = _layer_regions(config, stage, dtype, device)
    eager = [(count, region, inputs, _pass(region.eager, inputs)) for count, region, inputs in regions]
    if sum(count * calls * seconds for count, _, _, seconds in eager) < _SHORT:
        return False, ""
    # Other ranks wait while the compiler works. Under full recomputation half of the passes are without gradients, and eager.
    if config.run.timeout_minutes < 2 or config.model.recompute == "full":
        return False, ""
    if lacking:
        return False, f"run.compile: off: {lacking}"
    begin, saved = time.perf_counter(), 0.0
    try:
        for count, region, inputs, seconds in eager:
            saved += count * (seconds - _pass(region.kernel, inputs))
    except Exception as error:  # noqa: BLE001 - whatever the compiler lacks, the run goes on without it
        first = str(error).strip().splitlines() or [type(error).__name__]
        return False, f"run.compile: off: the compiler failed: {first[0][:200]}"
    cost = (time.perf_counter() - begin) / len(regions) * kernels
    pays = saved * calls > cost
    return pays, (
        f"run.compile: {'on' if pays else 'off'}: {what} {1e3 * saved:.2f} ms a layer and microbatch, "
        f"{max(0.0, saved) * calls:.0f} s in this run, and compiling takes about {cost:.0f} s"
    )


_Regions = list[tuple[int, Region, tuple[Any, ...]]]


def _layer_regions(config: Config, stage: int, dtype: torch.dtype, device: torch.device) -> tuple[str, int, _Regions]:
    """The regions of a layer that are measured: what they save in words, how many are compiled in all, and each with its calls
    and with tensors of its shapes."""
    model, data = config.model, config.data
    assert model.ffn_hidden_size is not None and model.num_query_groups is not None and model.head_dim is not None
    width, tokens = model.hidden_size, (data.sequence_length, data.micro_batch_size)

    def ones(*sizes: int) -> torch.Tensor:
        return torch.ones(*sizes, dtype=dtype, device=device, requires_grad=True)

    if not calls_whole_layers(config, stage):
        fused = 2 * model.ffn_hidden_size // config.parallel.tensor
        norm = (ones(*tokens, width), ones(width), model.norm_epsilon)
        # Rotation of queries and of keys, and the gate, are compiled too.
        return "norms and SwiGLU save", 5, [(2, NORM, norm), (1, SWIGLU, (ones(*tokens, fused),))]
    heads, groups, head_dim = model.num_attention_heads, model.num_query_groups, model.head_dim
    gate, features = model.attention_gate, heads * head_dim
    shape = LayerShape(groups, heads // groups, head_dim, gate, model.norm_epsilon, None)
    rows = features * (2 if gate == "elementwise" else 1) + 2 * groups * head_dim
    tensors = (
        ones(*tokens, width), ones(2, tokens[0], 1, 1, head_dim // 2).detach(), ones(width), ones(rows, width),
        *([ones(head_dim), ones(head_dim)] if model.qk_norm else [None, None]),
        ones(heads, width) if gate == "headwise" else None,
        ones(width, features), ones(width), ones(2 * model.ffn_hidden_size, width), ones(width, model.ffn_hidden_size),
    )  # fmt: skip
    return "whole layers save", 1, [(1, layer_region(shape), tensors)]


def _pass(function: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
    """Median seconds of a forward and backward pass, after warm ones."""
    tensors = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    on_gpu = tensors[0].device.type == "cuda"

    def run() -> None:
        torch.autograd.grad(function(*inputs).sum(), tensors)
        if on_gpu:
            torch.cuda.synchronize()

    for _ in range(2):
        run()
    return sorted(_seconds(run) for _ in range(7))[3]
