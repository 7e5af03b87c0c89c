"""Training steps of ours and of transformers, each in a process of its own, in turns.

The peers are Hugging Face's LlamaForCausalLM of the same shape under torch's fused AdamW with clipping: eager and compiled,
in fp32 and under bf16 autocast. All get the same tokens and threads. A process of its own gives each the allocator and the
OpenMP settings that it has in use; taking turns gives all the same share of a noisy machine.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from megagamma.cli import source_tree

PEERS = {
    "transformers fp32": (False, False),
    "transformers fp32, compiled": (True, False),
    "transformers bf16": (False, True),
    "transformers bf16, compiled": (True, True),
}
"""(compiled, bf16 autocast) of each."""
OURS = "megagamma"
# A model of 100,000 weights, as toys are: what a step costs there is Python and launches.
_TOY = {
    "model.hidden_size": 64, "model.num_layers": 2, "model.num_attention_heads": 4, "model.head_dim": 16,
    "model.ffn_hidden_size": 128, "model.vocab_size": 128, "data.sequence_length": 32,
    "data.global_batch_size": 32, "data.micro_batch_size": 32,
}  # fmt: skip
_WARM_UP = 3  # steps; the first compiles


def preset(name: str) -> str:
    """Path of a config of the source tree, such as model/17m."""
    return str(source_tree() / "configs" / f"{name}.yaml")


def shape_arguments(shape: str) -> list[str]:
    """Options of a shape: `toy`, `demo` (configs/demo.yaml), or a preset of configs/model, with 4 sequences a step."""
    if shape == "toy":
        return [f"--{name}={value}" for name, value in _TOY.items()]
    if shape == "demo":
        return ["--config", preset("demo")]
    return ["--config", preset(f"model/{shape}")]


def build(arguments: Sequence[str]) -> tuple[Any, Any]:
    """(config, engine) of a filled model on this process's CPU, without data."""
    from megagamma.config.io import parse_config
    from megagamma.distributed.runtime import Runtime
    from megagamma.training.assembly import fresh_engine

    common = ["--data.corpus", "tiny", "--model.vocab_size", "4096", "--run.device", "cpu"]
    batch = ["--data.global_batch_size", "4", "--data.micro_batch_size", "4"]
    config = parse_config([*batch, *common, *arguments])
    engine = fresh_engine(config, Runtime(config))
    engine.set_learning_rate(1e-4)
    return config, engine


def random_batch(config: Any) -> Any:
    """One microbatch of random tokens."""
    import torch

    from megagamma.data.contracts import Batch

    batch, length = config.data.global_batch_size, config.data.sequence_length
    tokens = torch.randint(0, config.model.vocab_size, (batch, length + 1))
    positions = torch.arange(length).repeat(batch, 1)
    return Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), torch.ones(batch, length), positions)


def _our_step(arguments: Sequence[str]) -> tuple[Callable[[], None], dict[str, Any]]:
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


def _peer_step(arguments: Sequence[str], compiled: bool, bf16: bool) -> tuple[Callable[[], None], dict[str, Any]]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megagamma.config.io import parse_config

    config = parse_config(
        ["--data.global_batch_size", "4", "--data.corpus", "tiny", "--model.vocab_size", "4096", *arguments]
    )
    model: Any = config.model
    length = config.data.sequence_length
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size, hidden_size=model.hidden_size, intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers, num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups, head_dim=model.head_dim, max_position_embeddings=length,
            rms_norm_eps=model.norm_epsilon, tie_word_embeddings=model.tie_embeddings, use_cache=False,
        )
    )  # fmt: skip
    adam = torch.optim.AdamW(llama.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(llama) if compiled else llama
    batch = random_batch(config)

    def step() -> None:
        # The labels are given shifted, so that both models predict the same positions.
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = forward(input_ids=batch.tokens, shift_labels=batch.labels, labels=batch.tokens)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step, {}


def _work(connection: Connection, name: str, arguments: Sequence[str]) -> None:
    from megagamma.environment import choose_threads, let_waiting_threads_sleep

    if name == OURS:
        let_waiting_threads_sleep()  # as a run does, before torch is imported
    import torch

    torch.set_num_threads(choose_threads(0, 1))
    begin = time.perf_counter()
    step, facts = _our_step(arguments) if name == OURS else _peer_step(arguments, *PEERS[name])
    for _ in range(_WARM_UP):
        step()
    connection.send({**facts, "start_seconds": time.perf_counter() - begin})
    while (count := connection.recv()) is not None:
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        connection.send(seconds)


def measure(shape: str, rounds: int, peers: Sequence[str], extra: Sequence[str] = ()) -> dict[str, Any]:
    """Tokens per second of every contender on one shape.

    Args:
        shape: see `shape_arguments`.
        rounds: turns of each contender, of about half a second.
        peers: names of `PEERS`.
        extra: options of ours alone.

    Returns:
        Facts of the model, and by contender the median and the tenth and ninetieth percentile of tokens per second.
    """
    plain = ["--model.attention_gate", "none", "--model.qk_norm", "false"]
    arguments = [*shape_arguments(shape), *plain]
    start = multiprocessing.get_context("spawn")
    ends, processes = {}, []
    for name in (OURS, *peers):
        ours, theirs = start.Pipe()
        process = start.Process(
            target=_work, args=(theirs, name, [*arguments, *extra] if name == OURS else arguments), daemon=True
        )
        process.start()
        theirs.close()
        ends[name] = ours
        processes.append(process)
        if name == OURS:
            facts = ours.recv()
            started = {name: facts.pop("start_seconds")}
        else:
            started[name] = ours.recv()["start_seconds"]
    times: dict[str, list[float]] = {name: [] for name in ends}
    counts: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, end in ends.items():
            end.send(counts.get(name, 1))
            seconds = end.recv()
            if number:
                times[name] += seconds
            else:
                counts[name] = max(1, min(50, round(0.5 / seconds[0])))
    for end, process in zip(ends.values(), processes, strict=True):
        end.send(None)
        process.join()
    speeds = {name: sorted(facts["tokens"] / value for value in values) for name, values in times.items()}
    contenders = {
        name: {
            "tokens_per_second": statistics.median(values),
            "low": values[len(values) // 10],
            "high": values[-1 - len(values) // 10],
            "start_seconds": started[name],
        }
        for name, values in speeds.items()
    }
    best = max(peers, key=lambda name: contenders[name]["tokens_per_second"], default=None)
    rate = contenders[OURS]["tokens_per_second"]
    return {
        "shape": shape, **facts, "contenders": contenders, "best_peer": best,
        "ratio": rate / contenders[best]["tokens_per_second"] if best else None,
        "share_of_matmul_peak": facts["flops"] / facts["tokens"] * rate / facts["matmul_peak"],
    }  # fmt: skip
