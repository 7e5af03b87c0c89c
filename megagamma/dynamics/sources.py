"""Where weights come from: a run in training, a checkpoint, a Hugging Face folder. All give whole logical tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagamma.config.resolve import resolve
from megagamma.config.schema import Config, InitConfig
from megagamma.data.schedule import total_steps
from megagamma.errors import MegagammaError
from megagamma.initialization.gamma import ModelShape, asked, truncation
from megagamma.initialization.streams import normal_
from megagamma.model.parameters import LogicalParameter, logical_parameters
from megagamma.training.optimizer import factor_of_role, role_decays
from megagamma.training.schedule import learning_rate

State = Mapping[str, Tensor]
"""A whole tensor by kind: `weight`, and where Adam's moments are there `exp_avg` and `exp_avg_sq`. fp32."""


@dataclass(frozen=True)
class Drawn:
    """How the matrices of a model were drawn: redraws step 0 one tensor at a time, and stores nothing."""

    init: InitConfig
    seed: int
    shape: ModelShape

    def std(self, parameter: LogicalParameter) -> float:
        """Target std of a matrix."""
        return asked(self.init, parameter.role, parameter.shape, self.shape)[1]

    def redraw(self, parameter: LogicalParameter) -> Tensor:
        """Its values at step 0, fp32; of a norm its gain of 1."""
        out = torch.ones(parameter.shape)
        if parameter.role == "norm":
            return out
        return normal_(
            out,
            seed=self.seed,
            name=parameter.name,
            global_shape=parameter.shape,
            std=self.std(parameter),
            truncate=truncation(self.init),
        )


@dataclass(frozen=True)
class LastUpdate:
    """What AdamW's last update was made with."""

    adam_step: int
    learning_rates: Mapping[str, float]
    """By role."""
    weight_decay: Mapping[str, float]
    """By role."""
    betas: tuple[float, float]
    eps: float


@dataclass(frozen=True)
class Snapshot:
    """A model at one step."""

    step: int
    parameters: tuple[LogicalParameter, ...]
    """Of the true vocabulary: rows that pad it are left out."""
    states: Callable[[], Iterator[tuple[LogicalParameter, State]]]
    """Every parameter with its state, one in memory at a time; on several ranks, those that this one owns."""
    drawn: Drawn | None
    """None: not known, as of a model that others have trained."""
    update: LastUpdate | None
    """None: there was none, or its moments are not known."""
    head_dim: int | None
    """Width of an attention head; None: not known, so that heads are not taken apart."""


def true_parameters(config: Config) -> tuple[LogicalParameter, ...]:
    """Logical parameters without the rows that pad the vocabulary, which no token reads and no export has."""
    size = config.model.vocab_size
    assert size is not None
    return tuple(
        LogicalParameter(one.name, one.role, (size, *one.shape[1:]), one.split_axis)
        if one.role in ("embedding", "head")
        else one
        for one in logical_parameters(config.model)
    )


def drawn_of(config: Config) -> Drawn:
    """How a run's model was drawn."""
    return Drawn(config.init, config.run.seed, ModelShape(config.model.hidden_size, config.model.num_layers))


def last_update(config: Config, step: int, adam_step: int) -> LastUpdate | None:
    """What the update of a step was made with, by the run's config."""
    if adam_step < 1 or step < 1:
        return None
    optimizer = config.optimizer
    rate = learning_rate(config.schedule, optimizer.lr, step, total_steps(config))
    roles = {one.role for one in logical_parameters(config.model)}
    return LastUpdate(
        adam_step,
        {role: rate * factor_of_role(role, config) for role in roles},
        {role: optimizer.weight_decay if role_decays(role, optimizer) else 0.0 for role in roles},
        (optimizer.betas[0], optimizer.betas[1]),
        optimizer.eps,
    )


def trimmed(parameter: LogicalParameter, state: State) -> State:
    """Without the rows that pad the vocabulary."""
    return {kind: values[: parameter.shape[0]] for kind, values in state.items()}


