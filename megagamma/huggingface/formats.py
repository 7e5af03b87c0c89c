"""Our model as a stock Hugging Face class: which class, its config, and how its tensors follow from logical matrices.

Each class is a `Format`. The differences between them are few and all here: where the output gate lives, whether norm
weights are stored as gain - 1, and Lfm3's names. No class needs a permutation of the rotary halves, and every one has
the true vocabulary, without the rows that pad it for tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megagamma.config.schema import Config, ModelConfig, resolve_model
from megagamma.errors import ConfigurationError
from megagamma.model.parameters import LogicalParameter, logical_parameters

# Reads a logical tensor by name: whole, or its first rows.
Read = Callable[[str, int | None], Tensor]

_LFM3_NAMES = (
    ("input_layernorm", "operator_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.up_proj", "feed_forward.w3"),
    ("mlp.down_proj", "feed_forward.w2"),
    ("self_attn.gate_proj", "self_attn.g_proj"),
    ("model.norm.", "model.embedding_norm."),
)


@dataclass(frozen=True)
class Format:
    """A Hugging Face class as a container of our weights."""

    key: str
    architecture: str
    model_type: str
    gates: tuple[str, ...]
    """Values of model.attention_gate that it can hold."""
    qk_norm: bool
    gate_in_query: bool = False
    """q_proj is, per head, the query's rows and then the gate's."""
    norm_offset: float = 0.0
    """Norm weights are stored as gain - norm_offset."""
    names: tuple[tuple[str, str], ...] = ()
    """Our part of a name, theirs."""
    code: str | None = None
    """File of this package that holds the class, for one that Hugging Face does not have."""

    def name(self, ours: str) -> str:
        """A logical name in this class."""
        for logical, exported in self.names:
            ours = ours.replace(logical, exported)
        return ours


FORMATS = {
    target.key: target
    for target in (
        Format("llama", "LlamaForCausalLM", "llama", ("none",), qk_norm=False),
        Format("qwen3", "Qwen3ForCausalLM", "qwen3", ("none",), qk_norm=True),
        Format(
            "qwen3_5", "Qwen3_5ForCausalLM", "qwen3_5_text", ("elementwise", "headwise"), qk_norm=True,
            gate_in_query=True, norm_offset=1.0,
        ),
        Format(
            "qwen3_next", "Qwen3NextForCausalLM", "qwen3_next", ("elementwise", "headwise"), qk_norm=True,
            gate_in_query=True, norm_offset=1.0,
        ),
        Format("lfm3", "Lfm3ForCausalLM", "lfm3", ("headwise",), qk_norm=True, names=_LFM3_NAMES),
        Format(
            "gated_llama", "GatedLlamaForCausalLM", "gated_llama", ("elementwise", "headwise"), qk_norm=False,
            code="modeling_gated_llama.py",
        ),
    )
}  # fmt: skip


def choose_format(model: ModelConfig, requested: str | None = None, custom_code: bool = False) -> Format:
    """The class that a model is exported to: the first of `FORMATS` that can hold it, or the requested one.

    Args:
        model: resolved.
        requested: key of a format, or None.
        custom_code: allow a class that Hugging Face does not have.

    Raises:
        ConfigurationError: the class cannot hold the model, or none can without code of our own.
    """
    fitting = {
        key: target
        for key, target in FORMATS.items()
        if model.attention_gate in target.gates and model.qk_norm == target.qk_norm
    }
    settings = f"model.attention_gate={model.attention_gate}, model.qk_norm={str(model.qk_norm).lower()}"
    if requested is not None and requested not in fitting:
        raise ConfigurationError(f"--hf_class {requested} cannot hold {settings}: use {' or '.join(fitting)}")
    target = fitting[requested] if requested is not None else next(iter(fitting.values()))
    if target.code and not custom_code:
        raise ConfigurationError(
            f"{settings}: no stock Hugging Face class has a gate without q/k-norm: --custom_code writes a model file of our "
            "own into the folder, which whoever loads it must trust (trust_remote_code=True)"
        )
    return target


# -- tensors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """A tensor of the exported model."""

    name: str
    shape: tuple[int, ...]
    logical: LogicalParameter


def exported_tensors(model: ModelConfig, target: Format) -> list[Exported]:
    """Name, shape and main source of every tensor of the exported model, in the model's order."""
    assert model.vocab_size is not None
    tensors = []
    for logical in logical_parameters(model):
        shape = logical.shape
        if logical.role == "gate" and target.gate_in_query:
            continue
        if logical.role in ("embedding", "head"):
            shape = (model.vocab_size, *shape[1:])
        elif logical.role == "query" and target.gate_in_query:
            shape = (2 * shape[0], *shape[1:])
        tensors.append(Exported(target.name(logical.name), shape, logical))
    return tensors


