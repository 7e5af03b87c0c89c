"""Bounds of options and rules between them. Pure: no file is opened, nothing is imported but the schema.

Each message gives the option's name, its value, the rule, and the nearest choices that satisfy it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

from megagamma.config.bounds import Bounds
from megagamma.config.schema import INSTRUMENTS, ROLES, Config
from megagamma.errors import ConfigurationError

_MAX_RISES = 100_000  # of the batch ramp


def divisors(value: int, limit: int = 64) -> str:
    """Advice that names the divisors of a number up to `limit`: "use 1, 2 or 4"."""
    numbers = [str(d) for d in range(1, min(value, limit) + 1) if value % d == 0]
    return f"use {numbers[0]}" if len(numbers) == 1 else "use " + ", ".join(numbers[:-1]) + " or " + numbers[-1]


def bounded_values(config: Config) -> Iterator[tuple[str, float, Bounds]]:
    """Name, value and bounds of every option that has bounds and is set, and of each element of a list or mapping."""
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        if not dataclasses.is_dataclass(values):
            continue
        for item in dataclasses.fields(values):
            bounds, value = item.metadata.get("bounds"), getattr(values, item.name)
            if bounds is None or value is None:
                continue
            name = f"{section.name}.{item.name}"
            if isinstance(value, dict):
                # The exponents of roles go by their short names, such as init.query.
                prefix = section.name if item.name == "exponents" else name
                yield from ((f"{prefix}.{key}", element, bounds) for key, element in value.items())
            elif isinstance(value, list | tuple):
                yield from ((f"{name}[{index}]", element, bounds) for index, element in enumerate(value))
            else:
                yield name, value, bounds


def check_bounds(config: Config) -> None:
    """Check the bounds of every option.

    Raises:
        ConfigurationError: the first value that is out of them.
    """
    for name, value, bounds in bounded_values(config):
        if bounds.exceeded(value):
            raise ConfigurationError(f"{name}={value} must be at most {bounds.limit:,}: no run is larger")
        if not bounds.allow(value):
            raise ConfigurationError(f"{name}={value} {bounds}")


def _check_schedule(config: Config) -> None:
    schedule = config.schedule
    if schedule.shape == "wsd" and schedule.warmup_steps is None and schedule.warmup_ratio + schedule.decay_ratio > 1:
        raise ConfigurationError(
            f"schedule.warmup_ratio={schedule.warmup_ratio} and schedule.decay_ratio={schedule.decay_ratio} of "
            "schedule.shape=wsd must add up to at most 1: the decay would begin before the warm-up ends"
        )


def check_instruments(names: Iterable[str], option: str = "instrument") -> None:
    """Refuse an unknown instrument.

    Raises:
        ConfigurationError: naming it.
    """
    for name in names:
        if name not in INSTRUMENTS:
            raise ConfigurationError(f"{option} {name!r} is not known: use {', '.join(INSTRUMENTS)}")


def _check_exponents(config: Config) -> None:
    init = config.init
    for role, value in init.exponents.items():
        if role not in ROLES:
            raise ConfigurationError(f"init.exponents: {role!r} is not a role: use {', '.join(ROLES)}")
        if init.scheme != "gamma":
            raise ConfigurationError(
                f"init.{role}={value} has no meaning with init.scheme={init.scheme}: use --init.scheme gamma, "
                "or leave the exponents out"
            )


def _check_learning_rates(config: Config) -> None:
    if config.init.scheme == "mup" and config.model.tie_embeddings:
        raise ConfigurationError(
            "init.scheme=mup with model.tie_embeddings=true: its embedding and head have other scales and learning rates: "
            "untie them"
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


def _check_model(config: Config) -> None:
    model = config.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    assert groups is not None and model.head_dim is not None and model.ffn_hidden_size is not None
    if heads % groups:
        raise ConfigurationError(
            f"model.num_query_groups={groups} must divide model.num_attention_heads={heads}: {divisors(heads)}"
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


def data_parallel_size(config: Config, world_size: int) -> int:
    """Data-parallel ranks of a world of `world_size` ranks.

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


