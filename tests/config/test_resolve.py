"""What follows from a config alone: its dtype, and that checking it needs nothing else."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megagamma.config import bounds as bounds_module
from megagamma.config import resolve
from megagamma.config import rules as rules_module
from megagamma.config import schema as schema_module
from megagamma.config.io import parse_config
from megagamma.config.resolve import planned_dtype

TINY = ["--data.corpus", "tiny"]


@pytest.mark.parametrize(
    ("dtype", "stage", "ranks", "device", "expected"),
    [
        ("auto", None, 1, "cpu", "bf16"),
        ("auto", None, 4, "cpu", "bf16"),
        ("auto", 0, 1, "cpu", "fp32"),
        ("auto", None, 1, "cuda", "bf16"),
        ("auto", None, 4, "cuda", "bf16"),
        ("auto", 0, 1, "cuda", "fp32"),
        ("auto", 0, 4, "cuda", "fp32"),
        ("auto", 1, 1, "cuda", "bf16"),
        ("auto", 3, 4, "cuda", "bf16"),
        ("auto", 2, 4, "cpu", "bf16"),
        ("auto", 2, 4, "cpu without bf16", "fp32"),
        ("auto", 2, 4, "cpu, small weights", "fp32"),
        ("fp32", None, 1, "cuda", "fp32"),
        ("bf16", None, 1, "cpu", "bf16"),
    ],
)
def test_planned_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, stage: int | None, ranks: int, device, expected: str
) -> None:
    monkeypatch.setattr(resolve, "has_fast_bf16", lambda: device != "cpu without bf16")
    gamma = "1" if device == "cpu, small weights" else "0.5"
    arguments = [*TINY, "--precision.dtype", dtype, "--init.gamma", gamma]
    if stage is not None:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        arguments += ["--deepspeed_config", str(path)]
    config = parse_config(arguments, world_size=ranks)
    assert planned_dtype(config, ranks, "cpu" if device.startswith("cpu") else "cuda") == expected


def test_deepspeed_agrees_with_the_planned_dtype(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` with a ZeRO 0 file on a GPU was refused once the data was open; it is fp32."""
    from megagamma.distributed.deepspeed_config import fill_deepspeed_config

    monkeypatch.chdir(root)
    for arguments, expected in ((["--deepspeed_config", "configs/deepspeed/zero0.json"], "fp32"), ([], "bf16")):
        config = parse_config([*TINY, *arguments])
        assert planned_dtype(config, 1, "cuda") == expected
        filled = fill_deepspeed_config(config, 1, expected == "bf16")
        assert filled["bf16"]["enabled"] is (expected == "bf16")
        # Gradients are reduced in fp32, as they add up.
        assert filled.get("communication_data_type") == ("fp32" if expected == "bf16" else None)


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
