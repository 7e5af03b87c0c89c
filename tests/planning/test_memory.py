"""The memory plan against formulas worked out by hand, against autograd, and against real steps."""

from pathlib import Path

import pytest
from support.memory import kept_by_autograd, measure_step
from support.ranks import RankPool
from support.shapes import small

from megagamma.config.io import parse_config
from megagamma.config.resolve import resolve
from megagamma.config.schema import Config
from megagamma.errors import ConfigurationError
from megagamma.planning.flops import parameter_counts
from megagamma.planning.memory import (
    GIB,
    OVERHEAD_BYTES,
    check_fits,
    layer_activation_bytes,
    nearest_fit,
    plan,
    stage_activation_bytes,
    stage_memory,
    stage_parameters,
)

ROOT = Path(__file__).resolve().parents[2]


def layout(model=None, tensor=1, pipeline=1, **data):
    config = Config()
    config.model = model or small(num_layers=4)
    config.data.corpus = "tiny"
    config.parallel.tensor, config.parallel.pipeline = tensor, pipeline
    config.data.sequence_length, config.data.micro_batch_size, config.data.global_batch_size = 128, 2, 32
    for key, value in data.items():
        setattr(config.data, key, value)
    return resolve(config)


def test_stages_hold_the_whole_model_between_them():
    config = layout()
    total = parameter_counts(config.model).total
    assert stage_parameters(config) == [total]
    config = layout(pipeline=2)
    first, last = stage_parameters(config)
    assert first + last == total
    assert last - first == 64  # the final norm
    config = layout(small(num_layers=4, tie_embeddings=True), pipeline=4)
    tied = stage_parameters(config)
    assert sum(tied) == parameter_counts(config.model).total + 256 * 64  # a second copy for the head
    assert tied[1] == tied[2] == tied[0] - 256 * 64


def test_tensor_parallel_ranks_share_the_matrices_and_repeat_the_norms():
    config = layout(tensor=2)
    counts = parameter_counts(config.model)
    norms = counts.by_role["norm"]
    assert stage_parameters(config) == [(counts.total - norms) // 2 + norms]


@pytest.mark.parametrize(
    ("stage", "dtype_bytes", "per_parameter"),
    [
        (0, 4, (4, 4, 8)),
        (1, 4, (4, 4, 12 / 8)),
        (1, 2, (2, 4, 12 / 8)),
        (2, 2, (2, 4 / 8, 12 / 8)),
        (3, 2, (2 / 8, 4 / 8, 12 / 8)),
        (3, 4, (4 / 8, 4 / 8, 12 / 8)),
    ],
)
def test_bytes_by_zero_stage(stage, dtype_bytes, per_parameter):
    config = layout(micro_batch_size=2)
    n = parameter_counts(config.model).total
    values = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, "stage3_max_live_parameters": 3000}}
    found = stage_memory(config, 0, 8, dtype_bytes, values)
    assert (found.weights_bytes, found.gradients_bytes, found.optimizer_bytes) == pytest.approx(
        tuple(n * x for x in per_parameter)
    )
    # ZeRO 3 has two buckets, since it overlaps, and gathered weights.
    bucket = {0: 0, 1: dtype_bytes == 4, 2: 1, 3: 2}[stage]
    assert found.buffers_bytes == (1000 * bucket + 3000 * (stage == 3)) * dtype_bytes
    away = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    host = stage_memory(config, 0, 8, dtype_bytes, {"zero_optimization": {**values["zero_optimization"], **away}})
    moved = (0, found.optimizer_bytes, found.gradients_bytes, found.weights_bytes)
    assert host.offloaded_bytes == pytest.approx(sum(moved[: stage + 1]))
    kept = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
    assert sum(getattr(found, name) - getattr(host, name) for name in kept) == pytest.approx(host.offloaded_bytes)


def test_buffers_of_a_cpu_are_what_is_written_of_them():
    config = layout()
    n = parameter_counts(config.model).total
    for stage, bytes_expected in ((1, 0), (2, 0), (3, 2 * 4 * n)):
        values = {"zero_optimization": {"stage": stage}}
        assert stage_memory(config, 0, 2, 4, values, "cpu").buffers_bytes == bytes_expected
        assert stage_memory(config, 0, 2, 4, values, "cuda").buffers_bytes >= 4 * 5e8


def test_the_fuller_moment_counts():
    config = layout(micro_batch_size=1, sequence_length=8, global_batch_size=1)
    few = stage_memory(config, 0, 1, 4, {"zero_optimization": {"stage": 1}}, "cpu")
    assert few.items().keys() == {"weights", "optimizer", "gradients", "update", "buffers", "overhead"}
    config.data.sequence_length = 4096
    one = stage_memory(config, 0, 1, 4, {"zero_optimization": {"stage": 1}}, "cpu")
    assert "gradients" not in one.items()  # none are there when the only backward pass begins
    config.data.global_batch_size = 2
    two = stage_memory(config, 0, 1, 4, {"zero_optimization": {"stage": 1}}, "cpu")
    assert two.device_bytes - one.device_bytes == two.gradients_bytes
    assert two.device_bytes == sum(two.items().values())


