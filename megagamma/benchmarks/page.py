"""The page docs/performance.md, from the numbers of calls of `megagamma benchmark`."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megagamma.benchmarks.training import OURS, STEPS
from megagamma.environment import FAST_BF16, cores_of_this_process, cpu_flags
from megagamma.errors import MegagammaError

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
        "| shape | contender | tokens/s | 10 % to 90 % | over the best peer of its dtype | of the matmul peak | start s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        shape = f"{result['shape']}, {result['parameters'] / 1e6:.3g}M"
        for name, values in result["contenders"].items():
            label, ratio, share = name, "", ""
            if name.startswith(OURS):
                label = f"**{name}{', compiled' if values['compiled'] else ''}**"
                ratio = "" if values["ratio"] is None else f"{values['ratio']:.2f}"
                share = f"{values['share_of_matmul_peak']:.2f} of {values['matmul_peak'] / 1e9:,.0f} GFLOP/s"
            lines.append(
                f"| {shape} | {label} | {values['tokens_per_second']:,.0f} | {values['low']:,.0f} to {values['high']:,.0f} "
                f"| {ratio} | {share} | {values['start_seconds']:.0f} |"
            )
            shape = ""
        if result["ratio"] is not None:
            lines.append(f"| | our best over the best peer of all | | | **{result['ratio']:.2f}** | | |")
    return "\n".join(lines)


def ratios_table(result: Mapping[str, Any]) -> str:
    """Tokens per second by contender, and each one's ratio to the reference."""
    lines = ["| contender | tokens/s | 10 % to 90 % | over the reference |", "|---|---:|---:|---:|"]
    for name, values in result["contenders"].items():
        ratio = f"{result['ratios'][name]:.2f}" if name in result["ratios"] else "reference"
        lines.append(
            f"| {name} | {values['tokens_per_second']:,.0f} | {values['low']:,.0f} to {values['high']:,.0f} | {ratio} |"
        )
    return "\n".join(lines)


def curve_tables(curves: Mapping[str, Any]) -> list[str]:
    """Lines of a table for each curve."""
    lines = []
    for name, points in curves.items():
        lines += [f"| {name} | parameters | tokens a step | tokens/s | peak MiB |", "|---|---:|---:|---:|---:|"]
        lines += [
            f"| {point['at']} | {point['parameters'] / 1e6:.3g}M | {point['tokens']:,} "
            f"| {point['tokens_per_second']:,.0f} | {point['peak_mib']:,.0f} |"
            for point in points
        ]
        lines.append("")
    return lines


def memory_table(results: list[Mapping[str, Any]]) -> str:
    """Peaks by shape."""
    lines = [
        "| shape | tokens | ours MiB | planned MiB | peer MiB | ours over the peer |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {result['shape']} | {result['tokens']:,} | {result['ours_mib']:,.0f} | {result['planned_mib']:,.0f} "
        f"| {result['peer_mib']:,.0f} | {result['ours_mib'] / result['peer_mib']:.2f} |"
        for result in results
    ]
    return "\n".join(lines)


def merged(calls: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """(commands, numbers of all of them); of two that measured the same, the later one's, but for shapes of `train`.

    Args:
        calls: what each measured, with its `command` and `machine`.

    Raises:
        MegagammaError: they are of different machines.
    """
    if any(call["machine"] != calls[-1]["machine"] for call in calls):
        raise MegagammaError("--add: numbers of another machine, or of other versions, do not belong on one page")
    results: dict[str, Any] = {}
    for call in calls:
        shapes = {one["shape"]: one for one in [*results.get("train", []), *call.get("train", [])]}
        results = {**results, **call} | ({"train": list(shapes.values())} if shapes else {})
    return [call["command"] for call in calls], results


def page(commands: Sequence[str], results: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        commands: that made the numbers.
        results: `machine`, and by benchmark what it gave; `train` is a list, one entry a shape.
    """
    about = results["machine"]
    bf16 = ", ".join(about["bf16"]) or "no fast bf16"
    lines = [
        "# Performance", "",
        "Ratios on one machine: every contender has a process of its own, and they take turns. Written by", "",
        *(f"    {command}" for command in commands), "",
        f"on {about['cores']} cores of {about['cpu']} ({'AVX-512, ' if about['avx512'] else ''}{bf16}); "
        + ", ".join(f"{name} {number}" for name, number in about["versions"].items()) + ".", "",
    ]  # fmt: skip
    if "train" in results:
        lines += [
            "## Training", "",
            "A step: forward, backward, clipping, AdamW. transformers' class is the one that the model exports to:",
            "LlamaForCausalLM, or Qwen3_5ForCausalLM for the shapes named gated (gate, q/k-norm).",
            "`start` is until the third step, compilation included: a compiled peer pays it in every new process. Ours has the",
            f"default options but for its dtype, and chooses whether to compile as a run of {STEPS:,} steps does.", "",
            training_table(results["train"]), "",
        ]  # fmt: skip
    if "ranks" in results:
        lines += [
            "## Data-parallel ranks", "",
            f"Two processes of one thread each over gloo, shape {results['ranks']['shape']}, 4 sequences a rank. The peer is",
            "transformers' class in fp32 under torch's DistributedDataParallel, gradients as views of its buckets.", "",
            ratios_table(results["ranks"]), "",
        ]  # fmt: skip
    if "overhead" in results:
        over = results["overhead"]
        lines += [
            "## What callbacks add to a step", "",
            "A run of configs/demo.yaml on two ranks: the share of a step that is neither its passes nor its update, with",
            "metrics, guard, replica check and the other standard callbacks at their default intervals, and what they wait",
            "for another rank; validation and checkpoints are left out.", "",
            f"{over['share_of_a_step']:.2%} of a step (95 % interval: {over['low']:.2%} to {over['high']:.2%}), mean of "
            f"{over['steps']} steps.", "",
        ]  # fmt: skip
    if "curves" in results:
        lines += [
            "## Cost by size", "",
            "Ours alone, default options, one point after the other; shape",
            f"{results['curves']['shape']} but for the first table. Peak is the resident memory of the fullest process,",
            "libraries included.", "",
            *curve_tables(results["curves"]["curves"]),
        ]  # fmt: skip
    if "memory" in results:
        lines += [
            "## Memory", "",
            "Peak resident memory of three steps in fp32, beyond what was resident before the model was built. A run on a CPU",
            "keeps memory that it has freed, which the plan does not count. The peer is eager.", "",
            memory_table(results["memory"]), "",
        ]  # fmt: skip
    for name in ("init", "loss", "checkpoint", "convert"):
        if name in results:
            lines += [f"## {name}", "", "| figure | value |", "|---|---:|"]
            lines += [f"| {key.replace('_', ' ')} | {value:,.3g} |" for key, value in results[name].items()]
            lines.append("")
    lines += ["GPU: not measured.", ""]
    return "\n".join(lines)
