"""What is needed of the private names of torch, Megatron-core and DeepSpeed: an upgrade that lacks one fails here."""

from __future__ import annotations

import gc
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.processes import attempt
from support.ranks import RankPool
from support.train import batches, build_engine, train_steps


def zero(stage: int) -> list[str]:
    return ["--deepspeed_config", f"configs/deepspeed/zero{stage}.json"]


def _process_groups() -> dict[str, bool]:
    import torch.distributed as dist

    from megagamma.distributed.compat.torch import process_groups

    before = process_groups()
    group = dist.new_group([0, 1])
    made = process_groups() - before
    dist.barrier()  # one that leaves while the other still connects would break its connection
    dist.destroy_process_group(group)
    return {"seen": made == {group}, "gone": process_groups() == before}


def test_torch_lists_its_process_groups(two_ranks: RankPool, data_cache: str) -> None:
    two_ranks.run(_engine_facts, ["--data.cache", data_cache])  # forms the world's group
    for found in two_ranks.run(_process_groups):
        assert all(found.values()), found


def test_megatron_names_cuda_where_it_is_redirected() -> None:
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random as megatron_random

    source = inspect.getsource(schedules)
    assert "torch.zeros(" in source, "the schedules make no tensor of their own any more: the redirection may go"
    for name in ("_get_cuda_rng_state", "_set_cuda_rng_state", "get_cuda_rng_tracker"):
        assert hasattr(megatron_random, name), name
    assert isinstance(megatron_random.get_cuda_rng_tracker().states_, dict)


def test_megatron_calls_what_our_modules_override() -> None:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.attention import Attention, SelfAttention

    attention = inspect.getsource(Attention.forward)
    assert "self._apply_output_gate(" in attention and "self.get_query_key_value_tensors(" in attention
    assert "output_gate" in inspect.signature(SelfAttention.get_query_key_value_tensors).parameters
    assert "rotary_pos_emb" in inspect.signature(Attention.forward).parameters
    source = inspect.getsource(GPTModel)
    assert "self.rotary_pos_emb(" in source and "self.rotary_pos_emb.get_rotary_seq_len(" in source
    assert "self.compute_language_model_loss(" in source


def test_the_schedule_divides_by_the_number_of_microbatches() -> None:
    from megatron.core.pipeline_parallel import schedules

    assert "output_tensor /= num_microbatches" in inspect.getsource(schedules)


def _engine_facts(arguments: list[str]) -> dict[str, Any]:
    """What the compat module reads of a live engine, and its norm against one that is added up in float64."""
    import math

    import torch

    from megagamma.distributed.compat import deepspeed as compat

    config, engine = build_engine(arguments)
    stage, optimizer = engine.zero_stage, engine.optimizer
    facts: dict[str, Any] = {
        "moments": engine.state.adam.state[engine.state.flat_parameters()[0]]["exp_avg"].numel() > 0
    }
    if stage:
        flat = compat.flat_parameters(optimizer, stage)
        facts["masters are fp32"] = all(one.dtype == torch.float32 for one in flat)
        facts["masters have state"] = all(one in optimizer.optimizer.state for one in flat)
    partitioned = [tensor.is_partitioned for tensor in engine.map]
    facts["partitioned"] = all(partitioned) if stage == 3 else not any(partitioned)
    engine.set_learning_rate(0.0)
    engine.forward_backward(batches(config, engine, 1))
    expected = math.nan
    if hasattr(optimizer, "get_grads_for_norm"):
        gradients, _experts = optimizer.get_grads_for_norm()
        expected = math.sqrt(sum(float(one.double().square().sum()) for one in gradients))
    assert engine.step()
    facts["norm"] = math.isnan(expected) or math.isclose(engine.grad_norm, expected, rel_tol=1e-6)
    facts["bf16 optimizer"] = hasattr(optimizer, "get_grads_for_norm")
    engine.close()
    return facts


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_optimizers(two_ranks: RankPool, data_cache: str, stage: int, dtype: str) -> None:
    if (stage, dtype) == (0, "bf16"):
        pytest.skip("ZeRO 0 keeps no masters: refused by the config's rules")
    given = ["--data.cache", data_cache, "--precision.dtype", dtype, *zero(stage)]
    for facts in two_ranks.run(_engine_facts, given):
        assert facts.pop("bf16 optimizer") == (stage == 1 and dtype == "bf16")
        assert all(facts.values()), facts


def test_spared_passes_change_nothing(one_rank: RankPool, data_cache: str) -> None:
    """Gradients and weights to the bit of DeepSpeed's own way, over several microbatches, dropped gradients included."""
    given = ["--data.cache", data_cache, "--precision.dtype", "bf16", "--data.micro_batch_size", "4", *zero(1)]
    ours, theirs, broken = (one_rank.run(_bf16_steps, given, how)[0] for how in ("ours", "theirs", "broken"))
    assert ours == theirs
    assert ours != broken, "negative control: gradients that are not cleared are seen"