def test_logits_are_on_the_last_stage():
    config = layout(small(num_layers=4, vocab_size=257), pipeline=2)
    first, last = (stage_memory(config, stage, 1, 2, {}) for stage in range(2))
    assert first.logits_bytes == 0
    assert last.logits_bytes == 128 * 2 * 384 * 2  # bf16, overwritten by their gradient
    config.parallel.tensor = 2
    assert stage_memory(config, 1, 1, 2, {}).logits_bytes == 128 * 2 * 192 * (2 + 8)


def test_the_largest_stage_is_reported():
    """Head and logits of a large vocabulary weigh on the last stage, microbatches in flight on the first."""
    assert plan(layout(small(num_layers=4, vocab_size=2**16), pipeline=4), 4).worst.pipeline_stage == 3
    config = layout(pipeline=4, sequence_length=4096)
    config.model.vocab_size_multiple = config.model.vocab_size = 8
    assert plan(config, 4).worst.pipeline_stage == 0


def test_in_flight_microbatches():
    config = layout(pipeline=4)
    layer = layer_activation_bytes(config, 2)
    assert [stage_activation_bytes(config, stage, 1, 2) / layer for stage in range(3)] == [4, 3, 2]
    config.data.global_batch_size = 4  # two microbatches are all there are
    assert stage_activation_bytes(config, 0, 1, 2) / layer == 2
    config = layout(pipeline=2)
    config.parallel.virtual_pipeline = 2
    # Korthikanti et al.: all L layers, times 1 + (p - 1) / (p v).
    assert stage_activation_bytes(config, 0, 1, 2) / layer == pytest.approx(4 * (1 + 1 / 4))


def test_recomputation_and_sequence_parallelism_save_activations():
    config = layout(tensor=2)
    config.model.attention_gate, config.model.qk_norm = "elementwise", True
    sizes = {}
    for recompute in ("none", "selective", "full"):
        for sequence in (False, True):
            config.model.recompute, config.parallel.sequence = recompute, sequence
            sizes[recompute, sequence] = stage_activation_bytes(config, 0, 1, 2)
    for sequence in (False, True):
        assert sizes["full", sequence] < sizes["selective", sequence] < sizes["none", sequence]
    for recompute in ("none", "selective", "full"):
        assert sizes[recompute, True] < sizes[recompute, False]


@pytest.mark.ranks
def test_activations_against_what_autograd_keeps():
    """The real model on a CPU in fp32, in a process of its own: what autograd keeps of tensors as they are stays."""
    cases = [("none", "none"), ("none", "elementwise"), ("none", "headwise"), ("full", "elementwise")]
    pool = RankPool(1)
    try:
        found = pool.run(kept_by_autograd, cases)[0]
    finally:
        pool.close()
    for (recompute, gate), measured in zip(cases, found, strict=True):
        model = small(
            hidden_size=256, num_layers=2, ffn_hidden_size=640, vocab_size=512, head_dim=64, qk_norm=True,
            recompute=recompute, attention_gate=gate,
        )  # fmt: skip
        config = layout(model)
        difference = stage_activation_bytes(config, 0, 1, 4)
        config.model.num_layers = 1
        difference -= stage_activation_bytes(config, 0, 1, 4)
        assert difference == pytest.approx(measured, rel=0 if recompute == "full" else 0.05), (recompute, gate)


# Against real steps

STEP = [
    *("--model.hidden_size", "512", "--model.num_layers", "8", "--model.num_attention_heads", "8"),
    *("--model.num_query_groups", "4", "--model.ffn_hidden_size", "1408", "--model.vocab_size", "4096"),
    *("--data.sequence_length", "512", "--data.micro_batch_size", "4", "--run.device", "cpu"),
    *("--precision.dtype", "fp32"),
]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads a process's peak where Linux keeps it")
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("zero", "size"),
    [(1, 2), *(pytest.param(zero, size, marks=pytest.mark.slow) for zero, size in ((0, 1), (0, 2)))],
)
def test_the_plan_against_a_real_step(monkeypatch, capsys, zero, size):
    """30 million weights, two microbatches per rank. With glibc told to give freed memory back, see docs/memory.md."""
    monkeypatch.chdir(ROOT)
    arguments = [*STEP, "--data.global_batch_size", str(8 * size)]
    arguments += ["--deepspeed_config", f"configs/deepspeed/zero{zero}.json"]
    pool = RankPool(size)
    try:
        ranks = pool.run(measure_step, arguments)
    finally:
        pool.close()
    worst = plan(parse_config(["--config", "configs/smoke.yaml", *arguments], world_size=size), size).worst
    planned = worst.device_bytes - worst.overhead_bytes
    with capsys.disabled():
        peaks = ", ".join(f"{rank['peak'] / 2**20:.0f} ({planned / rank['peak'] - 1:+.1%})" for rank in ranks)
        print(f"\nZeRO {zero}, {size} ranks: planned {planned / 2**20:.0f} MiB, measured {peaks}")
    for rank in ranks:
        # Narrow enough that none of weights, gradients, a moment of Adam's or the logits could be left out.
        assert abs(planned / rank["peak"] - 1) < 0.06
        assert abs(OVERHEAD_BYTES["cpu"] / rank["baseline"] - 1) < 0.5


