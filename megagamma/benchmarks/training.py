"""Training steps of ours and of transformers.

The peers are the class of transformers that our model exports to (LlamaForCausalLM; with gate and q/k-norm
Qwen3_5ForCausalLM), of the same shape, under torch's fused AdamW with clipping: eager and compiled, in fp32 and under bf16
autocast. All get the same tokens and threads.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from megagamma.benchmarks.contenders import Contender, Step, in_turns, speeds
from megagamma.cli import source_tree

PEERS = {
    "transformers fp32": (False, False),
    "transformers fp32, compiled": (True, False),
    "transformers bf16": (False, True),
    "transformers bf16, compiled": (True, True),
}
"""(compiled, bf16 autocast) of each."""
OURS = "megagamma"
GATED = "-gated"
"""End of the name of a shape with gate and q/k-norm."""
# A model of 100,000 weights, as toys are: what a step costs there is Python and launches.
_TOY = {
    "model.hidden_size": 64, "model.num_layers": 2, "model.num_attention_heads": 4, "model.head_dim": 16,
    "model.ffn_hidden_size": 128, "model.vocab_size": 128, "data.sequence_length": 32,
    "data.global_batch_size": 32, "data.micro_batch_size": 32,
}  # fmt: skip
COMMON = ["--data.global_batch_size=4", "--data.micro_batch_size=4", "--data.corpus=tiny", "--model.vocab_size=4096"]
"""Options of ours and of the peers."""
_COMPILER = "torch._inductor.compile_fx"
"""Torch's compiler, imported before a contender's memory is counted."""
STEPS = 20_000
"""Length of the run that ours makes its choices for, such as whether compiling pays."""


def preset(name: str, kind: str = "yaml") -> str:
    """Path of a config of the source tree, such as model/17m."""
    return str(source_tree() / "configs" / f"{name}.{kind}")


def shape_arguments(shape: str) -> list[str]:
    """Options of a shape: `toy`, `demo` (configs/demo.yaml), or a preset of configs/model, with 4 sequences a step.

    Its name may end in `-gated`; without that it has neither gate nor q/k-norm, as Llama.
    """
    name = shape.removesuffix(GATED)
    recipe = [] if shape.endswith(GATED) else ["--model.attention_gate=none", "--model.qk_norm=false"]
    if name == "toy":
        return [*(f"--{option}={value}" for option, value in _TOY.items()), *recipe]
    return ["--config", preset("demo" if name == "demo" else f"model/{name}"), *recipe]


def join(arguments: Sequence[str]) -> tuple[Any, Any]:
    """(config, runtime) of this process, on its CPU unless told otherwise, everything imported that a step needs."""
    from megagamma.config.io import parse_config
    from megagamma.distributed.compat.deepspeed import import_deepspeed
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import world_from_environment

    world = world_from_environment()
    config = parse_config([*COMMON, "--run.device=cpu", *arguments], world_size=world.size)
    runtime = Runtime(config, world)
    import_deepspeed(runtime.device.type == "cpu")
    return config, runtime


def build(arguments: Sequence[str]) -> tuple[Any, Any]:
    """(config, engine) of a filled model on this process's CPU, without data."""
    from megagamma.training.assembly import fresh_engine

    config, runtime = join(arguments)
    engine = fresh_engine(config, runtime)
    engine.set_learning_rate(1e-4)
    return config, engine


def random_batch(config: Any) -> Any:
    """One microbatch of random tokens."""
    import torch

    from megagamma.data.contracts import Batch

    batch, length = config.data.micro_batch_size, config.data.sequence_length
    tokens = torch.randint(0, config.model.vocab_size, (batch, length + 1))
    positions = torch.arange(length).repeat(batch, 1)
    return Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), torch.ones(batch, length), positions)


