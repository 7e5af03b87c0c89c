"""What is needed of DeepSpeed beyond its public names: its optimizers' flat parameters, gradients and norms.

`optimizer` is DeepSpeed's wrapper under ZeRO 1 to 3: DeepSpeedZeroOptimizer (1 and 2), BF16_Optimizer (1 with bf16 weights),
DeepSpeedZeroOptimizer_Stage3.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagamma.distributed.compat.torch import compiled_when_called
from megagamma.distributed.norm import sum_of_squares


@contextlib.contextmanager
def _without_prints() -> Iterator[None]:
    """DeepSpeed prints some of what it does, such as "begin bf16_optimizer", past its logger."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def import_deepspeed(on_cpu: bool) -> Any:
    """The deepspeed package, which logs warnings only."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if on_cpu:
        # DeepSpeed would compile a shared-memory all-reduce on first use, which needs a compiler and a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def initialize(deepspeed: Any, **arguments: Any) -> Any:
    """`deepspeed.initialize` without what it prints; returns the engine."""
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.get_global_norm_of_tensors = _exact_norm_of_tensors
    with _without_prints(), compiled_when_called():  # it imports its Muon
        engine, *_ = deepspeed.initialize(**arguments)
    if isinstance(engine.optimizer, bf16_optimizer.BF16_Optimizer):
        _spare_passes_over_gradients(engine, engine.optimizer)
    return engine


def _spare_passes_over_gradients(engine: Any, optimizer: Any) -> None:
    """Leave out what BF16_Optimizer does with fp32 gradients to no effect.

    It clears them after a step and then adds the first microbatch's; here that one overwrites them. And on one data-parallel
    rank it copies all of them into one buffer and back, to average them with nobody's.
    """
    filled = optimizer.fp32_groups_has_gradients
    step = optimizer.step

    @torch.no_grad()
    def take(weight: Any, group: int, number: int, clear_lp_grads: bool) -> None:
        if weight.grad is None:
            return
        sum_so_far = optimizer.fp32_groups_gradients[group][number]
        gradient = weight.grad.view(sum_so_far.shape)
        if filled[group][number]:
            sum_so_far.add_(gradient)
        else:
            sum_so_far.copy_(gradient)
        weight._hp_grad = sum_so_far
        filled[group][number] = True
        if clear_lp_grads:
            weight.grad.zero_()

    def clear() -> None:
        for flags in filled:
            flags[:] = [False] * len(flags)

    def zero_what_got_none() -> None:
        for flags, gradients in zip(filled, optimizer.fp32_groups_gradients, strict=True):
            for has_one, gradient in zip(flags, gradients, strict=True):
                if not has_one:
                    gradient.zero_()

    def step_without_leftovers(closure: Any = None) -> None:
        zero_what_got_none()
        step(closure)

    optimizer._update_hp_grad, optimizer.clear_hp_grads, optimizer.step = take, clear, step_without_leftovers
    if dist.get_world_size(optimizer.dp_process_group) == 1:
        engine.enable_backward_allreduce = False


def _exact_norm_of_tensors(
    input_tensors: Any, norm_type: float = 2, mpu: Any = None, moe_ep_group: Any = None
) -> Tensor:
    """In place of DeepSpeed's, which adds up squares in fp32: on a CPU its error grows with a tensor's size, so that it
    depends on the layout. Its other optimizers add up in fp64."""
    if norm_type != 2 or moe_ep_group is not None:
        raise NotImplementedError("only the L2 norm of a model without experts is asked for")
    tensors = list(input_tensors)
    total = sum_of_squares(tensors, tensors[0].device)
    if mpu is not None:
        dist.all_reduce(total, group=mpu.get_model_parallel_group())
    return total.sqrt().float()


def flat_parameters(optimizer: Any, stage: int) -> list[Tensor]:
    """This rank's flat fp32 partitions, which Adam's state is keyed by."""
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return list(optimizer.fp32_groups_flat_partition)
    return list(optimizer.single_partition_of_fp32_groups)


def gradient_bytes(optimizer: Any, stage: int, parameters: Iterable[Any]) -> int:
    """What this rank's gradients take when all of them are there, by the buffers that DeepSpeed has for them.

    Args:
        parameters: of this rank's model.
    """
    if hasattr(optimizer, "fp32_groups_gradients_flat"):
        return sum(flat.nbytes for flat in optimizer.fp32_groups_gradients_flat)
    if stage == 3:
        return int(optimizer.grad_partitions_flat_buffer.nbytes)
    if stage == 2:
        itemsize = optimizer.gradient_accumulation_dtype.itemsize
        return sum(flat.numel() for flat in flat_parameters(optimizer, stage)) * itemsize
    return sum(parameter.nbytes for parameter in parameters)


def padded_elements(groups: Sequence[Sequence[int]], stage: int, data_size: int) -> list[int]:
    """Elements of every group of parameters as DeepSpeed partitions it, its padding included.

    ZeRO 1 and 2 flatten a group and pad it to twice the data-parallel ranks; ZeRO 3 pads each parameter to their number.

    Args:
        groups: elements of each parameter, by group.
    """
    if stage == 0:
        return [sum(group) for group in groups]
    if stage == 3:
        return [sum(-(-count // data_size) * data_size for count in group) for group in groups]
    unit = 2 * data_size
    return [-(-sum(group) // unit) * unit for group in groups]


def link_moments(optimizer: Any, stage: int) -> None:
    """Tell ZeRO 1 and 2 that Adam's state is there, which they notice only after the first step."""
    if stage in (1, 2):
        optimizer._lazy_init_hp_params_optimizer_state()


