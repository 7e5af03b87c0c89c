"""Rules between knobs, checked before any file of a run or process group is opened.

Each message gives the knob's name, its value, the rule, and the nearest choices that satisfy it.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

from megagamma.config.schema import ROLES, Config, resolve_model
from megagamma.errors import ConfigurationError

DEFAULT_STEPS = 1000


def resolve(config: Config) -> Config:
    """Fill the defaults that follow from other knobs, in place; returns the config. Idempotent."""
    model = config.model
    heads, width = model.num_attention_heads, model.hidden_size
    # Sizes below 1 are named by `validate`.
    if model.head_dim is None and heads > 0 and width > 0 and width % heads:
        raise ConfigurationError(
            f"model.num_attention_heads={model.num_attention_heads} must divide model.hidden_size="
            f"{model.hidden_size}: {_divisors(model.hidden_size)}, or set model.head_dim"
        )
    resolve_model(model)
    config.run.folder = config.run.folder.replace("{name}", config.run.name)
    if config.run.steps is None and config.run.tokens is None:
        config.run.steps = DEFAULT_STEPS
    return config


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """DeepSpeed's JSON file as it stands.

    Raises:
        ConfigurationError: missing, or not a JSON object.
    """
    if not os.path.isfile(path):
        # A path relative to the source tree works from any working directory.
        beside = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), path)
        if os.path.isabs(path) or not os.path.isfile(beside):
            raise ConfigurationError(f"deepspeed_config={path}: there is no such file: give DeepSpeed's JSON file")
        path = beside
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"deepspeed_config={path}: not JSON ({error}): mend the file") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"deepspeed_config={path}: must be a JSON object, not {type(values).__name__}")
    return values


def deepspeed_file(config: Config, data_size: int, bf16: bool) -> str:
    """Path of DeepSpeed's JSON file for a run with that many data-parallel ranks."""
    if config.deepspeed_config != "auto":
        return config.deepspeed_config
    return f"configs/deepspeed/zero{0 if data_size == 1 and not bf16 else 1}.json"


def zero_stage(values: dict[str, Any]) -> int:
    """ZeRO stage that DeepSpeed's JSON asks for (0 when it says nothing)."""
    section = values.get("zero_optimization", {})
    if not isinstance(section, dict):
        raise ConfigurationError(
            f'deepspeed_config: zero_optimization={section} must be an object, such as {{"stage": 1}}'
        )
    stage = section.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigurationError(f"deepspeed_config: zero_optimization.stage={stage} must be 0, 1, 2 or 3")
    return int(stage)


def _divisors(value: int, limit: int = 64) -> str:
    found = [str(d) for d in range(1, min(value, limit) + 1) if value % d == 0]
    return f"use {found[0]}" if len(found) == 1 else "use " + ", ".join(found[:-1]) + " or " + found[-1]


