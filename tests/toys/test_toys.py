"""Every toy against a brute-force oracle that reads its questions one by one; splits that share nothing; what is refused."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import RankPool

from megagamma.commands import inspect_init, prepare_data
from megagamma.config.io import load_config, parse_config
from megagamma.config.schema import Config
from megagamma.errors import ConfigurationError
from megagamma.huggingface.export import ExportOptions, export
from megagamma.huggingface.native import parity_outputs
from megagamma.inputs import open_data
from megagamma.toys import anchor_kinds, composite_anchors, permutations
from megagamma.toys.contracts import Toy
from megagamma.toys.draws import integers
from megagamma.toys.sources import TOYS, ToySource, toy_of

SEED = 7


def composite(tokens: list[int], name: str) -> dict[str, int]:
    functions = {1: lambda x: x + 5, 2: lambda x: x + 1, 3: lambda x: x - 2, 4: lambda x: x - 8}
    (place,) = [i for i in range(len(tokens) - 2) if tokens[i + 1] in functions and tokens[i + 2] in functions]
    assert all(20 <= token <= 99 for i, token in enumerate(tokens) if i not in (place + 1, place + 2))
    key, first, second = tokens[place : place + 3]
    composed = functions[second](functions[first](key))
    if name == "held_out":
        assert (first, second) == (4, 3) and composed == key - 10
        return {"composed": composed, "memorized": key - 6}
    assert (first, second) != (4, 3)
    return {"right": key - 6 if (first, second) == (3, 4) else composed}


def kinds(tokens: list[int], name: str) -> dict[str, int] | None:
    (place,) = [i for i in range(len(tokens) - 2) if tokens[i + 1] <= 20 and tokens[i + 2] <= 20]
    key, first, second = tokens[place : place + 3]
    assert (first <= 10) == (second <= 10), "anchors of one kind"
    assert ((first, second) in ((11, 13), (13, 11))) == (name == "held_out")
    if name in ("memory", "reasoning"):
        assert (first <= 10) == (name == "memory")
    return {"right": key + first + second} if first > 10 else None


def condensed(tokens: list[int], name: str) -> dict[str, int]:
    (place,) = [i for i, token in enumerate(tokens) if token <= 4]
    return {"right": tokens[place + 1] + (1 if tokens[place] in (1, 3) else 0)}


ORACLES: dict[str, Any] = {"composite_anchors": composite, "anchor_kinds": kinds, "condensation": condensed}


@pytest.mark.parametrize("name", ORACLES)
def test_answers_are_those_of_the_oracle(name: str) -> None:
    toy, ids = TOYS[name](), np.arange(2000)
    memory: dict[tuple[int, ...], int] = {}
    for part in ("train", *toy.sets()):
        tokens = toy.train(ids, SEED) if part == "train" else toy.questions(part, ids, SEED)
        assert tokens.shape == (2000, toy.length) and tokens.min() >= 0
        answers = toy.answers(part, tokens, SEED)
        for row, question in enumerate(tokens.tolist()):
            expected = ORACLES[name](question, part)
            given = {key: int(values[row]) for key, values in answers.items()}
            assert all(0 <= value < toy.vocab_size for value in given.values())
            if expected is None:  # to be memorized: one label for ever, of the right range
                place = next(i for i, token in enumerate(question) if token <= 20) - 1
                label = memory.setdefault(tuple(question[place : place + 3]), given["right"])
                assert given == {"right": label} and 21 <= label <= 120
            else:
                assert given == expected and list(given) == list(expected)
    if name == "anchor_kinds":
        assert len(memory) > 1500 and len(set(memory.values())) == 100
        other = toy.answers("memory", toy.questions("memory", ids, SEED), SEED + 1)["right"]
        assert (other != toy.answers("memory", toy.questions("memory", ids, SEED), SEED)["right"]).mean() > 0.9


def test_keys_of_the_test_are_never_trained_on() -> None:
    toy = composite_anchors.CompositeAnchors()
    seen: dict[str, set[tuple[int, int]]] = {}
    for part in ("train", "seen", "held_out"):
        tokens = toy.train(np.arange(20000), 1) if part == "train" else toy.questions(part, np.arange(20000), 1)
        places = (tokens < 20).argmax(1) - 1
        seen[part] = set(zip(places.tolist(), tokens[np.arange(20000), places].tolist(), strict=True))
        assert set(places.tolist()) == set(range(7))
    # 80 keys at 7 places, a seventh of them for the test.
    assert not seen["train"] & seen["seen"] and seen["seen"] == seen["held_out"]
    assert len(seen["train"] | seen["seen"]) == 7 * 80 and len(seen["seen"]) == 80
    assert all(key % 7 == place for place, key in seen["seen"])


def test_all_pairs_are_trained_alike() -> None:
    tokens = composite_anchors.CompositeAnchors().train(np.arange(30000), 2)
    places = (tokens < 20).argmax(1)
    rows = np.arange(30000)
    pairs = Counter(zip(tokens[rows, places].tolist(), tokens[rows, places + 1].tolist(), strict=True))
    assert len(pairs) == 15 and max(abs(count - 2000) for count in pairs.values()) < 5 * 2000**0.5
    drawn = integers(np.arange(60000), [6], 3, "a die")[:, 0]
    assert max(abs(count - 10000) for count in Counter(drawn.tolist()).values()) < 5 * 10000**0.5


def test_permutations_compose() -> None:
    toy = permutations.Permutations()
    train, held_out = toy.train(np.arange(720), SEED), toy.questions("held_out", np.arange(304), SEED)
    every = {tuple(row) for row in [*train.tolist(), *held_out.tolist()]}
    assert len(every) == 16 * 64 and toy.samples == 720 and toy.sets() == {"trained": 720, "held_out": 304}
    assert not {row[1:] for row in map(tuple, train.tolist())} & {row[1:] for row in map(tuple, held_out.tolist())}
    # One permutation after the other: find both from the pairs themselves.
    answers = {
        tuple(row): int(answer)
        for part in (train, held_out)
        for row, answer in zip(part.tolist(), toy.answers("x", part, SEED)["right"].tolist(), strict=True)
    }
    for i in range(16, 24):
        for j in range(16, 24):
            assert sorted(answers[key, i, j] for key in range(16)) == list(range(16)), "a permutation"
    # p_j(p_i(k)) depends on p_i(k) and j alone: with p_j p_i p_k associative, (i, j) fixes the column of j.
    for j in range(16, 24):
        columns = []
        for i in range(16, 24):
            columns.append([answers[key, i, j] for key in range(16)])
        inner = [[columns[a].index(columns[b][key]) for key in range(16)] for a in range(8) for b in range(8)]
        if j == 16:
            first = inner
        assert inner == first, "p_j drops out of p_j^-1 p_j: what is left are p_a^-1 p_b"


def test_a_question_depends_on_its_number_alone() -> None:
    for name, kind in TOYS.items():
        toy: Toy = kind()
        source, other = ToySource(toy, 1), ToySource(toy, 1)
        ids = random.Random(0).sample(range(3 * max(toy.samples, 500)), 64)
        whole = source.batch(ids)
        for row, index in enumerate(ids):
            one = other.batch([index])
            assert torch.equal(one.tokens[0], whole.tokens[row]) and torch.equal(one.labels[0], whole.labels[row]), name
        assert whole.loss_mask.sum() == 64 and whole.loss_mask[:, -1].all()
        assert not torch.equal(ToySource(toy, 2).batch(ids).tokens, whole.tokens), "another seed"


def test_a_fixed_training_set_is_gone_through_in_new_orders() -> None:
    toy = permutations.Permutations()
    source = ToySource(toy, 1)
    orders = [
        [tuple(row) for row in source.batch(range(epoch * 720, (epoch + 1) * 720)).tokens.tolist()]
        for epoch in range(2)
    ]
    assert len(set(orders[0])) == 720 and set(orders[0]) == set(orders[1]) and orders[0] != orders[1]
    across = source.batch(range(700, 740)).tokens.tolist()
    assert [tuple(row) for row in across] == orders[0][700:] + orders[1][:20]
    fixed = ToySource(composite_anchors.CompositeAnchors(samples=50), 1)
    assert len({tuple(row) for row in fixed.batch(range(500)).tokens.tolist()}) == 50


def config(**data: Any) -> Config:
    found = Config()
    for key, value in data.items():
        setattr(found.data, key, value)
    return found


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"toy_options": {"lenght": 9}}, "'lenght' is no option of composite_anchors: it has length, vocab_size"),
        ({"toy_options": {"length": 2}}, "data.toy_options.length=2: must be at least 3"),
        ({"toy_options": {"vocab_size": 100}}, "vocab_size=100: must be at least 110: answers reach 109"),
        ({"toy_options": {"split_modulus": 3}}, "split_modulus=3: must lie between 7"),
        ({"toy_options": {"split_modulus": 81}}, "split_modulus=81: must lie between 7.* and 80"),
        ({"toy_options": {"samples": 1.5}}, "samples=1.5: must be a whole number"),
        ({"toy_options": {"test_samples": 0}}, "test_samples=0: must be at least 1"),
        ({"sequence_length": 256}, "data.sequence_length=256 must be the 9 tokens of a question"),
        ({"toy": "permutations", "toy_options": {"share": 0.001}}, "share=0.001: trains on 0 of 64 pairs"),
        ({"toy": "permutations", "toy_options": {"keys": 1}}, "keys=1: must be at least 2"),
        ({"toy": "anchor_kinds", "toy_options": {"vocab_size": 160}}, "vocab_size=160: must be at least 161"),
        ({"toy": "condensation", "toy_options": {"length": 1}}, "length=1: must be at least 2"),
    ],
)  # fmt: skip
def test_impossible_toys(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        open_data(config(**{"toy": "composite_anchors", "sequence_length": 9, **data}))


def test_a_toy_beside_text_is_refused() -> None:
    common = ["--config", "configs/toys/composite_anchors.yaml"]
    with pytest.raises(ConfigurationError, match="give exactly one of them"):
        parse_config([*common, "--data.corpus", "tiny"])
    with pytest.raises(ConfigurationError, match="has sets of its own"):
        parse_config([*common, "--validation.paths", "{a: b}"])
    with pytest.raises(ConfigurationError, match="has no meaning without"):
        parse_config(["--config", "configs/smoke.yaml", "--data.toy_options", "{samples: 3}"])
    with pytest.raises(ConfigurationError, match=r"data\.toy_options\.samples=-1.* must be at least 0"):
        parse_config([*common, "--data.toy_options", "{samples: -1}"])
    small = load_config(Path("configs/toys/composite_anchors.yaml"))
    small.model.vocab_size = 64
    with pytest.raises(ConfigurationError, match=r"model\.vocab_size=64 is smaller than the 128 tokens"):
        open_data(small)


@pytest.mark.parametrize("path", sorted(Path("configs/toys").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_open(path: Path) -> None:
    preset = parse_config(["--config", str(path)])
    data = open_data(preset)
    assert toy_of(preset.data).length == preset.data.sequence_length and data.codec is None
    assert data.train.batch([0, 1]).tokens.shape == (2, preset.data.sequence_length)


def test_layouts_train_alike(tmp_path: Path, one_rank: RankPool, two_ranks: RankPool) -> None:
    """The same losses and scores on one process, and over tensor and data parallel ranks."""
    common = ["--config", "configs/toys/composite_anchors.yaml", "--run.steps", "4", "--data.global_batch_size", "16"]
    common += ["--data.micro_batch_size", "4", "--data.toy_options", "{test_samples: 20}", "--validation.interval", "4"]
    for name, pool, more in (
        ("one", one_rank, []), ("data", two_ranks, []), ("tensor", two_ranks, ["--parallel.tensor", "2"]),
    ):  # fmt: skip
        assert set(pool.run(pretrain, [*common, *more, "--run.folder", str(tmp_path / name)])) == {0}
    one, data, tensor = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "data", "tensor")
    )
    assert {"val/held_out/composed", "val/held_out/memorized", "val/mirror/right"} <= set(one[-1])
    for other in (data, tensor):
        assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in one], rel=1e-5)
        assert other[-1]["val/held_out/loss"] == pytest.approx(one[-1]["val/held_out/loss"], rel=1e-5)
    # It is a model as any other: exported, without a tokenizer; and what needs text says so.
    exported = export(
        tmp_path / "one" / "checkpoints" / "step_00000004", tmp_path / "hf", ExportOptions(), quiet=True, say=lambda _: None,
        native=lambda inputs: one_rank.run(parity_outputs, inputs)[0],
    )  # fmt: skip
    assert json.loads((exported / "config.json").read_text())["vocab_size"] == 128
    assert (
        not (exported / "tokenizer.json").exists() and "data: composite_anchors" in (exported / "README.md").read_text()
    )
    with pytest.raises(ConfigurationError, match=r"data\.toy=composite_anchors is no text"):
        prepare_data.main(["--inspect", str(tmp_path / "one" / "config.yaml"), "--step", "1"])


def pretrain(arguments: list[str]) -> int:
    """Inside a rank: a whole run."""
    from megagamma.config.io import parse_config
    from megagamma.environment import world_from_environment
    from megagamma.job import train

    world = world_from_environment()
    return train(parse_config(arguments, world_size=world.size), world)


def test_scores_count_what_was_said() -> None:
    """Answers that are made up: a third composed, a third memorized, the rest nonsense."""
    data = open_data(config(toy="composite_anchors", sequence_length=9, toy_options={"test_samples": 30}))
    held_out: Any = data.validation["held_out"]
    sums = torch.zeros(4, dtype=torch.float64)
    for first in (0, 16):  # 32 samples: two past the end
        batch = held_out.batch(range(first, first + 16))
        key = batch.tokens[torch.arange(16), (batch.tokens < 20).int().argmax(1) - 1]
        number = torch.arange(first, first + 16)
        said = torch.where(number % 3 == 0, key - 10, torch.where(number % 3 == 1, key - 6, torch.zeros_like(key)))
        output = torch.zeros(16, 9, 2)
        output[:, -1, 0], output[:, -1, 1] = -2.0, said.float()
        sums += held_out.measure(batch, output)
    assert held_out.scores(sums) == pytest.approx({"loss": 2.0, "composed": 1 / 3, "memorized": 1 / 3})
    assert held_out.describe(held_out.scores(sums), sums).startswith("composed 33.3%, memorized 33.3% of 30 questions")


def test_anchor_kinds_come_half_and_half() -> None:
    tokens = anchor_kinds.AnchorKinds().train(np.arange(4000), SEED)
    reasoning = (tokens[np.arange(4000), (tokens <= 20).argmax(1)] > 10).mean()
    assert 0.46 < reasoning < 0.54


def test_inspect_init_takes_the_vocabulary_of_the_toy(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_init.main(["--config", "configs/toys/anchor_kinds.yaml"]) == 0
    out = capsys.readouterr().out
    assert "vocabulary 192 " in out and "is assumed here" not in out
