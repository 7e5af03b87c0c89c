"""SentencePiece tokenizers. Training one is `megagamma.data.preparation.train_tokenizer`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megagamma.errors import DataError

CONTROL_PIECES = ("<|unk|>", "<|bos|>", "<|eos|>", "<|pad|>")
_SPACE = "\u2581"  # SentencePiece's stand-in for a space


class Tokenizer:
    """A SentencePiece model file.

    Attributes:
        path: the .model file.
        vocab_size: number of pieces, control pieces included.
        bos_id, eos_id, pad_id: ids of the control pieces. Where a foreign model has no padding piece,
            pad_id is eos_id; where it has no beginning-of-text piece, bos_id is -1.
        fingerprint: sha256 of the model file, hexadecimal.

    Raises:
        DataError: the file is missing, is not a SentencePiece model, or has no eos piece.
    """

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        self.path = str(path)
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise DataError(
                f"tokenizer: '{path}' cannot be read ({error.strerror}): give a SentencePiece .model file"
            ) from error
        if not data:
            raise DataError(f"tokenizer: '{path}' is empty (0 bytes): give a SentencePiece .model file")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.vocab_size = self._model.get_piece_size()
        except RuntimeError as error:
            raise DataError(
                f"tokenizer: '{path}' is not a SentencePiece model ({len(data):,} bytes): give a .model file"
            ) from error
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        if self.eos_id < 0:
            raise DataError(
                f"tokenizer: '{path}' has no eos piece, which separates documents: "
                "use a model trained with one (eos_id >= 0)"
            )
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id
        fallback = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._space_ids = fallback if all(self._model.is_byte(index) for index in fallback) else None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without control pieces."""
        if self._space_ids is None or _SPACE not in text:
            return self._model.encode(text)
        # SentencePiece would read this character as a space; its bytes are kept apart so that decoding
        # restores it.
        ids: list[int] = []
        for index, piece in enumerate(text.split(_SPACE)):
            if index:
                ids.extend(self._space_ids)
            ids.extend(self._model.encode(piece))
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids. Control pieces give nothing; bytes that are not UTF-8 give U+FFFD."""
        return self._model.decode([int(index) for index in ids])

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text behind each token id: int64 [vocab_size], 0 for control pieces.

        Summed over the tokens of a document it is the document's length in bytes, for tokenizers trained
        here."""
        model = self._model
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for index in range(self.vocab_size):
            if model.is_byte(index):
                sizes[index] = 1
            elif not (model.is_control(index) or model.is_unknown(index)):
                sizes[index] = len(model.id_to_piece(index).replace(_SPACE, " ").encode())
        return sizes