def our_step(arguments: Sequence[str]) -> tuple[Step, dict[str, Any]]:
    """A step of ours, and facts of the model; `before_bytes` is what was resident before it was built."""
    from megagamma.environment import keep_freed_memory
    from megagamma.model import regions
    from megagamma.model.parameters import logical_parameters
    from megagamma.planning.drawing import resident_bytes
    from megagamma.planning.flops import flops_per_token, measure_matmul_peak
    from megagamma.training.assembly import fresh_engine

    keep_freed_memory()  # as a run does
    length = [] if any(word.startswith("--run.steps") for word in arguments) else [f"--run.steps={STEPS}"]
    config, runtime = join([*arguments, *length])
    importlib.import_module(_COMPILER)
    before = resident_bytes("VmRSS")
    engine = fresh_engine(config, runtime)
    engine.set_learning_rate(1e-4)
    data = config.data
    batches = [random_batch(config)] * (data.global_batch_size // (data.micro_batch_size * runtime.data_size))

    def step() -> None:
        engine.forward_backward(batches)
        engine.step()

    tokens = data.global_batch_size * data.sequence_length
    return step, {
        "parameters": sum(logical.numel for logical in logical_parameters(config.model)),
        "tokens": tokens,
        "flops": flops_per_token(config.model, data.sequence_length) * tokens,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "compiled": regions.are_compiled(),
        "zero_stage": engine.zero_stage,
        "matmul_peak": measure_matmul_peak(engine.dtype),
        "before_bytes": before,
    }


def peer_step(arguments: Sequence[str], compiled: bool, bf16: bool) -> tuple[Step, dict[str, Any]]:
    """A step of transformers' model, on several ranks under torch's DistributedDataParallel.

    Facts: the name of its class, and `before_bytes` as of ours.
    """
    import torch
    import transformers

    from megagamma.config.io import parse_config
    from megagamma.environment import keep_gloo_on_this_host, world_from_environment
    from megagamma.huggingface.formats import choose_format, export_config
    from megagamma.planning.drawing import resident_bytes

    ranks = world_from_environment().size
    config = parse_config([*COMMON, *arguments], world_size=ranks)
    target = choose_format(config.model)
    values = export_config(config, target, torch.float32, {}, {}) | {"use_cache": False}
    torch.manual_seed(0)
    getattr(transformers, target.architecture)  # imports the model's module
    importlib.import_module(_COMPILER)
    before = resident_bytes("VmRSS")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values))
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward: Any = torch.compile(model) if compiled else model
    if ranks > 1:
        keep_gloo_on_this_host()
        torch.distributed.init_process_group("gloo")
        forward = torch.nn.parallel.DistributedDataParallel(forward, gradient_as_bucket_view=True)
    batch = random_batch(config)

    def step() -> None:
        # The labels are given shifted, so that both models predict the same positions.
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = forward(input_ids=batch.tokens, shift_labels=batch.labels, labels=batch.tokens)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step, {"class": target.architecture, "before_bytes": before}


def measure(
    shape: str, rounds: int, peers: Sequence[str], extra: Sequence[str] = (), dtypes: Sequence[str] = ("fp32", "bf16")
) -> dict[str, Any]:
    """Tokens per second of every contender on one shape.

    Args:
        shape: see `shape_arguments`.
        rounds: turns of each contender.
        peers: names of `PEERS`.
        extra: options of ours alone.
        dtypes: of ours.

    Raises:
        MegagammaError: a contender ended by itself.

    Returns:
        Facts of the model; by contender the median and the tenth and ninetieth percentile of tokens per second, the seconds of
        its start, and of ours its ratio to the best peer of the same dtype, whether it is compiled, and its share of the
        matmul peak of its dtype; the ratio of our best to the best peer of all.
    """
    arguments = shape_arguments(shape)
    ours = {
        dtype: Contender(
            f"{OURS} {dtype}", our_step, [*arguments, f"--precision.dtype={dtype}", *extra], sleeping_threads=True
        )
        for dtype in dtypes
    }
    contenders = [*ours.values(), *(Contender(name, peer_step, arguments, *PEERS[name]) for name in peers)]
    facts = contenders[0].facts
    found: dict[str, dict[str, Any]] = {**speeds(in_turns(contenders, rounds), facts["tokens"])}
    for contender in contenders:
        found[contender.name]["start_seconds"] = contender.facts["start_seconds"]
        contender.close()

    def rate(name: str) -> float:
        return float(found[name]["tokens_per_second"])

    for dtype, contender in ours.items():
        values, peak = found[contender.name], contender.facts["matmul_peak"]
        rivals = [rate(name) for name in peers if PEERS[name][1] == (dtype == "bf16")]
        values["ratio"] = rate(contender.name) / max(rivals) if rivals else None
        values["compiled"], values["matmul_peak"] = contender.facts["compiled"], peak
        values["share_of_matmul_peak"] = facts["flops"] / facts["tokens"] * rate(contender.name) / peak
    best = max(map(rate, peers), default=None)
    return {
        "shape": shape, "parameters": facts["parameters"], "tokens": facts["tokens"], "contenders": found,
        "peer_class": contenders[-1].facts.get("class"),
        "ratio": max(rate(one.name) for one in ours.values()) / best if best else None,
    }  # fmt: skip
