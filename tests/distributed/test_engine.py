"""The engine's steps: accumulation, discarded and refused updates, masks, padding, precision."""

from __future__ import annotations

from typing import Any

import pytest
from support.ranks import RankPool
from support.train import batches, build_engine, train_steps


def zero(stage: int) -> list[str]:
    return ["--deepspeed_config", f"configs/deepspeed/zero{stage}.json"]


def weights(engine: Any) -> dict[str, Any]:
    """All fp32 weights and moments, whole."""
    return {
        f"{kind} {tensor.name}": engine.state.get(tensor, kind).clone()
        for tensor in engine.map
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(bool((left[name] == right[name]).all()) for name in left)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_microbatches_do_not_change_the_step(two_ranks: RankPool, data_cache: str, stage: int) -> None:
    base = ["--data.cache", data_cache, *zero(stage)]
    one = two_ranks.run(train_steps, [*base, "--data.micro_batch_size", "4"], 5)[0]
    four = two_ranks.run(train_steps, [*base, "--data.micro_batch_size", "1"], 5)[0]
    for (loss, norm), (loss4, norm4) in zip(one, four, strict=True):
        assert loss == pytest.approx(loss4, rel=1e-5)
        assert norm == pytest.approx(norm4, rel=1e-4)


def discard_and_poison(arguments: list[str]) -> dict[str, bool]:
    """What happens to weights and moments on a discarded step, and on one whose gradients are not finite."""
    import torch

    config, engine = build_engine(arguments)
    engine.set_learning_rate(0.003)
    for step in (1, 2):
        engine.forward_backward(batches(config, engine, step))
        assert engine.step()
    before, adam_steps = weights(engine), engine.state.step
    engine.forward_backward(batches(config, engine, 3))
    engine.discard()
    found = {"discard keeps": same(before, weights(engine)), "discard counts": engine.state.step == adam_steps}
    # A weight that is not a number on one rank poisons every gradient of that rank.
    poisoned = batches(config, engine, 3)
    if engine.runtime.rank == engine.runtime.size - 1:
        poisoned[0].loss_mask[0, 0] = torch.nan
    engine.forward_backward(poisoned)
    found["nan refused"] = not engine.step()
    found["nan keeps"] = same(before, weights(engine))
    loss = engine.forward_backward(batches(config, engine, 3))
    found["goes on"] = engine.step() and engine.state.step == adam_steps + 1
    after = weights(engine)
    found["moves"] = not same(before, after)
    engine.close()  # its groups end when another model is laid out
    clean_config, clean = build_engine(arguments)
    clean.set_learning_rate(0.003)
    for step in (1, 2, 3):
        clean_loss = clean.forward_backward(batches(clean_config, clean, step))
        assert clean.step()
    found["as if nothing happened"] = loss == clean_loss and same(after, weights(clean))
    clean.close()
    return found


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        *[(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")],
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, "fp32"), (2, "bf16"), (3, "fp32"))),
    ],
)
def test_discarded_and_refused_steps_leave_no_trace(
    two_ranks: RankPool, data_cache: str, stage: int, dtype: str
) -> None:
    arguments = ["--data.cache", data_cache, "--precision.dtype", dtype, *zero(stage)]
    for found in two_ranks.run(discard_and_poison, arguments):
        assert all(found.values()), found


def test_attention_stays_within_documents(one_rank: RankPool, data_cache: str) -> None:
    base = ["--data.cache", data_cache, "--data.micro_batch_size", "8", "--data.sequence_length", "256"]
    reset = ["--data.reset_attention", "true", "--data.reset_positions", "true"]
    clean = one_rank.run(_last_document, [*base, *reset], False)[0]
    altered = one_rank.run(_last_document, [*base, *reset], True)[0]
    assert altered == pytest.approx(clean, rel=1e-6)
    # Negative control: with plain causal attention the earlier document is seen.
    open_attention = one_rank.run(_last_document, [*base, *reset], True, False)[0]
    open_clean = one_rank.run(_last_document, [*base, *reset], False, False)[0]
    assert max(abs(a - b) for a, b in zip(open_attention, open_clean, strict=True)) > 1e-5


def _last_document(arguments: list[str], alter: bool, masked: bool = True) -> list[float]:
    """Losses of the last document of a window, with its first document altered or not."""
    config, engine = build_engine([*arguments, "--init.gamma", "0.5"])
    batch = batches(config, engine, 1)[0]
    documents = batch.document_ids
    row = int(documents.amax(1).argmax())
    assert documents[row].max() >= 1, "no window of the batch holds two documents"
    if alter:
        first = documents[row] == 0
        batch.tokens[row][first] = (batch.tokens[row][first] + 11) % 400 + 10
    if not masked:
        batch.document_ids = None
    out = engine.forward(engine.chunks[0], batch)
    engine.close()
    return out[row][documents[row] == documents[row].max()].tolist()


def test_reset_documents_equal_documents_alone(one_rank: RankPool, data_cache: str) -> None:
    """A document inside a window, isolated and counted from 0, gives the losses it gives at a window's start."""
    found = one_rank.run(_alone_and_inside, ["--data.cache", data_cache, "--data.sequence_length", "256"])[0]
    assert found["inside"] == pytest.approx(found["alone"], rel=1e-5)
    assert found["positions kept"] != pytest.approx(found["alone"], rel=1e-5)


