"""A small resolved model, by formula and for real."""

from megagamma.config.schema import ModelConfig, resolve_model


def small(**changes):
    fields = {
        "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 24,
        "ffn_hidden_size": 160, "vocab_size": 256, "attention_gate": "none", "qk_norm": False, **changes,
    }  # fmt: skip
    return resolve_model(ModelConfig(**fields))
