"""Forward and gradients equal those of a Hugging Face class that holds the same weights."""

from __future__ import annotations

import pytest
from support.ranks import RankPool

TOLERANCE = 1e-5
SHAPE = [
    *("--data.corpus", "tiny", "--model.hidden_size", "64", "--model.num_attention_heads", "4"),
    *("--model.num_query_groups", "2", "--model.head_dim", "24", "--model.num_layers", "3"),
    *("--model.vocab_size", "500", "--data.sequence_length", "48", "--init.gamma", "0.5"),
]
VARIANTS = {
    "plain": ["--model.attention_gate", "none", "--model.qk_norm", "false"],
    "qk_norm": ["--model.attention_gate", "none"],
    "elementwise": ["--model.attention_gate", "elementwise"],
    "headwise": ["--model.attention_gate", "headwise"],
    "tied": ["--model.attention_gate", "elementwise", "--model.tie_embeddings", "true"],
    "recomputed": ["--model.attention_gate", "elementwise", "--model.recompute", "full"],
    "selective": ["--model.attention_gate", "elementwise", "--model.recompute", "selective"],
}


def compare(arguments: list[str], mistakes: dict[str, float | str]) -> dict[str, float]:
    """Largest differences between our model and the reference, relative to the largest reference value."""
    import torch
    from support.reference import build_reference, gradients_to_logical, to_reference

    from megagamma.config.io import parse_config
    from megagamma.distributed.runtime import Runtime
    from megagamma.model.gpt import build_model
    from megagamma.model.initialize import fill
    from megagamma.model.parameters import ParameterMap

    config = parse_config([*SHAPE, *arguments])
    runtime = Runtime(config)
    chunk = build_model(config, torch.float32, runtime.device)[0]
    parameter_map = ParameterMap([chunk], config.model, 0, 1)
    fill(parameter_map, config)
    generator = torch.Generator().manual_seed(1)
    logical: dict[str, torch.Tensor] = {}
    for tensor in parameter_map:
        if tensor.role == "norm":  # gains other than 1, or a misplaced norm would not be seen
            tensor.parameter.data.uniform_(0.5, 1.5, generator=generator)
        for part in tensor.parts:
            whole = logical.setdefault(part.logical.name, torch.zeros(part.logical.shape))
            whole[part.start[0] : part.start[0] + part.shape[0]] = part.view(tensor.parameter.data)
    reference = build_reference(config.model, 48, epsilon=mistakes.get("epsilon"))  # type: ignore[arg-type]
    state = to_reference(logical, config.model, str(mistakes.get("gate_order", "per_head")))
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing

    tokens = torch.randint(0, 500, (3, 49), generator=generator)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(48).repeat(3, 1)
    chunk.train()
    logits = chunk(inputs, positions, None)[..., :500]
    loss = chunk(inputs, positions, None, labels=labels).mean()
    loss.backward()
    their_logits = reference(input_ids=inputs).logits
    their_loss = torch.nn.functional.cross_entropy(their_logits.flatten(0, 1), labels.flatten())
    their_loss.backward()
    found = {
        "logits": float((logits - their_logits).abs().max() / their_logits.abs().max()),
        "loss": abs(float(loss - their_loss)) / float(their_loss),
    }
    theirs = gradients_to_logical(reference, config.model)
    worst = 0.0
    for tensor in parameter_map:
        assert tensor.parameter.grad is not None
        for part in tensor.parts:
            ours = part.view(tensor.parameter.grad)
            expected = theirs[part.logical.name]
            rows = min(expected.shape[0] - part.start[0], part.shape[0])
            expected = expected[part.start[0] : part.start[0] + rows]
            worst = max(worst, float((ours[:rows] - expected).abs().max() / expected.abs().max()))
            assert not ours[rows:].any(), "the padded vocabulary must have no gradient"
    found["gradients"] = worst
    runtime.close_groups()
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_hugging_face(one_rank: RankPool, variant: str) -> None:
    found = one_rank.run(compare, VARIANTS[variant], {})[0]
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(
    ("mistake", "least"),
    [({"epsilon": 1e-5}, 1e-4), ({"gate_order": "blocks"}, 1e-2)],
    ids=["epsilon", "gate_order"],
)
def test_mistakes_are_seen(one_rank: RankPool, mistake: dict[str, float | str], least: float) -> None:
    # Small draws, so that epsilon 1e-5 saturates the first norm.
    found = one_rank.run(compare, ["--init.gamma", "1.0"], mistake)[0]
    assert found["logits"] > least > TOLERANCE, found
