"""Ours against torch's data parallelism, and the share of a step that is a run's callbacks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from megagamma.benchmarks.contenders import Contender, Step, in_turns, speeds
from megagamma.benchmarks.training import OURS, our_step, peer_step, preset, shape_arguments
from megagamma.scaling.paired import interval

DDP = "transformers fp32, torch DDP"
RANKS = 2
"""Data-parallel processes, of one thread each."""


def measure_ranks(shape: str, rounds: int, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Tokens per second of `RANKS` data-parallel ranks: ours by ZeRO stage and dtype, the peer in fp32 under torch's DDP.

    Args:
        shape: see `shape_arguments`; every rank has its 4 sequences.
        rounds: turns of each contender.
        extra: options of ours alone.
    """
    arguments = [*shape_arguments(shape), f"--data.global_batch_size={4 * RANKS}", "--data.micro_batch_size=4"]
    # By default ours shards the optimizer, which DDP does not.
    like_ddp = ["--precision.dtype=fp32", f"--deepspeed_config={preset('deepspeed/zero0', 'json')}"]
    ours = {
        f"{OURS} fp32, ZeRO 0": like_ddp,
        **{f"{OURS} {dtype}, ZeRO 1": [f"--precision.dtype={dtype}"] for dtype in ("fp32", "bf16")},
    }
    contenders = [
        Contender(name, our_step, [*arguments, *options, *extra], ranks=RANKS, sleeping_threads=True)
        for name, options in ours.items()
    ]
    contenders.append(Contender(DDP, peer_step, arguments, False, False, ranks=RANKS))
    return _compare(contenders, rounds, DDP, shape)


def _compare(contenders: Sequence[Contender], rounds: int, reference: str, shape: str) -> dict[str, Any]:
    """Speeds of all by name, and their ratios to the reference."""
    tokens = contenders[0].facts["tokens"]
    found = speeds(in_turns(contenders, rounds), tokens)
    for contender in contenders:
        contender.close()
    rate = found[reference]["tokens_per_second"]
    return {
        "shape": shape, "parameters": contenders[0].facts["parameters"], "tokens": tokens, "contenders": found,
        "reference": reference,
        "zero_stages": {one.name: one.facts["zero_stage"] for one in contenders if "zero_stage" in one.facts},
        "ratios": {name: values["tokens_per_second"] / rate for name, values in found.items() if name != reference},
    }  # fmt: skip


def callbacks_step(folder: str, extra: Sequence[str]) -> tuple[Step, dict[str, Any]]:
    """A step of a run of configs/demo.yaml, on the embedded corpus `tiny`, that measures the share of it that is neither its
    passes nor its update: the standard callbacks.

    Validation is off, and nothing is saved: both are work of their own, which users ask for by an interval.
    """
    from megagamma.config.io import parse_config
    from megagamma.environment import keep_freed_memory, world_from_environment
    from megagamma.job import prepare
    from megagamma.training.callbacks.standard import standard_callbacks
    from megagamma.training.loop import Trainer

    world = world_from_environment()
    keep_freed_memory()
    arguments = [
        *("--config", preset("demo"), "--run.device=cpu", f"--run.folder={folder}/run", "--run.steps=1000000"),
        *("--data.corpus=tiny", f"--data.cache={folder}/data", "--model.vocab_size=4096"),
        *(f"--data.micro_batch_size={16 // world.size}", "--validation.interval=0", *extra),
    ]
    config = parse_config(arguments, world_size=world.size)
    session = prepare(config, world)
    trainer = Trainer(session, standard_callbacks(config))
    for callback in trainer.callbacks:
        callback.begin()
    engine: Any = session.engine
    needed = 0.0

    def timed(action: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal needed
            begin = time.perf_counter()
            try:
                return action(*arguments)
            finally:
                needed += time.perf_counter() - begin

        return call

    engine.forward_backward, engine.step = timed(engine.forward_backward), timed(engine.step)

    def step() -> float:
        nonlocal needed
        begin, needed = time.perf_counter(), 0.0
        trainer._train_step()
        return 1.0 - needed / (time.perf_counter() - begin)

    return step, {}


def measure_overhead(steps: int, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Share of a step on `RANKS` ranks that is metrics, guard, replica check and the other standard callbacks.

    What they wait for another rank counts too.

    Args:
        steps: measured; a multiple of 100 holds every default interval a whole number of times.
        extra: options of the run, such as its shape.
    """
    with tempfile.TemporaryDirectory() as folder:
        contender = Contender(
            "a run with callbacks", callbacks_step, folder, list(extra), ranks=RANKS, sleeping_threads=True
        )
        shares = contender.run(steps)
        contender.close()
    mean, low, high = interval(shares)
    return {"steps": steps, "share_of_a_step": mean, "low": low, "high": high}
