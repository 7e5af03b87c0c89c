"""A step that is run twice gives the same to the bit, changes nothing, and names the rank and layer of a fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import RankPool
from support.synthetic import train_with
from support.train import batches, build_engine

from megagamma.training.callbacks.base import Callback


def zero(stage: int) -> tuple[str, ...]:
    return ("--deepspeed_config", f"configs/deepspeed/zero{stage}.json")


TENSOR, PIPELINE = ("--parallel.tensor", "2"), ("--parallel.pipeline", "2")


def replayed(arguments: list[str], threads: int = 1) -> list[Any]:
    """Losses, norms and weights of three steps that are replayed, against three that are not; problems first."""
    from megagamma.distributed.replay import replay

    found: list[list[Any]] = []
    problems: list[str | None] = []
    torch.set_num_threads(threads)
    for again in (True, False):
        torch.manual_seed(1)
        config, engine = build_engine([*arguments, "--run.threads", str(threads)])
        numbers: list[Any] = []
        for step in (1, 2, 3):
            engine.set_learning_rate(config.optimizer.lr)
            given = batches(config, engine, step)
            if again:
                loss, problem = replay(engine, given)
                problems.append(problem)
            else:
                loss = engine.forward_backward(given)
            assert engine.step()
            numbers += [loss, engine.grad_norm]
        numbers += [float(engine.state.get(tensor, "weight").double().square().sum()) for tensor in engine.map]
        numbers += [engine.state.step, float(torch.rand(()))]
        found.append(numbers)
        engine.close()
    torch.set_num_threads(1)
    return [problems, found[0] == found[1]]


@pytest.mark.parametrize(
    ("stage", "layout"),
    [
        (3, ()), (1, TENSOR),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (0, ()), (1, ()), (2, ()), (1, PIPELINE), (0, TENSOR), (3, TENSOR), (0, PIPELINE),
                (1, (*PIPELINE, "--parallel.virtual_pipeline", "2")),
                (1, ("--model.recompute", "full")), (2, ("--precision.dtype", "bf16")),
                (1, (*TENSOR, "--parallel.sequence", "true")),
            )
        ),
    ],
)  # fmt: skip
def test_a_replayed_step_is_the_step(two_ranks: RankPool, data_cache: str, stage: int, layout: tuple[str, ...]) -> None:
    arguments = ["--data.cache", data_cache, "--data.micro_batch_size", "2", *zero(stage), *layout]
    for problems, equal in two_ranks.run(replayed, arguments):
        assert problems == [None] * 3 and equal


@pytest.mark.slow
def test_a_cpu_with_threads_is_deterministic(one_rank: RankPool, data_cache: str) -> None:
    arguments = ["--data.cache", data_cache, "--model.hidden_size", "256", "--data.micro_batch_size", "4"]
    ((problems, equal),) = one_rank.run(replayed, arguments, 2)
    assert problems == [None] * 3 and equal


def bounded(arguments: list[str]) -> list[bool]:
    """Where a device is not deterministic: two runs agree, and a norm that is off by less or more than the bound."""
    from megagamma.distributed.replay import BOUNDS, _Trace

    config, engine = build_engine(arguments)
    traces = [_Trace(engine, exact=False) for _ in range(2)]
    for trace in traces:
        trace.run(batches(config, engine, 1))
        engine.discard()
    found = [traces[0].difference(traces[1]) is None]
    for factor in (0.5, 2.0):
        value = traces[1].values[7]
        traces[1].values[7] = value * (1 + factor * BOUNDS[torch.float32])
        found.append(traces[0].difference(traces[1]) is None)
        traces[1].values[7] = value
    engine.close()
    return found


def test_the_bound_where_a_device_is_not_deterministic(one_rank: RankPool, data_cache: str) -> None:
    assert one_rank.run(bounded, ["--data.cache", data_cache]) == [[True, True, False]]


class Fault(Callback):
    """On one rank, flips a bit once: of a layer's output or of the gradient at it, at a given pass through the layer."""

    def __init__(self, kind: str, rank: int, at: int) -> None:
        self.kind, self.rank, self.at = kind, rank, at
        self.passes = 0

    def begin(self) -> None:
        if self.session.runtime.rank == self.rank and self.kind:
            layer = self.engine.chunks[0].decoder.layers[1]
            layer.mlp.linear_fc1.register_forward_hook(self._hook)

    def _hook(self, _: Any, __: Any, output: Any) -> Any:
        values = output[0] if isinstance(output, tuple) else output
        self.passes += 1
        if self.passes != self.at or not values.requires_grad:
            return None
        if self.kind == "gradient":
            values.register_hook(_flipped)
            return None
        changed = values + (_flipped(values.detach()) - values.detach())
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _flipped(values: torch.Tensor) -> torch.Tensor:
    """A copy with a bit of the exponent of one number flipped."""
    values = values.clone()
    values.view(-1).view(torch.int32)[7] ^= 1 << 24
    return values


def faulty(arguments: list[str], kind: str, rank: int, at: int) -> tuple[int, str]:
    """Inside a rank: a run with the fault."""
    return train_with(arguments, lambda: [Fault(kind, rank, at)], first=True)


def run(folder: Path, *more: str) -> list[str]:
    rules = ("--validation.at_end", "false", "--guard.replica_interval", "0", "--data.micro_batch_size", "2")
    return ["--run.folder", str(folder), "--run.steps", "4", "--guard.replay_interval", "2", *rules, *more]


# With 8 samples on two ranks a step has two passes, its replay two more.
@pytest.mark.parametrize(
    ("kind", "layout", "named"),
    [
        ("output", zero(0), "rank 1 on * the output of layer 1 of microbatch 1"),
        ("gradient", zero(0), "rank 1 on * the gradient of model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj"),
        ("gradient", zero(3), "rank 1 on * the gradient of model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj"),
        ("gradient", TENSOR, "rank 1 on * the gradient of model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj"),
        pytest.param("output", PIPELINE, "rank 1 on * the output of layer 3 of microbatch", marks=pytest.mark.slow),
        pytest.param("gradient", zero(1), "rank 1 on * the gradient of model.layers.1.mlp", marks=pytest.mark.slow),
        pytest.param("gradient", zero(2), "rank 1 on * the gradient of model.layers.1.mlp", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_fault_is_named(tmp_path: Path, two_ranks: RankPool, kind: str, layout: tuple[str, ...], named: str) -> None:
    # The passes of step 1, then those of step 2 and of its replay, in which the fault is.
    passes = 4 if layout in (PIPELINE, TENSOR) else 2
    at = 2 * passes + 2
    given = run(tmp_path / "run", *layout)
    start, _, end = named.partition("*")
    for code, text in two_ranks.run(faulty, given, kind, 1, at):
        assert code == 3 and text.startswith("step 2: ") and start in text and end in text, text
        assert "differs between two runs of the same step" in text
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "replay"] == [2]
    # Negative control: the same run without the fault, and with the fault in a step that is not replayed.
    if layout == zero(0):
        assert two_ranks.run(faulty, run(tmp_path / "sound", *layout), "", 1, at) == [(0, "")] * 2
        assert two_ranks.run(faulty, run(tmp_path / "unseen", *layout), kind, 1, passes) == [(0, "")] * 2
