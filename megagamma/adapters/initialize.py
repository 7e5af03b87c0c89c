"""Draws a model that somebody else has built: the same rule, streams and report as a run of this project."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megagamma.adapters import refusals
from megagamma.adapters.blocks import MATRIX_ROLES, Constant, Entry, Kept, Plan
from megagamma.adapters.huggingface import TABLES, huggingface_plan
from megagamma.adapters.libraries import LIBRARIES, library_plan
from megagamma.adapters.local import LocalTensor, local_tensor
from megagamma.adapters.patterns import Role, check_roles, entries_by_pattern
from megagamma.adapters.report import Report, targets
from megagamma.config.rules import check_bounds
from megagamma.config.schema import InitConfig
from megagamma.errors import ConfigurationError, InitializationError
from megagamma.initialization.gamma import SCHEMES, truncation
from megagamma.initialization.report import WeightStatistics
from megagamma.initialization.streams import normal_

Models = nn.Module | Iterable[nn.Module]
_INNER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""Of blocks that torch compiles, or computes again, one by one."""
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "Float16Module")


@dataclasses.dataclass
class _Options:
    """Sections of a config, as its rules want them."""

    init: InitConfig


def checked_options(seed: int, **values: Any) -> InitConfig:
    """The options of a draw, by the rules of a run's config.

    Raises:
        ConfigurationError: an option that cannot be, with its rule.
    """
    exponents = values.get("exponents") or {}
    for role in exponents:
        if role not in MATRIX_ROLES:
            raise ConfigurationError(f"exponents: {role!r} is not a role: use {', '.join(MATRIX_ROLES)}")
    init = InitConfig(**{**values, "exponents": dict(exponents)})
    for name, allowed in (
        ("scheme", tuple(SCHEMES)), ("residual_fan_in", ("d_in", "hidden")), ("distribution", ("normal", "truncated")),
    ):  # fmt: skip
        if getattr(init, name) not in allowed:
            raise ConfigurationError(f"{name}={getattr(init, name)!r} is not known: use {', '.join(allowed)}")
    numbers = {"gamma": init.gamma, "std": init.std, "truncate_at": init.truncate_at, **init.exponents}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigurationError(f"{name}={value!r} must be a number")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ConfigurationError(f"seed={seed!r} must be an integer of at least 0 and below 2^64")
    check_bounds(_Options(init))  # type: ignore[arg-type]
    return init


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch's DistributedDataParallel, torch.compile's wrapper, and Megatron's."""
    while True:
        attribute = "module" if type(model).__name__ in _WRAPPERS else "_orig_mod"
        inner = getattr(model, attribute, None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _library_of(model: nn.Module) -> str:
    return next((m for c in type(model).__mro__ if (m := c.__module__.split(".")[0]) in LIBRARIES), "")


def _is_megatron(model: nn.Module) -> bool:
    return any(c.__module__.startswith("megatron.core.models.gpt") for c in type(model).__mro__)


def _plan(
    models: list[nn.Module],
    shapes: Mapping[str, tuple[int, ...]],
    roles: Mapping[str, Role],
    hidden_size: int | None,
    num_layers: int | None,
) -> Plan:
    """By the user's patterns first, then by the class's table; every parameter has an entry.

    Raises:
        InitializationError: naming the parameters without one.
    """
    given = entries_by_pattern(roles, shapes)
    model: nn.Module = models[0]
    config: Any = getattr(model, "config", getattr(model, "model_args", None))
    if _is_megatron(model):
        from megagamma.adapters.megatron import check_given, megatron_plan

        check_given(models, given)
        plan = megatron_plan(models, given)
    elif library := _library_of(model):
        plan = library_plan(library, model, shapes)
    elif len(given) < len(shapes) and (not given or getattr(config, "model_type", "") in TABLES):
        plan = (
            huggingface_plan(config.to_dict(), shapes)
            if hasattr(config, "model_type")
            else _plan_of_shapes(given, config)
        )
    else:
        plan = _plan_of_shapes(given, config)
    plan.hidden_size, plan.num_layers = hidden_size or plan.hidden_size, num_layers or plan.num_layers
    plan.entries = {name: entry for name in shapes if (entry := given.get(name) or plan.entries.get(name)) is not None}
    missing = [f"{name} {shapes[name]}" for name in shapes if name not in plan.entries]
    if missing:
        raise InitializationError(
            f"{type(model).__name__}: {len(missing)} of {len(shapes)} parameters have no role: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}: give roles={{pattern: role}} with one of {', '.join(MATRIX_ROLES)}, norm, "
            "zero_centred_norm, bias or keep"
        )
    for name, value in (("hidden_size", plan.hidden_size), ("num_layers", plan.num_layers)):
        if value < 1:
            raise InitializationError(f"{name} of {type(model).__name__} is not known: give {name}=")
    return plan


def _plan_of_shapes(entries: dict[str, Entry], config: Any) -> Plan:
    """Of a model that only the user's roles describe: its width is the embedding's, if its config does not say."""
    width = getattr(config, "hidden_size", 0)
    for entry in entries.values():
        if not width and isinstance(entry, tuple) and entry[0].logical.role == "embedding":
            width = entry[0].logical.shape[1]
    return Plan(width, getattr(config, "num_hidden_layers", 0), entries)


def _draw(
    local: LocalTensor, entry: Entry, stds: Mapping[str, tuple[int, float]], seed: int, cut: float | None
) -> None:
    if isinstance(entry, Constant):
        local.values.fill_(entry.value)
    elif not isinstance(entry, Kept):
        for block, start, view in local.pieces(entry):
            logical = block.logical
            _, std = stds[logical.name]
            normal_(view, seed=seed, name=logical.name, global_shape=logical.shape, start=start, std=std, truncate=cut)


@torch.no_grad()
def initialize(
    model: Models,
    gamma: float = 1.0,
    seed: int = 1234,
    *,
    scheme: str = "gamma",
    exponents: Mapping[str, float] | None = None,
    std: float = 0.02,
    residual_fan_in: Literal["d_in", "hidden"] = "d_in",
    depth_scale: bool = True,
    distribution: Literal["normal", "truncated"] = "normal",
    truncate_at: float = 3.0,
    roles: Mapping[str, Role] | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    optimizer: Any = None,
    dry_run: bool = False,
) -> Report:
    """Draw the weights of a built model anew: std = d_in^-gamma of each logical matrix [P, PRE]; biases 0, norms the identity.

    The numbers depend on the seed, the logical names and the shapes alone: not on the framework, the layout over processes, the
    device, or any state of random generators. Names follow the Hugging Face Llama convention in every class.

    Args:
        model: of transformers, Megatron-core (a GPTModel, or the list of a rank's chunks), torchtitan or litgpt, or any other
            with `roles`. On several processes all call it alike, each draws what it holds.
        gamma: exponent of the std for every role. 1: small; 0.5: the usual 1/sqrt(d_in).
        seed: of the streams, from 0 to 2^64 - 1.
        scheme: "gamma", or a baseline of `megagamma.initialization.gamma.SCHEMES`.
        exponents: exponents of single roles in place of gamma, such as {"embedding": 0.5}.
        std: of the schemes fixed and fixed_depth.
        residual_fan_in: d_in of the matrices that write to the residual stream: their own, or "hidden".
        depth_scale: divide the std of those by sqrt(2 num_layers).
        distribution: "normal", or "truncated" at truncate_at standard deviations and rescaled to the std.
        roles: {pattern: role} for parameters by name, before the class's own table; see `megagamma.adapters.patterns.Role`.
        hidden_size: width of the residual stream, where the model's config does not say.
        num_layers: of the whole model, where the model's config does not say.
        optimizer: that was built for the model already, to be sure that it holds nothing yet.
        dry_run: change nothing; measure the weights as they are.

    Returns:
        What was drawn, or what there is, beside the targets.

    Raises:
        ConfigurationError: an option that cannot be.
        InitializationError: a parameter without a role, a quantized or adapter-wrapped model, weights that are tied in an
            unknown way, that an optimizer holds copies of, or that have no memory; nothing is changed.
    """
    init = checked_options(
        seed, gamma=gamma, scheme=scheme, exponents=exponents, std=std, residual_fan_in=residual_fan_in,
        depth_scale=depth_scale, distribution=distribution, truncate_at=truncate_at,
    )  # fmt: skip
    check_roles(roles or {})
    models = [unwrapped(one) for one in ([model] if isinstance(model, nn.Module) else model)]
    if not models:
        raise InitializationError("there is no model: give a torch.nn.Module")
    module: Any
    for module in (inner for one in models for inner in one.modules()):
        if type(module).__name__.startswith("FSDP") and hasattr(module, "reshard"):
            module.reshard()  # after a forward pass the gathered weights stand in the shards' place
    parameters = named_parameters(models)
    refusals.check_model(models, parameters)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    plan = _plan(models, shapes, roles or {}, hidden_size, num_layers)
    aliases = refusals.aliases(parameters, plan)
    refusals.check_tied(models, parameters, plan, aliases)
    plan.entries = {name: entry for name, entry in plan.entries.items() if name not in aliases}
    if not dry_run:
        refusals.check_drawable(parameters, optimizer)
    found = {name: local_tensor(name, parameters[name]) for name in plan.entries}
    stds, cut = targets(plan, init), truncation(init)
    if not dry_run:
        for name, entry in plan.entries.items():
            _draw(found[name], entry, stds, seed, cut)
    kept = {name: entry.reason for name, entry in plan.entries.items() if isinstance(entry, Kept)}
    return Report(plan, init, _measured(plan, found), not dry_run, kept)


def named_parameters(models: list[nn.Module]) -> dict[str, Tensor]:
    """Every parameter by its name, tied ones by each of theirs; of several chunks with the chunk's number before it."""
    found: dict[str, Tensor] = {}
    for number, model in enumerate(models):
        prefix = f"{number}." if len(models) > 1 else ""
        for name, one in model.named_parameters(remove_duplicate=False):
            for inner in _INNER_PREFIXES:
                name = name.replace(inner, "")
            found[prefix + name] = one
    return found


def _measured(plan: Plan, tensors: Mapping[str, LocalTensor]) -> dict[str, WeightStatistics]:
    found: dict[str, WeightStatistics] = {}
    for name, entry in plan.entries.items():
        if isinstance(entry, tuple) and tensors[name].values.device.type != "meta":
            for block, _, view in tensors[name].pieces(entry):
                known = found.get(block.logical.name, WeightStatistics())
                found[block.logical.name] = known + WeightStatistics.of(view)
    return found
