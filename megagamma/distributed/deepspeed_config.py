"""DeepSpeed's JSON with its "auto" values filled from our options, and contradictions refused."""

from __future__ import annotations

import copy
from typing import Any

from megagamma.config.deepspeed import deepspeed_values, zero_stage
from megagamma.config.schema import Config
from megagamma.errors import ConfigurationError

# What our own options decide. DeepSpeed's optimizer and scheduler sections would shadow them.
_OURS = {"optimizer": "optimizer.*", "scheduler": "schedule.*", "fp16": "precision.dtype"}


def _fill(values: dict[str, Any], key: str, wanted: Any, option: str) -> None:
    given = values.get(key, "auto")
    if given != "auto" and given != wanted:
        raise ConfigurationError(
            f'deepspeed_config: {key}={given} contradicts {option}, which gives {wanted}: write "auto" in the JSON file'
        )
    values[key] = wanted


def fill_deepspeed_config(config: Config, data_size: int, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's config of a run.

    Args:
        config: resolved and validated.
        data_size: data-parallel ranks.
        bf16: whether weights are bf16.

    Raises:
        ConfigurationError: a value of the file that contradicts an option.
    """
    values = copy.deepcopy(deepspeed_values(config, data_size, bf16))
    for section, option in _OURS.items():
        if values.get(section, {}) and values[section].get("enabled", True):
            raise ConfigurationError(
                f"deepspeed_config: the section {section!r} would shadow {option}: remove it from the JSON file"
            )
    micro = config.data.micro_batch_size
    _fill(values, "train_micro_batch_size_per_gpu", micro, "data.micro_batch_size")
    # Megatron's schedule counts the microbatches; for DeepSpeed every step is one of them.
    _fill(values, "gradient_accumulation_steps", 1, "the engine")
    _fill(values, "train_batch_size", micro * data_size, "data.micro_batch_size x data-parallel ranks")
    stage = zero_stage(values)
    # Without ZeRO DeepSpeed clips but does not report the norm, so the engine does both.
    _fill(values, "gradient_clipping", config.optimizer.clip_grad, "optimizer.clip_grad")
    if stage == 0:
        values["gradient_clipping"] = 0.0
    _fill(values.setdefault("bf16", {}), "enabled", bf16, "precision.dtype")
    if bf16:
        if stage == 0:
            raise ConfigurationError(
                "precision.dtype=bf16 needs fp32 master weights, which ZeRO 0 does not keep: use "
                "--deepspeed_config configs/deepspeed/zero1.json, which costs no more memory on one rank"
            )
        # A step whose gradients are not finite is left out instead of applied.
        values["bf16"].setdefault("check_grad_overflow", True)
        # Microbatches add up in fp32 as they come, on either path of the engine.
        values["bf16"].setdefault("immediate_grad_update", True)
        if stage == 1:  # and over ranks: DeepSpeed would round each rank's sum to bf16 for the way
            values.setdefault("communication_data_type", "fp32")
        values.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    values.setdefault("zero_allow_untested_optimizer", True)
    return values
