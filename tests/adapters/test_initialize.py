"""`megagamma.initialize` on models of any kind: shards, dtypes, roles that the user gives, and all that it refuses."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import RankPool
from torch import nn

import megagamma
from megagamma.errors import MegagammaError
from megagamma.initialization.streams import fingerprint, normal_


class Attention(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.attention = nn.RMSNorm(width), Attention(width)
        self.up, self.down = nn.Linear(width, 72), nn.Linear(72, width)


class Plain(nn.Module):
    """A model of no library. 101 rows do not divide by two ranks."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(101, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 101, bias=False)


ROLES: dict[str, Any] = {
    "embed.weight": "embedding",
    "*.qkv.weight": ("query", "key", "value"),
    "*.attention.out.weight": "attention_output",
    "re:blocks\\.\\d+\\.up\\.weight": "mlp_up",
    "*.down.weight": "mlp_down",
    "head.weight": "head",
    "*norm.weight": "norm",
    "*.bias": "bias",
}
GIVEN: dict[str, Any] = {"roles": ROLES, "num_layers": 2}


def prints(model: nn.Module) -> dict[str, str]:
    return {name: fingerprint(one) for name, one in model.state_dict().items() if isinstance(one, torch.Tensor)}


def test_roles_that_the_user_gives() -> None:
    model = Plain()
    report = megagamma.initialize(model, gamma=1.0, seed=5, **GIVEN)
    report.check()
    assert "2 x query" in report.table() and "blocks.1.down.weight" in report.table("matrix")
    key = normal_(
        torch.empty(32, 32), seed=5, name="blocks.0.attention.qkv.key.weight", global_shape=(32, 32), std=1 / 32
    )
    assert torch.equal(model.blocks[0].attention.qkv.weight[32:64], key)
    down = normal_(torch.empty(32, 72), seed=5, name="blocks.0.down.weight", global_shape=(32, 72), std=0.5 / 72)
    assert torch.equal(model.blocks[0].down.weight, down)
    assert all((block.up.bias == 0).all() and (block.norm.weight == 1).all() for block in model.blocks)
    # Unequal parts, (in, out), and what stays.
    model.head.weight.data.fill_(3.0)
    roles = {
        **ROLES,
        "*.qkv.weight": (("query", 64), ("value", 32)),
        "*.up.weight": "mlp_down:in,out",
        "head.weight": "keep",
    }
    del roles["re:blocks\\.\\d+\\.up\\.weight"]
    report = megagamma.initialize(model, **{**GIVEN, "roles": roles})
    assert {row.role: row.d_in for row in report.matrices}["mlp_down"] in (72,) and report.kept == {
        "head.weight": "as the given roles say"
    }
    assert (model.head.weight == 3).all()


def test_roles_in_other_forms() -> None:
    """The first pattern that matches holds, whatever a later one would say; parts of one role are matrices of their own."""
    model = nn.ModuleDict(
        {"embed": nn.Embedding(50, 16), "norm": nn.LayerNorm(16), "fused": nn.Linear(16, 96, bias=False)}
    )
    model["wide"] = nn.Linear(96, 16, bias=False)
    roles = {
        "embed.weight": "embedding", "norm.weight": "norm", "*.bias": "bias", "fused.weight": ("mlp_up", "mlp_up", "mlp_gate"),
        "wide.weight": (("key:in,out", 32), ("value:in,out", 64)), "*.weight": "mlp_up",
    }  # fmt: skip
    report = megagamma.initialize(model, roles=roles, num_layers=1, seed=3)
    report.check()
    first, second, _ = model["fused"].weight.split(32)
    assert not torch.equal(first, second) and {row.d_in for row in report.matrices if row.role == "key"} == {16}
    value = normal_(torch.empty(64, 16), seed=3, name="wide.value.weight", global_shape=(64, 16), std=1 / 16)
    assert torch.equal(model["wide"].weight[:, 32:], value.t())
    assert "wide.value.weight" in report.table("matrix")


def test_a_dry_run_changes_nothing_and_names_no_past() -> None:
    torch.manual_seed(0)
    model = Plain()
    before, state, pointers = prints(model), torch.get_rng_state(), [p.data_ptr() for p in model.parameters()]
    report = megagamma.initialize(model, dry_run=True, **GIVEN)
    assert prints(model) == before and torch.equal(torch.get_rng_state(), state)
    assert "today's weights" in str(report) and "std now" in report.table()
    row = next(row for row in report.matrices if row.role == "embedding")
    assert row.measured_std == pytest.approx(1.0, rel=0.1), "torch's own"
    with pytest.raises(MegagammaError, match="dry run"):
        report.check()
    model.eval()
    model.head.weight.requires_grad_(False)
    megagamma.initialize(model, **GIVEN)
    assert torch.equal(torch.get_rng_state(), state) and prints(model) != before
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert not model.training and not model.head.weight.requires_grad