def export_tensor(tensor: Exported, model: ModelConfig, target: Format, read: Read) -> Tensor:
    """Values of a tensor of the exported model, fp32, from logical ones."""
    logical = tensor.logical
    if logical.role in ("embedding", "head"):
        return read(logical.name, model.vocab_size)
    values = read(logical.name, None)
    if logical.role == "norm":
        return values.float() - target.norm_offset
    if logical.role == "query" and target.gate_in_query:
        assert model.head_dim is not None
        gate = read(logical.name.replace("q_proj", "gate_proj"), None)
        if model.attention_gate == "headwise":
            gate = gate.repeat_interleave(model.head_dim, dim=0)
        heads = (model.num_attention_heads, model.head_dim, -1)
        return torch.stack((values.view(heads), gate.view(heads)), dim=1).reshape(tensor.shape)
    return values


def import_tensor(logical: LogicalParameter, model: ModelConfig, source: Format, read: Read) -> Tensor:
    """Values of a logical tensor, fp32, from those of a Hugging Face model: the inverse of `export_tensor`.

    The rows that pad the vocabulary are zero: they are no part of a Hugging Face model, and of no effect.

    Args:
        read: reads a tensor of the Hugging Face model by its name there.
    """
    if logical.role in ("query", "gate") and source.gate_in_query:
        assert model.head_dim is not None
        both = read(logical.name.replace("gate_proj", "q_proj"), None).float()
        pair = both.view(model.num_attention_heads, 2, model.head_dim, -1)[:, int(logical.role == "gate")]
        # A gate per head is exported as head_dim equal rows.
        per_head = logical.role == "gate" and model.attention_gate == "headwise"
        return (pair[:, 0] if per_head else pair).reshape(logical.shape)
    values = read(source.name(logical.name), None).float()
    if logical.role == "norm":
        return values + source.norm_offset
    if logical.role in ("embedding", "head"):
        padded = torch.zeros(logical.shape)
        padded[: values.shape[0]] = values
        return padded
    return values.reshape(logical.shape)


# -- config ------------------------------------------------------------------------------------------------------------


def export_config(
    config: Config, target: Format, dtype: torch.dtype, special: dict[str, int | None], provenance: dict[str, Any]
) -> dict[str, Any]:
    """config.json of the exported model, with the keys of transformers 4 and 5 side by side.

    Args:
        config: of the run, vocabulary known.
        special: bos_token_id, eos_token_id and pad_token_id.
        provenance: where the model comes from, kept under "megagamma".
    """
    model = config.model
    kind = str(dtype).removeprefix("torch.")
    full = ["full_attention"] * model.num_layers
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta, "partial_rotary_factor": 1.0}
    values: dict[str, Any] = {
        "architectures": [target.architecture],
        "model_type": target.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.data.sequence_length,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "rope_parameters": rope,
        # transformers 4 reads these, and silently takes its defaults where they are missing.
        "rope_theta": model.rope_theta,
        "partial_rotary_factor": 1.0,
        "dtype": kind,
        "torch_dtype": kind,
        **special,
    }
    if target.key in ("qwen3_5", "qwen3_next"):
        values |= {"layer_types": full, "attn_output_gate": True}
    if target.key == "qwen3_next":
        values |= {"num_experts": 0, "num_experts_per_tok": 0, "mlp_only_layers": [], "decoder_sparse_step": 1}
        # The cache of transformers 4.57 cannot be without a layer of linear attention.
        values["use_cache"] = False
    if target.key == "qwen3":
        values |= {"layer_types": full, "use_sliding_window": False, "sliding_window": None}
    if target.key == "llama":
        values["mlp_bias"] = False
    if target.key == "lfm3":
        values |= {
            "layer_types": full, "norm_eps": model.norm_epsilon, "use_sandwich_norm": False,
            "use_attention_gate": True, "sliding_window": None, "rope_parameters": {"full_attention": rope},
        }  # fmt: skip
    if target.code:
        module = target.code.removesuffix(".py")
        values |= {
            "attention_gate": model.attention_gate,
            "auto_map": {
                "AutoConfig": f"{module}.GatedLlamaConfig",
                "AutoModelForCausalLM": f"{module}.{target.architecture}",
            },
        }
    return values | {"megagamma": provenance}


