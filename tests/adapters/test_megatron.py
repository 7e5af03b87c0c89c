"""Megatron-core models that others build: the same bits at every layout, and those of transformers' class."""

from __future__ import annotations

from typing import Any

import pytest
from support.ranks import RankPool
from support.shapes import small

Pieces = dict[str, list[tuple[tuple[int, ...], Any]]]
SHAPE = {"num_layers": 4, "head_dim": 16, "ffn_hidden_size": 96, "vocab_size": 128, "qk_norm": True}


def in_groups(action: Any, tensor: int = 1, pipeline: int = 1, virtual: int | None = None, expert: int = 1) -> Any:
    """Do something in Megatron's process groups of a layout, as Megatron-LM forms them."""
    from megatron.core import parallel_state
    from support.ranks import join_world

    join_world()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor, pipeline, virtual_pipeline_model_parallel_size=virtual, expert_model_parallel_size=expert
    )
    try:
        return action()
    finally:
        parallel_state.destroy_model_parallel()


def drawn(layout: dict[str, Any], changes: dict[str, Any], gamma: float = 1.0) -> tuple[Pieces, dict[str, Any]]:
    """What a rank holds after `patched_initialization`, by the parameter map of this project; and the whole report's stds."""
    from support.megatron_builder import get_model

    import megagamma

    def draw() -> tuple[Pieces, dict[str, Any]]:
        from megatron.core import parallel_state as state

        from megagamma.model.parameters import parts_of

        with megagamma.patched_initialization(gamma=gamma, seed=7) as patch:
            chunks = get_model(**changes)
        pieces: Pieces = {}
        model = small(**SHAPE, tie_embeddings=changes.get("tie", False))
        for chunk in chunks:
            first = chunk.decoder.layers[0].layer_number - 1
            rank, size = state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size()
            for name, parameter in chunk.named_parameters():
                for part in parts_of(name, model, first, rank, size):
                    values = part.view(parameter.detach()).clone()
                    pieces.setdefault(part.logical.name, []).append((part.start, values))
        reports = [report.gathered() for report in patch.reports]
        for report in reports:
            report.check()
        return pieces, {row.name: (row.count, row.measured_std) for report in reports for row in report.matrices}

    return in_groups(draw, **layout)


def whole(ranks: list[Pieces]) -> dict[str, Any]:
    """Logical tensors put together; copies of one piece must be equal."""
    import torch

    model = small(**SHAPE)
    from megagamma.model.parameters import logical_parameters

    shapes = {one.name: one.shape for one in logical_parameters(model)}
    found: dict[str, Any] = {}
    for pieces in ranks:
        for name, parts in pieces.items():
            full = found.setdefault(name, torch.full(shapes[name], torch.nan))
            for start, values in parts:
                place = full[tuple(slice(a, a + n) for a, n in zip(start, values.shape, strict=True))]
                assert torch.isnan(place).all() or torch.equal(place, values)
                place.copy_(values)
    return found


