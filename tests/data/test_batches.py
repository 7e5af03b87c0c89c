"""Samples are a pure function of seed and number; files are Megatron's; masks and "
"counts mean what they say."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from megagamma.data.blend import Blend
from megagamma.data.contracts import microbatch_ids, rank_microbatches
from megagamma.data.inspect import inspect_batch
from megagamma.data.preparation.corpus import tiny_document
from megagamma.data.preparation.indexing import index_bytes
from megagamma.data.preparation.prepare import PrepareSettings, embedded_settings, prepare
from megagamma.data.preparation.source import Source
from megagamma.data.text import Corpus, CorpusSampler, keyed_permutation
from megagamma.data.text_batches import TextEvaluation, TextSource, collate
from megagamma.data.tokenizer import Tokenizer
from megagamma.errors import ConfigurationError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(embedded_settings("tiny", str(tmp_path_factory.mktemp("data"))))


@pytest.fixture(scope="module")
def corpus(folder):
    return Corpus(folder)


@pytest.fixture(scope="module")
def tokens(folder):
    return np.fromfile(folder / "train.bin", dtype="uint16")


class Fake:
    """A corpus that only has a size, for blends."""

    def __init__(self, tokens, tokenizer_fingerprint="same"):
        self.tokens, self.tokenizer_fingerprint, self.folder = tokens, tokenizer_fingerprint, f"fake{tokens}"
        self.split, self.name, self.documents = "train", self.folder, 1


def blend_of(weights, sizes=None):
    sizes = sizes or [1000] * len(weights)
    return Blend([CorpusSampler(Fake(size), 10, 1) for size in sizes], weights)


def test_megatrons_reader_and_writer_agree_with_our_files(folder, corpus, tokens, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    dataset = IndexedDataset(str(folder / "train"))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for index in range(len(dataset)):
        assert dataset[index][-1] == corpus.eos_id
        assert corpus.eos_id not in dataset[index][:-1]
        builder.add_document(torch.from_numpy(dataset[index].astype(np.int32)), [len(dataset[index])])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert np.array_equal(np.concatenate([dataset[index] for index in range(len(dataset))]), tokens)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"theirs.{suffix}").read_bytes() == (folder / f"train.{suffix}").read_bytes()
    wide = IndexedDatasetBuilder(str(tmp_path / "wide.bin"), dtype=np.int32)
    for length in (3, 1, 5):
        wide.add_document(torch.arange(length), [length])
    wide.finalize(str(tmp_path / "wide.idx"))
    assert (tmp_path / "wide.idx").read_bytes() == index_bytes(np.array([3, 1, 5]), "int32")


def test_megatrons_gpt_dataset_reads_the_same_tokens(folder, tokens):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class EndOfText:
        eod, vocab_size = 2, 512
        unique_identifiers = {"class": "EndOfText"}

    config = GPTDatasetConfig(
        random_seed=3,
        sequence_length=64,
        blend=([str(folder / "train")], None),
        split="1,0,0",
        tokenizer=EndOfText(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(folder.parent / "cache"),
    )
    indexed = IndexedDataset(str(folder / "train"))
    theirs = GPTDataset(
        indexed, str(folder / "train"), np.arange(len(indexed), dtype=np.int32), None, Split.train, config
    )
    stream = f" {' '.join(map(str, tokens))} "
    text = np.concatenate([theirs[0]["tokens"].numpy(), theirs[0]["labels"].numpy()[-1:]])
    pieces = [piece for piece in np.split(text, np.flatnonzero(text == 2) + 1) if len(piece)]
    assert all(f" {' '.join(map(str, piece))} " in stream for piece in pieces)
    # And ours holds as many windows, drawn from the same text.
    sampler = CorpusSampler(Corpus(folder), 64, seed=3)
    assert sampler.windows_per_epoch == len(theirs)
    counted = Counter(token for index in range(len(theirs)) for token in theirs[index]["labels"].tolist())
    ours = Counter(token for index in range(len(theirs)) for token in sampler[index][1:].tolist())
    assert sum((counted - ours).values()) < 2 * 64, "both leave out less than a window"


@pytest.mark.parametrize("length", [2, 7, 64, 1000])
def test_an_epoch_is_every_window_once(corpus, tokens, length):
    sampler = CorpusSampler(corpus, length, seed=5)
    count = sampler.windows_per_epoch
    assert count == (len(tokens) - 1) // length
    for epoch in (0, 2):
        samples = np.stack([sampler[index] for index in range(epoch * count, (epoch + 1) * count)])
        assert samples.shape == (count, length + 1)
        assert samples.dtype == np.int64
        # Rebuild the epoch's stream from the document order alone and cut it independently.
        order = keyed_permutation(corpus.documents, 5, corpus.name, epoch, "documents")
        documents = np.split(tokens, np.flatnonzero(tokens == 2)[:-1] + 1)
        stream = np.concatenate([documents[index] for index in order])
        expected = Counter(tuple(stream[k * length : k * length + length + 1].tolist()) for k in range(count))
        assert Counter(map(tuple, samples.tolist())) == expected
        windows = [tuple(stream[k * length : k * length + length + 1].tolist()) for k in range(count)]
        assert list(map(tuple, samples.tolist())) != windows, "windows are permuted"


def test_samples_do_not_depend_on_what_was_read_before(folder, corpus):
    first = CorpusSampler(corpus, 64, seed=5)
    count = first.windows_per_epoch
    asked = [0, 1, count - 1, count, 3 * count + 7, 2, 10 * count, count + 1]
    forward = {index: first[index] for index in asked}
    again = CorpusSampler(Corpus(folder), 64, seed=5)
    for index in reversed(asked):
        assert np.array_equal(again[index], forward[index])
    assert not np.array_equal(forward[0], forward[count]), "epochs differ"
    for other in (CorpusSampler(corpus, 64, seed=6), CorpusSampler(corpus, 64, seed=5, name="other")):
        assert any(not np.array_equal(other[index], forward[index]) for index in asked)
    assert len(first._epochs) <= 2


def test_the_order_is_frozen(corpus):
    """A run must resume with a later version: these numbers change only with a new data format."""
    assert keyed_permutation(10, 1, "name", 0, "documents").tolist() == FROZEN_PERMUTATION
    assert sorted(keyed_permutation(1000, 2).tolist()) == list(range(1000))


FROZEN_PERMUTATION = [3, 1, 5, 9, 7, 4, 0, 8, 6, 2]


def test_a_corpus_too_short_says_by_how_much(corpus):
    tokens = corpus.tokens
    assert CorpusSampler(corpus, tokens - 1, 0)[0].shape == (tokens,)
    with pytest.raises(DataError, match=rf"has {tokens:,} tokens in 45 documents, fewer than .* = {tokens + 1:,}: use"):
        CorpusSampler(corpus, tokens, 0)
    with pytest.raises(ConfigurationError, match="sequence_length=1 must be 2 or more"):
        CorpusSampler(corpus, 1, 0)


def test_a_missing_split_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": tiny_document(1)}))
    source = Source(inputs=(str(tmp_path / "a.jsonl"),))
    folder = prepare(PrepareSettings(str(tmp_path / "out"), source, vocab_size=330, validation_fraction=0))
    with pytest.raises(DataError, match=r"has no split 'validation' \(it has train\): prepare it with"):
        Corpus(folder, "validation")


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [1, 1], [3, 0, 1, 2], [1e-4, 1], [1 / 3, 1 / 7, 1 / 11, 1 / 13]])
def test_blend_keeps_its_proportions_at_every_prefix(weights):
    blend = blend_of(weights)
    count = 3 * 65536 // 2  # beyond one block
    located = np.array([blend.locate(index) for index in range(count)])
    share = np.array(weights) / sum(weights)
    for k in range(len(weights)):
        mine = located[:, 0] == k
        assert np.array_equal(located[mine, 1], np.arange(mine.sum())), "each corpus is read in order"
        given = np.cumsum(mine)
        assert np.abs(given - share[k] * np.arange(1, count + 1)).max() < 1 + 0.1 * len(weights)


def test_blend_answers_at_random_and_far_away():
    weights = [0.5, 0.3, 0.2, 0.0]
    forward, back = blend_of(weights), blend_of(weights)
    asked = [0, 70_000, 65_535, 65_536, 131_072, 200_000, 10**6]
    assert [forward.locate(i) for i in asked] == [back.locate(i) for i in reversed(asked)][::-1]
    for start in (10**9 + 65_530, 10**12):
        located = [forward.locate(index) for index in range(start, start + 20)]
        for k in range(3):
            numbers = [sample for corpus, sample in located if corpus == k]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            assert abs(numbers[0] - start * weights[k]) < 8


def test_blend_defaults_to_the_corpora_tokens_and_refuses_bad_weights():
    assert np.allclose(blend_of([1, 3]).weights, [0.25, 0.75])
    samplers = [CorpusSampler(Fake(size), 10, 1) for size in (1000, 3000)]
    assert np.allclose(Blend(samplers).weights, [0.25, 0.75])
    for weights, message in [
        ([1.0], "has 1 numbers for 2 data.paths: give one for each"),
        ([1.0, -2.0], "-2.0 must be a finite number, 0 or more"),
        ([1.0, math.nan], "nan must be a finite number"),
        ([0.0, 0.0], "are all zero"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            Blend(samplers, weights)
    with pytest.raises(ConfigurationError, match=r"data.paths is empty"):
        Blend([])
    with pytest.raises(DataError, match="has tokenizer same, 'fake99' has other: prepare both with the same"):
        Blend([samplers[0], CorpusSampler(Fake(99, "other"), 10, 1)])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_every_layout_sees_the_same_global_batch(corpus, ranks, micro):
    source = TextSource(Blend([CorpusSampler(corpus, 32, 1)]))
    rows = [batch.tokens for rank in range(ranks) for batch in rank_microbatches(source, 48, 16, micro, rank, ranks)]
    ids = [
        index
        for rank in range(ranks)
        for step in range(16 // (ranks * micro))
        for index in microbatch_ids(48, step, micro, rank, ranks)
    ]
    assert sorted(ids) == list(range(48, 64))
    assert torch.equal(torch.cat(rows), source.batch(ids).tokens)
    # Microbatch m of all ranks together is a contiguous run of samples.
    first = [index for rank in range(ranks) for index in microbatch_ids(48, 0, micro, rank, ranks)]
    assert first == list(range(48, 48 + ranks * micro))


def test_an_indivisible_global_batch_is_refused(corpus):
    source = TextSource(Blend([CorpusSampler(corpus, 32, 1)]))
    with pytest.raises(ValueError, match=r"10 samples are no multiple of 4 x 2 ranks"):
        rank_microbatches(source, 0, 10, 4, 0, 2)


def test_collate_by_hand():
    rows = np.array([[5, 2, 7, 8, 2, 2, 9], [2, 4, 4, 4, 4, 4, 2]])
    plain = collate(rows, 2)
    assert plain.tokens.tolist() == rows[:, :-1].tolist()
    assert plain.labels.tolist() == rows[:, 1:].tolist()
    assert plain.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert plain.document_ids is None
    assert plain.loss_mask.eq(1).all()
    assert plain.loss_mask.dtype == torch.float32
    assert {x.dtype for x in (plain.tokens, plain.labels, plain.position_ids)} == {torch.int64}
    full = collate(rows, 2, reset_positions=True, reset_attention=True, mask_eod_loss=True)
    assert full.position_ids.tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4]]
    assert full.document_ids.tolist() == [[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]]
    assert full.loss_mask.tolist() == [[1, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]


def test_masks_and_positions_agree_with_megatron(corpus):
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    source = TextSource(
        Blend([CorpusSampler(corpus, 2000, 1)]), reset_positions=True, reset_attention=True, mask_eod_loss=True
    )
    batch = source.batch(range(4))
    assert (batch.document_ids[:, -1] > 0).any()
    for row in range(4):
        attention, mask, positions = _get_ltor_masks_and_position_ids(
            batch.tokens[row], corpus.eos_id, True, True, True, True
        )
        assert torch.equal(mask, batch.loss_mask[row])
        assert torch.equal(positions, batch.position_ids[row])
        same = batch.document_ids[row][:, None] == batch.document_ids[row][None]
        assert torch.equal(~attention[0], same.tril())


@pytest.mark.parametrize("length", [1, 50, 256, 10**6])
def test_validation_predicts_every_token_once(folder, length):
    corpus = Corpus(folder, "validation")
    tokens = np.fromfile(folder / "validation.bin", dtype="uint16")
    validation = TextEvaluation(corpus, length)
    if length == 1:
        ids = range(20)
        tokens = tokens[:21]
    else:
        ids = range(validation.size + 3)  # samples beyond the end count for nothing
    batch = validation.batch(ids)
    kept = batch.loss_mask.bool()
    assert batch.labels[kept].tolist() == tokens[1:].tolist()
    assert batch.tokens[kept].tolist() == tokens[:-1].tolist()
    assert (batch.labels[~kept] == corpus.pad_id).all()
    assert validation.size == math.ceil((corpus.tokens - 1) / length)


def test_validation_bytes(folder):
    corpus = Corpus(folder, "validation")
    validation = TextEvaluation(corpus, 100)
    tokenizer = Tokenizer(corpus.tokenizer_path)
    tokens = np.fromfile(folder / "validation.bin", dtype="uint16")
    texts = [tokenizer.decode(piece[:-1]) for piece in np.split(tokens, np.flatnonzero(tokens == 2) + 1) if len(piece)]
    assert validation.bytes == sum(len(text.encode()) for text in texts)
    first = len(tokenizer.decode(tokens[:1]).encode())
    everything = validation.batch(range(validation.size + 2)).label_bytes
    assert everything.sum() == validation.bytes - first
    few = [token for token in tokens[1:301] if token != 2]
    assert validation.batch(range(3)).label_bytes.sum() == len(tokenizer.decode(few).encode())


def test_validation_scores(folder):
    """Nats per token and bits per byte of losses made by hand; masked positions do not count."""
    validation = TextEvaluation(Corpus(folder, "validation"), 100)
    batch = validation.batch([0, validation.size])
    sums = validation.measure(batch, torch.full((2, 100), 2.0)) + validation.measure(batch, torch.full((2, 100), 4.0))
    text_bytes = int(batch.label_bytes.sum())
    assert sums.tolist() == [600.0, 200.0, 2.0 * text_bytes]
    scores = validation.scores(sums)
    assert scores == {"loss": 3.0, "bits_per_byte": pytest.approx(300 / (math.log(2) * text_bytes))}
    assert validation.describe({"loss": 3.25, "bits_per_byte": 1.2345}, sums) == (
        "3.2500 nats/token, 1.2345 bits/byte over 200 tokens"
    )


def test_inspect_shows_what_is_trained_on(folder, corpus):
    source = TextSource(Blend([CorpusSampler(corpus, 3000, 1, "stories")]))
    shown = inspect_batch(source, [3, 0])
    assert [(index, name) for index, name, _ in shown] == [(3, "stories"), (0, "stories")]
    tokenizer = Tokenizer(corpus.tokenizer_path)
    sample = source.blend[3]
    assert (sample == 2).sum() == shown[0][2].count("<|eos|>") > 0
    assert shown[0][2].replace("<|eos|>", "") == tokenizer.decode(sample)
