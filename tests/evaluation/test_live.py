"""The live model answers lm-eval as lm-eval's own `hf` model does with the same weights, on any layout."""

from __future__ import annotations

from typing import Any

import pytest
from support.ranks import RankPool

TOLERANCE = 1e-4
SHAPE = [
    *("--model.vocab_size", "300", "--init.gamma", "0.5", "--data.micro_batch_size", "2"),
    *("--data.sequence_length", "48", "--model.attention_gate", "elementwise"),
]
PAIRS = [
    ("Question: Which of these is", " water"),
    ("Question: Which of these is", " the thing after that"),
    ("", "Which of these is empty before?"),
    ("A prompt with a space at its end: ", "pens"),
    ("One token", "!"),
    (
        "A prompt that is far too long for the window of the model, so that its start is cut away. " * 3,
        " Answer: water",
    ),
    ("Größe, naïve — 漢字", " ok 漢"),
]
ROLLING = [
    "Which of these is the thing?",
    "How many pens does a text need that fills several windows of the model? " * 4,
]
PROMPTS = [
    ("Question: How many", {"until": ["\n\n"], "max_gen_toks": 9}),
    ("Which", {"until": ["e"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0}),
    ("A prompt that is far too long for the window of the model and must lose its start. " * 2, {"max_gen_toks": 12}),
]


def build(arguments: list[str]) -> Any:
    """A freshly drawn engine on this rank; no data is opened."""
    from megagamma.config.io import parse_config
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import world_from_environment
    from megagamma.training.assembly import fresh_engine

    world = world_from_environment()
    config = parse_config(["--config", "configs/smoke.yaml", *arguments], world_size=world.size)
    return fresh_engine(config, Runtime(config, world))


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=("task", number, 1))
        for number, one in enumerate(arguments)
    ]


def ask(lm: Any) -> tuple[list[tuple[float, bool]], list[float], list[str]]:
    return (
        lm.loglikelihood(instances("loglikelihood", PAIRS)),
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in ROLLING])),
        lm.generate_until(instances("generate_until", PROMPTS)),
    )


def live_answers(arguments: list[str]) -> Any:
    """What the live model says, from rank 0."""
    from support.benchmarks import AsOurs, byte_tokenizer

    from megagamma.evaluation.live import LiveModel, lead

    engine = build([*SHAPE, *arguments])
    found = lead(engine, lambda passes: ask(LiveModel(passes, AsOurs(byte_tokenizer()))))
    assert engine.deepspeed.training
    engine.close()
    return found


def reference_answers(epsilon: float | None) -> Any:
    """What lm-eval's `hf` model says about the same weights in a Hugging Face class."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from support.benchmarks import byte_tokenizer
    from support.reference import build_reference, to_reference

    engine = build(SHAPE)
    logical: dict[str, torch.Tensor] = {}
    for tensor in engine.map:
        for part in tensor.parts:
            whole = logical.setdefault(part.logical.name, torch.zeros(part.logical.shape))
            whole[part.start[0] : part.start[0] + part.shape[0]] = part.view(tensor.parameter.data)
    model = build_reference(engine.config.model, 48, epsilon)
    model.load_state_dict(to_reference(logical, engine.config.model))
    engine.close()
    return ask(HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=3))


@pytest.fixture(scope="module")
def expected(one_rank: RankPool) -> Any:
    return one_rank.run(reference_answers, None)[0]


def difference(found: Any, expected: Any) -> float:
    """Largest absolute difference of a log-likelihood. Unit: nats."""
    pairs = [(a[0], b[0]) for a, b in zip(found[0], expected[0], strict=True)]
    pairs += list(zip(found[1], expected[1], strict=True))
    return max(abs(a - b) for a, b in pairs)


def test_equal_on_one_rank(one_rank: RankPool, expected: Any) -> None:
    found = one_rank.run(live_answers, [])[0]
    assert difference(found, expected) < TOLERANCE
    assert [greedy for _, greedy in found[0]] == [greedy for _, greedy in expected[0]]
    assert found[2] == expected[2]
    assert any(text for text in expected[2])
    assert len({round(value, 3) for value, _ in expected[0]}) == len(PAIRS)


@pytest.mark.parametrize(
    "layout",
    [
        "--parallel.tensor 2",
        "--parallel.tensor 2 --parallel.sequence true",
        "--parallel.pipeline 2",
        "--parallel.pipeline 2 --parallel.virtual_pipeline 2 --data.micro_batch_size 1",
        "--deepspeed_config configs/deepspeed/zero1.json",
        "--deepspeed_config configs/deepspeed/zero3.json",
    ],
)
def test_equal_on_two_ranks(two_ranks: RankPool, expected: Any, layout: str) -> None:
    found, other = two_ranks.run(live_answers, layout.split())
    assert other is None
    assert difference(found, expected) < TOLERANCE
    assert [greedy for _, greedy in found[0]] == [greedy for _, greedy in expected[0]]
    assert found[2] == expected[2]


def test_mistakes_are_seen(one_rank: RankPool, expected: Any) -> None:
    assert difference(one_rank.run(reference_answers, 1e-3)[0], expected) > 10 * TOLERANCE


def greedy_row(arguments: list[str]) -> list[tuple[float, bool]]:
    """The model's own greedy continuation, scored, and the same with its last token changed."""
    from support.benchmarks import AsOurs, byte_tokenizer

    from megagamma.evaluation.live import LiveModel, lead

    engine = build([*SHAPE, *arguments])

    def action(passes: Any) -> list[tuple[float, bool]]:
        lm = LiveModel(passes, AsOurs(byte_tokenizer()))
        row = lm.tok_encode("Which of these")
        start = len(row)
        for _ in range(4):
            row.append(int(passes.run([row], [[0]])[0][-1, 1]))
        changed = [*row[:-1], (row[-1] + 1) % 300]
        return lm._loglikelihood_tokens([(None, one[:start], one[start:]) for one in (row, changed)])

    found = lead(engine, action)
    engine.close()
    return found or []


def test_greedy_is_told(two_ranks: RankPool) -> None:
    found = two_ranks.run(greedy_row, ["--parallel.tensor", "2"])[0]
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] > found[1][0]