def transformers_model(gamma: float = 1.0, **changes: Any) -> Any:
    import transformers

    import megagamma

    config = transformers.Qwen3Config(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=96, vocab_size=128, rms_norm_eps=1e-5, rope_theta=10000.0, **changes,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    megagamma.initialize(model, gamma=gamma, seed=7)
    return model


LAYOUTS = [
    {"tensor": 2, "pipeline": 2},
    {"tensor": 2, "pipeline": 2, "virtual": 2},
    pytest.param({"tensor": 1, "pipeline": 4}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_transformers_have_one_draw(
    one_rank: RankPool, four_ranks: RankPool, layout: dict[str, Any]
) -> None:
    import torch

    ((pieces, single),) = one_rank.run(drawn, {}, {})
    expected = dict(transformers_model().state_dict())
    one = whole([pieces])
    assert one.keys() == expected.keys()
    assert all(torch.equal(one[name], expected[name]) for name in one)
    answers = four_ranks.run(drawn, layout, {})
    many = whole([pieces for pieces, _ in answers])
    assert all(torch.equal(many[name], expected[name]) for name in many) and many.keys() == expected.keys()
    if "virtual" not in layout:
        for _, stds in answers:
            assert {name: count for name, (count, _) in stds.items()} == {n: c for n, (c, _) in single.items()}
    other = dict(transformers_model(gamma=0.9).state_dict())
    assert not torch.equal(many["model.layers.3.mlp.up_proj.weight"], other["model.layers.3.mlp.up_proj.weight"])


def test_a_tied_embedding_on_two_stages(four_ranks: RankPool) -> None:
    import torch

    pieces = [pieces for pieces, _ in four_ranks.run(drawn, {"tensor": 2, "pipeline": 2}, {"tie": True})]
    holders = [rank for rank, one in enumerate(pieces) if "model.embed_tokens.weight" in one]
    assert holders == [0, 1, 2, 3]
    expected = transformers_model(tie_word_embeddings=True).state_dict()["model.embed_tokens.weight"]
    assert torch.equal(whole(pieces)["model.embed_tokens.weight"], expected)


def logits_of() -> Any:
    import torch
    from support.megatron_builder import get_model

    import megagamma

    def run() -> Any:
        (model,) = get_model(hidden_dropout=0.0, attention_dropout=0.0)
        report = megagamma.initialize(model, gamma=0.5, seed=7)
        report.check()
        tokens = torch.arange(24).unsqueeze(0)
        mask = torch.ones(1, 1, 24, 24, dtype=torch.bool).triu(1)
        with torch.no_grad():
            return model(tokens, torch.arange(24).unsqueeze(0), mask)

    return in_groups(run)


def test_the_same_function_as_transformers(one_rank: RankPool) -> None:
    """Megatron's own forward pass says where queries, keys and values lie in its fused tensors."""
    import torch

    (found,) = one_rank.run(logits_of)
    with torch.no_grad():
        expected = transformers_model(gamma=0.5)(torch.arange(24).unsqueeze(0)).logits
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(found, transformers_model(gamma=0.6)(torch.arange(24)[None]).logits, atol=1e-4)


def experts(layout: dict[str, Any]) -> dict[str, Any]:
    """Weights of a mixture's first layer by logical name: this rank's, as the adapter's plan says."""
    from support.megatron_builder import get_model

    import megagamma
    from megagamma.adapters.local import LocalTensor

    def run() -> dict[str, Any]:
        changes = {
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": 48,
            "moe_router_topk": 2,
            "moe_shared_expert_intermediate_size": 48,
        }
        with megagamma.patched_initialization(gamma=1.0, seed=7) as patch:
            (model,) = get_model(**changes)
        report = patch.reports[0]
        report.check()
        found = {}
        parameters = dict(model.named_parameters())
        for name, entry in report.plan.entries.items():
            if isinstance(entry, tuple) and ".layers.0.mlp" in name:
                values = parameters[name].detach()
                for block, start, view in LocalTensor(values, (0, 0), tuple(values.shape)).pieces(entry):
                    found[block.logical.name] = (block.logical.role, block.logical.shape, start, view.clone())
        return found

    return in_groups(run, **layout)


def test_experts_are_matrices_of_their_own(one_rank: RankPool, two_ranks: RankPool) -> None:
    import torch

    from megagamma.initialization.streams import normal_

    (single,) = one_rank.run(experts, {})
    names = [f"model.layers.0.mlp.experts.{e}.{s}_proj.weight" for e in range(4) for s in ("gate", "up", "down")]
    assert set(names) < set(single) and single["model.layers.0.mlp.gate.weight"][:2] == ("router", (4, 64))
    assert single["model.layers.0.mlp.shared_expert.down_proj.weight"][0] == "shared_down"
    # By hand: an expert's width is its d_in, and what it writes to the residual stream has the depth factor of 4 layers.
    role, shape, _, values = single["model.layers.0.mlp.experts.2.down_proj.weight"]
    assert (role, shape) == ("expert_down", (64, 48))
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    by_hand = normal_(torch.empty(64, 48), seed=7, name=name, global_shape=(64, 48), std=1 / 48 / 8**0.5)
    assert torch.equal(values, by_hand)
    ranks = two_ranks.run(experts, {"expert": 2})
    assert set(ranks[0]) | set(ranks[1]) == set(single)
    for rank in ranks:
        for name, (_, _, _, values) in rank.items():
            assert torch.equal(values, single[name][3])
    assert "model.layers.0.mlp.experts.3.up_proj.weight" not in ranks[0]


def traces() -> tuple[bool, bool, str, str]:
    import torch
    from megatron.core.models.gpt import GPTModel
    from support.megatron_builder import get_model

    import megagamma
    from megagamma.errors import InitializationError

    def run() -> tuple[bool, bool, str, str]:
        before = GPTModel.__init__
        (plain,) = get_model()
        weight = plain.decoder.layers[0].mlp.linear_fc1.weight
        old = weight.detach().clone()
        try:
            with megagamma.patched_initialization():
                raise KeyError("inside")
        except KeyError:
            pass
        restored = GPTModel.__init__ is before
        # Megatron's mixed-precision optimizer keeps its copy there.
        weight.main_param = torch.nn.Parameter(old.clone())
        problems = []
        for action in (
            lambda: megagamma.initialize(plain),
            lambda: megagamma.patched_initialization(gamma=float("nan")),
        ):
            try:
                action()
                problems.append("")
            except Exception as error:  # noqa: BLE001
                problems.append(f"{type(error).__name__}: {error}")
        assert isinstance(InitializationError("x"), Exception)
        return restored, torch.equal(weight, old), *problems  # type: ignore[return-value]

    return in_groups(run)


def test_no_trace_and_refusals(one_rank: RankPool) -> None:
    ((restored, unchanged, masters, option),) = one_rank.run(traces)
    assert restored and unchanged
    assert "InitializationError" in masters and "before the optimizer is built" in masters
    assert "ConfigurationError" in option and "gamma=nan" in option
