"""Imported first by the server that runs are forked from: Megatron-core as a run imports it, without its warnings."""

import os

from megagamma.cli import ignore_library_warnings
from megagamma.environment import visible_gpus

ignore_library_warnings()
# Else asking for GPUs would start CUDA here, and no process that is forked afterwards could use them.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
if not visible_gpus():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would say at length that it found no other

from megagamma.distributed.compat.megatron import preload  # noqa: E402

preload()
