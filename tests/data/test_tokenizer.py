"""Tokenizers trained here lose nothing, are reproducible, and refuse what cannot work "
"with a usable number."""

import re
import sysconfig
from pathlib import Path

import pytest

from megagamma.data.preparation.corpus import list_shards, read_documents, tiny_document
from megagamma.data.preparation.source import Source
from megagamma.data.preparation.train_tokenizer import sample_text, train_tokenizer
from megagamma.data.tokenizer import CONTROL_PIECES, Tokenizer
from megagamma.errors import ConfigurationError, DataError

EDGES = [
    *("", " ", "  a  b  ", "\n", "\n\n\n\t\r\n", "\x00\x01\x7f", "\u2581", "a\u2581\u2581 b"),
    *("\ufeff\u200b\u00a0", "e\u0301 vs \u00e9, ﬁ, Ⅷ", "🐢👩‍👩‍👧‍👦", "0123456789 3.14"),
    *("<|eos|><|bos|><|pad|><|unk|>", "<0x0A><s></s>", "\U0010ffff", " " * 50),
    *("漢字かな한국어", "\u0627\u0644", "a" * 5000),
]


def read(name):
    source = Source(corpus=name)
    shards = list_shards(source)
    return source, shards, [text for shard in shards for text in read_documents(shard, source)]


@pytest.fixture(scope="module")
def sotu(tmp_path_factory):
    source, shards, documents = read("sotu")
    path = tmp_path_factory.mktemp("tokenizer") / "sotu.model"
    tokenizer = train_tokenizer(shards, source, 2048, path, sample_characters=2_000_000)
    return source, shards, documents, tokenizer


def test_lossless_on_a_thousand_chunks_of_prose_and_code_and_on_edges(sotu):
    *_, documents, tokenizer = sotu
    prose = "".join(documents)
    library = Path(sysconfig.get_paths()["stdlib"])
    code = "".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(library.glob("*.py"))[:60])
    sizes = tokenizer.token_bytes()
    chunks = [text[k * 1500 : (k + 1) * 1500] for text in (prose, code) for k in range(500)]
    assert len(set(chunks)) == 1000
    for text in [*chunks, *EDGES]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())
        assert not set(ids) & {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, 0}


def test_settings(sotu):
    tokenizer = sotu[-1]
    pieces = [tokenizer._model.id_to_piece(index) for index in range(tokenizer.vocab_size)]
    assert tokenizer.vocab_size == 2048
    assert tuple(pieces[:4]) == CONTROL_PIECES
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    assert not [piece for piece in pieces[260:] if re.search(r"\d\d", piece)], "digits must be split"
    assert len(tokenizer.encode("The Congress of the United States")) < 10


def test_training_is_reproducible_and_the_seed_matters(sotu, tmp_path):
    source, shards, _, tokenizer = sotu
    again = train_tokenizer(shards, source, 2048, tmp_path / "again.model", sample_characters=2_000_000)
    assert again.fingerprint == tokenizer.fingerprint
    other = train_tokenizer(shards, source, 2048, tmp_path / "other.model", seed=7, sample_characters=2_000_000)
    assert other.fingerprint != tokenizer.fingerprint


def test_the_sample_respects_its_limit_and_spans_the_source(sotu):
    source, shards, documents, _ = sotu
    sample = list(sample_text(shards, source, 1, 1_000_000))
    assert 0.8e6 < sum(map(len, sample)) <= 1e6
    text = "".join(documents)
    places = [text.index(chunk) / len(text) for chunk in sample if len(chunk) > 500]
    assert min(places) < 0.1
    assert max(places) > 0.9
    assert sum(map(len, sample_text(shards, source, 1, 10**9))) == len(text)


def test_a_vocabulary_too_large_or_small_names_the_bound_that_works(tmp_path):
    source, shards, _ = read("tiny")
    path = tmp_path / "t.model"
    with pytest.raises(ConfigurationError, match=r"vocab_size=100000 is too large for 148,\d+ characters") as error:
        train_tokenizer(shards, source, 100_000, path)
    largest = int(re.search(r"use (\d+) or less", str(error.value))[1])
    with pytest.raises(ConfigurationError, match="vocab_size=100 is too small") as error:
        train_tokenizer(shards, source, 100, path)
    smallest = int(re.search(r"use (\d+) or more", str(error.value))[1])
    assert not path.exists()
    for size in (smallest, largest):
        assert train_tokenizer(shards, source, size, path).decode(Tokenizer(path).encode(tiny_document(3))) == (
            tiny_document(3)
        )
    with pytest.raises(ConfigurationError):
        train_tokenizer(shards, source, largest + 1, path)
    with pytest.raises(ConfigurationError):
        train_tokenizer(shards, source, smallest - 1, path)


def test_bad_files(tmp_path):
    (tmp_path / "empty.model").touch()
    (tmp_path / "text.model").write_text("hello " * 100)
    for name, message in [
        ("no", "cannot be read"),
        ("empty", "is empty"),
        ("text", "is not a SentencePiece model"),
    ]:
        with pytest.raises(DataError, match=message):
            Tokenizer(tmp_path / f"{name}.model")
    (tmp_path / "blank.txt").write_text("  \n ")
    source = Source(inputs=(str(tmp_path / "blank.txt"),))
    with pytest.raises(DataError, match="no text to train on"):
        train_tokenizer(list_shards(source), source, 300, tmp_path / "x.model")


def test_a_model_without_an_end_of_text_piece_is_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([tiny_document(0)[:2000]]), model_prefix=str(tmp_path / "m"), vocab_size=100,
        model_type="bpe", eos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    with pytest.raises(DataError, match="no eos piece"):
        Tokenizer(tmp_path / "m.model")
