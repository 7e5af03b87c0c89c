"""A task that is no text: a training source and an evaluation set of copies, and runs on them inside a rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from megagamma.data.contracts import Batch

LENGTH, SYMBOLS = 16, 64


class CopyTask:
    """The second half of a sequence repeats the first; only the second half counts. Sample i is a function of i alone."""

    size = 40
    needs: Literal["loss", "token_scores"] = "token_scores"
    sums: tuple[str, ...] = ("nats", "answers", "right")

    def __init__(self, first: int = 0) -> None:
        self.first = first

    def batch(self, ids: Sequence[int]) -> Batch:
        half = LENGTH // 2 + 1
        rows = []
        for index in ids:
            generator = torch.Generator().manual_seed(self.first + index)
            symbols = torch.randint(0, SYMBOLS, (half,), generator=generator)
            rows.append(torch.cat((symbols, symbols))[: LENGTH + 1])
        tokens = torch.stack(rows)
        mask = torch.zeros(len(ids), LENGTH)
        mask[:, half - 1 :] = 1.0
        mask[[row for row, index in enumerate(ids) if self.first and index >= self.size]] = 0.0
        positions = torch.arange(LENGTH).repeat(len(ids), 1)
        return Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), mask, positions)

    def measure(self, batch: Batch, output: Tensor) -> Tensor:
        right = (output[..., 1] == batch.labels) * batch.loss_mask
        return torch.stack(
            [x.double() for x in ((-output[..., 0] * batch.loss_mask).sum(), batch.loss_mask.sum(), right.sum())]
        )

    def scores(self, sums: Tensor) -> dict[str, float]:
        nats, answers, right = sums.tolist()
        return {"loss": nats / answers, "accuracy": right / answers, "answers": answers}

    def describe(self, scores: dict[str, float], sums: Tensor) -> str:
        return f"{scores['accuracy']:.1%} of {int(sums[1])} answers"


def open_copy_task(_: Any) -> Any:
    from megagamma.data.sources import RunData

    return RunData(CopyTask(), {"copy": CopyTask(first=10**6)}, None, SYMBOLS, "copy task")


def copy_config(arguments: list[str]) -> Any:
    """The smoke config with these flags, for the world of this rank."""
    from megagamma.config.io import parse_config
    from megagamma.environment import world_from_environment

    size = world_from_environment().size
    return parse_config(
        ["--config", "configs/smoke.yaml", "--data.sequence_length", str(LENGTH), *arguments], world_size=size
    )


def train_copy_task(arguments: list[str]) -> int:
    """Inside a rank: a whole run on the task; returns its exit code."""
    from megagamma.job import train

    return train(copy_config(arguments), None, open_copy_task)


def train_with(arguments: list[str], more: Callable[[], list[Any]], first: bool = False) -> tuple[int, str]:
    """Inside a rank: a whole run with further callbacks, after the standard ones or before them.

    Args:
        more: gives them, and is called inside the rank.

    Returns:
        The exit code, and the message of the error that ended the run.
    """
    from megagamma.distributed.runtime import Runtime
    from megagamma.errors import MegagammaError
    from megagamma.job import prepare
    from megagamma.training.callbacks.standard import standard_callbacks
    from megagamma.training.loop import Trainer

    config = copy_config(["--logging.sample_tokens", "0", *arguments])
    try:
        with prepare(config, None, open_copy_task) as session:
            standard = standard_callbacks(config)
            callbacks = [*more(), *standard] if first else [*standard, *more()]
            return Trainer(session, callbacks).run(), ""
    except MegagammaError as error:
        return error.exit_code, str(error)
    finally:
        Runtime.close_groups()
