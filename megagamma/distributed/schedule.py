"""Megatron-core's pipeline schedules, called here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megagamma.data.contracts import Batch

Forward = Callable[[Any, Batch], Tensor]
OutputFunction = Callable[[Tensor, Batch], Tensor]


def run_schedule(
    chunks: list[Any],
    batches: list[Batch],
    forward: Forward,
    output_function: OutputFunction,
    *,
    device: torch.device,
    train: bool,
) -> list[Tensor]:
    """Run microbatches through this rank's part of the model, and backward when training; all ranks call it.

    Args:
        chunks: this rank's GPTModel, or one per virtual stage; process groups must exist.
        batches: of one shape, as many on every rank.
        forward: runs a chunk on a batch that is on the device.
        output_function: gets what `forward` gave on the last stage, and the batch. When training it returns a scalar, and
            the gradient is that of the sum over the microbatches.
        device: of the model.

    Returns:
        What `output_function` returned, a value per microbatch, detached when training; empty on all stages but the last.
    """
    count = len(batches)

    def forward_step(iterator: Iterator[Batch], chunk: Any, *_: Any) -> tuple[Tensor, Any]:
        batch = next(iterator).to(device)

        def finish(output: Tensor, non_loss_data: bool = False) -> Any:
            value = output_function(output, batch)
            # The schedule divides by the number of microbatches.
            return value if non_loss_data else (value * count, value.detach())

        return forward(chunk, batch), finish

    iterators = [iter(batches) for _ in chunks]
    values: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=count,
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=not train,
        collect_non_loss_data=not train,
    )
    return values
