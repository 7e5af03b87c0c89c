"""The same model built by Hugging Face transformers: an independent reference for forward and gradients.

Its weights are filled from logical parameters by name, with the differences of each class spelled out here and not
taken from the code under test.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def build_reference(model: Any, length: int, epsilon: float | None = None) -> torch.nn.Module:
    """An fp32 Hugging Face model of the shape of a ModelConfig."""
    import transformers

    common = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "max_position_embeddings": length,
        "rms_norm_eps": model.norm_epsilon if epsilon is None else epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": False,
        "attn_implementation": "eager",
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta, "partial_rotary_factor": 1.0},
    }
    if model.attention_gate != "none":
        config = transformers.Qwen3_5TextConfig(**common, layer_types=["full_attention"] * model.num_layers)
        return transformers.Qwen3_5ForCausalLM(config).float()
    if model.qk_norm:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common)).float()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common)).float()


def _per_head(query: Tensor, gate: Tensor, head_dim: int) -> Tensor:
    """Qwen3.5's gated q_proj: per head, the query's rows and then the gate's."""
    heads = query.shape[0] // head_dim
    pair = torch.stack((query.view(heads, head_dim, -1), gate.view(heads, head_dim, -1)), dim=1)
    return pair.reshape(2 * query.shape[0], -1)


def to_reference(logical: dict[str, Tensor], model: Any, gate_order: str = "per_head") -> dict[str, Tensor]:
    """Logical parameters as the reference's state dict.

    Args:
        gate_order: "per_head" as the class wants it, or "blocks" ([all q ; all gate]), a mistake that must be seen.
    """
    state = dict(logical)
    head_dim = model.head_dim
    if model.attention_gate == "none":
        return {name: _cut(name, tensor, model) for name, tensor in state.items()}
    for name in [name for name in state if name.endswith("gate_proj.weight") and "self_attn" in name]:
        gate, query_name = state.pop(name), name.replace("gate_proj", "q_proj")
        if model.attention_gate == "headwise":
            gate = gate.repeat_interleave(head_dim, dim=0)
        query = state[query_name]
        state[query_name] = _per_head(query, gate, head_dim) if gate_order == "per_head" else torch.cat((query, gate))
    # Qwen3.5's norms multiply by 1 + weight.
    return {name: _cut(name, tensor - 1 if "norm" in name else tensor, model) for name, tensor in state.items()}


def _cut(name: str, tensor: Tensor, model: Any) -> Tensor:
    return tensor[: model.vocab_size] if "embed_tokens" in name or "lm_head" in name else tensor


def gradients_to_logical(reference: torch.nn.Module, model: Any) -> dict[str, Tensor]:
    """The reference's gradients by logical name, without vocabulary padding."""
    found: dict[str, Tensor] = {}
    head_dim = model.head_dim
    for name, parameter in reference.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        if model.attention_gate != "none" and name.endswith("q_proj.weight"):
            heads = gradient.view(-1, 2, head_dim, gradient.shape[1])
            found[name] = heads[:, 0].reshape(-1, gradient.shape[1])
            gate = heads[:, 1]
            # A gate per head is one row that stands for head_dim equal ones.
            found[name.replace("q_proj", "gate_proj")] = (
                gate.sum(1) if model.attention_gate == "headwise" else gate.reshape(-1, gradient.shape[1])
            )
        else:
            found[name] = gradient
    return found
