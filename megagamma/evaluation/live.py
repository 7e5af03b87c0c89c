"""A model in training as lm-eval sees a model, on any layout.

lm-eval runs on rank 0 alone; the other ranks serve it: they wait for batches of tokens, run their part of the model, and
go back to training when rank 0 is done. So only rank 0 needs the benchmarks' data, and whatever goes wrong there with a
task cannot leave another rank behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from torch import Tensor

from megagamma.data.contracts import Batch
from megagamma.errors import EvaluationError
from megagamma.evaluation import compat
from megagamma.model.decoding import greedy_continuations

T = TypeVar("T")

_DONE, _PASS = 0, 1


def lead(engine: Any, action: Callable[[Passes], T]) -> T | None:
    """Run `action` on rank 0, with the model of all ranks at its service; every rank must call this.

    Args:
        engine: of `megagamma.distributed`.
        action: on rank 0 only; gets what runs the model.

    Returns:
        What the action returned on rank 0, None on the others.
    """
    passes = Passes(engine)
    if not engine.runtime.is_main:
        passes.serve()
        return None
    try:
        return action(passes)
    finally:
        passes.finish()


class Passes:
    """Forward passes that rank 0 asks for and all ranks run."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.runtime = engine, engine.runtime
        data, parallel = engine.config.data, engine.config.parallel
        self.context_length = data.sequence_length
        # As many tokens in a microbatch as in training, whose memory is known to suffice.
        self.tokens = data.micro_batch_size * data.sequence_length
        self.stages = parallel.pipeline  # microbatches at a time, to fill the pipeline
        self.multiple = parallel.tensor if parallel.sequence else 1

    def capacity(self, length: int) -> int:
        """Rows of a length that fit in one pass of all ranks."""
        return max(1, self.tokens // length) * self.stages * int(self.runtime.data_size)

    def run(self, rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> list[Tensor]:
        """Score rows of tokens, on rank 0.

        Args:
            rows: token ids, each at most the context length; at most `capacity` of the longest.
            labels: for each row, the tokens whose log-probability is asked for after each of its positions.

        Returns:
            For each row [its length, 2]: log-probability of the label [nats], and the most likely token.
        """
        longest = max(len(row) for row in rows)
        length = min(-(-longest // self.multiple) * self.multiple, self.context_length)
        shares = self.stages * int(self.runtime.data_size)
        height = -(-len(rows) // shares)
        # What is padding at a row's right end is not seen from its left, and rows that fill up are not read.
        packed = torch.zeros(2, height * shares, length, dtype=torch.int64)
        for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
            packed[0, index, : len(row)] = torch.tensor(row)
            packed[1, index, : len(label)] = torch.tensor(label)
        self._broadcast(_PASS, height, length)
        scores = self._pass(packed, height, length)
        return [scores[index, : len(row)] for index, row in enumerate(rows)]

    def _broadcast(self, *message: int) -> None:
        if self.runtime.size > 1:
            values = [*message, *[0] * (3 - len(message))]
            dist.broadcast(torch.tensor(values, device=self.runtime.device), src=0)

    def finish(self) -> None:
        """Send the other ranks back to training."""
        self._broadcast(_DONE)

    def serve(self) -> None:
        """On all ranks but 0: run what rank 0 asks for, until it is done."""
        while True:
            message = torch.zeros(3, dtype=torch.int64, device=self.runtime.device)
            dist.broadcast(message, src=0)
            code, height, length = message.tolist()
            if code == _DONE:
                return
            # All ranks have heard of a failure; what to do about it is rank 0's business.
            with contextlib.suppress(Exception):
                self._pass(None, height, length)

    def _pass(self, packed: Tensor | None, height: int, length: int) -> Tensor:
        """Run one pass on every rank; returns [rows, length, 2]."""
        ranks = int(self.runtime.data_size)
        if packed is None:
            packed = torch.zeros(2, height * self.stages * ranks, length, dtype=torch.int64)
        if self.runtime.size > 1:
            packed = packed.to(self.runtime.device)
            dist.broadcast(packed, src=0)
        # [tokens and labels, data-parallel rank, microbatch, row, position]
        split = packed.view(2, ranks, self.stages, height, length)[:, self.runtime.data_rank]
        positions = torch.arange(length, device=packed.device).expand(height, length)
        batches = [
            Batch(split[0, index], split[1, index], torch.ones_like(split[0, index], dtype=torch.float32), positions)
            for index in range(self.stages)
        ]
        scores: Tensor = self.engine.token_scores(batches)
        return scores.flatten(0, 2)


class LiveModel(TemplateLM):
    """The lm-eval side, on rank 0. Generation is greedy, without a key-value cache."""

    def __init__(self, passes: Passes, tokenizer: Any) -> None:
        """Args: tokenizer: encode, decode, eos_id, vocab_size, as `megagamma.data.tokenizer.Tokenizer` has them."""
        super().__init__()
        self.passes, self._tokenizer = passes, tokenizer

    @property
    def eot_token_id(self) -> int:
        """End of document, which is also what stands before a document in training."""
        return int(self._tokenizer.eos_id)

    @property
    def max_length(self) -> int:
        """Context length. Unit: tokens."""
        return self.passes.context_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated where a task does not say, as lm-eval's `hf` model has it."""
        return 256

    def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
        """Token ids of a text; nothing is added."""
        return list(self._tokenizer.encode(string))

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """As lm-eval's, without its progress bar."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """requests: (texts, context ids, continuation ids); too long ones lose the start of the context."""
        rows, labels, counts = [], [], []
        for texts, context, continuation in requests:
            if not continuation:
                raise EvaluationError(f"the answer {texts!r} adds no token to its prompt: the tokenizer merges them")
            if len(continuation) > self.max_length:
                raise EvaluationError(
                    f"an answer of {len(continuation)} tokens is longer than the model's context length of {self.max_length}"
                )
            whole = (list(context) + list(continuation))[-(self.max_length + 1) :]
            rows.append(whole[:-1])
            labels.append(whole[1:])
            counts.append(len(continuation))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        for indices in self._batches([len(row) for row in rows]):
            batch = self.passes.run([rows[index] for index in indices], [labels[index] for index in indices])
            for index, scores in zip(indices, batch, strict=True):
                tail, expected = scores[-counts[index] :], torch.tensor(labels[index][-counts[index] :])
                answers[index] = (float(tail[:, 0].double().sum()), bool((tail[:, 1] == expected).all()))
        return answers

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices in batches that fit, the longest first, so that rows of one batch are about as long."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        first = 0
        while first < len(order):
            count = self.passes.capacity(lengths[order[first]])
            yield order[first : first + count]
            first += count

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        """Log-likelihood of whole texts, in sequences that do not overlap, as lm-eval's `hf` model cuts them."""
        sequences, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in compat.rolling_sequences(tokens, self.prefix_token_id, self.max_length):
                sequences.append((None, *pair))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _greedy) in zip(owners, self._loglikelihood_tokens(sequences), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """Greedy continuations up to a stop text, the end of the document, or max_gen_toks; cut at the stop text."""
        prompts, stops, limits = [], [], []
        for request in requests:
            prompt, stop, limit = self._prompt(*request.args[:2])
            prompts.append(prompt)
            stops.append(stop)
            limits.append(limit)
        texts = [""] * len(requests)
        for indices in self._batches([len(p) + n for p, n in zip(prompts, limits, strict=True)]):
            batch = self._continue(
                [prompts[index] for index in indices],
                [stops[index] for index in indices],
                [limits[index] for index in indices],
            )
            for index, text in zip(indices, batch, strict=True):
                texts[index] = compat.cut_at_stop(text, stops[index])
        return texts

    def _prompt(self, text: str, options: dict[str, Any]) -> tuple[list[int], list[str], int]:
        """Token ids with room for the answer, stop texts, and the longest answer in tokens."""
        if options.get("do_sample") or options.get("num_beams", 1) != 1:
            raise EvaluationError(
                f"generation_kwargs={options}: a live model generates greedily: score the converted model"
            )
        stop, limit = compat.generation_limits(options, self.max_gen_toks)
        if limit >= self.max_length:
            raise EvaluationError(
                f"max_gen_toks={limit} must be less than the model's context length of {self.max_length} tokens"
            )
        prompt = self.tok_encode(text)[-(self.max_length - limit) :]
        return prompt or [self.prefix_token_id], stop, limit

    def _continue(self, prompts: list[list[int]], stops: list[list[str]], limits: list[int]) -> list[str]:
        """Continue some prompts together, a pass for every token."""

        def decode(tokens: list[int]) -> str:
            return str(self._tokenizer.decode([token for token in tokens if token < self._tokenizer.vocab_size]))

        def next_tokens(rows: list[list[int]]) -> list[int]:
            return [int(scores[-1, 1]) for scores in self.passes.run(rows, [[0]] * len(rows))]

        def stopped(index: int, tokens: list[int]) -> bool:
            text = decode(tokens) if stops[index] else ""
            return any(stop in text for stop in stops[index])

        continuations = greedy_continuations(next_tokens, prompts, limits, self.eot_token_id, stopped)
        return [decode(tokens) for tokens in continuations]
