"""Process groups, devices and threads: the one place that knows which accelerator this is."""

from __future__ import annotations

import datetime
import os
import platform
import socket
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist

from megagamma.config.schema import Config
from megagamma.distributed.compat.megatron import run_on_cpu
from megagamma.distributed.compat.torch import process_groups
from megagamma.distributed.exchange import broadcast_json, describe_error, gather_json, pack, restore_error, unpack
from megagamma.distributed.rendezvous import rendezvous
from megagamma.environment import (
    World,
    choose_threads,
    export_local_rank,
    keep_gloo_on_this_host,
    world_from_environment,
)
from megagamma.errors import ConfigurationError, DistributedError, MegagammaError

T = TypeVar("T")


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """`run.device` as a device of this process.

    Raises:
        ConfigurationError: cuda is asked for and there is none, or fewer than the processes on this node.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigurationError("run.device=cuda, but torch sees no GPU here: use --run.device cpu or auto")
    if local_rank >= torch.cuda.device_count():
        error = ConfigurationError(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}: start that many "
            "processes per node, or use --run.device cpu"
        )
        error.on_one_rank = True
        raise error
    return torch.device("cuda", local_rank)


class Runtime:
    """A process with its device and process groups."""

    _megatron_groups: ClassVar[list[Any]] = []

    def __init__(self, config: Config, world: World | None = None) -> None:
        """Join the run's process groups.

        Args:
            config: resolved and validated for the world's size.
            world: from `world_from_environment`; read when not given.

        Raises:
            ConfigurationError: no such device, or a variable of the environment that is wrong.
            DistributedError: see `megagamma.distributed.rendezvous.rendezvous`.
        """
        self.config = config
        self.world = world or world_from_environment()
        self.rank, self.size = self.world.rank, self.world.size
        export_local_rank(self.world.local_rank)
        self.device = choose_device(config.run.device, self.world.local_rank)
        self.host = socket.gethostname()
        if self.device.type == "cpu":
            # DeepSpeed chooses its accelerator on import.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        else:
            torch.cuda.set_device(self.device)
            # Megatron's tensor parallelism overlaps only when kernels are queued in order.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        self.threads = choose_threads(config.run.threads, self.world.local_size or self.size)
        torch.set_num_threads(self.threads)
        self.others = self._join()
        self._form_groups()

    def _join(self) -> list[dict[str, Any]]:
        """Wait for the other processes and form the world's group; returns what each rank reported of itself."""
        if dist.is_initialized():
            return []
        if self.world.is_one_host:
            keep_gloo_on_this_host()
        minutes = self.config.run.start_minutes
        store, others = rendezvous(self.rank, self.size, self.device, minutes, self.world.is_one_host)
        self._store = store  # rank 0 serves it for as long as it lives
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=dist.PrefixStore("world", store),
            rank=self.rank,
            world_size=self.size,
            timeout=datetime.timedelta(minutes=self.config.run.timeout_minutes),
        )
        return others

    def _form_groups(self) -> None:
        from megatron.core import parallel_state

        if self.device.type == "cpu":
            run_on_cpu()
        parallel = self.config.parallel
        self.close_groups()
        before = process_groups()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            context_parallel_size=parallel.context,
            distributed_timeout_minutes=self.config.run.timeout_minutes,  # type: ignore[arg-type] # a fraction works
            create_gloo_process_groups=False,
        )
        Runtime._megatron_groups += list(process_groups() - before)
        if self.device.type == "cuda":
            from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

            model_parallel_cuda_manual_seed(self.config.run.seed % 2**31)
        self.tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        self.tensor_size = parallel_state.get_tensor_model_parallel_world_size()
        self.pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.data_group = parallel_state.get_data_parallel_group()
        self.model_group = parallel_state.get_model_parallel_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes the run's files and writes on the console."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pipeline_rank == self.config.parallel.pipeline - 1

    def gather_over_model(self, value: Any) -> list[Any]:
        """`value` of every rank that holds a part of this copy of the model; see `gather`."""
        return self._gather(value, self.model_group)

    def gather_devices(self) -> list[dict[str, Any]]:
        """Rank, host, device and the device's name of every rank, by rank; all ranks call it."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.processor()
        return self.gather({"rank": self.rank, "host": self.host, "device": str(self.device), "name": name or "cpu"})

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank; small JSON values only, of which tuples come back as lists."""
        return self._gather(value, dist.group.WORLD)

    def _gather(self, value: Any, group: Any) -> list[Any]:
        size = dist.get_world_size(group)

        def all_gather(tensor: torch.Tensor) -> torch.Tensor:
            found = [torch.empty_like(tensor) for _ in range(size)]
            dist.all_gather(found, tensor, group=group)
            return torch.stack(found)

        return gather_json(value, size, self.device, all_gather)

    def run_on_rank0(self, action: Callable[[], T]) -> T:
        """Do something on rank 0 and give its result to all; an exception there is raised on every rank.

        Args:
            action: returns a small JSON value, of which tuples come back as lists.

        Raises:
            Exception: the action's, on rank 0. On the others its class of `megagamma.errors`, or DistributedError.
        """
        outcome: dict[str, Any] = {}
        problem: Exception | None = None
        if self.is_main:
            try:
                outcome["result"] = unpack(pack(action()))
            except Exception as error:  # noqa: BLE001 - handed to every rank, then raised
                problem, outcome["error"] = error, describe_error(error)
        if self.size > 1:
            outcome = broadcast_json(outcome, self.device, self.is_main)
        if problem is not None:
            raise problem
        if "error" in outcome:
            raise restore_error(outcome["error"])
        result: T = outcome["result"]
        return result

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """Do something on every rank; when it goes wrong on any, all raise the error of the first of them.

        So that rank 0, which writes the run's messages, names a file that only another host lacks, and nobody waits.

        Raises:
            Exception: the action's own, on a rank where it is none of `megagamma.errors`, so that its traceback is seen.
        """
        result: Any = None
        problem: Exception | None = None
        try:
            result = action()
        except Exception as error:  # noqa: BLE001 - told to every rank, then raised
            problem = error
        about = None if problem is None else describe_error(problem)
        for rank, (host, met) in enumerate(self.gather((self.host, about))):
            if met is not None:
                if problem is not None and not isinstance(problem, MegagammaError):
                    raise problem
                raise restore_error(met, f"rank {rank} on {host}: " if rank else "")
        return result  # type: ignore[no-any-return]

    def raise_on_all_ranks(self, problem: Exception | None, what: str) -> None:
        """Raise on every rank when any has a problem: its own where it has one. Cheaper than `run_on_all_ranks`, which
        also hands the message round.

        Args:
            what: what was done, for the ranks that have no problem themselves.

        Raises:
            Exception: the problem; DistributedError on the other ranks.
        """
        if self.any_rank(problem is not None):
            raise problem or DistributedError(f"another rank failed {what}: see its message")

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        value = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def memory_bytes(self) -> int:
        """Peak memory of this process: of the GPU allocator, or resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @classmethod
    def close_groups(cls) -> None:
        """Forget Megatron's process groups, and end their threads, so that another model can be laid out here."""
        from megatron.core import parallel_state

        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        # Megatron only forgets its groups; each keeps threads and sockets.
        while cls._megatron_groups:
            dist.destroy_process_group(cls._megatron_groups.pop())

    @classmethod
    def close(cls) -> None:
        """Leave the run's process groups."""
        cls.close_groups()
        if dist.is_initialized():
            dist.destroy_process_group()
