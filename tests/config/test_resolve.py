"""What follows from a config alone: its dtype, and that checking it needs nothing else."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megagamma.config import bounds as bounds_module
from megagamma.config import rules as rules_module
from megagamma.config import schema as schema_module
from megagamma.config.io import parse_config
from megagamma.config.resolve import planned_dtype

TINY = ["--data.corpus", "tiny"]


@pytest.mark.parametrize(
    ("dtype", "stage", "ranks", "device", "expected"),
    [
        ("auto", None, 1, "cpu", "fp32"),
        ("auto", None, 4, "cpu", "fp32"),
        ("auto", None, 1, "cuda", "bf16"),
        ("auto", None, 4, "cuda", "bf16"),
        ("auto", 0, 1, "cuda", "fp32"),
        ("auto", 0, 4, "cuda", "fp32"),
        ("auto", 1, 1, "cuda", "bf16"),
        ("auto", 3, 4, "cuda", "bf16"),
        ("auto", 2, 4, "cpu", "fp32"),
        ("fp32", None, 1, "cuda", "fp32"),
        ("bf16", None, 1, "cpu", "bf16"),
    ],
)
def test_planned_dtype(tmp_path: Path, dtype: str, stage: int | None, ranks: int, device, expected: str) -> None:
    arguments = [*TINY, "--precision.dtype", dtype]
    if stage is not None:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        arguments += ["--deepspeed_config", str(path)]
    config = parse_config(arguments, world_size=ranks)
    assert planned_dtype(config, ranks, device) == expected


def test_a_run_takes_the_planned_dtype(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` with a ZeRO 0 file on a GPU was refused once the data was open; it is fp32, and DeepSpeed agrees."""
    import torch

    from megagamma.distributed.deepspeed_config import fill_deepspeed_config
    from megagamma.training.assembly import choose_dtype

    monkeypatch.chdir(root)
    config = parse_config([*TINY, "--deepspeed_config", "configs/deepspeed/zero0.json"])
    dtype, warning = choose_dtype(config, 1, torch.device("cuda"))
    assert (dtype, warning) == (torch.float32, None)
    assert fill_deepspeed_config(config, 1, dtype == torch.bfloat16)["bf16"]["enabled"] is False
    # Negative control: with the built-in file the same config is bf16 on a GPU.
    config = parse_config(TINY)
    assert choose_dtype(config, 1, torch.device("cuda")) == (torch.bfloat16, None)


def imports(path: str) -> set[str]:
    """Top-level packages, and modules of ours, that a source file imports anywhere in it."""
    nodes = list(ast.walk(ast.parse(Path(path).read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name if name.startswith("megagamma") else name.split(".")[0] for name in names}


def test_the_schema_needs_the_standard_library_only() -> None:
    found = imports(schema_module.__file__) | imports(bounds_module.__file__)
    assert found <= {*sys.stdlib_module_names, "megagamma.config.bounds"}


def test_the_rules_open_nothing() -> None:
    found = imports(rules_module.__file__) - {"megagamma.config.bounds", "megagamma.config.schema", "megagamma.errors"}
    assert found <= set(sys.stdlib_module_names) - {"os", "io", "pathlib", "json", "importlib", "subprocess"}


def test_checking_a_config_loads_neither_torch_nor_the_planner() -> None:
    code = (
        "import sys\nfrom megagamma.config.io import parse_config\n"
        "parse_config(['--data.corpus', 'tiny', '--parallel.memory_gib', '80'])\n"
        "print([name for name in ('torch', 'megagamma.planning', 'megatron', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
