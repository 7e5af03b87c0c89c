"""Processes, their groups, and the engine: Megatron-core's schedule and DeepSpeed's optimizer on any layout."""
