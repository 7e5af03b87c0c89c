"""ZeRO 3 while the model is built: no rank holds more of it than its partition and the module that is being made."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from megagamma.config.deepspeed import zero_stage
from megagamma.config.schema import Config
from megagamma.distributed.compat.deepspeed import import_deepspeed
from megagamma.distributed.deepspeed_config import fill_deepspeed_config
from megagamma.distributed.engine import ModelParallelUnit
from megagamma.distributed.runtime import Runtime


def building(config: Config, runtime: Runtime, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Where to build the model in: under ZeRO 3 over several ranks, each module is partitioned as soon as it exists.

    Elsewhere it does nothing. Without it a model that only fits when it is partitioned could not be made at all.
    """
    values = fill_deepspeed_config(config, runtime.data_size, dtype == torch.bfloat16)
    if zero_stage(values) < 3 or runtime.data_size == 1:
        return contextlib.nullcontext()
    deepspeed = import_deepspeed(runtime.device.type == "cpu")
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    context: contextlib.AbstractContextManager[Any] = deepspeed.zero.Init(
        data_parallel_group=runtime.data_group,
        config_dict_or_path=values,
        mpu=ModelParallelUnit(),
        # The model chooses its dtypes and devices itself: tables of fp32 among weights of bf16.
        tensor_overrides=(),
    )
    return context