def _positive(config: Config) -> None:
    rules: list[tuple[str, float | None, float, bool]] = [
        # name, value, least, whether the least itself is allowed
        ("run.steps", config.run.steps, 1, True),
        ("run.tokens", config.run.tokens, 1, True),
        ("run.seed", config.run.seed, 0, True),
        ("run.threads", config.run.threads, 0, True),
        ("run.timeout_minutes", config.run.timeout_minutes, 0, False),
        ("run.start_minutes", config.run.start_minutes, 0, False),
        ("model.hidden_size", config.model.hidden_size, 1, True),
        ("model.num_layers", config.model.num_layers, 1, True),
        ("model.num_attention_heads", config.model.num_attention_heads, 1, True),
        ("model.num_query_groups", config.model.num_query_groups, 1, True),
        ("model.head_dim", config.model.head_dim, 2, True),
        ("model.ffn_hidden_size", config.model.ffn_hidden_size, 1, True),
        ("model.vocab_size", config.model.vocab_size, 2, True),
        ("model.vocab_size_multiple", config.model.vocab_size_multiple, 1, True),
        ("model.norm_epsilon", config.model.norm_epsilon, 0, False),
        ("model.rope_theta", config.model.rope_theta, 1, False),
        ("init.std", config.init.std, 0, False),
        ("init.truncate_at", config.init.truncate_at, 0, False),
        ("init.max_z", config.init.max_z, 0, False),
        ("data.sequence_length", config.data.sequence_length, 2, True),
        ("data.global_batch_size", config.data.global_batch_size, 1, True),
        ("data.micro_batch_size", config.data.micro_batch_size, 1, True),
        ("tokenizer.vocab_size", config.tokenizer.vocab_size, 2, True),
        ("optimizer.lr", config.optimizer.lr, 0, True),
        ("optimizer.eps", config.optimizer.eps, 0, False),
        ("optimizer.weight_decay", config.optimizer.weight_decay, 0, True),
        ("optimizer.clip_grad", config.optimizer.clip_grad, 0, True),
        ("schedule.warmup_steps", config.schedule.warmup_steps, 0, True),
        ("parallel.tensor", config.parallel.tensor, 1, True),
        ("parallel.pipeline", config.parallel.pipeline, 1, True),
        ("parallel.virtual_pipeline", config.parallel.virtual_pipeline, 1, True),
        ("parallel.context", config.parallel.context, 1, True),
        ("parallel.memory_gib", config.parallel.memory_gib, 0, False),
        ("checkpoint.interval", config.checkpoint.interval, 0, True),
        ("checkpoint.keep_last", config.checkpoint.keep_last, 0, True),
        ("validation.interval", config.validation.interval, 0, True),
        ("validation.windows", config.validation.windows, 0, True),
        ("validation.harness_interval", config.validation.harness_interval, 0, True),
        ("validation.harness_limit", config.validation.harness_limit, 0, True),
        ("guard.spike_sigma", config.guard.spike_sigma, 0, False),
        ("guard.spike_window", config.guard.spike_window, 2, True),
        ("guard.max_skips", config.guard.max_skips, 0, True),
        ("guard.replica_interval", config.guard.replica_interval, 0, True),
        ("logging.interval", config.logging.interval, 1, True),
        ("logging.console_interval", config.logging.console_interval, 1, True),
        ("logging.sample_interval", config.logging.sample_interval, 0, True),
        ("logging.sample_tokens", config.logging.sample_tokens, 0, True),
    ]
    for name, value, least, allowed in rules:
        if value is None:
            continue
        if not math.isfinite(value) or value < least or (value == least and not allowed):
            sign = "at least" if allowed else "more than"
            raise ConfigurationError(f"{name}={value} must be {sign} {least:g}")
    if config.run.seed >= 2**64:
        raise ConfigurationError(f"run.seed={config.run.seed} must be below 2^64")
    for name, value in (
        ("schedule.warmup_ratio", config.schedule.warmup_ratio),
        ("schedule.min_lr_ratio", config.schedule.min_lr_ratio),
        ("schedule.decay_ratio", config.schedule.decay_ratio),
        ("optimizer.betas[0]", config.optimizer.betas[0]),
        ("optimizer.betas[1]", config.optimizer.betas[1]),
    ):
        top = "1 excluded" if name.startswith("optimizer") else "1"
        if not 0 <= value <= 1 or (value == 1 and top != "1"):
            raise ConfigurationError(f"{name}={value} must lie between 0 and {top}")
    schedule = config.schedule
    if schedule.shape == "wsd" and schedule.warmup_steps is None and schedule.warmup_ratio + schedule.decay_ratio > 1:
        raise ConfigurationError(
            f"schedule.warmup_ratio={schedule.warmup_ratio} and schedule.decay_ratio={schedule.decay_ratio} of "
            "schedule.shape=wsd must add up to at most 1: the decay would begin before the warm-up ends"
        )


def _init_rules(config: Config) -> None:
    for name in ("gamma", *ROLES):
        value = getattr(config.init, name)
        if value is not None and not 0 <= value <= 4:
            raise ConfigurationError(
                f"init.{name}={value} must lie between 0 and 4: it is the exponent of std = d_in^-gamma; "
                "0.5 is the usual scale and 1 the small one"
            )
    overridden = [role for role in ROLES if getattr(config.init, role) is not None]
    if overridden and config.init.scheme != "gamma":
        raise ConfigurationError(
            f"init.{overridden[0]}={getattr(config.init, overridden[0])} has no meaning with "
            f"init.scheme={config.init.scheme}: use --init.scheme gamma, or leave the exponents out"
        )
    for role, factor in config.optimizer.lr_factors.items():
        if role not in (*ROLES, "norm"):
            raise ConfigurationError(f"optimizer.lr_factors: {role!r} is not a role: use {', '.join(ROLES)} or norm")
        if not 0 <= factor < math.inf:
            raise ConfigurationError(f"optimizer.lr_factors: {role}={factor} must be a finite number, 0 or more")
    fused = [("query", "key", "value"), ("mlp_gate", "mlp_up")]
    if config.model.attention_gate == "elementwise":
        fused[0] += ("gate",)  # type: ignore[assignment]
    for roles in fused:
        factors = {config.optimizer.lr_factors.get(role, 1.0) for role in roles}
        if len(factors) > 1:
            raise ConfigurationError(
                f"optimizer.lr_factors={config.optimizer.lr_factors}: {', '.join(roles)} live in one tensor and need one "
                "factor: give all of them the same"
            )


