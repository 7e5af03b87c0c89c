"""fp32 weights and Adam moments of every tensor, under any ZeRO stage, by whole tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagamma.distributed.runtime import Runtime
from megagamma.model.parameters import MappedTensor, ParameterMap

# The fp32 master weight and Adam's two moments; names as torch.optim.AdamW has them.
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def partition_writer(runtime: Runtime) -> Callable[[MappedTensor, Tensor], None]:
    """`write_partition` for this rank."""
    return functools.partial(write_partition, data_rank=runtime.data_rank)


def write_partition(tensor: MappedTensor, whole: Tensor, data_rank: int) -> None:
    """Write this rank's part of a whole local tensor into a weight that ZeRO 3 has partitioned.

    Args:
        tensor: of the map; its parameter holds a shard `ds_tensor`, the last of them padded.
        whole: [tensor.shape], rounded to the weight's dtype here.
        data_rank: this rank among the data-parallel ones.
    """
    parameter: Any = tensor.parameter
    flat, shard = whole.reshape(-1), parameter.ds_tensor
    start = shard.numel() * data_rank
    if start < flat.numel():
        end = min(flat.numel(), start + shard.numel())
        shard.data.view(-1)[: end - start].copy_(flat[start:end])
    if parameter.numel() == flat.numel():  # small ones stay whole between steps
        parameter.data.copy_(whole)


class OptimizerState:
    """Reads and writes what DeepSpeed has sharded, one whole (fused, tensor-parallel local) tensor at a time."""

    def __init__(self, optimizer: Any, stage: int, parameter_map: ParameterMap, runtime: Runtime) -> None:
        """Args: optimizer: DeepSpeed's, or the bare one under stage 0; stage: ZeRO stage."""
        self.optimizer, self.stage, self.map, self.runtime = optimizer, stage, parameter_map, runtime
        self.adam: torch.optim.Optimizer = optimizer if stage == 0 else optimizer.optimizer
        self._create_moments()

    def _flat_parameters(self) -> list[Tensor]:
        """What Adam's state is keyed by: the parameters, or this rank's flat fp32 partitions of them."""
        if self.stage == 0:
            return [tensor.parameter for tensor in self.map]
        if self.stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        if hasattr(self.optimizer, "fp32_groups_flat_partition"):  # bf16 weights under ZeRO 1
            return list(self.optimizer.fp32_groups_flat_partition)
        return list(self.optimizer.single_partition_of_fp32_groups)

    def _create_moments(self) -> None:
        """Create Adam's state now; torch would at the first step, too late for a checkpoint to be read into it."""
        for flat in self._flat_parameters():
            state = self.adam.state[flat]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                state["exp_avg"] = torch.zeros_like(flat)
                state["exp_avg_sq"] = torch.zeros_like(flat)
        if self.stage in (1, 2):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _fragment(self, tensor: MappedTensor, kind: str) -> tuple[Tensor | None, int]:
        """This rank's flat fp32 piece of a tensor and where it starts; None when it has none.

        A piece may be longer than what is left of the tensor: ZeRO 3 pads the last one.
        """
        parameter: Any = tensor.parameter
        if self.stage == 0:
            whole = parameter.data if kind == "weight" else self.adam.state[parameter][kind]
            return whole.view(-1), 0
        if self.stage == 3:
            key = None if kind == "weight" else kind
            piece, _ = self.optimizer._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=key
            )
            return piece.view(-1), piece.numel() * self.runtime.data_rank
        mapping = parameter._hp_mapping
        if mapping is None:
            return None, 0
        piece = mapping.get_hp_fragment(None if kind == "weight" else kind)
        return piece.view(-1), mapping.lp_fragment_address.start

    @torch.no_grad()
    def get(self, tensor: MappedTensor, kind: str) -> Tensor:
        """A whole tensor in fp32 on the run's device.

        A collective over data-parallel ranks: all call it for the same tensors in the same order.
        """
        piece, start = self._fragment(tensor, kind)
        if self.stage == 0:
            assert piece is not None
            return piece.detach().view(tensor.shape).float()
        count = int(torch.Size(tensor.shape).numel())
        whole = torch.zeros(count, dtype=torch.float32, device=self.runtime.device)
        if piece is not None and start < count:
            end = min(count, start + piece.numel())
            whole[start:end] = piece[: end - start].to(whole.device, torch.float32)
        if self.runtime.data_size > 1:
            dist.all_reduce(whole, group=self.runtime.data_group)
        return whole.view(tensor.shape)

    @torch.no_grad()
    def set(self, tensor: MappedTensor, kind: str, value: Tensor) -> None:
        """Write a whole tensor; a weight goes into the model too, rounded to its dtype. Not a collective."""
        flat = value.reshape(-1)
        piece, start = self._fragment(tensor, kind)
        if piece is not None and start < flat.numel():
            end = min(flat.numel(), start + piece.numel())
            piece[: end - start].copy_(flat[start:end])
        if kind != "weight" or self.stage == 0:
            return
        if self.stage < 3:
            tensor.parameter.data.copy_(value)
        else:
            write_partition(tensor, value, self.runtime.data_rank)

    @property
    def step(self) -> int:
        """Updates that Adam has made; its bias correction depends on it."""
        return int(self.adam.state[self._flat_parameters()[0]]["step"])

    @step.setter
    def step(self, value: int) -> None:
        for flat in self._flat_parameters():
            self.adam.state[flat]["step"].fill_(value)