def _alone_and_inside(arguments: list[str]) -> dict[str, list[float]]:
    import torch

    from megagamma.model.gpt import document_mask

    reset = ["--data.reset_attention", "true", "--data.reset_positions", "true", "--init.gamma", "0.5"]
    config, engine = build_engine([*arguments, *reset])
    chunk, length = engine.chunks[0], config.data.sequence_length
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(10, 500, (1, length + 1), generator=generator)
    start = 100
    documents = (torch.arange(length) >= start).long().unsqueeze(0)
    positions = torch.where(documents == 0, torch.arange(length), torch.arange(length) - start)
    mask = document_mask(documents)

    def run(tokens: Any, positions: Any, mask: Any, labels: Any) -> list[float]:
        return chunk(tokens, positions, mask, labels=labels)[0].tolist()

    inside = run(tokens[:, :-1], positions, mask, tokens[:, 1:])[start:]
    tail = tokens[:, start:]
    alone = run(tail[:, :-1], torch.arange(length - start).unsqueeze(0), None, tail[:, 1:])
    shifted = run(tokens[:, :-1], positions * 2, mask, tokens[:, 1:])[start:]
    engine.close()
    return {"inside": inside, "alone": alone, "positions kept": shifted}


def test_padding_of_the_vocabulary_does_not_matter(one_rank: RankPool, data_cache: str) -> None:
    base = ["--data.cache", data_cache]
    found = [
        one_rank.run(train_steps, [*base, "--model.vocab_size_multiple", str(multiple)], 5)[0]
        for multiple in (128, 1024)
    ]
    for (loss, norm), (other, other_norm) in zip(*found, strict=True):
        assert loss == pytest.approx(other, rel=1e-6)
        assert norm == pytest.approx(other_norm, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 3, pytest.param(2, marks=pytest.mark.slow)])
def test_bf16_keeps_exact_masters(two_ranks: RankPool, data_cache: str, stage: int) -> None:
    found = two_ranks.run(_bf16_masters, ["--data.cache", data_cache, "--precision.dtype", "bf16", *zero(stage)])[0]
    assert found["masters are the fp32 draw"]
    assert found["weights are rounded masters"]
    assert found["rounding is visible"] > 0
    assert found["losses"][-1] < found["losses"][0] - 0.3
    # Updates of 1e-6 reach weights that are a thousand times as large; rounded to bf16, nearly all would be lost.
    assert found["moved by a tiny step"] > 0.9
    assert found["moved, were they bf16"] < 0.1


def _bf16_masters(arguments: list[str]) -> dict[str, Any]:
    import deepspeed
    import torch

    from megagamma.model.initialize import draw
    from megagamma.training.setup import refine_masters

    config, engine = build_engine(arguments)
    refine_masters(engine, config)
    exact, rounded, visible = True, True, 0.0
    for tensor in engine.map:
        expected = torch.empty(tensor.shape)
        draw(tensor, expected, config)
        master = engine.state.get(tensor, "weight")
        exact &= bool((master == expected).all())
        with deepspeed.zero.GatheredParameters([tensor.parameter], enabled=engine.zero_stage == 3):
            rounded &= bool((tensor.parameter.data == master.bfloat16()).all())
            visible = max(visible, float((master - tensor.parameter.data.float()).abs().max()))
    losses = []
    for step in range(1, 13):
        engine.set_learning_rate(config.optimizer.lr)
        losses.append(engine.forward_backward(batches(config, engine, step)))
        assert engine.step()
    matrices = [tensor for tensor in engine.map if tensor.role not in ("norm", "embedding")]
    before = [engine.state.get(tensor, "weight").clone() for tensor in matrices]
    engine.set_learning_rate(1e-6)
    engine.forward_backward(batches(config, engine, 13))
    assert engine.step()
    after = [engine.state.get(tensor, "weight") for tensor in matrices]
    large = [b.abs() > 1e-3 for b in before]
    moved = [a[where] != b[where] for a, b, where in zip(after, before, large, strict=True)]
    rough = [a[where].bfloat16() != b[where].bfloat16() for a, b, where in zip(after, before, large, strict=True)]
    engine.close()
    return {
        "moved by a tiny step": float(torch.cat(moved).float().mean()),
        "moved, were they bf16": float(torch.cat(rough).float().mean()),
        "masters are the fp32 draw": exact,
        "weights are rounded masters": rounded,
        "rounding is visible": visible,
        "losses": losses,
    }


def _embeddings(arguments: list[str], steps: int) -> float | None:
    """Sum of squares of this stage's copy of the tied embedding after some steps; None where it has none."""
    config, engine = build_engine(arguments)
    for step in range(1, steps + 1):
        engine.set_learning_rate(config.optimizer.lr)
        engine.forward_backward(batches(config, engine, step))
        assert engine.step()
    found = [engine.state.get(tensor, "weight") for tensor in engine.map if tensor.role == "embedding"]
    value = float(found[0].double().square().sum()) if found else None
    engine.close()
    return value


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tied_embeddings_stay_equal_over_stages(two_ranks: RankPool, data_cache: str, dtype: str) -> None:
    """Their gradients are summed over both stages; of bf16 weights DeepSpeed keeps them elsewhere."""
    given = ["--data.cache", data_cache, "--precision.dtype", dtype, "--model.tie_embeddings", "true", *zero(1)]
    first, last = two_ranks.run(_embeddings, [*given, "--parallel.pipeline", "2"], 3)
    assert first == last is not None
    untied = two_ranks.run(_embeddings, [*given, "--parallel.pipeline", "2", "--model.tie_embeddings", "false"], 3)
    assert untied[0] != first, "negative control"
