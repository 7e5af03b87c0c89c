"""The loss of every held-out token, with all of its context and with the last few tokens of it."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megagamma.data.contracts import Batch
from megagamma.errors import MegagammaError
from megagamma.files import atomic_file
from megagamma.runs.folder import RunFolder, folder_name

SHORT = 4
"""Tokens of context in the short loss [INF: docs/claims.md]."""
_AT_ONCE = 4096  # tokens of a forward pass


@dataclass(frozen=True)
class TokenLosses:
    """Of a held-out set's first sequences; all arrays [sequences, s]."""

    step: int
    tokens: np.ndarray
    """Inputs, int32."""
    labels: np.ndarray
    """What is predicted, int32."""
    full: np.ndarray
    """Loss with all tokens before in the sequence. Unit: nats; float32, not a number where nothing is to be learned."""
    short: np.ndarray
    """Loss with the last `SHORT` tokens alone; where there are no more before it, the full loss."""
    tokenizer: str
    """Fingerprint."""

    def save(self, path: Path) -> None:
        """Write it compressed, atomically.

        Raises:
            MegagammaError: it cannot be written.
        """
        arrays = {name: getattr(self, name) for name in ("tokens", "labels", "full", "short")}
        with atomic_file(path, "wb") as file:
            np.savez_compressed(file, step=self.step, tokenizer=self.tokenizer, **arrays)


def read(path: Path) -> TokenLosses:
    """Read what `save` wrote.

    Raises:
        MegagammaError: it is not that.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in ("tokens", "labels", "full", "short")}
            return TokenLosses(int(found["step"]), **arrays, tokenizer=str(found["tokenizer"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise MegagammaError(f"{path}: cannot be read ({error}): delete it, and it is measured again") from error


def _losses(engine: Any, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[b, s] nats; no part of a batch is masked."""
    rows = max(1, _AT_ONCE // tokens.shape[1])
    found = []
    for first in range(0, len(tokens), rows):
        inputs = tokens[first : first + rows]
        positions = torch.arange(inputs.shape[1]).expand(len(inputs), -1)
        batch = Batch(inputs, labels[first : first + rows], torch.ones(inputs.shape), positions)
        found += engine.run([batch], lambda output, _: output.float(), needs="loss")
    return torch.cat(found).cpu()


def measure(engine: Any, evaluation_set: Any, sequences: int, step: int, tokenizer: str) -> TokenLosses:
    """Losses on the first sequences of a set, on one process."""
    count = min(sequences, evaluation_set.size)
    batch = evaluation_set.batch(range(count))
    tokens, labels, valid = batch.tokens, batch.labels, batch.loss_mask > 0
    full = _losses(engine, tokens, labels)
    short = full.clone()
    if tokens.shape[1] > SHORT:
        windows = tokens.unfold(1, SHORT, 1)  # [b, s - SHORT + 1, SHORT]: the last token of a window predicts its label
        targets = torch.zeros_like(windows)
        targets[..., -1] = labels[:, SHORT - 1 :]
        alone = _losses(engine, windows.reshape(-1, SHORT), targets.reshape(-1, SHORT))[:, -1]
        short[:, SHORT - 1 :] = alone.view(len(tokens), -1)
        short[:, SHORT - 1] = full[:, SHORT - 1]  # the same context
    for values in (full, short):
        values[~valid] = torch.nan
    arrays = (tokens.numpy().astype(np.int32), labels.numpy().astype(np.int32), full.numpy(), short.numpy())
    return TokenLosses(step, *arrays, tokenizer)


def of_checkpoint(folder: Path, sequences: int, keep: Path | None) -> TokenLosses:
    """Losses of a checkpoint on its run's first held-out set; kept in a file, and read from it the next time.

    Args:
        keep: the file; None: it is not kept.

    Raises:
        MegagammaError: see `megagamma.dynamics.rebuilt.rebuilt`.
    """
    from megagamma.dynamics.rebuilt import rebuilt

    if keep is not None and keep.is_file():
        known = read(keep)
        if len(known.tokens) >= sequences:
            part = {name: getattr(known, name)[:sequences] for name in ("tokens", "labels", "full", "short")}
            return TokenLosses(known.step, **part, tokenizer=known.tokenizer)
    with rebuilt(folder) as (engine, data):
        evaluation_set = next(iter(data.validation.values()))
        found = measure(engine, evaluation_set, sequences, int(folder.name.removeprefix("step_")), data.fingerprint)
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        found.save(keep)
    return found


def kept_file(run: RunFolder, step: int) -> Path:
    """Where a run's losses of a step are kept."""
    return run.path / "tokens" / f"{folder_name(step)}.npz"


def keep_newest(run: RunFolder, sequences: int) -> bool:
    """Measure a run's newest checkpoint, and keep it; False: there is none.

    Raises:
        MegagammaError: see `of_checkpoint`.
    """
    steps = run.steps()
    if steps:
        of_checkpoint(run.checkpoint(steps[-1]), sequences, kept_file(run, steps[-1]))
    return bool(steps)


def newest_kept(run: RunFolder) -> TokenLosses | None:
    """The losses of the last step that were kept; None: none were.

    Raises:
        MegagammaError: their file cannot be read.
    """
    files = sorted((run.path / "tokens").glob("step_*.npz"))
    return read(files[-1]) if files else None


def pieces_of(run: RunFolder) -> list[str]:
    """Text of every token of a run's tokenizer.

    Raises:
        MegagammaError: the run's folder lacks it.
    """
    import sentencepiece

    file = run.tokenizer_file
    if not file.is_file():
        raise MegagammaError(
            f"{file}: is missing, and kinds of tokens are told by their text: copy the tokenizer there"
        )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    return [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
