"""Activations on a fixed probe: the residual stream, norms against their epsilon, attention and its sinks, gates.

Exact over all tokens of the probe, whatever the layout: ranks add up sums. One head's scores are in memory at a time.
Sinks as of arXiv 2410.10781 [REF]: the first token's attention alpha is its mean over all queries of a sequence, and the
rate is the share of (sequence, head) pairs with alpha above 0.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from megagamma.data.contracts import Batch

SAMPLES = 8
"""Sequences of the probe, one a microbatch, so that it is the same for any layout."""
SINK_THRESHOLD = 0.3
SINK_LENGTH = 64
"""Tokens at whose length sinks are compared with published rates; the rate at the whole length stands beside it."""
_CLOSED = 0.1
"""A gate below this lets little through."""

_OUTPUT = "output"

Sums = dict[str, dict[str, list[float]]]
"""By place (a layer's number, or layer.head) and number: [sum, count], or [largest]."""


class _Recorder:
    """Adds up what hooks see on this rank."""

    def __init__(self, engine: Any) -> None:
        runtime = engine.runtime
        self.sums: Sums = {}
        # Without sequence parallelism tensor-parallel ranks hold the same residual stream.
        self.has_stream = engine.config.parallel.sequence or runtime.tensor_rank == 0
        self.tensor_rank = runtime.tensor_rank

    def mean(self, place: str, name: str, values: Tensor) -> None:
        known = self.sums.setdefault(place, {}).setdefault(name, [0.0, 0.0])
        known[0] += float(values.sum(dtype=torch.float64))
        known[1] += values.numel()

    def largest(self, place: str, name: str, value: float) -> None:
        known = self.sums.setdefault(place, {}).setdefault(name, [value])
        known[0] = max(known[0], value)

    def stream(self, place: str, x: Tensor) -> None:
        if self.has_stream:
            wide = x.float()
            self.mean(place, "residual_square", wide.square())
            self.largest(place, "residual_max", float(wide.abs().max()))

    def norm(self, place: str, name: str, x: Tensor, epsilon: float, is_stream: bool) -> None:
        """What epsilon does to a norm's input: its rms over sqrt(epsilon), and the rms of the output before the gain."""
        if self.has_stream or not is_stream:
            square = x.float().square().mean(-1)
            self.mean(place, f"{name}_saturation", (square / epsilon).sqrt())
            self.mean(place, f"{name}_attenuation", (square / (square + epsilon)).sqrt())

    def attention(self, place: str, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> None:
        """query [s, b, heads, d], key [s, b, groups, d]; mask [b, 1, s, s], True where forbidden, or None for causal."""
        length, _, heads, width = query.shape
        repeats, factor = heads // key.shape[2], width**-0.5 if scale is None else scale
        forbidden = (
            torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1) if mask is None else mask[:, 0]
        )
        allowed = (~forbidden).expand(query.shape[1], -1, -1)
        for head in range(heads):
            one = f"{place}.{self.tensor_rank * heads + head}"
            scores = query[:, :, head].float().transpose(0, 1) @ key[:, :, head // repeats].float().permute(1, 2, 0)
            scores = scores * factor
            inside = scores[allowed]
            self.mean(place, "attention_logit_square", inside.square())
            self.largest(place, "attention_logit_max", float(inside.max()))
            chosen = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            self.mean(one, "attention_entropy", -(chosen * chosen.clamp_min(1e-30).log()).sum(-1))
            first = chosen[..., 0]
            self.mean(one, "first_token_attention", first)
            self.mean(one, "sink_rate", (first.mean(1) > SINK_THRESHOLD).double())
            self.mean(one, f"sink_rate_{SINK_LENGTH}", (first[:, :SINK_LENGTH].mean(1) > SINK_THRESHOLD).double())

    def gate(self, place: str, logits: Tensor) -> None:
        """Logits of the gates of this rank's heads."""
        wide = logits.float()
        opened = wide.sigmoid()
        self.mean(place, "gate_logit_square", wide.square())
        self.mean(place, "gate", opened)
        self.mean(place, "gate_closed", (opened < _CLOSED).double())


def _hook_layer(layer: Any, record: _Recorder, stack: ExitStack) -> None:
    place, attention = str(layer.layer_number - 1), layer.self_attention

    def before(module: Any, action: Callable[..., None]) -> None:
        stack.callback(module.register_forward_pre_hook(action, with_kwargs=True).remove)

    def norm(module: Any, name: str, is_stream: bool) -> None:
        if hasattr(module, "weight") and hasattr(module, "eps"):
            before(module, lambda _, inputs, __: record.norm(place, name, inputs[0], module.eps, is_stream))

    norm(layer.input_layernorm, "input_norm", True)
    norm(layer.pre_mlp_layernorm, "mlp_norm", True)
    norm(attention.q_layernorm, "query_norm", False)
    norm(attention.k_layernorm, "key_norm", False)

    def core(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        mask = inputs[3] if len(inputs) > 3 else named.get("attention_mask")
        record.attention(place, inputs[0], inputs[1], mask, getattr(module, "softmax_scale", None))

    before(attention.core_attention, core)
    stack.callback(
        layer.register_forward_hook(
            lambda _, __, output: record.stream(place, output[0] if isinstance(output, tuple) else output)
        ).remove
    )
    if layer.config.attention_output_gate:
        apply = attention._apply_output_gate

        def gated(x: Tensor, gate: Tensor) -> Tensor:
            record.gate(place, gate)
            out: Tensor = apply(x, gate)
            return out

        attention._apply_output_gate = gated
        stack.callback(lambda: delattr(attention, "_apply_output_gate"))


def _hook_output(chunk: Any, record: _Recorder, stack: ExitStack) -> None:
    """Logits of the true vocabulary; each tensor-parallel rank holds a shard of them."""
    head = getattr(chunk, "output_layer", None)
    if head is None:
        return

    def see(_: Any, __: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        held = logits.shape[-1]
        own = min(max(chunk.true_vocab_size - record.tensor_rank * held, 0), held)
        record.mean(_OUTPUT, "logit_square", logits[..., :own].float().square())

    stack.callback(head.register_forward_hook(see).remove)


@contextmanager
def _recording(engine: Any) -> Iterator[_Recorder]:
    record = _Recorder(engine)
    with ExitStack() as stack:
        for chunk in engine.chunks:
            for layer in chunk.decoder.layers:
                _hook_layer(layer, record, stack)
            _hook_output(chunk, record, stack)
        yield record


def probe_batches(evaluation_set: Any, pipeline: int) -> list[Batch]:
    """The first `SAMPLES` samples of a set, one a batch; as many more as fill a pipeline."""
    count = min(SAMPLES, evaluation_set.size)
    count = max(pipeline, count // pipeline * pipeline)
    return [evaluation_set.batch([index]) for index in range(count)]


def _merged(parts: list[Sums]) -> Sums:
    total: Sums = {}
    for part in parts:
        for place, numbers in part.items():
            for name, values in numbers.items():
                known = total.setdefault(place, {}).setdefault(name, [-math.inf] if len(values) == 1 else [0.0, 0.0])
                if len(values) == 1:
                    known[0] = max(known[0], values[0])
                else:
                    known[0], known[1] = known[0] + values[0], known[1] + values[1]
    return total


def measure_activations(engine: Any, batches: list[Batch]) -> dict[str, Any]:
    """Numbers of every layer and head on the probe; a collective, and every data-parallel rank runs the same probe.

    Returns:
        `layers`: by number, means over tokens and heads; `heads`: by layer.head; `output`: of the logits. Weights,
        gradients and random states stay as they are.
    """
    with _recording(engine) as record:
        engine.run(batches, lambda output, _: output.new_zeros(()), needs="loss")
    total = _merged(engine.runtime.gather_over_model(record.sums))
    layers: dict[str, dict[str, float]] = {}
    heads: dict[str, dict[str, float]] = {}
    outputs: dict[str, dict[str, float]] = {}
    for place, sums in total.items():
        found = outputs if place == _OUTPUT else layers if "." not in place else heads
        for name, values in sums.items():
            value = values[0] if len(values) == 1 else values[0] / max(values[1], 1.0)
            if name.endswith("_square"):
                name, value = name.removesuffix("_square") + "_rms", math.sqrt(value)
            found.setdefault(place, {})[name] = value
    for place, numbers in layers.items():
        if numbers.get("residual_rms"):
            numbers["massive_activation"] = numbers["residual_max"] / numbers["residual_rms"]
        own = [one for key, one in heads.items() if key.split(".")[0] == place]
        for name in own[0] if own else ():
            numbers[name] = math.fsum(one[name] for one in own) / len(own)
    return {
        "samples": len(batches),
        "output": outputs.get(_OUTPUT, {}),
        "layers": {place: layers[place] for place in sorted(layers, key=int)},
        "heads": {place: heads[place] for place in sorted(heads, key=lambda one: tuple(map(int, one.split("."))))},
    }
