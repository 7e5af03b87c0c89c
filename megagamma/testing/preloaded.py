"""Imported first by the server that runs are forked from: Megatron-core as a run imports it."""

from megagamma.distributed.compat.megatron import preload

preload()
