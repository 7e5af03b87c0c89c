"""A rehearsal against real builds of the same layout, against Megatron-core's own groups, and against mistakes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ranks import RankPool

from megagamma.cli import main_guard
from megagamma.commands import rehearse as command

ROOT = Path(__file__).resolve().parent.parent
SHAPE = [
    *("--data.corpus", "tiny", "--model.vocab_size", "500", "--model.hidden_size", "64", "--model.num_layers", "4"),
    *("--model.num_attention_heads", "4", "--model.num_query_groups", "2", "--model.ffn_hidden_size", "96"),
    *("--data.sequence_length", "32", "--data.micro_batch_size", "1", "--data.global_batch_size", "8"),
    "--precision.dtype=fp32",
]


def config_for(arguments: list[str], size: int) -> Any:
    from megagamma.config.io import parse_config

    return parse_config([*SHAPE, *arguments], world_size=size)


def real(arguments: list[str]) -> dict[str, Any]:
    """What this rank of a pool holds after a real start: by the rehearsal's own count, and by its tensors."""
    import torch

    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import world_from_environment
    from megagamma.planning.memory import plan
    from megagamma.rehearsal import held_tensors, start
    from megagamma.training.assembly import build

    world = world_from_environment()
    config = config_for(arguments, world.size)
    runtime = Runtime(config, world)
    stage = plan(config, world.size).zero_stage
    chunks, parameter_map = build(config, runtime, torch.bfloat16 if "bf16" in arguments else torch.float32)
    tensors = held_tensors(parameter_map)
    held, stopped = start(config, runtime, chunks, parameter_map, stage)
    assert not stopped
    return {
        "place": (runtime.tensor_rank, runtime.pipeline_rank),
        "data": runtime.data_rank,
        "held": held,
        "tensors": tensors,
    }


def rehearsed(arguments: list[str], size: int, ranks: list[int] | None = None) -> Any:
    """A rehearsal inside a pool's process."""
    from megagamma.distributed.runtime import Runtime
    from megagamma.rehearsal import rehearse

    Runtime.close()  # whatever a test before has left
    return rehearse(config_for(["--run.device", "cpu", *arguments], size), size, ranks, draws=False)


TWO = [
    "--deepspeed_config configs/deepspeed/zero2.json",
    "--deepspeed_config configs/deepspeed/zero3.json --model.hidden_size 63 --model.head_dim 16",
    "--parallel.tensor 2 --deepspeed_config configs/deepspeed/zero0.json --parallel.sequence true",
    "--parallel.pipeline 2 --model.tie_embeddings true --deepspeed_config configs/deepspeed/zero0.json",
    pytest.param("--parallel.pipeline 2 --parallel.virtual_pipeline 2 --precision.dtype bf16", marks=pytest.mark.slow),
    "--precision.dtype bf16 --model.hidden_size 62 --model.head_dim 16 --model.attention_gate headwise",
]
FOUR = [
    "--parallel.tensor 2 --parallel.pipeline 2 --precision.dtype bf16",
    '--parallel.tensor 2 --optimizer.lr_factors {"embedding":2.0} --model.hidden_size 62 --model.head_dim 16',
]


def compare(layout: str, one_rank: RankPool, pool: RankPool) -> None:
    """Names, shapes, slices and bytes of a rehearsal and of a real start, on every rank."""
    arguments, size = layout.split(), pool.size
    (found,) = one_rank.run(rehearsed, arguments, size, list(range(size)))
    assert found.problems == []
    started = {one.rank: one for one in found.started}
    for rank, there in enumerate(pool.run(real, arguments)):
        one = started[rank]
        assert ((one.tensor_rank, one.pipeline_rank), one.data_rank) == (there["place"], there["data"])
        assert found.tensors[there["place"]] == there["tensors"]
        assert one.held == there["held"]
    pads = "head_dim 16" in layout
    assert all(one.held.weights > 0 and (one.held.padding > 0) == pads for one in found.started)


@pytest.mark.parametrize("layout", TWO)
def test_a_rehearsal_holds_what_a_real_start_holds(layout: str, one_rank: RankPool, two_ranks: RankPool) -> None:
    compare(layout, one_rank, two_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR)
def test_on_four_ranks_too(layout: str, one_rank: RankPool, four_ranks: RankPool) -> None:
    compare(layout, one_rank, four_ranks)


