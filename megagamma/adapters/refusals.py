"""Models that cannot be drawn, and what to do instead; all is looked at before anything is changed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megagamma.adapters.blocks import Plan
from megagamma.adapters.local import storage_span
from megagamma.errors import InitializationError

_QUANTIZED = ("torch.ao.", "bitsandbytes", "auto_gptq", "gptqmodel", "awq")
"""Where modules come from that keep quantized weights, which need not be parameters."""
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_model(models: Sequence[nn.Module], parameters: Mapping[str, Tensor]) -> None:
    """Refuse models whose parameters are not the weights themselves.

    Raises:
        InitializationError: quantized, adapter-wrapped, or flattened by FSDP 1 or DeepSpeed's ZeRO 3.
    """
    for model in models:
        if getattr(model, "peft_config", None) is not None:
            raise InitializationError(
                f"{type(model).__name__}: has adapters (peft_config): draw the base model before they are added, "
                "or give model.get_base_model() without them"
            )
        config = getattr(model, "config", None)
        if getattr(config, "quantization_config", None) or getattr(model, "hf_quantizer", None) is not None:
            raise InitializationError(
                f"{type(model).__name__}: is quantized: draw the model in fp32 or bf16, and quantize it then"
            )
        for name, module in model.named_modules():
            if any(word in type(module).__module__ for word in ("quantiz", "bitsandbytes")) or hasattr(
                module, "qweight"
            ):
                raise InitializationError(
                    f"{name} ({type(module).__name__}): is quantized: draw the model in fp32 or bf16, and quantize it then"
                )
            if type(module).__name__ == "FullyShardedDataParallel":
                raise InitializationError(
                    "the model is wrapped by FSDP 1, which has flattened its weights: draw it before it is wrapped, or use "
                    "torch.distributed.fsdp.fully_shard"
                )
    for name, parameter in parameters.items():
        if "lora_" in name:
            raise InitializationError(f"{name}: is a part of an adapter: draw the base model before adapters are added")
        if parameter.dtype not in _FLOATS:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise InitializationError(
                f"{name}: is quantized ({kind}): draw the model in fp32 or bf16, and quantize it then"
            )
        if type(parameter).__name__ in ("Params4bit", "Int8Params"):
            raise InitializationError(f"{name}: is quantized (bitsandbytes): draw the model in fp32 or bf16 first")
        if hasattr(parameter, "ds_tensor"):
            raise InitializationError(
                f"{name}: is partitioned by DeepSpeed's ZeRO 3: draw the model before deepspeed.initialize, without "
                "deepspeed.zero.Init"
            )


def check_drawable(parameters: Mapping[str, Tensor], optimizer: Any) -> None:
    """Refuse weights without memory, and those that an optimizer has taken over.

    Raises:
        InitializationError: on the meta device; an optimizer that has made steps, or that holds copies in fp32.
    """
    for name, parameter in parameters.items():
        if parameter.device.type == "meta":
            raise InitializationError(
                f"{name}: is on the meta device, without memory: model.to_empty(device=...) first, let the model's own code "
                "fill its buffers, then draw; dry_run=True shows the targets"
            )
        for attribute in ("main_param", "_hp_mapping"):
            if getattr(parameter, attribute, None) is not None:
                raise InitializationError(
                    f"{name}: an optimizer holds an fp32 copy of it ({attribute}), which would put the old weights back at the "
                    "first step: draw the model before the optimizer is built"
                )
    if optimizer is None:
        return
    # Some, such as Adagrad, have a state before their first step.
    made = sum(float(one.get("step", 1)) > 0 for one in (getattr(optimizer, "state", None) or {}).values())
    if made:
        raise InitializationError(
            f"optimizer={type(optimizer).__name__} has made steps on {made} weights already: draw the model before the first "
            "step, and build the optimizer anew"
        )
    own = {id(parameter) for parameter in parameters.values()}
    for group in getattr(optimizer, "param_groups", []):
        for tensor in group["params"]:
            if id(tensor) not in own:
                raise InitializationError(
                    f"optimizer={type(optimizer).__name__} holds a tensor of shape {tuple(tensor.shape)} that is not the "
                    "model's, such as an fp32 copy: draw the model before the optimizer is built"
                )


def aliases(parameters: Mapping[str, Tensor], plan: Plan) -> set[str]:
    """Names of weights that are drawn under another one: a head that is the embedding.

    Raises:
        InitializationError: weights that are tied, or share memory, in any other way.
    """
    first: dict[Any, str] = {}
    found: set[str] = set()
    for name, parameter in parameters.items():
        span = storage_span(parameter)
        other = first.setdefault(id(parameter) if span is None else (span, parameter.shape), name)
        if other == name:
            continue
        roles = {one: _role(plan, one) for one in (other, name)}
        if set(roles.values()) == {"embedding", "head"}:
            found.add(next(one for one, role in roles.items() if role == "head"))
        elif plan.entries.get(other) == plan.entries.get(name) or (
            roles[other] == roles[name] and _is_plain(plan, name)
        ):
            found.add(name)
        else:
            raise InitializationError(
                f"{other} ({roles[other]}) and {name} ({roles[name]}) are one weight: only an embedding and a head may be "
                "tied"
            )
    _check_overlaps({name: parameter for name, parameter in parameters.items() if name not in found})
    return found


def _role(plan: Plan, name: str) -> str:
    entry = plan.entries.get(name)
    return entry[0].logical.role if isinstance(entry, tuple) else type(entry).__name__.lower()


def _is_plain(plan: Plan, name: str) -> bool:
    """Whether a tensor is one whole matrix, so that two of one role may be one weight, as of layers that share theirs."""
    entry = plan.entries.get(name)
    return isinstance(entry, tuple) and len(entry) == 1


def check_tied(models: Sequence[nn.Module], parameters: Mapping[str, Tensor], plan: Plan, found: set[str]) -> None:
    """Refuse a model whose config ties embedding and head, which are two weights now.

    Raises:
        InitializationError: as after `to_empty`, which gives each its own memory.
    """
    config = getattr(models[0], "config", None)
    if not getattr(config, "tie_word_embeddings", False) or any(
        one.device.type == "meta" for one in parameters.values()
    ):
        return
    by_role = {_role(plan, name): name for name in parameters if name not in found}
    if {"embedding", "head"} <= set(by_role):
        raise InitializationError(
            f"{by_role['embedding']} and {by_role['head']} are two weights, and the config says tie_word_embeddings=True: "
            "model.tie_weights() first, as after model.to_empty()"
        )


def _check_overlaps(parameters: Mapping[str, Tensor]) -> None:
    spans = sorted(
        (*span, name) for name, parameter in parameters.items() if (span := storage_span(parameter)) is not None
    )
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise InitializationError(
                f"{name} and {other} share memory, and would be drawn into each other: give each its own"
            )
