"""The page docs/performance.md, from the numbers of one call of `megagamma benchmark`."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megagamma.benchmarks.training import OURS
from megagamma.environment import FAST_BF16, cores_of_this_process, cpu_flags

_PACKAGES = ("torch", "transformers", "megatron-core", "deepspeed")


def machine() -> dict[str, Any]:
    """CPU, cores, its instructions for bf16, and versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = cpu_flags()
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": cores_of_this_process(),
        "avx512": "avx512f" in flags,
        "bf16": [flag for flag in FAST_BF16 if flag in flags],
        "versions": {name: version(name) for name in _PACKAGES},
    }


def training_table(results: list[Mapping[str, Any]]) -> str:
    """Tokens per second by shape and contender, and our ratio to each."""
    lines = [
        "| shape | contender | tokens/s | 10 % to 90 % | ours over it | start s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for result in results:
        contenders = result["contenders"]
        ours = contenders[OURS]["tokens_per_second"]
        for name, values in contenders.items():
            ratio = "" if name == OURS else f"{ours / values['tokens_per_second']:.2f}"
            label = f"{name} {result['dtype']}" if name == OURS else name
            shape = f"{result['shape']}, {result['parameters'] / 1e6:.3g}M" if name == OURS else ""
            lines.append(
                f"| {shape} | {'**' + label + '**' if name in (OURS, result['best_peer']) else label} "
                f"| {values['tokens_per_second']:,.0f} | {values['low']:,.0f} to {values['high']:,.0f} | {ratio} "
                f"| {values['start_seconds']:.0f} |"
            )
        peak = f"share of the matmul peak, {result['matmul_peak'] / 1e9:,.0f} GFLOP/s"
        lines.append(f"| | {peak} | {result['share_of_matmul_peak']:.2f} | | | |")
    return "\n".join(lines)


def page(command: str, results: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        command: that made the numbers.
        results: `machine`, and by benchmark what it gave; `train` is a list, one entry a shape.
    """
    about = results["machine"]
    bf16 = ", ".join(about["bf16"]) or "no fast bf16"
    lines = [
        "# Performance", "",
        "Ratios of one run on one machine: every contender has a process of its own, and they take turns. Written by", "",
        f"    {command}", "",
        f"on {about['cores']} cores of {about['cpu']} ({'AVX-512, ' if about['avx512'] else ''}{bf16}); "
        + ", ".join(f"{name} {number}" for name, number in about["versions"].items()) + ".", "",
    ]  # fmt: skip
    if "train" in results:
        lines += [
            "## Training", "",
            "A step: forward, backward, clipping, AdamW. transformers' class is the one that the model exports to:",
            "LlamaForCausalLM, or Qwen3_5ForCausalLM for the shapes named gated (gate, q/k-norm). The best peer is in bold.",
            "`start` is until the third step, compilation included: a compiled peer pays it in every new process.", "",
            training_table(results["train"]), "",
        ]  # fmt: skip
    for name in ("init", "loss", "checkpoint", "convert"):
        if name in results:
            lines += [f"## {name}", "", "| figure | value |", "|---|---:|"]
            lines += [f"| {key.replace('_', ' ')} | {value:,.3g} |" for key, value in results[name].items()]
            lines.append("")
    lines += ["GPU: not measured.", ""]
    return "\n".join(lines)