def test_padding_is_counted() -> None:
    from megagamma.distributed.compat.deepspeed import padded_elements

    assert padded_elements([[5, 6], [8]], 1, 4) == [16, 8]
    assert padded_elements([[5, 6], [8]], 3, 4) == [16, 8]
    assert padded_elements([[5, 6, 5], [9]], 3, 4) == [24, 12]
    assert padded_elements([[5, 6], [9]], 0, 4) == [11, 9]


def groups_of_every_rank(size: int, tensor: int, pipeline: int, own_only: bool) -> list[set[tuple[int, ...]]]:
    """Ranks of every group that Megatron-core makes for each rank of a world."""
    import torch.distributed as dist

    from megagamma.distributed.compat.megatron import own_groups_only
    from megagamma.distributed.compat.torch import fake_world, process_groups
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import World

    Runtime.close()
    config = config_for(["--parallel.tensor", str(tensor), "--parallel.pipeline", str(pipeline)], size)
    found = []
    with own_groups_only() if own_only else contextlib.nullcontext():
        for rank in range(size):
            with fake_world(rank, size):
                runtime = Runtime(config, World(rank, size, 0, 1))
                groups = [tuple(dist.get_process_group_ranks(group)) for group in process_groups()]
                named = (runtime.tensor_group, runtime.data_group, runtime.model_group)
                found.append({*groups, *(("named", *dist.get_process_group_ranks(group)) for group in named)})
                Runtime.close()
    return found


def test_a_rank_that_skips_foreign_groups_has_the_same_groups(one_rank: RankPool) -> None:
    (whole,) = one_rank.run(groups_of_every_rank, 16, 2, 2, False)
    (own,) = one_rank.run(groups_of_every_rank, 16, 2, 2, True)
    assert own == whole
    assert whole[0] != whole[1] and ("named", 0, 1) in whole[0]


def fake_facts() -> dict[str, bool]:
    """What is needed of torch's fake process group and fake tensors."""
    import torch
    import torch.distributed as dist

    from megagamma.distributed.compat.torch import fake_tensors, fake_world
    from megagamma.distributed.runtime import Runtime

    Runtime.close()
    facts = {}
    with fake_world(5, 1000):
        facts["rank"] = (dist.get_rank(), dist.get_world_size()) == (5, 1000)
        dist.barrier()  # returns at once
        value = torch.ones(3)
        dist.all_reduce(value)
        facts["collectives change nothing"] = bool((value == 1).all())
        with fake_tensors():
            large = torch.nn.Linear(1 << 20, 1 << 20)  # 4 TiB
            facts["no memory"] = large.weight.nbytes == 1 << 42
            dist.broadcast(large.weight.data, 0)
            facts["moves nowhere"] = large.to("cpu") is large
        try:
            with fake_world(0, 2):
                facts["refused in a world"] = False
        except RuntimeError:
            facts["refused in a world"] = True
    facts["gone"] = not dist.is_initialized()
    facts["real again"] = float(torch.nn.Linear(1, 1).to(torch.float64).weight.double().abs()) >= 0
    return facts


def test_what_is_needed_of_fake_worlds_and_tensors(one_rank: RankPool) -> None:
    (facts,) = one_rank.run(fake_facts)
    assert all(facts.values()), facts


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


RANK_0 = "rank 0 (tensor 0, stage 0, data 0)"


def with_mistake(kind: str) -> list[str]:
    """Problems of a rehearsal into which a mistake was put."""
    from megagamma import rehearsal
    from megagamma.model import parameters
    from megagamma.planning import memory

    def wrong_part(*arguments: Any, **named: Any) -> Any:
        part = whole_part(*arguments, **named)
        if part.logical.name == "model.layers.2.mlp.down_proj.weight":
            return parameters.Part(part.logical, (0, 0), part.rows, part.columns)
        return part

    def wrong_plan(config: Any) -> list[int]:
        return [count + 1 for count in whole_plan(config)]

    def no_start(*_: Any) -> None:
        raise NotImplementedError("this cannot be done with fake tensors")

    whole_part, whole_plan = parameters._parts_of_split, memory.stage_parameters
    place: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "part": (parameters, "_parts_of_split", wrong_part),
        "plan": (memory, "stage_parameters", wrong_plan),
        "start": (rehearsal, "Engine", no_start),
    }
    with replaced(*place[kind]):
        return rehearsed(["--parallel.tensor", "2", "--parallel.pipeline", "2"], 8).problems


