"""The method is usable with torch and numpy alone: schema, initialization and the parameter map."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MODULES = (
    "config.schema",
    "initialization.gamma",
    "initialization.streams",
    "initialization.report",
    "model.parameters",
)
PROGRAM = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not there")

BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocked())
for name in sys.argv[2:]:
    importlib.import_module(f"megagamma.{name}")
"""
# What the package depends on, by the names that are imported, but for torch and numpy.
OTHERS = (
    "accelerate,datasets,deepspeed,filelock,huggingface_hub,jsonargparse,lm_eval,matplotlib,megatron,psutil,pyarrow,safetensors,"
    "sentencepiece,tokenizers,tqdm,transformers,wandb,xxhash,yaml,zstandard"
)


def import_without(blocked: str, *modules: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, blocked, *modules]
    return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)


def test_nothing_but_torch_and_numpy_is_needed() -> None:
    result = import_without(OTHERS, *MODULES)
    assert result.returncode == 0, result.stderr


def test_the_schema_needs_the_standard_library_only() -> None:
    result = import_without(f"{OTHERS},torch,numpy", "config.schema")
    assert result.returncode == 0, result.stderr


def test_a_module_that_needs_more_is_noticed() -> None:
    """The negative control."""
    result = import_without(OTHERS, "config.io")
    assert result.returncode == 1 and "is not there" in result.stderr