def _bf16_steps(arguments: list[str], how: str) -> list[float]:
    from megagamma.distributed.compat import deepspeed as compat

    kept = compat._spare_passes_over_gradients
    if how != "ours":
        compat._spare_passes_over_gradients = lambda engine, optimizer: None
    try:
        config, engine = build_engine(arguments)
    finally:
        compat._spare_passes_over_gradients = kept
    if how == "broken":
        engine.optimizer.clear_hp_grads = lambda: None
    numbers: list[float] = []
    for step in range(1, 5):
        engine.set_learning_rate(config.optimizer.lr)
        numbers.append(engine.forward_backward(batches(config, engine, step)))
        if step == 2:
            engine.discard()
            continue
        assert engine.step()
        numbers.append(engine.grad_norm)
    for tensor in engine.map:
        numbers.append(float(engine.state.get(tensor, "weight").double().square().sum()))
    engine.close()
    return numbers


def test_deepspeed_prints_nothing(two_ranks: RankPool, data_cache: str) -> None:
    for printed in two_ranks.run(_printed, ["--data.cache", data_cache, "--precision.dtype", "bf16", *zero(1)]):
        assert printed == ""


def _printed(arguments: list[str]) -> str:
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        _config, engine = build_engine(arguments)
    engine.close()
    return text.getvalue()


def test_megatron_is_imported_without_the_compiler() -> None:
    """And what it decorates is compiled at its first call, once, with its options."""
    program = (
        "import sys, torch\n"
        "from megagamma.distributed.compat.megatron import preload\n"
        "from megagamma.distributed.compat.torch import _compiled_when_called\n"
        "whole = torch.compile\n"
        "preload()\n"
        "from megatron.core.fusions import fused_bias_geglu\n"
        "print(torch.compile is whole, 'torch._inductor.compile_fx' in sys.modules)\n"
        "calls = []\n"
        "torch.compile = lambda function, **options: calls.append(options) or (lambda x: function(x) + 1)\n"
        "double = _compiled_when_called(backend='eager')(lambda x: 2 * x)\n"
        "print(len(calls), double(3), double(4), calls, fused_bias_geglu.geglu.__name__)\n"
        "torch.compile = whole\n"
        "from torch._inductor import compile_fx\n"
        "print('torch._inductor.compile_fx' in sys.modules)\n"  # negative control
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines == ["True False", "0 7 9 [{'backend': 'eager'}] geglu", "True"], lines


@pytest.mark.launcher
def test_a_run_loads_neither_compiler_nor_wandb(root: Path, data_cache: str, tmp_path: Path) -> None:
    """Each takes a second or more at the start, and optimizers and Megatron-core would load them to no use."""
    program = (
        "import sys\n"
        "from megagamma.pretrain import main\n"
        "code = main(sys.argv[1:])\n"
        "print(code, sorted({'torch._dynamo', 'torch._inductor', 'wandb', 'deepspeed', 'megatron.core'} & {*sys.modules}))\n"
        "import wandb\n"  # can still be had
        "print(wandb.__name__)\n"
    )
    arguments = [
        "--config=configs/smoke.yaml",
        "--run.steps=2",
        "--precision.dtype=bf16",
        f"--run.folder={tmp_path / 'run'}",
    ]
    command = [sys.executable, "-c", program, *arguments, f"--data.cache={data_cache}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=root)
    assert done.stdout.splitlines()[-2:] == ["0 ['deepspeed', 'megatron.core']", "wandb"], done.stderr[-2000:]
    assert "untested optimizer" not in done.stdout + done.stderr


def _threads_after(arguments: list[str], fails: bool) -> int:
    if fails:
        assert attempt([*arguments, "--guard.on_nan", "stop"], train=True)[0] == "TrainingError"
    else:
        train_steps(arguments, 1)
    gc.collect()
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted where Linux lists them")
@pytest.mark.parametrize("fails", [False, True])
def test_an_engine_that_is_done_leaves_no_groups(
    two_ranks: RankPool, data_cache: str, tmp_path: Path, fails: bool
) -> None:
    """Under ZeRO 3 the engine itself stays; with its process groups it left 45 threads."""
    arguments = ["--data.cache", data_cache, *zero(3), "--run.folder", str(tmp_path / "run"), "--optimizer.lr", "1e9"]
    first, second = (two_ranks.run(_threads_after, arguments, fails)[0] for _ in range(2))
    assert second == first