def reduce_gradients(engine: Any, optimizer: Any, stage: int) -> None:
    """Average the gradients over data-parallel ranks after a schedule that ran without DeepSpeed's hooks."""
    engine.set_gradient_accumulation_boundary(True)
    if stage > 0 and hasattr(optimizer, "reduce_gradients"):
        optimizer.reduce_gradients(pipeline_parallel=True)
    elif engine.enable_backward_allreduce:
        # ZeRO 0; and bf16 weights under ZeRO 1, whose hooks have summed the microbatches' gradients in fp32.
        engine.allreduce_gradients()


def gradient(parameter: Any) -> Tensor | None:
    """A weight's gradient on this rank before it is reduced: of bf16 weights their sum in fp32."""
    summed: Tensor | None = getattr(parameter, "_hp_grad", None)
    return parameter.grad if summed is None else summed


def drop_gradients(engine: Any, optimizer: Any, stage: int) -> None:
    """Forget the gradients of ZeRO 1 to 3; weights and moments stay."""
    if hasattr(optimizer, "clear_hp_grads"):
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()
        return
    # DeepSpeed leaves a step out, and cleans up after it, when the norm is not a number.
    bad = torch.tensor(math.nan, device=engine.device)
    method = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
    setattr(optimizer, method, lambda *_, **__: [bad] if stage == 3 else bad)
    try:
        engine.step()
    finally:
        delattr(optimizer, method)


def local_partition(parameter: Any) -> Tensor:
    """What this rank holds of a weight: under ZeRO 3 its shard, the last one padded; else all of it."""
    partition: Tensor = parameter.ds_tensor.data if hasattr(parameter, "ds_tensor") else parameter.data
    return partition


def mark_pipeline_copy(parameter: Any, is_copy: bool) -> None:
    """Keep DeepSpeed's gradient norm from counting a tied embedding on both of its stages."""
    parameter.ds_pipe_replicated = is_copy


def release(engine: Any) -> None:
    """End a DeepSpeed engine, and let go of the process groups that it and its model name.

    Under ZeRO 3 hooks of autograd keep engine and model alive, out of reach of Python's collector. With them some fifteen
    process groups would stay, whose threads look for messages a hundred times a second each. Its weights name one too.
    """
    engine.destroy()
    weights = list(engine.module.parameters())
    holders = [engine, engine.optimizer, *engine.module.modules(), *weights]
    # Under ZeRO 3 also what gathers the weights: a part of the optimizer, and what each weight's methods close over.
    holders += [getattr(engine.optimizer, "parameter_offload", None)]
    for weight in weights:
        holders += [
            cell.cell_contents for cell in getattr(getattr(weight, "partition", None), "__closure__", None) or ()
        ]
    for holder in holders:
        for name, value in list(getattr(holder, "__dict__", {}).items()):
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, dist.ProcessGroup) or type(value).__name__ == "ProcessGroupCollection":
                vars(holder)[name] = None
