"""The marriage of Megatron-core's schedule and DeepSpeed's engine.

Megatron's schedules run the microbatches; DeepSpeed's engine reduces the gradients, shards the optimizer by its
ZeRO stage, and steps. Two roads lead from the backward pass to the reduced gradient:

- *hooked* (ZeRO 1 to 3 without pipeline parallelism): the forward step calls the DeepSpeed engine, whose hooks
  follow the schedule's backward. DeepSpeed believes in one microbatch per step, so the schedule's no-sync context
  tells it which backward is the last.
- *bare* (ZeRO 0, or any pipeline parallelism): several forwards may be in flight before the first backward, and
  the hooks would lose count. The schedule runs the module itself, and the gradients are reduced once at the end.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megagamma.config.deepspeed import zero_stage
from megagamma.config.schema import Config
from megagamma.distributed.deepspeed_config import fill_deepspeed_config
from megagamma.distributed.runtime import Runtime
from megagamma.distributed.state import OptimizerState
from megagamma.distributed.straggler import ForwardClock
from megagamma.distributed.token_scores import token_scores
from megagamma.model.gpt import document_mask
from megagamma.model.parameters import ParameterMap


class ModelParallelUnit:
    """Megatron's groups under the names that DeepSpeed asks for.

    Its model-parallel group is tensor x pipeline, so that gradient norms and overflow checks see every stage.
    """

    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)

    @staticmethod
    def get_model_parallel_rank() -> int:
        return dist.get_rank(parallel_state.get_model_parallel_group())

    @staticmethod
    def get_model_parallel_world_size() -> int:
        return dist.get_world_size(parallel_state.get_model_parallel_group())


class _Chunks(torch.nn.Module):
    """This rank's model as one module for DeepSpeed; calling it calls the first chunk."""

    def __init__(self, chunks: list[torch.nn.Module]) -> None:
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.chunks[0](*args, **kwargs)


def _reduce_over_tensor_ranks(gradient: Tensor) -> Tensor:
    gradient = gradient.contiguous()
    dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
    return gradient


def sum_replicated_gradients(parameter_map: ParameterMap) -> int:
    """Sum over tensor-parallel ranks the gradients of weights that they share but use on different activations.

    Those are the q/k norms (each rank norms its own heads) and, under sequence parallelism, every norm (each rank
    norms its own tokens). Megatron sums them in a step that DeepSpeed does not run; without it the copies drift
    apart silently. Must be called before DeepSpeed takes the parameters.

    Returns:
        Number of parameters hooked.
    """
    count = 0
    for tensor in parameter_map:
        per_head = tensor.name.endswith(("q_layernorm.weight", "k_layernorm.weight"))
        if not tensor.is_split and (per_head or getattr(tensor.parameter, "sequence_parallel", False)):
            tensor.parameter.register_hook(_reduce_over_tensor_ranks)
            count += 1
    return count


