"""What a run will be: the defaults that follow from other options, its dtype, and whether it may start.

Reads DeepSpeed's JSON file where one is named; nothing else is opened, and torch is not imported.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

from megagamma.config.deepspeed import deepspeed_values, zero_stage
from megagamma.config.rules import (
    check_batches,
    check_layout,
    check_options,
    check_zero_stage,
    data_parallel_size,
    divisors,
)
from megagamma.config.schema import ROLES, Config, resolve_model
from megagamma.environment import has_fast_bf16
from megagamma.errors import ConfigurationError

DEFAULT_STEPS = 1000


def resolve(config: Config) -> Config:
    """Fill the defaults that follow from other options, in place; returns the config. Idempotent.

    Raises:
        ConfigurationError: model.head_dim is left out and the heads do not divide the width.
    """
    model = config.model
    heads, width = model.num_attention_heads, model.hidden_size
    # Sizes below 1 are named by `validate`.
    if model.head_dim is None and heads > 0 and width > 0 and width % heads:
        raise ConfigurationError(
            f"model.num_attention_heads={model.num_attention_heads} must divide model.hidden_size="
            f"{model.hidden_size}: {divisors(model.hidden_size)}, or set model.head_dim"
        )
    resolve_model(model)
    config.run.folder = config.run.folder.replace("{name}", config.run.name)
    if config.run.steps is None and config.run.tokens is None:
        config.run.steps = DEFAULT_STEPS
    return config


def is_drawn_small(config: Config) -> bool:
    """Whether any matrix is drawn with a gamma above the usual 0.5, where bf16 is not shown to be as good as fp32: see
    docs/lab_notebook.md."""
    init = config.init
    return init.scheme == "gamma" and any(init.exponents.get(role, init.gamma) > 0.5 for role in ROLES)


def planned_dtype(config: Config, data_parallel_size: int, device: Literal["cpu", "cuda"]) -> Literal["fp32", "bf16"]:
    """`precision.dtype` of a run, with `auto` decided.

    auto is bf16 on a GPU, and on a CPU that has instructions for it where weights are not drawn small; but fp32 under a
    DeepSpeed file with ZeRO 0, which keeps no fp32 master weights. Of a CPU it is a plan: a run measures, and may take fp32.

    Raises:
        ConfigurationError: DeepSpeed's file is missing or not usable.
    """
    if config.precision.dtype != "auto":
        return config.precision.dtype
    if device == "cpu" and (not has_fast_bf16() or is_drawn_small(config)):
        return "fp32"
    return "bf16" if zero_stage(deepspeed_values(config, data_parallel_size, bf16=True)) else "fp32"


def validate(config: Config, world_size: int = 1) -> None:
    """Check every rule, before a process group or the data is opened.

    Args:
        config: a resolved config.
        world_size: number of processes.

    Raises:
        ConfigurationError: the first rule that is broken.
    """
    check_options(config)
    _check_machine(config)
    check_layout(config, world_size)
    replicas = data_parallel_size(config, world_size)
    # Where the dtype is `auto` it never contradicts the ZeRO stage, see `planned_dtype`.
    bf16 = config.precision.dtype == "bf16"
    check_zero_stage(config, zero_stage(deepspeed_values(config, replicas, bf16)))
    check_batches(config, replicas)


def _check_machine(config: Config) -> None:
    """What the options need of this machine: a package, and folders.

    The names of benchmarks are checked when the run is prepared: lm-eval takes seconds to import.
    """
    if config.model.transformer_engine and importlib.util.find_spec("transformer_engine") is None:
        raise ConfigurationError(
            "model.transformer_engine=true needs the package transformer_engine, which is not installed: "
            "install it, or set --model.transformer_engine false"
        )
    options = config.validation
    if not options.harness_tasks:
        return
    for name, path, hint in (
        ("harness_mirror", options.harness_mirror, "give the folder that tools/fetch_benchmarks.py filled"),
        ("harness_include_path", options.harness_include_path, "give a folder of lm-eval task YAMLs"),
    ):
        if path and not os.path.isdir(path):
            raise ConfigurationError(f"validation.{name}={path}: there is no such folder: {hint}")
