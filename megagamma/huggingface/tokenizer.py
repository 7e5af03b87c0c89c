"""A SentencePiece BPE model as a Hugging Face tokenizer, proven equal on text before it is used.

transformers' own conversion of such a model is wrong for it (its merges lack the pieces' scores), so the tokenizer is
built from the model's pieces:

- Every split of a piece into two other pieces is a merge, ranked by the piece's score, as SentencePiece joins.
- What is in no piece becomes its UTF-8 bytes (byte fallback).
- SentencePiece writes a space as U+2581. Here pieces hold plain spaces, and nothing is replaced in the text, so that a
  U+2581 in a text stays one: it is in no piece and falls back to its bytes.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from megagamma.data.tokenizer import Tokenizer
from megagamma.errors import ConfigurationError, DataError
from megagamma.files import copy_file, write_json, write_text

_SPACE = "\u2581"
# Texts at the edges of what tokenizers treat specially.
EDGES = (
    "", " ", "  ", "\n", "\t", " \n \t ", "a", " a", "a ", "  a  b   c    ", "\r\n\r\n", "\u00a0", "\u200b\u200d",
    "\u2581", "a\u2581b", " \u2581 \u2581\u2581", "<|eos|>", "a<|bos|>b <|unk|><|pad|>", "<0x41>", "<s></s>", "[INST]",
    "0123456789 3.14159 1,000,000 -1e-12", "naïve café Ångström ﬁ ½ ²", "e\u0301 vs é", "日本語 中文 한국어", "שלום עולם",
    "🙂🙃👩‍👩‍👧‍👦🇩🇪", "\x00\x01\x7f", "def f(x):\n\treturn x**2  # ok\n", "A" * 300, "ab" * 200, " " * 129, "\n" * 65,
)  # fmt: skip


def build_tokenizer(model_file: Path) -> Any:
    """A `tokenizers.Tokenizer` from a SentencePiece BPE model.

    Raises:
        ConfigurationError: a model whose settings have no equal there.
    """
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2 as pb2
    from tokenizers import decoders, models

    proto: Any = pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model_file.read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    for name, value, expected in (
        ("model_type", trainer.model_type, 2),
        ("byte_fallback", trainer.byte_fallback, True),
        ("add_dummy_prefix", normalizer.add_dummy_prefix, False),
        ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces, False),
        ("normalization rules", len(normalizer.precompiled_charsmap), 0),
        ("treat_whitespace_as_suffix", trainer.treat_whitespace_as_suffix, False),
    ):
        if value != expected:
            raise ConfigurationError(
                f"{model_file}: {name}={value}: a Hugging Face tokenizer equals a SentencePiece model only with {expected} "
                "(BPE is model_type 2): use --tokenizer none to export without one, or train with tools/prepare_data.py"
            )
    kinds = type(proto.pieces[0])
    vocabulary, scores, control = {}, {}, []
    for index, piece in enumerate(proto.pieces):
        normal = piece.type in (kinds.NORMAL, kinds.USER_DEFINED)
        text = piece.piece.replace(_SPACE, " ") if normal else piece.piece
        vocabulary[text] = index
        if normal:
            scores[text] = piece.score
        elif piece.type in (kinds.CONTROL, kinds.UNKNOWN):
            control.append(text)
    merges = [
        (score, whole[:cut], whole[cut:])
        for whole, score in scores.items()
        for cut in range(1, len(whole))
        if whole[:cut] in scores and whole[cut:] in scores
    ]
    merges.sort(key=lambda merge: -merge[0])
    unknown = proto.pieces[trainer.unk_id].piece
    converted = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=[(left, right) for _, left, right in merges], unk_token=unknown,
            byte_fallback=True, fuse_unk=False,
        )
    )  # fmt: skip
    converted.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    converted.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in control])
    # As in training, where a control piece's name in a text is text.
    converted.encode_special_tokens = True
    return converted


def sample_texts(tokenizer: Tokenizer, count: int, seed: int = 0) -> list[str]:
    """Texts for the proof: the edges, and runs of random pieces, which meet in ways that no prose would show."""
    rng = random.Random(seed)
    texts = list(EDGES)
    while len(texts) < count:
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 64))]
        texts.append(tokenizer.decode(ids))
    return texts


def prove_equal(ours: Tokenizer, theirs: Any, texts: list[str]) -> int:
    """Check that two tokenizers give the same ids, and that theirs gives the text back.

    Args:
        theirs: a `tokenizers.Tokenizer`.

    Raises:
        DataError: naming the first text that differs.

    Returns:
        Number of texts.
    """
    for text in texts:
        expected, converted = ours.encode(text), theirs.encode(text, add_special_tokens=False).ids
        if expected != converted:
            raise DataError(
                f"tokenizer: the converted one differs on {text[:80]!r}: {converted[:12]} in place of {expected[:12]}: use "
                "--tokenizer none to export without one"
            )
        back = theirs.decode(converted, skip_special_tokens=False)
        if back != ours.decode(expected):
            raise DataError(f"tokenizer: the converted one gives {back[:80]!r} for {text[:80]!r}")
    return len(texts)


def special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Token ids for config.json. There is no bos token: training puts none before a document."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {"bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def export_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int, texts: list[str]) -> int:
    """Write tokenizer.json and what transformers needs beside it, and the SentencePiece model itself.

    Args:
        context_length: longest input that the model was trained on. Unit: tokens.
        texts: for the proof, beside `sample_texts`.

    Raises:
        DataError, ConfigurationError: it has no equal.

    Returns:
        Number of texts that it was proven equal on.
    """
    built = build_tokenizer(Path(tokenizer.path))
    proven = prove_equal(tokenizer, built, [*sample_texts(tokenizer, 1000), *texts])
    write_text(folder / "tokenizer.json", built.to_str(pretty=False) + "\n")
    names = {
        name: built.id_to_token(index)
        for name, index in (("eos_token", tokenizer.eos_id), ("pad_token", tokenizer.pad_id))
    }
    settings: dict[str, Any] = {
        # Where the class is missing, folders of some model types silently load another one's tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "padding_side": "left",
        **names,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", names)
    # Under another name than tokenizer.model, which transformers would take in place of tokenizer.json.
    copy_file(tokenizer.path, folder / "sentencepiece.model")
    return proven