def import_deepspeed(runtime: Runtime) -> Any:
    """The deepspeed package, ready for the runtime's device, and quiet on all ranks but for its warnings."""
    import logging

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if runtime.device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce on first use, which needs a compiler and a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Engine:
    """Runs steps of a laid-out model: forward, backward, reduce, clip, update."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        chunks: list[Any],
        parameter_map: ParameterMap,
        groups: list[dict[str, Any]],
    ) -> None:
        """Hand the model to DeepSpeed.

        Args:
            config: resolved and validated.
            runtime: this process.
            chunks: this rank's part of the model, filled.
            parameter_map: of those chunks.
            groups: parameter groups for AdamW, from `megagamma.training.optimizer.parameter_groups`.
        """
        deepspeed = import_deepspeed(runtime)
        self.config, self.runtime, self.chunks, self.map = config, runtime, chunks, parameter_map
        bf16 = chunks[0].config.bf16
        values = fill_deepspeed_config(config, runtime.data_size, bf16)
        self.stage = zero_stage(values)
        self.pipeline = config.parallel.pipeline
        self.hooked = self.stage > 0 and self.pipeline == 1
        if runtime.tensor_size > 1:
            sum_replicated_gradients(parameter_map)
        for tensor in parameter_map:
            # DeepSpeed's gradient norm would count a tied embedding on both of its stages.
            tensor.parameter.ds_pipe_replicated = tensor.is_copy  # type: ignore[attr-defined]
        adam = torch.optim.AdamW(
            groups, lr=config.optimizer.lr, betas=config.optimizer.betas, eps=config.optimizer.eps, fused=True
        )
        self.deepspeed, *_ = deepspeed.initialize(
            model=_Chunks(chunks),
            optimizer=adam,
            config=values,
            mpu=ModelParallelUnit(),
            dist_init_required=False,
        )
        self.optimizer = self.deepspeed.optimizer
        for chunk in chunks:
            chunk.config.no_sync_func = self._inner_microbatches if self.hooked else None
        self.state = OptimizerState(self.optimizer, self.stage, parameter_map, runtime)
        self._forward_backward = get_forward_backward_func()
        self.forward_clock = ForwardClock(runtime.device)
        self.grad_norm = math.nan

    # -- one step ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _inner_microbatches(self) -> Iterator[None]:
        """Around all microbatches but the last: no reduction is due yet."""
        self.deepspeed.set_gradient_accumulation_boundary(False)
        yield
        self.deepspeed.set_gradient_accumulation_boundary(True)

    def _inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        on_device = {key: value.to(self.runtime.device, non_blocking=True) for key, value in batch.items()}
        documents = on_device.pop("document_ids", None)
        mask = None if documents is None else document_mask(documents)
        return {**on_device, "attention_mask": mask}

    def _run(self, batches: list[dict[str, Tensor]], scale: float, train: bool) -> float:
        """Run the schedule; returns the sum over this rank's tokens of their loss (0 on all but the last stage)."""
        count = len(batches)

        def forward_step(iterator: Iterator[dict[str, Tensor]], chunk: Any, *_: Any) -> tuple[Tensor, Any]:
            inputs = self._inputs(next(iterator))
            mask = inputs.pop("loss_mask")
            module = self.deepspeed if self.hooked else chunk
            positions, attention = inputs["position_ids"], inputs["attention_mask"]
            with self.forward_clock.measure():
                output = module(inputs["tokens"], positions, attention, labels=inputs["labels"])

            def loss_of(output: Tensor) -> tuple[Tensor, Tensor]:
                total = (output.float() * mask).sum()
                # The schedule divides by the number of microbatches.
                return total * (scale * count), total.detach()

            return output, loss_of

        iterators = [iter(batches) for _ in self.chunks]
        losses = self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=count,
            seq_length=batches[0]["tokens"].shape[1],
            micro_batch_size=batches[0]["tokens"].shape[0],
            forward_only=not train,
        )
        return float(torch.stack(losses).double().sum()) if losses else 0.0

    def _sum_over_ranks(self, loss: float, tokens: float) -> tuple[float, float]:
        """Sum loss and tokens over data-parallel ranks and give them to every stage.

        Only the last stage knows the loss; each of its tensor-parallel ranks holds the same one.
        """
        runtime = self.runtime
        if runtime.size == 1:
            return loss, tokens
        mine = float(runtime.is_last_stage and runtime.tensor_rank == 0)
        total = torch.tensor([loss * mine, tokens * mine], dtype=torch.float64, device=runtime.device)
        dist.all_reduce(total)
        return float(total[0]), float(total[1])

    def forward_backward(self, batches: list[dict[str, Tensor]]) -> float:
        """Forward and backward of one global batch; gradients are left for `step` or `discard`.

        The loss of a batch is the mean over all its unmasked tokens, wherever they lie, so that a layout with other
        microbatches has the same gradient.

        Args:
            batches: this data-parallel rank's microbatches: tokens, labels, loss_mask, position_ids [b, s].

        Returns:
            Mean loss of the global batch. Unit: nats per token.
        """
        self.deepspeed.train()
        _, tokens = self._sum_over_ranks(0.0, float(sum(batch["loss_mask"].sum() for batch in batches)))
        # DeepSpeed averages over data-parallel ranks.
        loss = self._run(batches, self.runtime.data_size / max(tokens, 1.0), train=True)
        if not self.hooked:
            self._reduce()
        return self._sum_over_ranks(loss, 0.0)[0] / max(tokens, 1.0)

    def _reduce(self) -> None:
        """On the bare road: sum tied embeddings over their two stages, then average over data-parallel ranks."""
        if self.config.model.tie_embeddings and self.pipeline > 1:
            for tensor in self.map:
                if tensor.role == "embedding" and tensor.parameter.grad is not None:
                    dist.all_reduce(tensor.parameter.grad, group=parallel_state.get_embedding_group())
        self.deepspeed.set_gradient_accumulation_boundary(True)
        if self.stage == 0:
            # On one rank DeepSpeed would still flatten and copy every gradient.
            if self.runtime.data_size > 1:
                self.deepspeed.allreduce_gradients()
        elif hasattr(self.optimizer, "reduce_gradients"):
            self.optimizer.reduce_gradients(pipeline_parallel=True)
        else:
            # bf16 weights under ZeRO 1: hooks have summed the microbatches' gradients in fp32.
            self.deepspeed.allreduce_gradients()

    def _clip(self, limit: float) -> float:
        """Clip to a global L2 norm (0: do not); returns the norm before. For ZeRO 0, where DeepSpeed does not tell it.

        Each logical weight counts once: replicated ones on the first tensor-parallel rank, a tied embedding on the
        first stage.
        """
        gradients = [tensor.parameter.grad for tensor in self.map if tensor.parameter.grad is not None]
        counted = [
            tensor.parameter.grad
            for tensor in self.map
            if tensor.parameter.grad is not None
            and (tensor.is_split or self.runtime.tensor_rank == 0)
            and not tensor.is_copy
        ]
        square = torch.zeros((), dtype=torch.float32, device=self.runtime.device)
        if counted:
            square += torch.nn.utils.get_total_norm(counted) ** 2
        if self.runtime.size > 1:
            dist.all_reduce(square, group=self.runtime.model_group)
        norm = float(square.sqrt())
        if 0 < limit < norm:
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        return norm

    def step(self) -> bool:
        """Clip and update.

        Returns:
            Whether the update was made. It is left out, weights and moments untouched, when the gradient norm is not
            finite; `grad_norm` tells.
        """
        if self.stage == 0:
            self.grad_norm = self._clip(self.config.optimizer.clip_grad)
            if not math.isfinite(self.grad_norm):
                self.deepspeed.zero_grad()
                return False
            self.deepspeed.step()
            return True
        self.deepspeed.step()
        self.grad_norm = float(self.deepspeed.get_global_grad_norm() or 0.0)
        return bool(self.deepspeed.was_step_applied())

    def discard(self) -> None:
        """Drop the gradients of `forward_backward`; weights and moments stay."""
        if self.stage == 0:
            self.deepspeed.zero_grad()
            return
        if hasattr(self.optimizer, "clear_hp_grads"):
            self.optimizer.clear_hp_grads()
            self.optimizer.clear_lp_grads()
            return
        # DeepSpeed leaves a step out, and cleans up after it, when the norm is not a number.
        bad = torch.tensor(math.nan, device=self.runtime.device)
        method = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        setattr(self.optimizer, method, lambda *_, **__: [bad] if self.stage == 3 else bad)
        try:
            self.deepspeed.step()
        finally:
            delattr(self.optimizer, method)

    @torch.no_grad()
    def evaluate(self, batches: list[dict[str, Tensor]]) -> tuple[float, float]:
        """Summed loss and number of unmasked tokens over all data-parallel ranks. Unit: nats, tokens."""
        self.deepspeed.eval()
        try:
            loss = self._run(batches, 1.0, train=False)
        finally:
            self.deepspeed.train()
        return self._sum_over_ranks(loss, float(sum(batch["loss_mask"].sum() for batch in batches)))

    @torch.no_grad()
    def next_token(self, tokens: Tensor, position: int) -> int:
        """Greedy continuation: the most likely token after `position`, the same on every rank.

        Args:
            tokens: [1, s] on the CPU, the same on every rank.
            position: index of the last known token.
        """
        self.deepspeed.eval()
        # The interleaved schedule runs a multiple of the number of stages.
        count = self.pipeline if len(self.chunks) > 1 else 1
        positions = torch.arange(tokens.shape[1]).unsqueeze(0)

        def forward_step(_: Any, chunk: Any, *__: Any) -> tuple[Tensor, Any]:
            inputs = self._inputs({"tokens": tokens, "position_ids": positions})
            module = self.deepspeed if self.hooked else chunk
            output = module(inputs["tokens"], inputs["position_ids"], None, runtime_gather_output=True)
            return output, lambda output, **_: output[0, position, : self.config.model.vocab_size].float().argmax()

        found = self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=[iter(())] * len(self.chunks) if len(self.chunks) > 1 else iter(()),
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=count,
            seq_length=tokens.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        self.deepspeed.train()
        best = int(found[0]) if found else -1
        if self.runtime.size == 1:
            return best
        value = torch.tensor([best], device=self.runtime.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.runtime.model_group)
        return int(value)

    def token_scores(self, batches: list[dict[str, Tensor]]) -> Tensor:
        """Log-probability of every label, and the most likely token, at every position: see `token_scores.py`."""
        self.deepspeed.eval()
        try:
            return token_scores(self, batches)
        finally:
            self.deepspeed.train()

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and of Megatron's groups, so that this process can lay out another model.

        DeepSpeed's hooks on the gradients keep the engine alive from outside Python's reach.
        """
        for chunk in self.chunks:
            chunk.config.no_sync_func = None
        self.deepspeed.destroy()
        self.runtime.close_groups()

    def set_learning_rate(self, lr: float) -> None:
        """Set every group's rate to `lr` times the group's factor."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
