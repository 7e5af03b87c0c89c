"""Several corpora mixed by weight."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from megagamma.data.text import CorpusSampler
from megagamma.errors import ConfigurationError, DataError

_BLEND_BLOCK = 1 << 16


class Blend:
    """Several samplers mixed by weight; sample i -> (corpus k, its sample j).

    Sample j of corpus k falls due at the time (j + 1/2) / w_k; the blend is all samples in the order of
    their times (Webster's method; ties go to the first corpus). After any number n of samples corpus k has
    given n w_k of them to within about one, as with Megatron's greedy rule, and the order never depends on
    how many samples are asked for. Unlike the greedy rule it needs no pass over samples 0 ... i to answer
    for i, so a late resume is instant.

    Args:
        weights: one number >= 0 per sampler, any sum; None: proportional to the corpora's tokens.

    Raises:
        ConfigurationError: no corpora, another count of weights, a negative or non-finite one, or all zero.
        DataError: corpora of different tokenizers.
    """

    def __init__(self, samplers: Sequence[CorpusSampler], weights: Sequence[float] | None = None) -> None:
        if not samplers:
            raise ConfigurationError("data.paths is empty: give at least one prepared folder")
        if weights is None:
            weights = [sampler.corpus.tokens for sampler in samplers]
        if len(weights) != len(samplers):
            raise ConfigurationError(
                f"data.weights has {len(weights)} numbers for {len(samplers)} data.paths: give one for each"
            )
        for weight in weights:
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigurationError(f"data.weights: {weight} must be a finite number, 0 or more")
        if sum(weights) <= 0:
            raise ConfigurationError(f"data.weights={list(weights)} are all zero: make at least one positive")
        first = samplers[0].corpus
        for sampler in samplers[1:]:
            if sampler.corpus.tokenizer_fingerprint != first.tokenizer_fingerprint:
                raise DataError(
                    f"data.paths: '{first.folder}' has tokenizer {first.tokenizer_fingerprint[:12]}, "
                    f"'{sampler.corpus.folder}' has "
                    f"{sampler.corpus.tokenizer_fingerprint[:12]}: prepare both with "
                    "the same --tokenizer"
                )
        self.samplers = list(samplers)
        self.weights = np.asarray(weights, dtype=np.float64) / math.fsum(weights)
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, its sample) of samples block * 65,536 and on."""
        if block not in self._blocks:
            begin, live = block * _BLEND_BLOCK, np.flatnonzero(self.weights)
            # At time t about t samples are due, to within half a sample per corpus. So what is due before
            # `begin - live - 2` lies before this block, and what is due after its end plus as much, behind
            # it.
            margin = len(live) + 2
            due = np.floor(max(0.0, begin - margin) * self.weights[live] + 0.5).astype(np.int64)
            until = np.ceil((begin + _BLEND_BLOCK + margin) * self.weights[live]).astype(np.int64) + 1
            samples = np.concatenate([np.arange(a, b) for a, b in zip(due, until, strict=True)])
            corpora = np.repeat(live, until - due)
            order = np.lexsort((corpora, (samples + 0.5) / self.weights[corpora]))
            order = order[begin - due.sum() :][:_BLEND_BLOCK]
            self._blocks[block] = corpora[order], samples[order]
            while len(self._blocks) > 2:
                self._blocks.popitem(last=False)
        return self._blocks[block]

    def locate(self, index: int) -> tuple[int, int]:
        """(k, j): sample `index` of the blend is sample j of corpus k."""
        if len(self.samplers) == 1:
            return 0, int(index)
        corpora, samples = self._block(int(index) // _BLEND_BLOCK)
        place = int(index) % _BLEND_BLOCK
        return int(corpora[place]), int(samples[place])

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index`: int64 [sequence_length + 1]."""
        corpus, sample = self.locate(index)
        return self.samplers[corpus][sample]