# Whether it fits


def of_7b(*more, micro=1):
    """Llama-2-7B's shape with a gate, on 8 ranks of a GPU machine."""
    options = ["--config", "configs/model/7b.yaml", "--data.corpus", "tiny", "--model.vocab_size", "32000"]
    options += ["--data.global_batch_size", "64", "--data.micro_batch_size", str(micro)]
    config = parse_config([*options, *more], world_size=8)
    check_fits(config, 8)
    return config


@pytest.mark.parametrize(
    ("micro", "limit", "expected"),
    [
        # Fewest options first, then in the order that is documented; each option by its smallest step.
        (8, 200, {"data.micro_batch_size": 4}),
        (8, 150, {"data.micro_batch_size": 2}),
        (1, 70, {"model.recompute": "full"}),
        (1, 50, {"deepspeed_config": "configs/deepspeed/zero3.json"}),
        (1, 45, {"parallel.tensor": 4}),
        (8, 45, {"data.micro_batch_size": 2, "parallel.tensor": 4}),
        (1, 20, {"model.recompute": "full", "parallel.tensor": 8}),
        (1, 10, None),
    ],
)
def test_the_nearest_choice_that_fits(monkeypatch, micro, limit, expected):
    monkeypatch.chdir(ROOT)
    config = of_7b(micro=micro)
    config.parallel.memory_gib = limit
    found = nearest_fit(config, 8)
    assert (found and found[0]) == expected
    config.parallel.memory_gib = None
    assert config == of_7b(micro=micro), "the search changed what it was given"
    config.parallel.memory_gib = limit
    if found is None:
        with pytest.raises(ConfigurationError, match="no micro batch, recomputation"):
            check_fits(config, 8)
        return
    # What is named is a legal config, and fits.
    changes = [word for name, value in found[0].items() for word in (f"--{name}", str(value))]
    changed = of_7b("--data.micro_batch_size", str(micro), *changes, "--parallel.memory_gib", str(limit))
    assert plan(changed, 8).worst.device_bytes == found[1] <= limit * GIB


def test_only_legal_layouts_are_named(monkeypatch):
    """Pipeline stages cannot be combined with ZeRO 2 and 3, which would save more here."""
    monkeypatch.chdir(ROOT)
    config = of_7b("--parallel.pipeline", "2")
    for limit in (80, 60, 50, 40, 30, 20):
        config.parallel.memory_gib = limit
        found = nearest_fit(config, 8)
        assert found is not None and "deepspeed_config" not in found[0], limit


def test_a_run_that_cannot_fit_is_refused_by_its_knob(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigurationError) as caught:
        of_7b("--parallel.memory_gib", "70")
    text = str(caught.value)
    assert "parallel.memory_gib=70: a rank of pipeline stage 0 needs 80.51 GiB, most of it activations" in text
    assert "use --model.recompute full, which needs 54.61 GiB" in text
    assert of_7b("--parallel.memory_gib", "82").parallel.memory_gib == 82
    with pytest.raises(ConfigurationError, match=r"parallel.memory_gib=0.0 must be more than 0"):
        of_7b("--parallel.memory_gib", "0")


def test_an_unknown_vocabulary_refuses_only_what_no_vocabulary_would_save(monkeypatch):
    monkeypatch.chdir(ROOT)
    known = of_7b()
    known.model.vocab_size = 2
    least = plan(known, 8).worst.device_bytes / GIB
    options = ["--config", "configs/model/7b.yaml", "--data.corpus", "tiny", "--data.micro_batch_size", "1"]
    options += ["--data.global_batch_size", "64"]
    accepted = parse_config([*options, "--parallel.memory_gib", str(least + 0.01)], world_size=8)
    check_fits(accepted, 8)
    assert accepted.model.vocab_size is None
    refused = parse_config([*options, "--parallel.memory_gib", str(least - 0.01)], world_size=8)
    with pytest.raises(ConfigurationError, match="GiB"):
        check_fits(refused, 8)


def test_a_bucket_size_that_is_no_number_is_named():
    with pytest.raises(ConfigurationError, match="reduce_bucket_size='auto' must be a number"):
        stage_memory(layout(), 0, 1, 2, {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}})
