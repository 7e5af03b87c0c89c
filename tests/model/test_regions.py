"""Regions: what is compiled is the same function as what torch runs, and gradients alone are compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megagamma.model import norm, regions, rotary
from megagamma.model.attention import _gate
from megagamma.model.regions import Region, compile_regions
from megagamma.model.swiglu import SWIGLU
from megagamma.training.choices import compiler_problem


@pytest.fixture(autouse=True)
def eager_afterwards() -> Iterator[None]:
    yield
    compile_regions(False)


def tensor(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def cases(dtype: torch.dtype) -> dict[str, tuple[Region, tuple[Any, ...]]]:
    table = tensor(2, 6, 1, 1, 4, dtype=dtype, seed=2).detach()
    x, heads, weight = tensor(6, 2, 16, dtype=dtype), tensor(6, 2, 3, 8, dtype=dtype), tensor(8, dtype=dtype)
    return {
        "norm": (norm.NORM, (x, tensor(16, dtype=dtype, seed=3), 1e-12)),
        "norm and rotation": (norm.NORM_AND_ROTATE, (heads, weight, 1e-5, table)),
        "rotation": (rotary.ROTATION, (heads, table)),
        "swiglu": (SWIGLU, (x,)),
        "gate per feature": (_gate, (x, tensor(6, 2, 16, dtype=dtype, seed=4))),
        "gate per head": (_gate, (x, tensor(6, 2, 4, dtype=dtype, seed=4))),
    }


def results(function: Any, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Output and gradients."""
    out = function(*arguments)
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, weights)]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", list(cases(torch.float32)))
def test_formulas_are_what_torch_runs(name: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        region, arguments = cases(dtype)[name]
        expected = results(region.eager, arguments)
        assert [x.dtype for x in results(region.formula, arguments)] == [x.dtype for x in expected]
        assert distance(results(region.formula, arguments), expected) < tolerance
        # Negative control: one changed input is seen.
        with torch.no_grad():
            arguments[0][0, 0] *= 2
        assert distance(results(region.formula, arguments), expected) > 2 * tolerance


@pytest.mark.skipif(compiler_problem(torch.device("cpu")) != "", reason="no C++ compiler")
def test_a_compiled_region() -> None:
    """Really compiled: equal to rounding, and only where gradients are asked for."""
    compile_regions(True)
    region, arguments = cases(torch.float32)["norm and rotation"]
    found = results(region, arguments)
    assert type(found[0].grad_fn).__name__ == "CompiledFunctionBackward"
    assert distance(found, results(region.eager, arguments)) < 1e-5
    with torch.no_grad():
        assert torch.equal(region(*arguments), region.eager(*arguments))
    compile_regions(False)
    assert type(region(*arguments).grad_fn).__name__ != "CompiledFunctionBackward"


def test_off_unless_asked_for() -> None:
    assert not regions.are_compiled()
