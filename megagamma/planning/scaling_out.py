"""The page docs/scaling_out.md: layouts, memory and time of models from 1B to 1T on 8 to 10,000 GPUs, by arithmetic alone.

And the memory plan beside a table that others measured. Facts that are not computed here stand with their source.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megagamma.config.io import load_config
from megagamma.config.resolve import resolve, validate
from megagamma.config.schema import Config, ModelConfig
from megagamma.errors import ConfigurationError
from megagamma.planning.flops import flops_per_token, known_peak_flops, parameter_counts, tokens_for_budget
from megagamma.planning.memory import GIB, MemoryPlan, plan
from megagamma.reporting.tables import markdown_table

DEVICE, DEVICE_BYTES, MFU = "H100", 80e9, 0.4
GPUS = (8, 64, 256, 1024, 4096, 10_000)
# Preset, vocabulary of its header, and the global batch that is aimed at. Unit: sequences of 4,096 tokens.
SIZES = (("1b", 128_256, 512), ("7b", 32_000, 1024), ("13b", 32_000, 1024), ("70b", 32_000, 1024), ("175b", 51_200, 2048),
         ("1t", 51_200, 2048))  # fmt: skip
# Tried in this order: what costs no time first. The ZeRO stage, and recomputation.
TIERS = ((1, "none"), (1, "full"), (3, "none"), (3, "full"))
TENSOR = (1, 2, 4, 8)  # inside a node of 8 GPUs


@dataclass(frozen=True)
class Choice:
    """A layout of a model on some GPUs, with what it needs."""

    config: Config
    memory: MemoryPlan
    gpus: int

    @property
    def microbatches(self) -> int:
        return self.config.data.global_batch_size // self.memory.data_size

    @property
    def seconds(self) -> float:
        """For 20 tokens per parameter at `MFU` of `DEVICE`'s peak."""
        model, peak = self.config.model, known_peak_flops(DEVICE)
        assert peak is not None
        flops = flops_per_token(model, self.config.data.sequence_length)
        return flops * tokens_for_budget(parameter_counts(model).total) / (self.gpus * peak * MFU)


def preset(tree: Path, name: str, vocabulary: int) -> Config:
    """A model preset for planning, micro batch 1, on GPUs."""
    config = load_config(tree / "configs" / "model" / f"{name}.yaml")
    config.data.corpus, config.model.vocab_size = "tiny", vocabulary  # no data is read
    config.data.micro_batch_size, config.run.device, config.precision.dtype = 1, "cuda", "bf16"
    return resolve(config)


def laid_out(config: Config, gpus: int, tensor: int, pipeline: int, zero: int, recompute: str, batch: int) -> Choice:
    """A config on a layout, its global batch rounded to what the layout can split.

    Raises:
        ConfigurationError: the config's rules do not allow it.
    """
    config = copy.deepcopy(config)
    config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence = tensor, pipeline, tensor > 1
    config.model.recompute, config.deepspeed_config = recompute, f"configs/deepspeed/zero{zero}.json"  # type: ignore[assignment]
    replicas = max(1, gpus // (tensor * pipeline))
    config.data.global_batch_size = max(1, round(batch / replicas)) * replicas
    validate(config, gpus)
    return Choice(config, plan(config, gpus), gpus)


def layouts(config: Config, gpus: int, zero: int, recompute: str, batch: int) -> Iterator[Choice]:
    """Legal layouts that keep tensor parallelism inside a node and at least as many microbatches as stages.

    Those with fewer model-parallel ranks come first, and of them those with fewer stages.
    """
    # ZeRO 3 gathers a module's weights whole; of the plan's assumptions it is the least tried, so it comes with all of a
    # node's tensor parallelism.
    pairs = [
        (tensor, pipeline)
        for pipeline in range(1, config.model.num_layers + 1)
        for tensor in (TENSOR if zero < 3 else TENSOR[-1:])
        # What the rules would refuse, left out to save their time.
        if config.model.num_layers % pipeline == 0 and gpus % (tensor * pipeline) == 0
    ]
    for tensor, pipeline in sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[1])):
        try:
            choice = laid_out(config, gpus, tensor, pipeline, zero, recompute, batch)
        except ConfigurationError:
            continue
        if choice.microbatches >= pipeline:
            yield choice


