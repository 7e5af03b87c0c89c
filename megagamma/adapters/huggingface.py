"""Role tables of transformers' classes: (settings of config.json, {parameter: shape}) -> plan.

They need names and shapes only, so that the same table serves a model in memory and the headers of safetensors files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from megagamma.adapters.blocks import Block, Entry, LogicalParameter, Plan, Shapes, fused, whole
from megagamma.adapters.rules import (
    EMBEDDING,
    HEAD,
    MLP,
    PROJECTIONS,
    Found,
    Rule,
    Settings,
    by_group,
    entries_by_rule,
    gain,
    kept,
    layer_matrix,
    matrix,
    zero,
)
from megagamma.errors import InitializationError

_MODEL = r"(?:model\.)?(?:language_model\.)?(?:model\.)?"
_LAYER = _MODEL + r"layers\.(?P<layer>\d+)\."


def _expert(found: Found) -> Entry:
    short, number = found.match["short"], found.match["expert"]
    return whole(f"{found.layer}.mlp.experts.{number}.{short}_proj.weight", f"expert_{short}", found.shape)


def _shared(found: Found) -> Entry:
    short = found.match["short"]
    return whole(f"{found.layer}.mlp.shared_expert.{short}_proj.weight", f"shared_{short}", found.shape)


def _experts(*shorts: str) -> Callable[[Found], Entry]:
    """[experts, rows of all parts, in]: each expert's parts are logical matrices of their own."""

    def entry(found: Found) -> Entry:
        experts, rows, inputs = found.shape
        height = rows // len(shorts)
        return tuple(
            Block(
                LogicalParameter(
                    f"{found.layer}.mlp.experts.{expert}.{short}_proj.weight", f"expert_{short}", (height, inputs), None
                ),
                (0, 0),
                ((expert, expert + 1), (part * height, (part + 1) * height), (0, inputs)),
            )
            for expert in range(experts)
            for part, short in enumerate(shorts)
        )

    return entry


def _llama(identity: float = 1.0) -> tuple[Rule, ...]:
    """Llama's names, which most classes have."""
    return (
        (_LAYER + r"self_attn\.(?P<short>[qkvo])_proj\.weight", by_group(PROJECTIONS)),
        (_LAYER + r"self_attn\.[qkvo]_proj\.bias", zero),
        (_LAYER + r"mlp\.(?P<short>gate|up|down)_proj\.weight", by_group(MLP)),
        (_LAYER + r"mlp\.(?:gate|up|down)_proj\.bias", zero),
        (_LAYER + r"(?:self_attn\.[qk]_norm|\w*layernorm)\.weight", gain(identity)),
        (_MODEL + r"norm\.weight", gain(identity)),
        (_MODEL + r"embed_tokens\.weight", EMBEDDING),
        (r"(?:language_model\.)?lm_head\.weight", HEAD),
    )


def _experts_rules() -> tuple[Rule, ...]:
    """Router and experts, of one tensor each or stacked, as transformers 5 has them in memory."""
    return (
        (_LAYER + r"mlp\.gate\.weight", layer_matrix("mlp.gate", "router")),
        (_LAYER + r"mlp\.shared_expert_gate\.weight", layer_matrix("mlp.shared_expert_gate", "router")),
        (_LAYER + r"mlp\.experts\.gate_up_proj", _experts("gate", "up")),
        (_LAYER + r"mlp\.experts\.down_proj", _experts("down")),
        (_LAYER + r"mlp\.experts\.(?P<expert>\d+)\.(?P<short>gate|up|down)_proj\.weight", _expert),
        (_LAYER + r"mlp\.shared_expert\.(?P<short>gate|up|down)_proj\.weight", _shared),
    )