def test_rounded_once_and_through_wrappers() -> None:
    wide, narrow = Plain(), Plain().to(torch.bfloat16)
    megagamma.initialize(wide, **GIVEN)
    megagamma.initialize(torch.compile(narrow), **GIVEN).check()
    for one, two in zip(wide.parameters(), narrow.parameters(), strict=True):
        assert torch.equal(one.bfloat16(), two)


def test_options_of_the_rule(tmp_path: Path) -> None:
    def stds(**options: Any) -> dict[str, float]:
        report = megagamma.initialize(Plain(), **GIVEN, **options)
        report.check()
        report.save(tmp_path / "report.json")
        return {row.role: row.asked_std for row in report.matrices}

    assert stds(scheme="fixed", std=0.03)["mlp_up"] == 0.03
    assert stds(gamma=1.0, depth_scale=False, residual_fan_in="hidden")["mlp_down"] == pytest.approx(1 / 32)
    assert stds(exponents={"query": 0.5})["query"] == pytest.approx(32**-0.5)
    model = Plain()
    megagamma.initialize(model, gamma=0.5, distribution="truncated", truncate_at=2.0, **GIVEN).check()
    assert model.embed.weight.abs().max() <= 2.3 * 32**-0.5


def tied_oddly() -> Plain:
    model = Plain()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return model


def overlapping() -> Plain:
    model = Plain()
    whole = torch.zeros(101 * 32 + 8)
    model.embed.weight.data = whole[: 101 * 32].view(101, 32)
    model.head.weight.data = whole[8:].view(101, 32)
    return model


def quantized() -> Plain:
    model = Plain()
    model.head.weight = nn.Parameter(torch.zeros(101, 32, dtype=torch.int8), requires_grad=False)
    return model


def with_adapter() -> Plain:
    model = Plain()
    model.blocks[0].up.lora_A = nn.Linear(32, 4, bias=False)
    return model


def stepped(model: Plain) -> Any:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def with_masters(model: Plain) -> Any:
    return torch.optim.SGD([parameter.detach().clone().requires_grad_() for parameter in model.parameters()], lr=0.1)


