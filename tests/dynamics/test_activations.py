"""Activations whose numbers are known: uniform attention, a sink, gates, a saturated norm; one answer for all layouts."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.exports import SHAPE
from support.ranks import RankPool
from support.train import run_trainer

from megagamma.commands import analyze_run
from megagamma.config.io import parse_config
from megagamma.dynamics.activations import SINK_LENGTH, _merged, _Recorder
from megagamma.dynamics.analysis import records
from megagamma.errors import ConfigurationError
from megagamma.runs.folder import RunFolder


def recorder() -> _Recorder:
    engine: Any = SimpleNamespace(
        runtime=SimpleNamespace(tensor_rank=0), config=SimpleNamespace(parallel=SimpleNamespace(sequence=False))
    )
    return _Recorder(engine)


def means(record: _Recorder, place: str) -> dict[str, float]:
    return {name: values[0] / values[1] for name, values in record.sums[place].items() if len(values) == 2}


def test_uniform_attention() -> None:
    record, length = recorder(), 80
    record.attention("3", torch.zeros(length, 2, 4, 8), torch.randn(length, 2, 2, 8), None, None)
    found = means(record, "3.1")
    sizes = range(1, length + 1)
    assert found["attention_entropy"] == pytest.approx(sum(map(math.log, sizes)) / length, rel=1e-6)
    assert found["first_token_attention"] == pytest.approx(sum(1 / n for n in sizes) / length, rel=1e-6)
    assert found["sink_rate"] == 0 and record.sums["3"]["attention_logit_max"] == [0.0]
    assert set(record.sums) == {"3", "3.0", "3.1", "3.2", "3.3"}


def test_a_pure_sink_in_one_head() -> None:
    length = 100
    query, key = torch.zeros(length, 1, 2, 4), torch.zeros(length, 1, 2, 4)
    query[:, :, 1, 0], key[0, :, 1, 0] = 30.0, 30.0
    record = recorder()
    record.attention("0", query, key, None, 1.0)
    sink, other = means(record, "0.1"), means(record, "0.0")
    assert sink["sink_rate"] == sink[f"sink_rate_{SINK_LENGTH}"] == 1 and other["sink_rate"] == 0
    assert sink["first_token_attention"] == pytest.approx(1) and sink["attention_entropy"] == pytest.approx(0, abs=1e-6)
    assert record.sums["0"]["attention_logit_max"] == [900.0]
    # Documents: the second half may not look at the first token.
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    mask[50:, :50] = True
    halves = recorder()
    halves.attention("0", query, key, mask[None, None], 1.0)
    assert means(halves, "0.1")["first_token_attention"] == pytest.approx(0.5)


def test_gates_norms_and_stream() -> None:
    record = recorder()
    record.gate("0", torch.tensor([-5.0, -5.0, 5.0, 0.0]))
    assert means(record, "0")["gate_closed"] == 0.5 and means(record, "0")["gate"] == pytest.approx(0.376, abs=1e-3)
    record.norm("0", "input_norm", torch.full((3, 2, 8), 1e-3), 1e-6, True)
    assert means(record, "0")["input_norm_saturation"] == pytest.approx(1, rel=1e-5)
    assert means(record, "0")["input_norm_attenuation"] == pytest.approx(2**-0.5, rel=1e-5)
    record.stream("0", torch.tensor([[[3.0, -4.0]]]))
    assert means(record, "0")["residual_square"] == 12.5 and record.sums["0"]["residual_max"] == [4.0]
    total = _merged(
        [{"0": {"a": [1.0, 2.0], "m": [3.0]}}, {"0": {"a": [2.0, 1.0], "m": [7.0]}, "1": {"a": [1.0, 1.0]}}]
    )
    assert total == {"0": {"a": [3.0, 3.0], "m": [7.0]}, "1": {"a": [1.0, 1.0]}}


def numbers(line: dict[str, Any]) -> dict[tuple[str, str], float]:
    found = line["activations"]
    return {
        (place, name): one
        for part in ("layers", "heads")
        for place, v in found[part].items()
        for name, one in v.items()
    }


def test_layouts_and_checkpoints_give_one_answer(tmp_path: Path, four_ranks: RankPool, data_cache: str) -> None:
    run = tmp_path / "run"
    layout = ["--parallel.tensor", "2", "--parallel.pipeline", "2", "--parallel.sequence", "true"]
    instruments = ["--dynamics.log_spaced", "true", "--dynamics.instruments", '["activations"]']
    given = [*SHAPE, "--run.folder", str(run), "--data.cache", data_cache, "--run.steps", "2", *layout, *instruments]
    assert four_ranks.run(run_trainer, given) == [0] * 4
    lines = RunFolder(run).dynamics().read()
    live = numbers(lines[-1])
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert len({place for place, _ in live if "." in place}) == 4 * 4, "every head of every layer"
    (run / "dynamics.jsonl").unlink()
    assert analyze_run.main([str(run), "--instruments", "weights", "activations"]) == 0
    saved = numbers(records(RunFolder(run))[-1])
    assert saved == pytest.approx(live, rel=1e-5, abs=1e-7)
    # Negative control: the step before has other numbers.
    assert saved != pytest.approx(numbers(lines[1]), rel=1e-3)


def test_an_unknown_instrument() -> None:
    with pytest.raises(ConfigurationError, match=r"dynamics\.instruments: 'activation' is not known: use weights"):
        parse_config(["--config", "configs/smoke.yaml", "--dynamics.instruments", '["activation"]'])