def of_checkpoint(folder: Path) -> Snapshot:
    """A checkpoint of a run, of any layout.

    Raises:
        MegagammaError: it is not whole, or not a checkpoint.
    """
    from megagamma.checkpoint.manifest import stored_config
    from megagamma.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(folder)
    manifest = reader.manifest
    config = resolve(stored_config(folder, manifest))
    parameters = true_parameters(config)
    kinds = [kind for kind in ("weight", "exp_avg", "exp_avg_sq") if kind in reader.kinds]

    def states() -> Iterator[tuple[LogicalParameter, State]]:
        for one in parameters:
            yield one, trimmed(one, {kind: reader.read(kind, one.name) for kind in kinds})
            reader.close_files()

    imported = "imported_from" in manifest
    update = None if len(kinds) < 3 else last_update(config, manifest["step"], manifest["adam_step"])
    drawn = None if imported else drawn_of(config)
    return Snapshot(manifest["step"], parameters, states, drawn, update, config.model.head_dim)


def of_huggingface(folder: Path) -> Snapshot:
    """A Hugging Face folder: an exported model with its own step and seed, or another's, of which they are not known.

    Raises:
        MegagammaError: it has no safetensors, or its class has no table of roles.
    """
    from megagamma.adapters.blocks import Plan
    from megagamma.adapters.huggingface import huggingface_plan
    from megagamma.adapters.local import LocalTensor
    from megagamma.files import read_json
    from megagamma.huggingface.importing import HuggingFaceWeights

    values = read_json(folder / "config.json")
    weights = HuggingFaceWeights(folder)
    shapes = {name: weights.shape(name) for name in sorted(weights.names())}
    plan: Plan = huggingface_plan(values, shapes)
    parameters = plan.logical()
    if values.get("tie_word_embeddings"):
        parameters.pop("lm_head.weight", None)
    holders: dict[str, list[str]] = {name: [] for name in parameters}
    for name, entry in plan.entries.items():
        for block in entry if isinstance(entry, tuple) else ():
            if block.logical.name in holders and name not in holders[block.logical.name]:
                holders[block.logical.name].append(name)

    def states() -> Iterator[tuple[LogicalParameter, State]]:
        for name, one in parameters.items():
            whole = torch.empty(one.shape)
            for holder in holders[name]:
                tensor, entry = weights.read(holder), plan.entries[holder]
                assert isinstance(entry, tuple)
                own = tuple(block for block in entry if block.logical.name == name)
                for _, (row, column), view in LocalTensor(tensor, (0,) * tensor.dim(), shapes[holder]).pieces(own):
                    whole[row : row + view.shape[0], column : column + view.shape[1]] = view
            yield one, {"weight": whole}

    about = values.get("megagamma") or {}
    drawn = None
    if about:
        init = InitConfig(**about["init"])
        drawn = Drawn(init, about["seed"], ModelShape(plan.hidden_size, plan.num_layers))
    heads = values.get("num_attention_heads")
    head_dim = values.get("head_dim") or (plan.hidden_size // heads if heads else None)
    return Snapshot(int(about.get("step", 0)), tuple(parameters.values()), states, drawn, None, head_dim)


def of_engine(engine: Any, step: int) -> Snapshot:
    """A run in training. A collective: every rank must go through `states`, and gets those that it owns."""
    from megagamma.checkpoint.saver import whole_states

    config: Config = engine.config
    parameters = {one.name: one for one in true_parameters(config)}

    def states() -> Iterator[tuple[LogicalParameter, State]]:
        for name, state in whole_states(engine):
            yield parameters[name], trimmed(parameters[name], state)

    last = last_update(config, step, engine.state.step)
    return Snapshot(step, tuple(parameters.values()), states, drawn_of(config), last, config.model.head_dim)


def snapshot_of(path: Path) -> Snapshot:
    """A checkpoint's folder, or a Hugging Face folder.

    Raises:
        MegagammaError: it is neither.
    """
    from megagamma.runs.folder import is_checkpoint

    if is_checkpoint(path):
        return of_checkpoint(path)
    if (path / "config.json").is_file():
        return of_huggingface(path)
    raise MegagammaError(f"{path}: is neither a checkpoint nor a Hugging Face folder: give one of them, or a run")
