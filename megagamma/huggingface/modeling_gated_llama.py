"""Llama with an output gate on attention and without q/k-norm, which no class of transformers has.

Copied into an exported folder when asked for. It needs transformers and torch only.
"""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class GatedLlamaConfig(LlamaConfig):
    """Llama's config, and `attention_gate`: "elementwise" or "headwise"."""

    model_type = "gated_llama"

    def __init__(self, attention_gate="elementwise", **kwargs):
        self.attention_gate = attention_gate
        super().__init__(**kwargs)


class GatedOutput(nn.Linear):
    """Attention's output projection of y * sigmoid(gate), with one gate per feature or per head."""

    gate = None

    def forward(self, attended):
        gate = torch.sigmoid(self.gate)
        gate = gate.repeat_interleave(attended.shape[-1] // gate.shape[-1], dim=-1)
        return super().forward(attended * gate)


class GatedLlamaForCausalLM(LlamaForCausalLM):
    config_class = GatedLlamaConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            attention = layer.self_attn
            width = config.num_attention_heads
            if config.attention_gate == "elementwise":
                width *= attention.head_dim
            attention.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
            shape = attention.o_proj
            attention.o_proj = GatedOutput(shape.in_features, shape.out_features, bias=False)
            attention.register_forward_pre_hook(self._keep_gate, with_kwargs=True)
        self.post_init()

    @staticmethod
    def _keep_gate(attention, arguments, keywords):
        """The gate reads what attention reads: the block's normed input."""
        hidden = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
        attention.o_proj.gate = attention.gate_proj(hidden)
