"""Megatron-core's schedule and DeepSpeed's optimizer in one engine.

Megatron's schedules run the microbatches; DeepSpeed's engine reduces the gradients, partitions the optimizer by its ZeRO
stage, and steps. Two paths lead from the backward pass to the reduced gradient:

- the *ZeRO-hook path* (ZeRO 1 to 3 without pipeline parallelism): the forward step calls the DeepSpeed engine, whose hooks
  follow the schedule's backward. DeepSpeed believes in one microbatch per step, so the schedule's no-sync context says
  which backward is the last.
- the *explicit-reduction path* (ZeRO 0, or any pipeline parallelism): several forwards may be in flight before the first
  backward, and the hooks would lose count. The schedule runs the module itself, and the gradients are reduced once at the
  end.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megagamma.config.deepspeed import zero_stage
from megagamma.config.schema import Config
from megagamma.data.contracts import Batch, EvaluationSet
from megagamma.distributed.compat import deepspeed as compat
from megagamma.distributed.compat.torch import adamw
from megagamma.distributed.deepspeed_config import fill_deepspeed_config
from megagamma.distributed.norm import sum_of_squares
from megagamma.distributed.runtime import Runtime
from megagamma.distributed.schedule import OutputFunction, run_schedule
from megagamma.distributed.state import OptimizerState
from megagamma.distributed.straggler import ForwardClock
from megagamma.distributed.token_scores import label_scores
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


class Engine:
    """Runs batches through a model that is laid out over ranks: forward, backward, reduce, clip, update."""

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
        deepspeed = compat.import_deepspeed(runtime.device.type == "cpu")
        self.config, self.runtime, self.chunks, self.map = config, runtime, chunks, parameter_map
        self.dtype: torch.dtype = chunks[0].config.params_dtype
        self.deepspeed_config = fill_deepspeed_config(config, runtime.data_size, self.dtype == torch.bfloat16)
        self.zero_stage = zero_stage(self.deepspeed_config)
        self.pipeline = config.parallel.pipeline
        self.uses_hooks = self.zero_stage > 0 and self.pipeline == 1
        if runtime.tensor_size > 1:
            sum_replicated_gradients(parameter_map)
        for tensor in parameter_map:
            compat.mark_pipeline_copy(tensor.parameter, tensor.is_copy)
        adam = adamw(groups, lr=config.optimizer.lr, betas=config.optimizer.betas, eps=config.optimizer.eps, fused=True)
        self.deepspeed = compat.initialize(
            deepspeed,
            model=_Chunks(chunks),
            optimizer=adam,
            config=self.deepspeed_config,
            mpu=ModelParallelUnit(),
            dist_init_required=False,
        )
        self.optimizer = self.deepspeed.optimizer
        for chunk in chunks:
            chunk.config.no_sync_func = self._inner_microbatches if self.uses_hooks else None
        self.state = OptimizerState(self.optimizer, self.zero_stage, parameter_map, runtime)
        self.forward_clock = ForwardClock(runtime.device)
        self.grad_norm = math.nan
        self.microbatch_losses: list[Tensor] = []
        """Of this rank's last batch, summed over tokens; empty on all stages but the last. Unit: nats."""

    # -- batches through the model -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _inner_microbatches(self) -> Iterator[None]:
        """Around all microbatches but the last: no reduction is due yet."""
        self.deepspeed.set_gradient_accumulation_boundary(False)
        yield
        self.deepspeed.set_gradient_accumulation_boundary(True)

    def forward(self, chunk: Any, batch: Batch, needs: Literal["loss", "logits"] = "loss") -> Tensor:
        """One chunk on one batch on the device.

        Returns:
            On the last stage the loss per token [b, s] in nats, fp32, or this tensor-parallel rank's logits
            [b, s, padded vocabulary / t]; on the others hidden states.
        """
        mask = None if batch.document_ids is None else document_mask(batch.document_ids)
        module = self.deepspeed if self.uses_hooks else chunk
        labels = batch.labels if needs == "loss" else None
        output: Tensor = module(batch.tokens, batch.position_ids, mask, labels=labels)
        return output

    def run(
        self,
        batches: list[Batch],
        output_function: OutputFunction,
        *,
        train: bool = False,
        needs: Literal["loss", "logits"] = "loss",
    ) -> list[Tensor]:
        """Run this data-parallel rank's microbatches through the model; every rank calls this.

        Args:
            batches: as many and of the same shape on every rank; with virtual stages a multiple of the number of stages.
            output_function: (output, batch) -> tensor, on the last stage; see `forward` for the output. When training, a
                scalar whose sum over the microbatches of all data-parallel ranks, over their number, is differentiated.
            train: also run backward; gradients are left for `step` or `discard`. Otherwise nothing is recorded for it.
            needs: what the output function works on.

        Returns:
            What it returned for each microbatch; empty on all stages but the last.
        """

        def forward(chunk: Any, batch: Batch) -> Tensor:
            if not train:
                return self.forward(chunk, batch, needs)
            with self.forward_clock.measure():
                return self.forward(chunk, batch, needs)

        def run() -> list[Tensor]:
            return run_schedule(self.chunks, batches, forward, output_function, device=self.runtime.device, train=train)

        if not train:
            self.deepspeed.eval()
            try:
                with torch.no_grad():
                    return run()
            finally:
                self.deepspeed.train()
        values = run()
        if not self.uses_hooks:
            self._reduce()
        return values

    def _over_ranks(self, values: Tensor) -> Tensor:
        """Sum float64 values over data-parallel ranks and give them to every stage.

        Only the last stage knows them; each of its tensor-parallel ranks holds the same ones.
        """
        runtime = self.runtime
        if runtime.size == 1:
            return values
        if not (runtime.is_last_stage and runtime.tensor_rank == 0):
            values = torch.zeros_like(values)
        total = values.to(runtime.device)
        dist.all_reduce(total)
        return total.cpu()

    def forward_backward(self, batches: list[Batch]) -> float:
        """Forward and backward of one global batch; gradients are left for `step` or `discard`.

        The loss of a batch is the mean over all its unmasked tokens, wherever they lie, so that a layout with other
        microbatches has the same gradient.

        Args:
            batches: this data-parallel rank's microbatches.

        Returns:
            Mean loss of the global batch. Unit: nats per token.
        """
        return self._loss(batches, train=True)

    def loss(self, batches: list[Batch]) -> float:
        """Mean loss of a global batch, as `forward_backward` gives it, without gradients. Unit: nats per token."""
        return self._loss(batches, train=False)

    def _loss(self, batches: list[Batch], train: bool) -> float:
        local = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum()
        tokens = max(float(self._over_ranks(local)), 1.0)
        # DeepSpeed averages over data-parallel ranks.
        scale = self.runtime.data_size / tokens
        totals: list[Tensor] = []

        def objective(output: Tensor, batch: Batch) -> Tensor:
            total = (output.float() * batch.loss_mask).sum()
            totals.append(total.detach())
            return total * scale

        self.run(batches, objective, train=train)
        self.microbatch_losses = totals
        nats = torch.stack(totals).double().sum().cpu() if totals else torch.zeros((), dtype=torch.float64)
        return float(self._over_ranks(nats)) / tokens

    def evaluate(self, evaluation_set: EvaluationSet, batches: list[Batch]) -> Tensor:
        """Sums of an evaluation set's `measure` over batches of all data-parallel ranks: float64, on every rank."""

        def measure(output: Tensor, batch: Batch) -> Tensor:
            if evaluation_set.needs == "token_scores":
                output = label_scores(output, batch.labels, self._vocab_size)
            return evaluation_set.measure(batch, output)

        values = self.run(batches, measure, needs="loss" if evaluation_set.needs == "loss" else "logits")
        zeros = torch.zeros(len(evaluation_set.sums), dtype=torch.float64)
        return self._over_ranks(torch.stack(values).sum(0).cpu() if values else zeros)

    @property
    def _vocab_size(self) -> int:
        size = self.config.model.vocab_size
        assert size is not None
        return size

    def token_scores(self, batches: list[Batch]) -> Tensor:
        """Log-probability of every label, and the most likely token, at every position; every rank calls this.

        Raises:
            DistributedError: another rank failed before its share was done. A rank's own error is raised as it is. (A rank
                that fails while others wait for it inside the model cannot tell them, as in a training step.)

        Returns:
            [data-parallel ranks, microbatches, b, s, 2] on the CPU, the same on every rank: nats, and a token's number.
        """
        runtime = self.runtime
        values: list[Tensor] = []
        problem: Exception | None = None
        try:
            values = self.run(
                batches, lambda logits, batch: label_scores(logits, batch.labels, self._vocab_size), needs="logits"
            )
        except Exception as error:  # noqa: BLE001 - the other ranks must hear of it before they wait for this one
            problem = error
        runtime.raise_on_all_ranks(problem, "while it scored tokens")
        scores = torch.zeros(runtime.data_size, len(batches), *batches[0].tokens.shape, 2, device=runtime.device)
        if runtime.is_last_stage and runtime.tensor_rank == 0:
            scores[runtime.data_rank] = torch.stack(values)
        if runtime.size > 1:
            dist.all_reduce(scores)
        return scores.cpu()

    # -- the update ----------------------------------------------------------------------------------------------

    def _reduce(self) -> None:
        """On the explicit-reduction path: sum tied embeddings over their two stages, then average over data-parallel
        ranks."""
        if self.config.model.tie_embeddings and self.pipeline > 1:
            for tensor in self.map:
                if tensor.role == "embedding" and (gradient := compat.gradient(tensor.parameter)) is not None:
                    dist.all_reduce(gradient, group=parallel_state.get_embedding_group())
        # On one rank without ZeRO, DeepSpeed would still flatten and copy every gradient.
        if self.zero_stage > 0 or self.runtime.data_size > 1:
            compat.reduce_gradients(self.deepspeed, self.optimizer, self.zero_stage)
        else:
            self.deepspeed.set_gradient_accumulation_boundary(True)

    def _clip(self, limit: float) -> float:
        """Clip to a global L2 norm (0: do not); returns the norm before. For ZeRO 0, where DeepSpeed does not report it.

        Each logical weight counts once: replicated ones on the first tensor-parallel rank, a tied embedding on the
        first stage.
        """
        with_gradient = [tensor for tensor in self.map if tensor.parameter.grad is not None]
        counted = [
            tensor.parameter.grad
            for tensor in with_gradient
            if (tensor.is_split or self.runtime.tensor_rank == 0) and not tensor.is_copy
        ]
        square = sum_of_squares([gradient for gradient in counted if gradient is not None], self.runtime.device)
        if self.runtime.size > 1:
            dist.all_reduce(square, group=self.runtime.model_group)
        norm = float(square.sqrt())
        if 0 < limit < norm:
            torch.nn.utils.clip_grads_with_norm_(
                [tensor.parameter for tensor in with_gradient], limit, square.sqrt().float()
            )
        return norm

    def step(self) -> bool:
        """Clip and update.

        Returns:
            Whether the update was made. It is left out, weights and moments untouched, when the gradient norm is not
            finite; `grad_norm` holds it.
        """
        if self.zero_stage == 0:
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
        if self.zero_stage == 0:
            self.deepspeed.zero_grad()
        else:
            compat.drop_gradients(self.deepspeed, self.optimizer, self.zero_stage)

    def set_learning_rate(self, lr: float) -> None:
        """Set every group's rate to `lr` times the group's factor."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and of Megatron's groups, so that this process can lay out another model.

        DeepSpeed's hooks on the gradients keep the engine alive from outside Python's reach.
        """
        self.release()
        self.runtime.close_groups()

    def release(self) -> None:
        """Let go of DeepSpeed's hooks and of the process groups, and leave those alone: no other rank is waited for."""
        for chunk in self.chunks:
            chunk.config.no_sync_func = None
        compat.release(self.deepspeed)