class WithBuffers(nn.Module):
    """As GPTQ keeps weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))


def with_packed_weights() -> Plain:
    model = Plain()
    model.blocks[0].up = WithBuffers()  # type: ignore[assignment]
    return model


def dynamically_quantized() -> Plain:
    return torch.ao.quantization.quantize_dynamic(Plain(), {nn.Linear})  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[], Plain], dict[str, Any], str]] = {
    "tied across roles": (tied_oddly, {"roles": {"blocks.1.up.weight": "mlp_gate", **ROLES}}, "are one weight"),
    "overlapping": (overlapping, {}, "share memory"),
    "quantized": (quantized, {}, r"head\.weight: is quantized \(int8\)"),
    "packed": (with_packed_weights, {}, r"blocks\.0\.up .*is quantized"),
    "quantized dynamically": (dynamically_quantized, {}, "is quantized"),
    "an adapter": (with_adapter, {}, "lora_A"),
    "no role": (
        Plain,
        {"roles": {k: v for k, v in ROLES.items() if k != "head.weight"}},
        r"head\.weight \(101, 32\).*give roles=",
    ),
    "unknown role": (
        Plain,
        {"roles": {**ROLES, "head.weight": "output"}},
        "'output' is not a role: use one of embedding",
    ),
    "no such name": (Plain, {"roles": {**ROLES, "lm_head.*": "head"}}, r"'lm_head\.\*' match no parameter"),
    "no matrix": (Plain, {"roles": {**ROLES, "*norm.weight": "query"}}, "a matrix has two axes"),
    "bad parts": (Plain, {"roles": {**ROLES, "*.qkv.weight": (("query", 5), ("key", 5))}}, "do not make up 96"),
    "no parts": (Plain, {"roles": {**ROLES, "*.qkv.weight": ()}}, "must be a role, several roles"),
    "half a pair": (Plain, {"roles": {**ROLES, "*.qkv.weight": (("key",),)}}, "must be a role, several roles"),
    "two ways": (Plain, {"roles": {**ROLES, "*.qkv.weight": ("query:in,out", "key")}}, "all its parts end in"),
    "no depth": (Plain, {"num_layers": None}, "num_layers of Plain is not known: give num_layers="),
    "gamma": (Plain, {"gamma": float("nan")}, "gamma=nan must lie between 0 and 4"),
    "gamma as text": (Plain, {"gamma": "1"}, "gamma='1' must be a number"),
    "exponent": (Plain, {"exponents": {"query": float("inf")}}, "query=inf"),
    "exponent's role": (Plain, {"exponents": {"queries": 1.0}}, "'queries' is not a role"),
    "scheme": (Plain, {"scheme": "xavier"}, "scheme='xavier' is not known: use gamma"),
    "seed": (Plain, {"seed": -1}, "seed=-1"),
    "meta": (lambda: Plain().to("meta"), {}, "to_empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing(case: str) -> None:
    make, options, message = REFUSED[case]
    model = make()
    before = prints(model) if case != "meta" else {}
    with pytest.raises(MegagammaError, match=message):
        megagamma.initialize(model, **{**GIVEN, **options})
    assert case == "meta" or prints(model) == before


@pytest.mark.parametrize(("make", "message"), [(stepped, "has made steps on"), (with_masters, "fp32 copy")])
def test_an_optimizer_that_holds_something(make: Any, message: str) -> None:
    model = Plain()
    optimizer = make(model)
    before = prints(model)
    with pytest.raises(MegagammaError, match=message):
        megagamma.initialize(model, optimizer=optimizer, **GIVEN)
    assert prints(model) == before
    for fresh in (torch.optim.AdamW, torch.optim.Adagrad):  # which has a state from the start
        megagamma.initialize(model, optimizer=fresh(model.parameters()), **GIVEN)


def test_tied_embedding_is_drawn_once() -> None:
    model, other = Plain(), Plain()
    model.head.weight = model.embed.weight
    report = megagamma.initialize(model, **GIVEN)
    megagamma.initialize(other, **GIVEN)
    assert torch.equal(model.head.weight, other.embed.weight)
    assert "head" not in {row.role for row in report.matrices}


def test_layers_that_share_a_weight_draw_it_once() -> None:
    model = tied_oddly()
    report = megagamma.initialize(model, **GIVEN)
    report.check()
    assert [row.name for row in report.matrices if row.role == "mlp_up"] == ["blocks.0.up.weight"]


def sharded(from_meta: bool, dtype: torch.dtype) -> dict[str, Any]:
    """What this rank holds of a model under FSDP2, and the largest tensor that was allocated on the way."""
    import torch.distributed as dist
    from support.ranks import join_world
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.utils._python_dispatch import TorchDispatchMode

    join_world()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta" if from_meta else "cpu"):
        model = Plain().to(dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh)
    if not from_meta:  # a pass leaves the gathered weights where the shards were
        with torch.no_grad():
            model.embed(torch.zeros(1, 1, dtype=torch.long))
            model.unshard()
    if from_meta:
        assert "target std" in megagamma.initialize(model, dry_run=True, **GIVEN).table()
        model.to_empty(device="cpu")

    largest = [0]

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            found = function(*arguments, **(named or {}))
            if isinstance(found, torch.Tensor) and type(found) is torch.Tensor:
                largest[0] = max(largest[0], found.untyped_storage().nbytes())
            return found

    with Largest():
        report = megagamma.initialize(model, gamma=1.0, **GIVEN)
    report.check()
    report.gathered().check()
    counts = {row.name: row.count for row in report.gathered().matrices}
    values = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    return {"values": values, "largest": largest[0], "counts": counts}


@pytest.mark.parametrize(("from_meta", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_shards_of_fsdp2(two_ranks: RankPool, from_meta: bool, dtype: torch.dtype) -> None:
    whole = Plain()
    report = megagamma.initialize(whole, gamma=1.0, **GIVEN)
    for rank in two_ranks.run(sharded, from_meta, dtype):
        for name, parameter in whole.named_parameters():
            assert torch.equal(rank["values"][name], parameter.to(dtype)), name
        assert rank["counts"] == {row.name: row.count for row in report.matrices}
        # The largest is the embedding's shard of 51 rows, in float64 when its std is measured.
        assert rank["largest"] <= 51 * 32 * 8


def test_importing_is_free_of_torch_and_asks_for_no_library() -> None:
    """And what draws a plain model loads neither Megatron-core, DeepSpeed, transformers nor a reader of YAML."""
    program = (
        "import sys, megagamma\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "from torch import nn\n"
        "model = nn.ModuleDict({'embed': nn.Embedding(50, 16), 'head': nn.Linear(16, 50, bias=False)})\n"
        "roles = {'embed.weight': 'embedding', 'head.weight': 'head'}\n"
        "megagamma.initialize(model, roles=roles, num_layers=1).check()\n"
        "bad = {'megatron', 'deepspeed', 'transformers', 'lm_eval', 'yaml', 'jsonargparse', 'wandb'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    with pytest.raises(AttributeError):
        _ = megagamma.nothing
    assert copy.copy(megagamma.__all__) == ["__version__", "initialize", "patched_initialization"]