def _refuse(name: str, value: Any, rule: str) -> ConfigurationError:
    return ConfigurationError(f"config.json: {name}={value}: {rule}: this model has no counterpart here")


def import_config(values: dict[str, Any], headwise: Callable[[], bool]) -> tuple[ModelConfig, Format, int]:
    """(our model, its class, its context length in tokens) of a Hugging Face config.json.

    Args:
        values: the file's content.
        headwise: whether the gates of a class that stores them with the query are one per head.

    Raises:
        ConfigurationError: a class that is not ours, or a setting that our model does not have.
    """
    architecture = (values.get("architectures") or [None])[0]
    source = next((target for target in FORMATS.values() if target.architecture == architecture), None)
    if source is None:
        supported = ", ".join(target.architecture for target in FORMATS.values())
        raise _refuse("architectures", architecture, f"must be one of {supported}")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(values[name], int):
            raise _refuse(name, repr(values[name]), "must be a whole number")
    layers = values["num_hidden_layers"]
    # Lfm3's own defaults differ from the others', so that its file must state them.
    for name in ("tie_word_embeddings", "norm_eps", "rope_parameters") if source.key == "lfm3" else ():
        if values.get(name) is None:
            raise _refuse(name, None, "must be written")
    for name, expected in (
        ("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False), ("use_sandwich_norm", False),
        ("use_sliding_window", False), ("num_experts", 0),
    ):  # fmt: skip
        default = {"use_sandwich_norm": source.key == "lfm3", "num_experts": 512 if source.key == "qwen3_next" else 0}
        value = values.get(name, default.get(name, expected))
        if value != expected:
            raise _refuse(name, value, f"must be {expected}")
    types = values.get("layer_types")
    if types is None and source.key in ("qwen3_5", "qwen3_next", "lfm3"):
        raise _refuse("layer_types", None, "must name full_attention for every layer")
    if types is not None and list(types) != ["full_attention"] * layers:
        raise _refuse("layer_types", sorted(set(types)), "must be full_attention everywhere")
    rope = values.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    for scaling in (rope, values.get("rope_scaling") or {}):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise _refuse("rope_type", kind, "must be default")
    default_share = 0.25 if source.key in ("qwen3_5", "qwen3_next") else 1.0
    share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", default_share))
    if share != 1.0:
        raise _refuse("partial_rotary_factor", share, "must be 1.0")
    gate: Any = values.get("attention_gate", source.gates[0]) if source.code else source.gates[0]
    default_theta = 1_000_000.0 if source.key == "lfm3" else 10_000.0
    heads = values["num_attention_heads"]
    model = ModelConfig(
        hidden_size=values["hidden_size"],
        num_layers=layers,
        num_attention_heads=heads,
        num_query_groups=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        ffn_hidden_size=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        norm_epsilon=values.get("rms_norm_eps", values.get("norm_eps", 1e-6)),
        qk_norm=source.qk_norm,
        attention_gate=gate,
        allow_gate_without_qk_norm=source.code is not None,
        rope_theta=float(rope.get("rope_theta", values.get("rope_theta", default_theta))),
    )
    if source.gate_in_query and headwise():
        model = replace(model, attention_gate="headwise")
    return resolve_model(model), source, int(values.get("max_position_embeddings", 2048))