def _head_dim(settings: Settings) -> int:
    return int(settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"])


def _query_and_gate(found: Found) -> Entry:
    """Qwen3.5: per head [query | gate]."""
    attention, width = f"{found.layer}.self_attn", _head_dim(found.settings)
    parts = [(f"{attention}.q_proj.weight", "query", width), (f"{attention}.gate_proj.weight", "gate", width)]
    return fused(parts, found.shape, found.settings["num_attention_heads"])


def _linear_qkv(found: Found) -> Entry:
    """Qwen3.5's linear attention: [query | key | value]."""
    settings, attention = found.settings, f"{found.layer}.linear_attn"
    keys = settings["linear_num_key_heads"] * settings["linear_key_head_dim"]
    values = settings["linear_num_value_heads"] * settings["linear_value_head_dim"]
    return fused(
        [
            (f"{attention}.q_proj.weight", "query", keys), (f"{attention}.k_proj.weight", "key", keys),
            (f"{attention}.v_proj.weight", "value", values),
        ],
        found.shape,
    )  # fmt: skip


def _qwen3_5() -> tuple[Rule, ...]:
    linear = _LAYER + r"linear_attn\."
    recurrence = "sets the time scales of the linear attention"
    return (
        (_LAYER + r"self_attn\.q_proj\.weight", _query_and_gate),
        (linear + r"in_proj_qkv\.weight", _linear_qkv),
        (linear + r"in_proj_z\.weight", layer_matrix("linear_attn.gate_proj", "gate")),
        (linear + r"in_proj_b\.weight", layer_matrix("linear_attn.b_proj", "gate")),
        (linear + r"in_proj_a\.weight", layer_matrix("linear_attn.a_proj", "gate")),
        (linear + r"out_proj\.weight", layer_matrix("linear_attn.o_proj", "attention_output")),
        (linear + r"conv1d\.weight", kept("is a convolution over a few tokens, channel by channel")),
        (linear + r"(?:A_log|dt_bias)", kept(recurrence)),
        (linear + r"norm\.weight", gain(1.0)),
        *_experts_rules(),
        *_llama(0.0),
    )


def _neox_qkv(found: Found) -> Entry:
    """GPT-NeoX: per head [query | key | value]."""
    heads = found.settings["num_attention_heads"]
    attention, width = f"{found.layer}.self_attn", found.shape[0] // (3 * heads)
    parts = [(f"{attention}.{short}_proj.weight", PROJECTIONS[short][1], width) for short in "qkv"]
    return fused(parts, found.shape, heads)


def _gpt_neox() -> tuple[Rule, ...]:
    layer = r"gpt_neox\.layers\.(?P<layer>\d+)\."
    norms = r"(?:input_layernorm|post_attention_layernorm|final_layer_norm)"
    return (
        (layer + r"attention\.query_key_value\.weight", _neox_qkv),
        (layer + r"attention\.dense\.weight", layer_matrix("self_attn.o_proj", "attention_output")),
        (layer + r"mlp\.dense_h_to_4h\.weight", layer_matrix("mlp.up_proj", "mlp_up")),
        (layer + r"mlp\.dense_4h_to_h\.weight", layer_matrix("mlp.down_proj", "mlp_down")),
        (r"gpt_neox\.(?:layers\.\d+\.)?" + norms + r"\.weight", gain(1.0)),
        (r"gpt_neox\..*\.bias", zero),
        (r"gpt_neox\.embed_in\.weight", EMBEDDING),
        (r"(?:embed_out|lm_head)\.weight", HEAD),
    )


def _gpt2_qkv(found: Found) -> Entry:
    """GPT-2: (in, out), and of the outputs [query | key | value]."""
    attention, width = f"{found.layer}.self_attn", found.shape[1] // 3
    parts = [(f"{attention}.{short}_proj.weight", PROJECTIONS[short][1], width) for short in "qkv"]
    return fused(parts, found.shape, transposed=True)


def _gpt2() -> tuple[Rule, ...]:
    model = r"(?:transformer\.)?"
    layer = model + r"h\.(?P<layer>\d+)\."
    return (
        (layer + r"attn\.c_attn\.weight", _gpt2_qkv),
        (layer + r"attn\.c_proj\.weight", layer_matrix("self_attn.o_proj", "attention_output", transposed=True)),
        (layer + r"mlp\.c_fc\.weight", layer_matrix("mlp.up_proj", "mlp_up", transposed=True)),
        (layer + r"mlp\.c_proj\.weight", layer_matrix("mlp.down_proj", "mlp_down", transposed=True)),
        (model + r"(?:h\.\d+\.ln_[12]|ln_f)\.weight", gain(1.0)),
        (model + r"(?:h\.\d+\..*|ln_f)\.bias", zero),
        (model + r"wte\.weight", EMBEDDING),
        (model + r"wpe\.weight", matrix("model.embed_positions.weight", "position")),
        (r"lm_head\.weight", HEAD),
    )


def _gated_llama() -> tuple[Rule, ...]:
    gate = (_LAYER + r"self_attn\.(?:gate|g)_proj\.weight", layer_matrix("self_attn.gate_proj", "gate"))
    return (gate, *_llama())


def _lfm3() -> tuple[Rule, ...]:
    """LFM3's attention layers: a gate per head, and an MLP of other names."""
    feed_forward = {"1": MLP["gate"], "2": MLP["down"], "3": MLP["up"]}
    return (
        (_LAYER + r"feed_forward\.w(?P<short>[123])\.weight", by_group(feed_forward)),
        (_LAYER + r"(?:operator_norm|ffn_norm)\.weight", gain()),
        (_MODEL + r"embedding_norm\.weight", gain()),
        *_gated_llama(),
    )


TABLES: dict[str, Callable[[], tuple[Rule, ...]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo2"), _llama),
    "gated_llama": _gated_llama,
    "lfm3": _lfm3,
    **dict.fromkeys(("gemma3", "gemma3_text"), lambda: _llama(0.0)),
    **dict.fromkeys(("qwen3_moe", "qwen2_moe"), lambda: (*_experts_rules(), *_llama())),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _qwen3_5),
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
}
"""Rules by model_type, the first that matches holds."""


_POST_NORM = ("olmo2", "gemma3", "gemma3_text")


def text_settings(settings: Settings) -> Settings:
    """The part of a config that describes the language model."""
    return settings.get("text_config") or settings


def _first(settings: Settings, *names: str) -> Any:
    return next((settings[name] for name in names if settings.get(name) is not None), None)


def huggingface_plan(settings: Settings, shapes: Shapes) -> Plan:
    """The plan of a transformers class; parameters that no rule knows are left out.

    Args:
        settings: values of config.json.
        shapes: of all parameters.

    Raises:
        InitializationError: the class has no table, or a tensor's shape does not fit its config.
    """
    text = text_settings(settings)
    kind = text.get("model_type") or settings.get("model_type")
    if kind not in TABLES:
        raise InitializationError(
            f"model_type={kind!r} has no table of roles: give roles={{pattern: role}}, see docs/initialize.md; tables are "
            f"there for {', '.join(TABLES)}"
        )
    width, layers = _first(text, "hidden_size", "n_embd"), _first(text, "num_hidden_layers", "n_layer")
    if width is None or layers is None:
        raise InitializationError(
            f"{kind}: its config.json does not give hidden_size and num_hidden_layers of the language model: add "
            "them to text_config"
        )
    # Where norms stand behind what they norm, epsilon meets other numbers than `norm_saturation` knows.
    pre_norm = kind not in _POST_NORM
    return Plan(
        hidden_size=width,
        num_layers=layers,
        entries=entries_by_rule(TABLES[kind](), shapes, text, kind),
        epsilon=_first(text, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon") if pre_norm else None,
        qk_norm=any(re.search(r"\.k_norm\.weight$", name) for name in shapes),
        input_scale=float(width) ** 0.5 if kind.startswith("gemma") else 1.0,
    )
