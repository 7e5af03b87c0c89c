"""Parameter groups of AdamW: what decays, and the learning-rate factor of each role."""

from __future__ import annotations

from typing import Any

from megagamma.config.schema import Config, OptimizerConfig
from megagamma.initialization.gamma import ModelShape, rate_factor
from megagamma.model.parameters import MappedTensor, ParameterMap


def role_decays(role: str, optimizer: OptimizerConfig) -> bool:
    """Whether weight decay acts on a role: on matrices it does, on gains only with `optimizer.decay` all."""
    return optimizer.decay == "all" or role != "norm"


def decays(tensor: MappedTensor, optimizer: OptimizerConfig) -> bool:
    """Whether weight decay acts on a tensor, by its role."""
    return role_decays(tensor.role, optimizer)


def factor_of_role(role: str, config: Config) -> float:
    """Learning-rate factor of a role: the scheme's times that of `optimizer.lr_factors`."""
    shape = ModelShape(config.model.hidden_size, config.model.num_layers)
    return config.optimizer.lr_factors.get(role, 1.0) * rate_factor(config.init, role, shape)


def learning_rate_factor(tensor: MappedTensor, config: Config) -> float:
    """Learning-rate factor of a tensor's role; roles fused in one tensor have one factor by the config's rules."""
    return factor_of_role(tensor.role, config)


def parameter_groups(parameter_map: ParameterMap, config: Config) -> list[dict[str, Any]]:
    """Groups for AdamW: one per (decays, factor), each with `lr_factor` beside Adam's own keys.

    The order does not depend on the layout within a pipeline stage.
    """
    optimizer = config.optimizer
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for tensor in parameter_map:
        decay, factor = decays(tensor, optimizer), learning_rate_factor(tensor, config)
        group = groups.setdefault(
            (decay, factor),
            {"params": [], "weight_decay": optimizer.weight_decay if decay else 0.0, "lr_factor": factor},
        )
        group["params"].append(tensor.parameter)
    return list(groups.values())


def describe_groups(parameter_map: ParameterMap, config: Config) -> list[str]:
    """One line per group: which roles, how many parameters, decay and factor."""
    optimizer = config.optimizer
    lines: dict[tuple[bool, float], tuple[set[str], int]] = {}
    for tensor in parameter_map:
        key = (decays(tensor, optimizer), learning_rate_factor(tensor, config))
        roles, count = lines.get(key, (set(), 0))
        for part in tensor.parts:
            roles.add(part.logical.role)
            size = 1
            for length in part.shape:
                size *= length
            count += size
        lines[key] = (roles, count)
    return [
        f"weight decay {optimizer.weight_decay if decay else 0:g}, learning rate x{factor:g}: "
        f"{count:,} parameters ({', '.join(sorted(roles))})"
        for (decay, factor), (roles, count) in lines.items()
    ]
