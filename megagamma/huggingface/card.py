"""The model card of an exported model: what it is, where it comes from, how it was initialized."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from megagamma.config.schema import ROLES, Config
from megagamma.errors import MegagammaError
from megagamma.files import read_json
from megagamma.huggingface.formats import Format
from megagamma.huggingface.parity import Parity
from megagamma.reporting.tables import markdown_table


def _read_or_empty(run: Path | None, name: str) -> dict[str, Any]:
    """A JSON file of the run's folder; empty where there is none that can be read, since a card can do without."""
    if run is not None:
        with contextlib.suppress(MegagammaError):
            return read_json(run / name)
    return {}


def _provenance(run: Path | None) -> list[str]:
    """Lines from the run's provenance.json, when it is there."""
    provenance = _read_or_empty(run, "provenance.json")
    if not provenance:
        return []
    layout, packages = provenance.get("layout", {}), provenance.get("packages", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    changed = " with uncommitted changes" if provenance.get("git_changed") else ""
    return [
        f"- started {provenance.get('started')}, source {str(provenance.get('git_commit'))[:12]}{changed}",
        f"- {layout.get('world')} processes: tensor {layout.get('tensor')}, pipeline {layout.get('pipeline')}, data "
        f"{layout.get('data')}",
        f"- Python {provenance.get('python')}, {versions}",
    ]


def _weight_statistics(run: Path | None) -> list[str]:
    """Table of the initial weights, from the run's init_report.json, when it is there."""
    roles = _read_or_empty(run, "init_report.json").get("roles", [])
    if not roles:
        return []
    rows = [(row["role"], f"{row['asked_std']:.4e}", f"{row['measured_std']:.4e}") for row in roles]
    return ["", markdown_table(("role", "target std", "measured std"), rows)]


def model_card(
    config: Config, provenance: dict[str, Any], target: Format, parity: Parity, proven: int, run: Path | None
) -> str:
    """README.md of an exported folder.

    Args:
        provenance: from `provenance.checkpoint_provenance`.
        proven: texts that the tokenizer was proven equal on; 0: there is none.
        run: folder of the run, or None.
    """
    init, model = config.init, config.model
    scheme = f"std = d_in^-gamma, gamma {init.gamma:g}" if init.scheme == "gamma" else f"scheme {init.scheme}"
    if init.exponents:
        scheme += ", but " + ", ".join(f"{role} {init.exponents[role]:g}" for role in ROLES if role in init.exponents)
    trust = ", trust_remote_code=True" if target.code else ""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [megagamma, small-initialization]",
        "---",
        "",
        f"# {provenance['name']}, step {provenance['step']:,}",
        "",
        f"A base model of {provenance['parameters']:,} parameters, pretrained with megagamma on "
        f"{provenance['tokens']:,} tokens.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("this folder"{trust})',
        *(['tokenizer = AutoTokenizer.from_pretrained("this folder")'] if proven else []),
        "```",
        "",
        "## Initialization",
        "",
        f"Drawn with {scheme}; {init.distribution} distribution, seed {provenance['seed']}.",
        *_weight_statistics(run),
        "",
        "## Model",
        "",
        f"- {model.num_layers} layers of width {model.hidden_size}, {model.num_attention_heads} heads of "
        f"{model.head_dim} features in {model.num_query_groups} groups, SwiGLU of {model.ffn_hidden_size}",
        f"- attention gate: {model.attention_gate}; q/k-norm: {'yes' if model.qk_norm else 'no'}; embeddings "
        f"{'tied' if model.tie_embeddings else 'untied'}",
        f"- RMSNorm epsilon {model.norm_epsilon:g}; another one gives another model",
        f"- trained on sequences of {config.data.sequence_length} tokens; documents end with the eos token and "
        "begin with none",
        f"- class {target.architecture}",
        "",
        "## Where it comes from",
        "",
        f"- data: {config.data.toy or config.data.corpus or ', '.join(Path(path).name for path in config.data.paths)}",
        f"- {parity.line()} (parity.json)",
        *([f"- the tokenizer gives the same ids as the SentencePiece model on {proven:,} texts"] if proven else []),
        *_provenance(run),
        "",
    ]
    return "\n".join(lines)
