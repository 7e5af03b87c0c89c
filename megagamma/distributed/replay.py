"""One step's forward and backward passes twice on the same state and batch: a device that computes two results is faulty.

What is compared, on every rank and microbatch: the output of every layer, the loss, and the gradient of every weight as the
backward pass gives it, before it is added up or reduced over ranks; under ZeRO 0 the reduced gradients too. The other stages
keep those in partitions, which are not compared. Where the device is deterministic (a CPU, or a GPU with
run.deterministic) each must be equal to the bit; elsewhere the L2 norms must agree to `BOUNDS`, so that a small error
passes.

The first difference in the order of the computation names rank and layer. Tensor-parallel ranks add up their outputs at
once, so that a fault in a forward pass may show on all of them together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megagamma.data.contracts import Batch
from megagamma.distributed.engine import Engine
from megagamma.distributed.replicas import fingerprint
from megagamma.model.parameters import MappedTensor

# Largest relative difference of an L2 norm where the device is not deterministic.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

# Microbatch, phase (forward, backward, reduced) and place in it: ascending in the order of the computation.
_Key = tuple[int, int, int]
_AFTER_ALL = 1 << 30  # microbatch of what comes after the last one

# Of a layer's tensors, by parts of their Megatron names, in the order of the forward pass.
_WITHIN_LAYER = (
    "input_layernorm", "linear_qkv", "linear_gate", "q_layernorm", "k_layernorm", "linear_proj", "pre_mlp_layernorm",
    "linear_fc1", "linear_fc2",
)  # fmt: skip


class _Trace:
    """What one run of a step computed on this rank."""

    def __init__(self, engine: Engine, exact: bool) -> None:
        self.engine, self.exact = engine, exact
        self.records: list[tuple[_Key, str]] = []
        self.values: list[Tensor] = []
        self._calls: Counter[tuple[int, int]] = Counter()

    def add(self, key: _Key, what: str, values: Tensor) -> None:
        """Keep a number or two for a tensor; on its device, so that nothing waits."""
        values = values.detach()
        self.records.append((key, what))
        if self.exact:
            self.values.append(fingerprint(values.contiguous()))
        else:
            self.values.append(torch.linalg.vector_norm(values, dtype=torch.float32).double().reshape(1))

    def run(self, batches: list[Batch]) -> float:
        """Forward and backward; returns the loss."""
        engine = self.engine
        handles = [
            layer.register_forward_hook(self._forward_hook(layer.layer_number))
            for chunk in engine.chunks
            for layer in chunk.decoder.layers
        ]
        handles += [tensor.parameter.register_hook(self._gradient_hook(tensor)) for tensor in engine.map]
        try:
            loss = engine.forward_backward(batches)
        finally:
            for handle in handles:
                handle.remove()
        last = engine.config.model.num_layers + 1
        for microbatch, value in enumerate(engine.microbatch_losses):
            self.add((microbatch, 0, last), "the loss", value)
        if engine.zero_stage == 0:
            for tensor in engine.map:
                if tensor.parameter.grad is not None:
                    key = (_AFTER_ALL, 2, -self._place(tensor))
                    self.add(key, f"the reduced gradient of {_names(tensor)}", tensor.parameter.grad)
        return loss

    def _forward_hook(self, number: int) -> Callable[..., None]:
        # With full recomputation a layer runs again in the backward pass.
        recomputes = self.engine.config.model.recompute == "full"

        def hook(_: Any, __: Any, output: Any) -> None:
            if recomputes and torch.is_grad_enabled():
                return
            hidden = output[0] if isinstance(output, tuple) else output
            self.add((self._count(0, number), 0, number), f"the output of layer {number - 1}", hidden)

        return hook

    def _gradient_hook(self, tensor: MappedTensor) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            microbatch = self._count(1, id(tensor))
            self.add((microbatch, 1, -self._place(tensor)), f"the gradient of {_names(tensor)}", gradient)

        return hook

    def _count(self, phase: int, which: int) -> int:
        """Number of the microbatch: each comes once to every layer and weight, in order."""
        self._calls[phase, which] += 1
        return self._calls[phase, which] - 1

    def _place(self, tensor: MappedTensor) -> int:
        """Place of a tensor in the forward pass: the embedding, the layers' tensors, what follows them."""
        name = tensor.parts[0].logical.name
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is not None:
            within = next((place for place, part in enumerate(_WITHIN_LAYER) if part in tensor.name), 0)
            return (int(layer.group(1)) + 1) * len(_WITHIN_LAYER) + within
        is_first = "embed_tokens" in name and not tensor.is_copy
        return 0 if is_first else (self.engine.config.model.num_layers + 1) * len(_WITHIN_LAYER) + ("norm" not in name)

    def difference(self, other: _Trace) -> tuple[_Key, str] | None:
        """The first record, in the order of the computation, that the other run has not alike."""
        if self.records != other.records:
            return (0, 0, 0), "the order of the computation"
        if not self.records:
            return None
        ours, theirs = torch.stack(self.values).cpu(), torch.stack(other.values).cpu()
        if self.exact:
            different = (ours != theirs).any(1)
        else:
            bound = BOUNDS[self.engine.dtype] * ours.abs().maximum(theirs.abs())
            # What is not finite in both is the guard's matter.
            different = ((ours - theirs).abs() > bound).any(1) | (ours.isfinite() != theirs.isfinite()).any(1)
        indices = different.nonzero().flatten().tolist()
        return self.records[min(indices, key=lambda index: (self.records[index][0], index))] if indices else None


def _names(tensor: MappedTensor) -> str:
    return ", ".join(dict.fromkeys(part.logical.name for part in tensor.parts))


def replay(engine: Engine, batches: list[Batch]) -> tuple[float, str | None]:
    """`Engine.forward_backward` twice on the same state; the second run's gradients are left. All ranks call it.

    Args:
        batches: this data-parallel rank's microbatches.

    Returns:
        The loss, and None or what differs between the two runs, with its rank: the same on every rank.
    """
    exact = engine.runtime.device.type == "cpu" or engine.config.run.deterministic
    first, second = _Trace(engine, exact), _Trace(engine, exact)
    loss = first.run(batches)
    engine.discard()
    again = second.run(batches)
    found = engine.runtime.gather((engine.runtime.host, first.difference(second)))
    differences = [(difference, rank, host) for rank, (host, difference) in enumerate(found) if difference is not None]
    if not differences:
        return again, None
    # Over the network a tuple may have become a list.
    key = min(tuple(difference[0]) for difference, _, _ in differences)
    earliest = [(difference, rank, host) for difference, rank, host in differences if tuple(difference[0]) == key]
    (_, what), _, host = earliest[0]
    ranks = ", ".join(str(rank) for _, rank, _ in earliest)
    where = f" of microbatch {key[0]}" if key[0] != _AFTER_ALL else ""
    plural = "s" if len(earliest) > 1 else ""
    return again, (
        f"rank{plural} {ranks} on {host}: {what}{where} differs between two runs of the same step (losses {loss:.8g} and "
        f"{again:.8g})"
    )