def recommend(config: Config, gpus: int, batch: int) -> Choice | None:
    """The first of `layouts` that fits, in the first of `TIERS` that has one; None: none fits."""
    for zero, recompute in TIERS:
        for one in layouts(config, gpus, zero, recompute, batch):
            if one.memory.worst.device_bytes <= DEVICE_BYTES:
                return one
    return None


@dataclass(frozen=True)
class Measured:
    """A peak of memory that others measured."""

    tensor: int
    pipeline: int
    data: int
    micro_batch: int
    global_batch: int
    gib: float
    """torch.cuda.max_memory_allocated, so without CUDA's context."""


# README of tools/get_training_info in https://github.com/NVIDIA/Megatron-LM/pull/482: Llama 2 7B under Megatron-LM in bf16
# with flash attention and the distributed optimizer, without sequence parallelism and recomputation, on eight H800. It does
# not give the sequence length of the table; the one of its example, 2,048, is taken.
MEASURED = (Measured(1, 1, 8, 2, 2048, 69.1), Measured(2, 1, 4, 4, 512, 55.7), Measured(1, 2, 4, 2, 2048, 49.8),
            Measured(8, 1, 1, 4, 128, 28.8))  # fmt: skip


def planned_like(one: Measured) -> float:
    """The plan's peak for a measured case, without the device's overhead. Unit: GiB."""
    config = Config(model=ModelConfig(
        hidden_size=4096, num_layers=32, num_attention_heads=32, ffn_hidden_size=11008, vocab_size=32_000,
        attention_gate="none", qk_norm=False,
    ))  # fmt: skip
    config.data.corpus, config.data.sequence_length = "tiny", 2048
    config.data.micro_batch_size, config.data.global_batch_size = one.micro_batch, one.global_batch
    config.parallel.tensor, config.parallel.pipeline = one.tensor, one.pipeline
    config.run.device, config.precision.dtype = "cuda", "bf16"
    worst = plan(resolve(config), one.tensor * one.pipeline * one.data).worst
    return (worst.device_bytes - worst.overhead_bytes) / GIB


def _time(seconds: float) -> str:
    days = seconds / 86400
    if days < 1:
        return f"{days * 24:.1f} hours" if days > 1 / 24 else f"{seconds / 60:.0f} minutes"
    return f"{days:,.1f} days" if days < 730 else f"{days / 365.25:,.0f} years"


def _size_table(tree: Path, name: str, vocabulary: int, batch: int) -> str:
    config = preset(tree, name, vocabulary)
    total = parameter_counts(config.model).total
    rows: list[tuple[object, ...]] = []
    for gpus in GPUS:
        choice = recommend(config, gpus, batch)
        if choice is None:
            rows.append((f"{gpus:,}", "nothing fits", *["-"] * 7))
            continue
        parallel, memory = choice.config.parallel, choice.memory
        rows.append((
            f"{gpus:,}", f"{parallel.tensor} x {parallel.pipeline} x {memory.data_size}", memory.zero_stage,
            choice.config.model.recompute, f"{choice.config.data.global_batch_size:,}", choice.microbatches,
            f"{(parallel.pipeline - 1) / (choice.microbatches + parallel.pipeline - 1):.0%}",
            f"{memory.worst.device_bytes / 1e9:.1f}", _time(choice.seconds),
        ))  # fmt: skip
    columns = (
        "GPUs",
        "tensor x pipeline x data",
        "ZeRO",
        "recompute",
        "batch",
        "microbatches",
        "bubble",
        "GB per rank",
        "time",
    )
    return (
        f"### {name.upper()}: {total / 1e9:,.1f} billion parameters, {tokens_for_budget(total) / 1e9:,.0f} billion tokens\n\n"
        + markdown_table(columns, rows)
    )


