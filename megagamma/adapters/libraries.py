"""Role tables of torchtitan's Llama and of litgpt's GPT, by their published names.

Checked against the source of torchtitan (torchtitan/models) and of litgpt (litgpt/model.py), not against a model of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megagamma.adapters.blocks import Constant, Entry, Plan, Shapes, fused
from megagamma.adapters.rules import (
    EMBEDDING,
    HEAD,
    MLP,
    PROJECTIONS,
    Found,
    Rule,
    by_group,
    entries_by_rule,
    gain,
    layer_matrix,
    zero,
)


def _torchtitan_qkv(found: Found) -> Entry:
    """Per group of heads [its queries | key | value]."""
    width, queries = found.settings["head_dim"], found.settings["heads_per_kv"]
    parts = [
        (f"{found.layer}.{PROJECTIONS[one][0]}.weight", PROJECTIONS[one][1], width * (queries if one == "q" else 1))
        for one in "qkv"
    ]
    return fused(parts, found.shape, found.shape[0] // (width * (queries + 2)))


def _torchtitan() -> tuple[Rule, ...]:
    layer = r"layers\.(?P<layer>\d+)\."
    feed_forward = {"1": MLP["gate"], "2": MLP["down"], "3": MLP["up"]}
    return (
        (layer + r"attention\.(?:qkv_linear\.)?wqkv\.weight", _torchtitan_qkv),
        (layer + r"attention\.(?:qkv_linear\.)?w(?P<short>[qkvo])\.weight", by_group(PROJECTIONS)),
        (layer + r"feed_forward\.w(?P<short>[123])\.weight", by_group(feed_forward)),
        (layer + r"(?:attention_norm|ffn_norm|attention\.[qk]_norm)\.weight", gain()),
        (r"norm\.weight", gain()),
        (r"tok_embeddings\.weight", EMBEDDING),
        (r"(?:output|lm_head)\.weight", HEAD),
    )


def _litgpt_qkv(found: Found) -> Entry:
    """[query | key | value]."""
    settings = found.settings
    width, groups = settings["head_size"], settings["n_query_groups"]
    rows = {"q": settings["n_head"] * width, "k": groups * width, "v": groups * width}
    return fused(
        [(f"{found.layer}.{PROJECTIONS[one][0]}.weight", PROJECTIONS[one][1], rows[one]) for one in "qkv"], found.shape
    )


def _litgpt_gain(found: Found) -> Entry:
    """Its norms multiply by 1 + gain in models that are called Gemma."""
    return Constant(0.0 if "Gemma" in str(found.settings.get("name", "")) else 1.0, "norm")


def _litgpt() -> tuple[Rule, ...]:
    layer = r"transformer\.h\.(?P<layer>\d+)\."
    return (
        (layer + r"attn\.qkv\.weight", _litgpt_qkv),
        (layer + r"attn\.proj\.weight", layer_matrix(*PROJECTIONS["o"])),
        (layer + r"mlp\.fc_1\.weight", layer_matrix(*MLP["gate"])),
        (layer + r"mlp\.(?:fc_2|fc)\.weight", layer_matrix(*MLP["up"])),
        (layer + r"mlp\.proj\.weight", layer_matrix(*MLP["down"])),
        (r"transformer\.(?:h\.\d+\..*norm\w*|ln_f)\.weight", _litgpt_gain),
        (r".*\.bias", zero),
        (r"transformer\.wte\.weight", EMBEDDING),
        (r"lm_head\.weight", HEAD),
    )


LIBRARIES: dict[str, Callable[[], tuple[Rule, ...]]] = {"torchtitan": _torchtitan, "litgpt": _litgpt}
"""Rules by the first part of the name of the module that a model's class comes from."""


def library_plan(library: str, model: Any, shapes: Shapes) -> Plan:
    """The plan of a model of `LIBRARIES`; parameters that no rule knows are left out.

    Args:
        model: whose `config`, or `model_args`, and attention modules say how wide it is.

    Raises:
        InitializationError: a tensor's shape does not fit the config.
    """
    config = getattr(model, "config", getattr(model, "model_args", None))
    settings = {name: getattr(config, name) for name in dir(config) if not name.startswith("_")}
    for module in model.modules():
        if hasattr(module, "heads_per_kv") and hasattr(module, "head_dim"):
            settings |= {"heads_per_kv": module.heads_per_kv, "head_dim": module.head_dim}
            break
    width, layers = settings.get("dim", settings.get("n_embd")), settings.get("n_layers", settings.get("n_layer"))
    if layers is None and isinstance(settings.get("layers"), list | tuple):
        layers = len(settings["layers"])
    scale = float(width) ** 0.5 if width and settings.get("scale_embeddings") is True else 1.0
    return Plan(
        hidden_size=int(width or 0),
        num_layers=int(layers or 0),
        entries=entries_by_rule(LIBRARIES[library](), shapes, settings, f"model of {library}"),
        epsilon=settings.get("norm_eps"),
        qk_norm=any(".k_norm." in name or ".norm_k." in name for name in shapes),
        input_scale=scale,
    )
