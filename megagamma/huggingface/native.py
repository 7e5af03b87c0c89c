"""Our own model from a checkpoint, in one process, to compare an exported model with.

Runs in a process of its own (`run_in_subprocess`): Megatron-core, its process groups and the CPU shims stay out of the
process that runs transformers and lm-eval, and its memory is free again afterwards.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagamma.checkpoint.reader import CheckpointReader
from megagamma.config.io import from_dict
from megagamma.config.resolve import resolve
from megagamma.config.schema import Config, ParallelConfig
from megagamma.errors import MegagammaError
from megagamma.model.decoding import greedy_continuations


@dataclass(frozen=True)
class ParityInputs:
    """What two models compute, so that they can be compared."""

    checkpoint: Path
    tokens: Tensor
    """[b, s]"""
    prompt: Tensor
    """[p], continued greedily."""
    new_tokens: int
    layer: int | None = None
    """Only this layer, between embedding and head; None: the whole model."""
    dtype: torch.dtype = torch.float32
    """The weights are rounded to it, as an export in it rounds them. All is computed in fp32."""
    norm_offset: float = 0.0
    """Gains are rounded as gain - norm_offset."""
    device: str = "cpu"


@dataclass(frozen=True)
class ParityOutputs:
    """logits [b, s, vocabulary] in fp32, and the greedy continuation."""

    logits: Tensor
    greedy: list[int]


def single_process(config: Config, layer: int | None = None, device: str = "cpu") -> Config:
    """The config of the same model on one process; with `layer`, of a model of one layer."""
    model = replace(config.model, recompute="none", num_layers=1 if layer is not None else config.model.num_layers)
    kind: Any = "cuda" if device.startswith("cuda") else "cpu"
    run = replace(config.run, device=kind, threads=torch.get_num_threads())
    return resolve(replace(config, model=model, run=run, parallel=ParallelConfig()))


def rounded(values: Tensor, role: str, dtype: torch.dtype, norm_offset: float) -> Tensor:
    """Values as an exported model has them in fp32, after its file's rounding."""
    offset = norm_offset if role == "norm" else 0.0
    return values if dtype == torch.float32 else (values - offset).to(dtype).float() + offset


def parity_outputs(inputs: ParityInputs) -> ParityOutputs:
    """Build the model in this process, fill it from the checkpoint, and run it."""
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import World
    from megagamma.model.gpt import build_model
    from megagamma.model.parameters import ParameterMap

    reader = CheckpointReader(inputs.checkpoint)
    config = single_process(from_dict(reader.manifest["config"]), inputs.layer, inputs.device)
    runtime = Runtime(config, World(0, 1, torch.device(inputs.device).index or 0, 1))
    chunk = build_model(config, torch.float32, runtime.device)[0].eval()
    for tensor in ParameterMap([chunk], config.model, 0, 1):
        for part in tensor.parts:
            name = part.logical.name
            if inputs.layer is not None:
                name = name.replace("model.layers.0.", f"model.layers.{inputs.layer}.")
            values = reader.read("weight", name, part.start, part.shape, part.logical.shape)
            values = rounded(values, part.logical.role, inputs.dtype, inputs.norm_offset)
            part.view(tensor.parameter.data).copy_(values)

    @torch.no_grad()
    def forward(tokens: Tensor) -> Tensor:
        tokens = tokens.to(runtime.device)
        positions = torch.arange(tokens.shape[1], device=runtime.device).expand(tokens.shape)
        # Without labels Megatron gives [b, s, padded vocabulary].
        logits: Tensor = chunk(tokens, positions, None)[..., : config.model.vocab_size].float().cpu()
        return logits

    def next_tokens(rows: list[list[int]]) -> list[int]:
        return [int(forward(torch.tensor([row]))[0, -1].argmax()) for row in rows]

    greedy = greedy_continuations(next_tokens, [inputs.prompt.tolist()], [inputs.new_tokens])[0]
    outputs = ParityOutputs(forward(inputs.tokens), greedy)
    runtime.close_groups()
    return outputs


def _subprocess_outputs(inputs: ParityInputs, threads: int) -> ParityOutputs:
    import warnings

    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    from megagamma.distributed.compat.megatron import preload

    preload()
    return parity_outputs(inputs)


def run_in_subprocess(inputs: ParityInputs) -> ParityOutputs:
    """`parity_outputs` in a process of its own.

    Raises:
        MegagammaError: the process was killed, as a system does that runs out of memory.
    """
    context: Any = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_subprocess_outputs, inputs, torch.get_num_threads()).result()
        except BrokenProcessPool as error:
            raise MegagammaError(
                "the process that ran our model for the comparison was killed, perhaps for want of memory: use --parity layers"
            ) from error