def check_layout(config: Config, world_size: int) -> None:
    """Check that the model and the data can be split over the ranks.

    Raises:
        ConfigurationError: a degree that divides no number that it must divide, or a combination that is not offered.
    """
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
            raise ConfigurationError(f"parallel.tensor={t} must divide {name}={value}: {divisors(value)}")
    stages = p * (parallel.virtual_pipeline or 1)
    if model.num_layers % stages:
        raise ConfigurationError(
            f"parallel.pipeline={p} x parallel.virtual_pipeline={parallel.virtual_pipeline or 1} = {stages} must "
            f"divide model.num_layers={model.num_layers}: {divisors(model.num_layers)}"
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
    data_parallel_size(config, world_size)


def check_zero_stage(config: Config, stage: int) -> None:
    """Check DeepSpeed's ZeRO stage against dtype and pipeline.

    Raises:
        ConfigurationError: bf16 without master weights, or gradients sharded while several microbatches are in flight.
    """
    p = config.parallel.pipeline
    if config.precision.dtype == "bf16" and stage == 0:
        raise ConfigurationError(
            f"precision.dtype=bf16 needs fp32 master weights, which deepspeed_config={config.deepspeed_config} (ZeRO 0) "
            "does not keep: use configs/deepspeed/zero1.json, which costs no more memory on one rank"
        )
    if p > 1 and stage > 1:
        raise ConfigurationError(
            f"deepspeed_config={config.deepspeed_config} asks for ZeRO {stage}, which cannot be combined with "
            f"parallel.pipeline={p}: several microbatches are in flight before the first backward: use ZeRO 0 or 1"
        )


def check_batches(config: Config, replicas: int) -> None:
    """Check that every global batch is a whole number of microbatches on each of `replicas` data-parallel ranks.

    Raises:
        ConfigurationError: it is not, or the batch ramp misses its end.
    """
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
        if (data.global_batch_size - start) // increment > _MAX_RISES:
            raise ConfigurationError(
                f"data.batch_ramp={data.batch_ramp}: increment={increment} must reach data.global_batch_size="
                f"{data.global_batch_size} in at most {_MAX_RISES:,} rises: use a larger increment"
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


def _check_data(config: Config) -> None:
    data = config.data
    if sum(map(bool, (data.paths, data.corpus, data.toy))) != 1:
        raise ConfigurationError(
            f"data.paths={data.paths}, data.corpus={data.corpus!r} and data.toy={data.toy!r}: give exactly one of them: "
            "folders written by tools/prepare_data.py, an embedded corpus (sotu, tiny), or a toy"
        )
    if data.toy and config.validation.paths:
        raise ConfigurationError(
            f"validation.paths={config.validation.paths}: data.toy={data.toy} has sets of its own: leave it out"
        )
    if data.toy_options and not data.toy:
        raise ConfigurationError(f"data.toy_options={data.toy_options}: has no meaning without data.toy: leave it out")
    if data.weights is not None:
        if len(data.weights) != max(1, len(data.paths)):
            raise ConfigurationError(
                f"data.weights has {len(data.weights)} values for {max(1, len(data.paths))} paths: give one per path"
            )
        if not all(0 <= weight < math.inf for weight in data.weights) or sum(data.weights) <= 0:
            raise ConfigurationError(
                f"data.weights={data.weights} must be finite and not negative, and one must be positive"
            )


# Of Linux' file systems; inside a run's folder names go on for up to 100 bytes more.
_LONGEST_NAME, _LONGEST_PATH = 255, 4096 - 100


def _bytes(name: str) -> int:
    return len(name.encode("utf-8", "surrogatepass"))


def _shown(name: str) -> str:
    text = ascii(name)
    return text if len(text) <= 80 else f"{text[:76]}...'"


def _check_folder(config: Config) -> None:
    """The run's name and folder, as far as they can be judged without looking at the disk."""
    name, folder = config.run.name, config.run.folder
    shown = _shown(name)
    if not name.strip() or name in (".", "..") or "/" in name or not name.isprintable():
        raise ConfigurationError(
            f"run.name={shown} must be a plain name, without / or control characters: use letters, digits, - and _, and "
            "give the place by run.folder"
        )
    if _bytes(name) > _LONGEST_NAME:
        raise ConfigurationError(
            f"run.name={shown} has {_bytes(name)} bytes, a file name has at most {_LONGEST_NAME}: use a shorter one"
        )
    shown = _shown(folder)
    if not folder.strip() or "\0" in folder:
        raise ConfigurationError(f"run.folder={shown} must be the path of a folder: use one such as runs/{name}")
    longest = max(_bytes(part) for part in folder.split("/"))
    if longest > _LONGEST_NAME or _bytes(folder) > _LONGEST_PATH:
        raise ConfigurationError(
            f"run.folder={shown} has {_bytes(folder)} bytes and a name of {longest}; a path has at most "
            f"{_LONGEST_PATH} here and a file name {_LONGEST_NAME}: use a shorter one"
        )


def check_options(config: Config) -> None:
    """Check every rule that does not depend on the number of processes.

    Raises:
        ConfigurationError: the first rule that is broken.
    """
    if config.run.steps is not None and config.run.tokens is not None:
        raise ConfigurationError(
            f"run.steps={config.run.steps} and run.tokens={config.run.tokens:g}: give one of them, not both"
        )
    _check_folder(config)
    check_bounds(config)
    _check_schedule(config)
    _check_model(config)
    _check_exponents(config)
    check_instruments(config.dynamics.instruments, "dynamics.instruments:")
    _check_learning_rates(config)
    _check_data(config)
