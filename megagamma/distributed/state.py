"""fp32 weights and Adam moments of every tensor, under any ZeRO stage, by whole tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagamma.distributed.compat import deepspeed as compat
from megagamma.distributed.norm import sum_of_squares
from megagamma.distributed.runtime import Runtime
from megagamma.model.parameters import MappedTensor, ParameterMap

_AT_ONCE = 1 << 20  # numbers of which an update is worked out at a time: they stay in a cache


def partition_writer(runtime: Runtime) -> Callable[[MappedTensor, Tensor], None]:
    """`write_partition` for this rank."""
    return functools.partial(write_partition, data_rank=runtime.data_rank)


def _shard(whole: Tensor, size: int, data_rank: int) -> Tensor:
    """This rank's shard of a flattened tensor, of `size` numbers; the last one is padded with zeros."""
    flat = whole.reshape(-1)
    shard = flat[size * data_rank : size * (data_rank + 1)]
    return torch.nn.functional.pad(shard, (0, size - shard.numel()))


def write_partition(tensor: MappedTensor, whole: Tensor, data_rank: int) -> None:
    """Write this rank's part of a whole local tensor into a weight that ZeRO 3 has partitioned.

    Args:
        tensor: of the map.
        whole: [tensor.shape], rounded to the weight's dtype here.
        data_rank: this rank among the data-parallel ones.
    """
    parameter: Any = tensor.parameter
    partition = compat.local_partition(parameter).view(-1)
    partition.copy_(_shard(whole, partition.numel(), data_rank))
    if parameter.numel() == whole.numel():  # small ones stay whole between steps
        parameter.data.copy_(whole)


class OptimizerState:
    """Reads and writes what DeepSpeed has partitioned, one whole (fused, tensor-parallel local) tensor at a time."""

    def __init__(self, optimizer: Any, zero_stage: int, parameter_map: ParameterMap, runtime: Runtime) -> None:
        """Args: optimizer: DeepSpeed's, or the bare one under ZeRO 0."""
        self.optimizer, self.zero_stage, self.map, self.runtime = optimizer, zero_stage, parameter_map, runtime
        self.adam: torch.optim.Optimizer = optimizer if zero_stage == 0 else optimizer.optimizer
        self._create_moments()

    def flat_parameters(self) -> list[Tensor]:
        """What Adam's state is keyed by: the parameters, or this rank's flat fp32 partitions of them."""
        if self.zero_stage == 0:
            return [tensor.parameter for tensor in self.map]
        return compat.flat_parameters(self.optimizer, self.zero_stage)

    def _create_moments(self) -> None:
        """Create Adam's state now; torch would at the first step, too late for a checkpoint to be read into it."""
        for flat in self.flat_parameters():
            state = self.adam.state[flat]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                state["exp_avg"] = torch.zeros_like(flat)
                state["exp_avg_sq"] = torch.zeros_like(flat)
        compat.link_moments(self.optimizer, self.zero_stage)

    @torch.no_grad()
    def get(self, tensor: MappedTensor, kind: str) -> Tensor:
        """A whole tensor in fp32 on the run's device.

        A collective over data-parallel ranks: all call it for the same tensors in the same order.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = tensor.parameter
        if self.zero_stage == 0:
            whole = parameter.data if kind == "weight" else self.adam.state[parameter][kind]
        elif kind == "weight":
            whole = safe_get_full_fp32_param(parameter)
        else:
            whole = safe_get_full_optimizer_state(parameter, kind)
        return whole.detach().view(tensor.shape).to(self.runtime.device, torch.float32)

    def gradient(self, tensor: MappedTensor) -> Tensor | None:
        """The reduced gradient of a tensor, between backward and update: before it is clipped, in any shape.

        A collective over data-parallel ranks under ZeRO 1 to 3.
        """
        from deepspeed.utils import safe_get_full_grad

        parameter: Any = tensor.parameter
        found: Tensor | None = parameter.grad if self.zero_stage == 0 else safe_get_full_grad(parameter)
        return found

    @torch.no_grad()
    def set(self, tensor: MappedTensor, kind: str, value: Tensor) -> None:
        """Write a whole tensor; a weight goes into the model too, rounded to its dtype. Not a collective."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        parameter: Any = tensor.parameter
        if self.zero_stage == 0:
            (parameter.data if kind == "weight" else self.adam.state[parameter][kind]).copy_(value)
        elif self.zero_stage < 3:
            if kind != "weight":
                safe_set_full_optimizer_state(parameter, value, kind)
            else:
                safe_set_full_fp32_param(parameter, value)
                parameter.data.copy_(value)
        else:
            # The setters of whole tensors refuse a last shard that is padded.
            shard = _shard(value, compat.local_partition(parameter).numel(), self.runtime.data_rank)
            if kind != "weight":
                safe_set_local_optimizer_state(parameter, shard, kind)
            else:
                safe_set_local_fp32_param(parameter, shard)
                write_partition(tensor, value, self.runtime.data_rank)

    @torch.no_grad()
    def direction_rms(self) -> float:
        """Root mean square of what AdamW moves weights by over the learning rate; a collective of all ranks.

        It is m / (1 - b1^t) over sqrt(v / (1 - b2^t)) + eps, between 0 and about 1, whatever was drawn. Gains that
        tensor-parallel ranks share count once a rank.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.runtime.device)
        group = self.adam.param_groups[0]
        (beta1, beta2), eps, step = group["betas"], group["eps"], self.step
        if step == 0:
            return 0.0
        for flat in self.flat_parameters():
            state = self.adam.state[flat]
            for first, second in zip(
                state["exp_avg"].view(-1).split(_AT_ONCE), state["exp_avg_sq"].view(-1).split(_AT_ONCE), strict=True
            ):
                root = (second / (1.0 - beta2**step)).sqrt_().add_(eps)
                total[0] += sum_of_squares([first / root], first.device).to(total.device) / (1.0 - beta1**step) ** 2
                total[1] += first.numel()
        dist.all_reduce(total)
        return float((total[0] / total[1]).sqrt())

    @property
    def step(self) -> int:
        """Updates that Adam has made; its bias correction depends on it."""
        return int(self.adam.state[self.flat_parameters()[0]]["step"])

    @step.setter
    def step(self, value: int) -> None:
        for flat in self.flat_parameters():
            self.adam.state[flat]["step"].fill_(value)