@pytest.mark.parametrize(
    ("kind", "messages"),
    [
        ("part", ["model.layers.2.mlp.down_proj.weight: two ranks hold the same of axis 1: 0 to 47 of tensor rank 0 on"]),
        ("plan", [f"{RANK_0} has 51,520 parameters, the memory plan says 51,521", f"{RANK_0} holds "]),
        ("start", [f"{RANK_0}: the start stopped at ", "rank 4 (tensor 0, stage 1, data 0): the start"]),
    ],
)  # fmt: skip
def test_mistakes_are_noticed(kind: str, messages: list[str], one_rank: RankPool) -> None:
    (problems,) = one_rank.run(with_mistake, kind)
    for message in messages:
        assert any(problem.startswith(message) for problem in problems), problems
    if kind == "start":
        assert "test_rehearsal.py:" in problems[0] and "NotImplementedError: this cannot be done" in problems[0]


def run_command(arguments: list[str]) -> tuple[int, str, str]:
    from megagamma.distributed.runtime import Runtime

    Runtime.close()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main_guard(lambda: command.main([*SHAPE, "--precision.dtype=auto", *arguments]))
    return code, out.getvalue(), err.getvalue()


def test_the_command_prints_a_table_and_json(one_rank: RankPool) -> None:
    layout = ["--parallel.tensor", "2", "--parallel.pipeline", "4", "--world_size", "16", "--ranks", "0,7,13"]
    ((code, out, err),) = one_rank.run(run_command, layout)
    assert (code, err) == (0, "")
    for text in ("16 ranks = tensor 2 x pipeline 4 x data 2, ZeRO 1, bf16", "built     8 ranks", "started   3 ranks", "equal",
                 "drawn     ", "OK        every matrix"):  # fmt: skip
        assert text in out
    ((code, out, err),) = one_rank.run(run_command, [*layout, "--json", "--no_draw"])
    found = json.loads(out)
    assert (code, found["problems"], found["drawing"], found["data"]) == (0, [], None, 2)
    assert [(one["rank"], one["tensor_rank"], one["pipeline_rank"], one["data_rank"]) for one in found["started"]] == [
        (0, 0, 0, 0), (7, 1, 1, 1), (13, 1, 3, 0),
    ]  # fmt: skip


def wrong_command() -> tuple[int, str, str]:
    from megagamma.planning import memory

    whole = memory.stage_parameters
    with replaced(memory, "stage_parameters", lambda config: [count + 2 for count in whole(config)]):
        return run_command(["--no_draw"])


def test_the_exit_code_is_1_when_a_check_fails(one_rank: RankPool) -> None:
    ((code, out, _err),) = one_rank.run(wrong_command)
    assert code == 1 and "WRONG     rank 0 (tensor 0, stage 0, data 0) has" in out and "OK" not in out
    assert "nothing (--no_draw)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parallel.tensor", "3"], "parallel.tensor=3 must divide model.num_query_groups=2: use 1 or 2"),
        (
            ["--parallel.tensor", "2", "--world_size", "7"],
            "must divide the number of processes, 7: start a multiple of 2",
        ),
        (["--ranks", "0,x"], "ranks=0,x: must be whole numbers with commas between them"),
        (["--world_size", "2", "--ranks", "2"], "ranks=2 must be a rank of the world: use 0 to 1"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Found before any world is made, so that it needs no process of its own."""
    assert main_guard(lambda: command.main([*SHAPE, "--precision.dtype=auto", *arguments])) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("error:") == 1 and len(err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.launcher
def test_70b_on_8192_ranks() -> None:
    """In a minute and less than 2 GB, on one machine."""
    program = (
        "import resource, sys\nfrom megagamma.commands.rehearse import main\ncode = main(sys.argv[1:])\n"
        "print('KiB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\nsys.exit(code)"
    )
    command_line = [
        *(sys.executable, "-c", program, "--config", "configs/model/70b.yaml", "--model.vocab_size", "32000"),
        *(
            "--parallel.tensor",
            "8",
            "--parallel.pipeline",
            "16",
            "--world_size",
            "8192",
            "--data.micro_batch_size",
            "1",
        ),
        *("--data.global_batch_size", "1024"),
    ]
    begin = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        command_line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8,192 ranks = tensor 8 x pipeline 16 x data 64" in done.stdout and "built     128 ranks" in done.stdout
    assert done.stdout.count("equal") == 16
    assert int(done.stdout.split()[-1]) * 1024 < 2e9
    assert time.perf_counter() - begin < 240  # some 15 s on two idle cores