def _model_rules(config: Config) -> None:
    model = config.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    assert groups is not None and model.head_dim is not None and model.ffn_hidden_size is not None
    if heads % groups:
        raise ConfigurationError(
            f"model.num_query_groups={groups} must divide model.num_attention_heads={heads}: {_divisors(heads)}"
        )
    if model.head_dim % 2:
        raise ConfigurationError(
            f"model.head_dim={model.head_dim} must be even, since RoPE rotates pairs: use {model.head_dim + 1}"
        )
    if model.attention_gate != "none" and not model.qk_norm and not model.allow_gate_without_qk_norm:
        raise ConfigurationError(
            f"model.attention_gate={model.attention_gate} needs model.qk_norm=true, or else the model exports to no "
            "stock Hugging Face class: set --model.qk_norm true, --model.attention_gate none, or "
            "--model.allow_gate_without_qk_norm true"
        )
    if model.transformer_engine:
        import importlib.util

        if importlib.util.find_spec("transformer_engine") is None:
            raise ConfigurationError(
                "model.transformer_engine=true needs the package transformer_engine, which is not installed: "
                "install it, or set --model.transformer_engine false"
            )


def layout(config: Config, world_size: int) -> int:
    """Data-parallel size of a world of `world_size` ranks.

    Raises:
        ConfigurationError: the model-parallel ranks do not divide the world.
    """
    parallel = config.parallel
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_ranks:
        raise ConfigurationError(
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} x "
            f"parallel.context={parallel.context} = {model_ranks} must divide the number of processes, "
            f"{world_size}: start a multiple of {model_ranks}"
        )
    return world_size // model_ranks


def _layout_rules(config: Config, world_size: int) -> None:
    model, parallel, data = config.model, config.parallel, config.data
    t, p = parallel.tensor, parallel.pipeline
    assert model.num_query_groups is not None and model.ffn_hidden_size is not None
    for name, value in (
        ("model.num_query_groups", model.num_query_groups),
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
        ("model.vocab_size_multiple", model.vocab_size_multiple),
    ):
        if value % t:
            raise ConfigurationError(f"parallel.tensor={t} must divide {name}={value}: {_divisors(value)}")
    stages = p * (parallel.virtual_pipeline or 1)
    if model.num_layers % stages:
        raise ConfigurationError(
            f"parallel.pipeline={p} x parallel.virtual_pipeline={parallel.virtual_pipeline or 1} = {stages} must "
            f"divide model.num_layers={model.num_layers}: {_divisors(model.num_layers)}"
        )
    if parallel.virtual_pipeline and parallel.virtual_pipeline > 1 and p == 1:
        raise ConfigurationError(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline of 2 or more"
        )
    if parallel.sequence and t == 1:
        raise ConfigurationError(
            "parallel.sequence=true needs parallel.tensor of 2 or more: it splits the sequence over those ranks"
        )
    if parallel.sequence and data.sequence_length % t:
        raise ConfigurationError(
            f"data.sequence_length={data.sequence_length} must be a multiple of parallel.tensor={t} with "
            "parallel.sequence=true"
        )
    if parallel.context > 1:
        raise ConfigurationError(
            f"parallel.context={parallel.context}: context parallelism is not offered by the SDPA core attention: use 1"
        )
    replicas = layout(config, world_size)
    bf16 = config.precision.dtype == "bf16"
    stage = zero_stage(read_deepspeed_json(deepspeed_file(config, replicas, bf16)))
    if bf16 and stage == 0:
        raise ConfigurationError(
            f"precision.dtype=bf16 needs fp32 master weights, which deepspeed_config={config.deepspeed_config} (ZeRO 0) "
            "does not keep: use configs/deepspeed/zero1.json, which costs no more memory on one rank"
        )
    if p > 1 and stage > 1:
        raise ConfigurationError(
            f"deepspeed_config={config.deepspeed_config} asks for ZeRO {stage}, which cannot be combined with "
            f"parallel.pipeline={p}: several microbatches are in flight before the first backward: use ZeRO 0 or 1"
        )
    _batch_rules(config, replicas)