def page(tree: Path) -> str:
    """The whole page.

    Args:
        tree: the source tree, whose configs/model/ is read.
    """
    measured = []
    for case in MEASURED:
        planned = planned_like(case)
        layout = f"{case.tensor} x {case.pipeline} x {case.data}"
        measured.append((layout, case.micro_batch, f"{case.gib}", f"{planned:.1f}", f"{planned / case.gib - 1:+.1%}"))
    peak = known_peak_flops(DEVICE)
    assert peak is not None
    tables = "\n\n".join(_size_table(tree, *size) for size in SIZES)
    return _TEXT.format(
        gib=DEVICE_BYTES / GIB, mfu=MFU, peak=peak / 1e12, device=DEVICE, tables=tables,
        measured=markdown_table(("tensor x pipeline x data", "micro batch", "measured GiB", "planned GiB", "error"), measured),
    )  # fmt: skip


_TEXT = """\
<!-- Written by `python tools/rehearse.py --scaling_out docs/scaling_out.md`: change megagamma/planning/scaling_out.py. -->
# Scaling out: layouts, memory and time from 8 to 10,000 GPUs

**Nothing on this page was run.** Everything but the published figures is arithmetic on shapes, by
[the memory plan](memory.md) and the FLOPs of `megagamma/planning/flops.py`. What can be tried without the machines is
[the rehearsal](rehearsal.md) of any of these layouts.

## Recommended layouts

Each row is the layout of the config's rules with the fewest model-parallel ranks (tensor x pipeline) whose fullest rank fits
in 80 GB ({gib:.1f} GiB; the cards have some 5 GiB more, which is left for fragmentation). Tensor parallelism stays inside a
node of 8, with sequence parallelism; there are at least as many microbatches as stages; micro batch 1; sequences of 4,096
tokens; bf16; a gate and q/k-norm, which the presets add to the shapes of others. ZeRO 1 without recomputation comes first,
then ZeRO 1 with full recomputation, then ZeRO 3 on 8 tensor-parallel ranks. Without a layout for all of the GPUs, as for
10,000 = 2^4 x 5^4 and a model of 96 or 128 layers, fewer of them may be the better choice.

- batch: sequences per step, the multiple of the data-parallel ranks nearest to 512 (1B), 1,024 (7B to 70B) or 2,048. Past
  some thousand GPUs it is the ranks that set it, and a batch above some 16 million tokens is no longer the usual recipe.
- bubble: share of a step that a stage waits, (p - 1) / (m + p - 1) with p stages and m microbatches.
- time: 20 tokens per parameter at {mfu:.0%} MFU of an {device}'s {peak:.1f} TFLOP/s, whatever the bubble and the network; full
  recomputation repeats the forward pass, which the MFU does not count. [Megatron-LM's README][readme] measured 41 % for its
  smallest and 47 to 48 % for its largest models on up to 6,144 H100, and 42 % where 175B is spread over 4,608.

{tables}

## Against published memory

Llama 2 7B under Megatron-LM on eight H800, by [a table in a pull request there][analysis], as
`torch.cuda.max_memory_allocated` says, so that the plan is taken without its 1.5 GiB for CUDA and NCCL. bf16, flash
attention, distributed optimizer (this project's ZeRO 1), no recomputation. The table does not give the sequence length: 2,048
is assumed, that of the example beside it, and only with it do the figures agree. The micro batches of a step are those of the
table.

{measured}

The plan is lower the more tensor-parallel ranks there are; what the ranks hold whole without sequence parallelism, such as
the masks of dropout that this project has not, may be the reason.

Weights, gradients and optimizer alone: [Megatron-LM's own estimate][bytes] is 18 bytes per parameter, and 6 + 12 / d with its
distributed optimizer over d data-parallel ranks. The plan's ZeRO 1 in bf16 is the same: 2 + 4 + 12 / d.

## Published layouts

None is compared here: a row would need its shape, layout, batch and recomputation from one source. The table of models
from 2B to 462B in Megatron-LM's README is an image.

[readme]: https://github.com/NVIDIA/Megatron-LM#training-speed-and-scalability
[analysis]: https://github.com/NVIDIA/Megatron-LM/pull/482
[bytes]: https://github.com/NVIDIA/Megatron-LM/issues/654
"""
