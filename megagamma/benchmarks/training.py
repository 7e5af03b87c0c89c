"""Training steps of ours and of transformers.

The peers are the class of transformers that our model exports to (LlamaForCausalLM; with gate and q/k-norm
Qwen3_5ForCausalLM), of the same shape, under torch's fused AdamW with clipping: eager and compiled, in fp32 and under bf16
autocast. All get the same tokens and threads.
"""

from __future__ import annotations

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
# Of ours and of the peers.
_COMMON = [
    "--run.steps=20000",
    "--data.global_batch_size=4",
    "--data.micro_batch_size=4",
    "--data.corpus=tiny",
    "--model.vocab_size=4096",
]


def preset(name: str) -> str:
    """Path of a config of the source tree, such as model/17m."""
    return str(source_tree() / "configs" / f"{name}.yaml")


def shape_arguments(shape: str) -> list[str]:
    """Options of a shape: `toy`, `demo` (configs/demo.yaml), or a preset of configs/model, with 4 sequences a step.

    Its name may end in `-gated`; without that it has neither gate nor q/k-norm, as Llama.
    """
    name = shape.removesuffix(GATED)
    recipe = [] if shape.endswith(GATED) else ["--model.attention_gate=none", "--model.qk_norm=false"]
    if name == "toy":
        return [*(f"--{option}={value}" for option, value in _TOY.items()), *recipe]
    return ["--config", preset("demo" if name == "demo" else f"model/{name}"), *recipe]


def build(arguments: Sequence[str]) -> tuple[Any, Any]:
    """(config, engine) of a filled model on this process's CPU, without data."""
    from megagamma.config.io import parse_config
    from megagamma.distributed.runtime import Runtime
    from megagamma.training.assembly import fresh_engine

    config = parse_config([*_COMMON, "--run.device=cpu", *arguments])
    engine = fresh_engine(config, Runtime(config))
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
    """A step of ours, and facts of the model."""
    from megagamma.environment import keep_freed_memory
    from megagamma.model.parameters import logical_parameters
    from megagamma.planning.flops import flops_per_token, measure_matmul_peak

    keep_freed_memory()  # as a run does
    config, engine = build(arguments)
    batch = random_batch(config)

    def step() -> None:
        engine.forward_backward([batch])
        engine.step()

    data = config.data
    tokens = data.global_batch_size * data.sequence_length
    return step, {
        "parameters": sum(logical.numel for logical in logical_parameters(config.model)),
        "tokens": tokens,
        "flops": flops_per_token(config.model, data.sequence_length) * tokens,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "matmul_peak": measure_matmul_peak(engine.dtype),
    }


def peer_step(arguments: Sequence[str], compiled: bool, bf16: bool) -> tuple[Step, dict[str, Any]]:
    """A step of transformers' model; facts: the name of its class."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megagamma.config.io import parse_config
    from megagamma.huggingface.formats import choose_format, export_config

    config = parse_config([*_COMMON, *arguments])
    target = choose_format(config.model)
    values = export_config(config, target, torch.float32, {}, {}) | {"use_cache": False}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if compiled else model
    batch = random_batch(config)

    def step() -> None:
        # The labels are given shifted, so that both models predict the same positions.
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = forward(input_ids=batch.tokens, shift_labels=batch.labels, labels=batch.tokens)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step, {"class": target.architecture}


def measure(shape: str, rounds: int, peers: Sequence[str], extra: Sequence[str] = ()) -> dict[str, Any]:
    """Tokens per second of every contender on one shape.

    Args:
        shape: see `shape_arguments`.
        rounds: turns of each contender.
        peers: names of `PEERS`.
        extra: options of ours alone.

    Raises:
        MegagammaError: a contender ended by itself.

    Returns:
        Facts of the model, and by contender the median and the tenth and ninetieth percentile of tokens per second.
    """
    arguments = shape_arguments(shape)
    ours = Contender(OURS, our_step, [*arguments, *extra], sleeping_threads=True)
    contenders = [ours, *(Contender(name, peer_step, arguments, *PEERS[name]) for name in peers)]
    facts = dict(ours.facts)
    found = speeds(in_turns(contenders, rounds), facts["tokens"])
    for contender in contenders:
        found[contender.name]["start_seconds"] = contender.facts["start_seconds"]
        contender.close()
    del facts["start_seconds"]
    best = max(peers, key=lambda name: found[name]["tokens_per_second"], default=None)
    rate = found[OURS]["tokens_per_second"]
    return {
        "shape": shape, **facts, "contenders": found, "best_peer": best,
        "peer_class": contenders[-1].facts.get("class"),
        "ratio": rate / found[best]["tokens_per_second"] if best else None,
        "share_of_matmul_peak": facts["flops"] / facts["tokens"] * rate / facts["matmul_peak"],
    }  # fmt: skip
