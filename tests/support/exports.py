"""Checkpoints of small models, and what runs inside a rank to make and to read them."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

SHAPE = [
    *("--model.hidden_size", "64", "--model.num_attention_heads", "4", "--model.num_query_groups", "2"),
    *("--model.head_dim", "24", "--model.num_layers", "4", "--model.ffn_hidden_size", "160"),
    *("--model.vocab_size", "520", "--data.sequence_length", "48", "--init.gamma", "0.5"),
]
VARIANTS = {
    "plain": ["--model.attention_gate", "none", "--model.qk_norm", "false"],
    "qk_norm": ["--model.attention_gate", "none"],
    "elementwise": ["--model.attention_gate", "elementwise"],
    "headwise": ["--model.attention_gate", "headwise"],
    "gate alone": ["--model.qk_norm", "false", "--model.allow_gate_without_qk_norm", "true"],
    "head gate alone": [
        *("--model.attention_gate", "headwise"),
        *("--model.qk_norm", "false", "--model.allow_gate_without_qk_norm", "true"),
    ],
}
TIED = ["--model.tie_embeddings", "true"]


def save_model(arguments: list[str], folder: str) -> str:
    """Inside a rank: draw a model, give its norms gains other than 1, and save it as a run of step 7 would."""
    import torch

    from megagamma.checkpoint.saver import Saver
    from megagamma.config.io import as_dict, parse_config, save_config
    from megagamma.data.tokenizer import Tokenizer
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import world_from_environment
    from megagamma.files import copy_file
    from megagamma.training.assembly import fresh_engine

    world = world_from_environment()
    given = ["--config", "configs/smoke.yaml", *SHAPE, *arguments, "--run.folder", folder]
    config = parse_config(given, world_size=world.size)
    runtime = Runtime(config, world)
    engine = fresh_engine(config, runtime)
    for tensor in engine.map:
        if tensor.role == "norm":
            name = tensor.parts[0].logical.name
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            engine.state.set(tensor, "weight", torch.empty(tensor.shape).uniform_(0.5, 1.5, generator=generator))
    tokenizer = Tokenizer(Path(config.data.cache) / "tiny" / "tokenizer.model")
    state: dict[str, Any] = {
        "config": as_dict(config), "consumed_samples": 56, "seconds": 1.0, "tokenizer": tokenizer.fingerprint,
        "progress": {},
    }  # fmt: skip
    saved = Saver(engine, Path(folder) / "checkpoints").save(7, state)
    if runtime.is_main:
        save_config(config, Path(folder) / "config.yaml")
        copy_file(tokenizer.path, Path(folder) / "tokenizer.model")
    engine.close()
    return str(saved)
