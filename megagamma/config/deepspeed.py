"""DeepSpeed's JSON: the built-in values, a file of the user's, and the ZeRO stage that they ask for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megagamma.config.schema import Config
from megagamma.errors import ConfigurationError
from megagamma.reading import Unreadable, read_json_value

AUTO = "auto"
_OFFLOADS = ("offload_optimizer", "cpu_offload")  # the second is an older spelling


def built_in(stage: int) -> dict[str, Any]:
    """What configs/deepspeed/zero0.json and zero1.json hold, so that `deepspeed_config: auto` needs no file."""
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 1,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """DeepSpeed's JSON file as it stands.

    Raises:
        ConfigurationError: missing, or not a JSON object.
    """
    if not os.path.isfile(path):
        # In a checkout a path relative to the source tree works from any working directory.
        in_tree = Path(__file__).resolve().parents[2] / path
        if os.path.isabs(path) or not in_tree.is_file():
            raise ConfigurationError(f"deepspeed_config={path}: there is no such file: give DeepSpeed's JSON file")
        path = str(in_tree)
    try:
        values = read_json_value(path)
    except Unreadable as error:
        raise ConfigurationError(f"deepspeed_config={path}: {error}: fix the file") from error
    except OSError as error:
        raise ConfigurationError(f"deepspeed_config={path}: cannot be read ({error.strerror}): fix the file") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"deepspeed_config={path}: must be a JSON object, not {type(values).__name__}")
    return values


def deepspeed_values(config: Config, data_parallel_size: int, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's JSON for a run: the user's file, or for `auto` ZeRO 1; and ZeRO 0 for 1 where there is nothing to shard.

    Raises:
        ConfigurationError: the file is missing, or not a JSON object.
    """
    nothing_to_shard = data_parallel_size == 1 and not bf16
    if config.deepspeed_config == AUTO:
        return built_in(0 if nothing_to_shard else 1)
    values = read_deepspeed_json(config.deepspeed_config)
    section = values.get("zero_optimization")
    if (
        nothing_to_shard
        and isinstance(section, dict)
        and section.get("stage") == 1
        and not any(map(section.get, _OFFLOADS))
    ):
        # The same numbers in the same memory, without DeepSpeed's copies to and from flat partitions.
        values["zero_optimization"] = {**section, "stage": 0}
    return values


def zero_stage(values: dict[str, Any]) -> int:
    """ZeRO stage that DeepSpeed's JSON asks for (0 when it says nothing).

    Raises:
        ConfigurationError: it is not 0, 1, 2 or 3.
    """
    section = values.get("zero_optimization", {})
    if not isinstance(section, dict):
        raise ConfigurationError(
            f'deepspeed_config: zero_optimization={section} must be an object, such as {{"stage": 1}}'
        )
    stage = section.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigurationError(f"deepspeed_config: zero_optimization.stage={stage} must be 0, 1, 2 or 3")
    return int(stage)