def _batch_rules(config: Config, replicas: int) -> None:
    data, p = config.data, config.parallel.pipeline
    unit = data.micro_batch_size * replicas
    batches = [("data.global_batch_size", data.global_batch_size)]
    if data.batch_ramp is not None:
        if len(data.batch_ramp) != 3 or min(data.batch_ramp) < 1:
            raise ConfigurationError(
                f"data.batch_ramp={data.batch_ramp} must be three positive numbers: [start, increment, samples]"
            )
        start, increment, _ = data.batch_ramp
        if start > data.global_batch_size or (data.global_batch_size - start) % increment:
            raise ConfigurationError(
                f"data.batch_ramp={data.batch_ramp}: from start={start}, steps of increment={increment} must reach "
                f"data.global_batch_size={data.global_batch_size} exactly"
            )
        batches += [("data.batch_ramp start", start), ("data.batch_ramp increment", increment)]
    for name, value in batches:
        if value % unit:
            near = max(unit, round(value / unit) * unit)
            raise ConfigurationError(
                f"{name}={value} must be a multiple of data.micro_batch_size={data.micro_batch_size} x "
                f"{replicas} data-parallel ranks = {unit}: use {near}, or another micro batch"
            )
    if config.parallel.virtual_pipeline and config.parallel.virtual_pipeline > 1:
        for name, value in batches:
            if (value // unit) % p:
                raise ConfigurationError(
                    f"{name}={value} gives {value // unit} microbatches, which must be a multiple of "
                    f"parallel.pipeline={p} with virtual stages: use {unit * p} or a multiple of it"
                )


def _data_rules(config: Config) -> None:
    data = config.data
    if bool(data.paths) == bool(data.corpus):
        raise ConfigurationError(
            f"data.paths={data.paths} and data.corpus={data.corpus!r}: give exactly one of them: folders written by "
            "tools/prepare_data.py, or an embedded corpus (sotu, tiny)"
        )
    if data.weights is not None:
        if len(data.weights) != max(1, len(data.paths)):
            raise ConfigurationError(
                f"data.weights has {len(data.weights)} values for {max(1, len(data.paths))} paths: give one per path"
            )
        if not all(0 <= weight < math.inf for weight in data.weights) or sum(data.weights) <= 0:
            raise ConfigurationError(
                f"data.weights={data.weights} must be finite and not negative, and one must be positive"
            )


def _harness_rules(config: Config) -> None:
    """Folders only: lm-eval takes seconds to import, so the names are checked when the run is prepared."""
    asked = config.validation
    if not asked.harness_tasks:
        return
    for name, path, hint in (
        ("harness_mirror", asked.harness_mirror, "give the folder that tools/fetch_benchmarks.py filled"),
        ("harness_include_path", asked.harness_include_path, "give a folder of lm-eval task YAMLs"),
    ):
        if path and not os.path.isdir(path):
            raise ConfigurationError(f"validation.{name}={path}: there is no such folder: {hint}")


def validate(config: Config, world_size: int = 1) -> None:
    """Check every rule between knobs.

    Args:
        config: a resolved config.
        world_size: number of processes.

    Raises:
        ConfigurationError: the first rule that is broken.
    """
    if config.run.steps is not None and config.run.tokens is not None:
        raise ConfigurationError(
            f"run.steps={config.run.steps} and run.tokens={config.run.tokens:g}: give one of them, not both"
        )
    _positive(config)
    _model_rules(config)
    _init_rules(config)
    _data_rules(config)
    _harness_rules(config)
    _layout_rules(config, world_size)
    if config.parallel.memory_gib is not None:
        # Imports torch, which this module leaves to those who need it.
        from megagamma.planning.memory import check_fits

        check_fits(config, world_size)
