"""What the hook draws into a really built model is what was asked for."""

from __future__ import annotations

import pytest
from support.ranks import RankError, RankPool

from megagamma.config.schema import ROLES

ARGUMENTS = [
    *("--data.corpus", "tiny", "--model.vocab_size", "1000", "--model.hidden_size", "128", "--model.num_layers", "3"),
    *("--model.num_attention_heads", "4", "--model.num_query_groups", "2", "--model.head_dim", "48"),
]


def drawn(arguments: list[str], factor: float = 1.0) -> list[tuple[str, str, float, float, float]]:
    """(name, role, target std, std measured from the model's own tensors, reported z) of every matrix.

    Args:
        factor: multiplies one matrix's weights after the draw, and before the report, as a fault would.
    """
    import torch

    from megagamma.config.io import parse_config
    from megagamma.distributed.runtime import Runtime
    from megagamma.initialization.report import check
    from megagamma.model import initialize as hook
    from megagamma.model.gpt import build_model
    from megagamma.model.parameters import ParameterMap

    config = parse_config([*ARGUMENTS, *arguments])
    runtime = Runtime(config)
    chunks = build_model(config, torch.float32, runtime.device)
    parameter_map = ParameterMap(list(chunks), config.model, 0, 1)
    original = hook.part_std
    if factor != 1.0:
        hook.part_std = lambda part, config: (
            original(part, config) * (factor if part.logical.name.endswith("layers.1.mlp.down_proj.weight") else 1.0)
        )
    try:
        moments = hook.fill(parameter_map, config)
    finally:
        hook.part_std = original
    reports = {report.name: report for report in hook.report_drawn(moments, config, runtime.gather_over_model)}
    values: dict[str, list[torch.Tensor]] = {}
    for tensor in parameter_map:
        for part in tensor.parts:
            view = part.view(tensor.parameter.data)
            if part.logical.role == "norm":
                assert (view == 1).all()
            else:
                values.setdefault(part.logical.name, []).append(view.flatten())
    runtime.close_groups()
    found = []
    for name, pieces in values.items():
        measured = float(torch.cat(pieces).double().std())
        found.append((name, reports[name].role, reports[name].asked_std, measured, reports[name].z))
    check(reports.values(), config.init.max_z)
    return found


@pytest.mark.parametrize("gamma", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_every_matrix_within_six_sigma(one_rank: RankPool, gamma: float, gate: str) -> None:
    found = one_rank.run(drawn, ["--init.gamma", str(gamma), "--model.attention_gate", gate])[0]
    assert {role for _, role, *_ in found} == set(ROLES)
    sizes = {"mlp_down": 384, "attention_output": 4 * 48}
    depth = (2 * 3) ** -0.5
    for name, role, asked, measured, z in found:
        fan = sizes.get(role, 128)
        expected = fan**-gamma * (depth if role in sizes else 1.0)
        assert asked == pytest.approx(expected, rel=1e-12), name
        # 6 standard errors of the smallest matrix here, 4 x 128 numbers.
        assert measured == pytest.approx(expected, rel=6 * (2 * 512) ** -0.5), name
        assert abs(z) < 6, name
    assert max(abs(z) for *_, z in found) > 0.1  # z is measured, not a constant


def test_overrides_reach_their_role_only(one_rank: RankPool) -> None:
    found = one_rank.run(drawn, ["--init.gamma", "1.0", "--init.query", "0.5", "--init.depth_scale", "false"])[0]
    for _, role, asked, _, _ in found:
        fan = {"mlp_down": 384, "attention_output": 192}.get(role, 128)
        assert asked == pytest.approx(fan ** -(0.5 if role == "query" else 1.0))


def test_truncated_draws_have_the_target_std(one_rank: RankPool) -> None:
    found = one_rank.run(drawn, ["--init.distribution", "truncated", "--init.truncate_at", "2"])[0]
    assert max(abs(z) for *_, z in found) < 6


def test_a_matrix_drawn_wrongly_stops_the_run(one_rank: RankPool) -> None:
    with pytest.raises(RankError, match=r"layers\.1\.mlp\.down_proj.*beyond init\.max_z"):
        one_rank.run(drawn, [], 1.05)
