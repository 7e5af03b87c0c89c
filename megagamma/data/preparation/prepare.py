"""Prepare a corpus: text -> tokenizer -> token files, in a folder that appears complete or not at all.

Work happens in a hidden folder beside the output (`.NAME.partial`), under a lock, so that a killed run
continues from its finished parts and two runs at once do the work once. The result is put together in
`.NAME.partial/result`, which is what takes the output's name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagamma.data.preparation.corpus import count_empty_files, group_shards, list_shards
from megagamma.data.preparation.indexing import (
    FORMAT,
    FORMAT_VERSION,
    merge_parts,
    read_manifest,
    token_dtype,
    verify_prepared,
    writing,
)
from megagamma.data.preparation.parts import PartTask, run_parts
from megagamma.data.preparation.source import Shard, Source
from megagamma.data.preparation.train_tokenizer import SAMPLE_CHARACTERS, train_tokenizer
from megagamma.data.tokenizer import Tokenizer
from megagamma.errors import ConfigurationError, DataError
from megagamma.files import copy_file, write_json
from megagamma.folders import directory_lock, hidden_name, publish_directory, recover_at_start, recover_directory
from megagamma.owned import require_own, require_place
from megagamma.reading import read_json_value

logger = logging.getLogger(__name__)

# Names in the hidden folder of unfinished work.
_WORK = ("parts", "result", "tokenizer.model", "tokenizer.json")
EMBEDDED_VOCABULARY = {"sotu": 4096, "tiny": 512}


@dataclass(frozen=True)
class PrepareSettings:
    """What to prepare, and where. `workers`, `part_bytes` and `progress` never change the result."""

    output: str
    """Folder to create."""
    source: Source
    tokenizer: str | None = None
    """A SentencePiece .model to use; or train one with `vocab_size`."""
    vocab_size: int | None = None
    """Pieces of the tokenizer to train. Default: 4096 for sotu, 512 for tiny; else it must be given."""
    validation_fraction: float = 0.05
    """Share of documents held out, chosen by the hash of their text; 0 for none."""
    split_salt: str = "validation"
    """Another salt holds out other documents."""
    drop_duplicates: bool = False
    """Keep only the first of documents with exactly the same text."""
    seed: int = 1234
    """Seed of the sample that the tokenizer is trained on."""
    sample_characters: int = SAMPLE_CHARACTERS
    """Characters the tokenizer is trained on at most."""
    workers: int = 1
    """Processes that encode; 1 works in this process."""
    part_bytes: int = 4 << 20
    """Bytes of source text per part: the unit of parallel work and of resuming."""
    overwrite: bool = False
    """Replace a finished folder that was made with other settings or is corrupt."""
    progress: bool | None = None
    """Show a progress bar; None: on a terminal only."""

    def validate(self) -> None:
        """Raise ConfigurationError for settings that cannot work."""
        if not 0 <= self.validation_fraction < 1:
            raise ConfigurationError(
                f"validation_fraction={self.validation_fraction} must be at least 0 and below 1: "
                "use 0 for no validation split, 0.05 for one document in twenty"
            )
        if self.tokenizer and self.vocab_size:
            raise ConfigurationError(
                f"tokenizer='{self.tokenizer}' and vocab_size={self.vocab_size}: give only one of them"
            )
        if not self.tokenizer and not self.vocabulary:
            raise ConfigurationError(
                "tokenizer: neither a tokenizer nor vocab_size is given: "
                "give --tokenizer FILE.model, or --vocab_size N (such as 16384) to train one"
            )
        for name in ("workers", "part_bytes", "sample_characters"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be 1 or more")

    @property
    def vocabulary(self) -> int | None:
        return self.vocab_size or EMBEDDED_VOCABULARY.get(self.source.corpus or "")

    def describe(self) -> dict:
        """The settings that decide the result, as plain data."""
        trained = {
            "vocab_size": self.vocabulary,
            "seed": self.seed,
            "sample_characters": self.sample_characters,
        }
        return {
            "source": self.source.describe(),
            "tokenizer": {"fingerprint": Tokenizer(self.tokenizer).fingerprint} if self.tokenizer else trained,
            "validation_fraction": self.validation_fraction,
            "split_salt": self.split_salt,
            "drop_duplicates": self.drop_duplicates,
        }


def prepare(settings: PrepareSettings) -> Path:
    """Prepare a corpus and return its folder, at once if it is there already with the same settings.

    Safe to call from several processes at once: one does the work, the others wait and take its result.

    Raises:
        ConfigurationError: settings that cannot work, or a vocabulary too large or small for the text.
        DataError: unreadable source, nothing to read, a disk that is full or read-only, an output folder
            that holds something else (never touched), or one made with other settings (without
            `overwrite`).
    """
    settings.validate()
    output = Path(os.path.abspath(settings.output))
    described = settings.describe()
    require_place(output, f"output: '{output}'", itself=("prepared data",), around=("run",))
    recover_at_start(output, "output")
    try:
        shards = list_shards(settings.source, settings.part_bytes)
    except DataError:
        # The text may be gone, or never have been on this machine, while what was made of it is here.
        if _is_prepared(output) and read_manifest(output)["settings"] == described and not settings.overwrite:
            verify_prepared(output)
            return output
        raise
    fingerprint = _fingerprint(described, shards)
    if _finished(output, fingerprint, settings):
        _tidy(output)
        return output
    with _lock(output):
        if _finished(output, fingerprint, settings):
            return output
        partial = hidden_name(output, "partial")
        with writing(output):
            (partial / "parts").mkdir(parents=True, exist_ok=True)
            for leftover in [*partial.glob("parts/*.tmp"), *partial.glob("*.tmp")]:
                leftover.unlink()
            tokenizer = _tokenizer(settings, partial)
            tasks = _tasks(settings, shards, tokenizer, partial)
            summaries = run_parts(tasks, settings.workers, settings.progress)
            _publish(settings, described, fingerprint, tasks, summaries, tokenizer, partial, output)
    return output


def embedded_settings(
    corpus: str, cache: str = "data", vocab_size: int | None = None, **others: Any
) -> PrepareSettings:
    """Settings that prepare "sotu" or "tiny" as CACHE/NAME, or CACHE/NAME-VOCAB for another vocabulary."""
    default = EMBEDDED_VOCABULARY.get(corpus)
    name = corpus if vocab_size in (None, default) else f"{corpus}-{vocab_size}"
    return PrepareSettings(os.path.join(cache, name), Source(corpus=corpus), vocab_size=vocab_size, **others)


def _is_prepared(output: Path) -> bool:
    return (output / "manifest.json").is_file()


def _fingerprint(described: dict, shards: list[Shard]) -> str:
    """One hash of all that decides the result: settings, and the identity of every file, however spelled."""
    source = {key: value for key, value in described["source"].items() if key != "inputs"}
    identities = list(dict.fromkeys(f"{shard.identity}|{shard.format}" for shard in shards))
    text = json.dumps([FORMAT_VERSION, {**described, "source": source}, identities])
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(output: Path, fingerprint: str, settings: PrepareSettings) -> bool:
    """Whether `output` already holds the result. Raises DataError when what it holds must stay."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not _is_prepared(output):
        raise DataError(
            f"output: '{output}' exists and is not a prepared folder: choose another, or remove it yourself"
        )
    try:
        same = verify_prepared(output)["settings_fingerprint"] == fingerprint
    except DataError as error:
        if settings.overwrite:
            require_own(output, f"output: '{output}'", error=DataError)
            return False
        raise DataError(
            f"output: '{output}' exists but is corrupt: use --overwrite to make it again ({error})"
        ) from error
    if same:
        logger.info("already prepared: %s", output)
        return True
    if settings.overwrite:
        require_own(output, f"output: '{output}'", error=DataError)
        return False
    raise DataError(
        f"output: '{output}' was prepared from other text or with other settings: "
        "use --overwrite to replace it, or another --output"
    )


@contextlib.contextmanager
def _lock(output: Path) -> Iterator[None]:
    """Hold the output's lock; log when another process has it. A killed run's replaced output is put back."""
    with contextlib.ExitStack() as stack:
        with writing(output):
            if output.parent.is_file():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            output.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(directory_lock(output, "output", lambda: _log_waiting(output)))
            recover_directory(output)
        yield


def _tidy(output: Path) -> None:
    """Delete what a run left that was killed after it had published, unless another process writes there now."""
    partial = hidden_name(output, "partial")
    if os.path.lexists(partial):
        with contextlib.suppress(OSError, ConfigurationError), directory_lock(output, "output"):
            _remove_partial(partial)


def _remove_partial(partial: Path) -> None:
    """Delete the folder of unfinished work, where it holds nothing else.

    Raises:
        DataError: naming what else it holds.
    """
    if not os.path.lexists(partial):
        return
    others = [path.name for path in partial.iterdir() if path.name not in _WORK and path.suffix != ".tmp"]
    if others:
        raise DataError(
            f"output: '{partial}' holds {', '.join(sorted(others)[:4])}, which this tool did not write: move it away, or "
            "choose another output"
        )
    shutil.rmtree(partial, ignore_errors=True)


def _log_waiting(output: Path) -> None:
    logger.info("waiting for another process that prepares %s", output)


def _tokenizer(settings: PrepareSettings, partial: Path) -> Tokenizer:
    """Copy or train the tokenizer into the partial folder; a trained one is reused after a kill."""
    path, note = partial / "tokenizer.model", partial / "tokenizer.json"
    if settings.tokenizer:
        shutil.copyfile(settings.tokenizer, path)
        return Tokenizer(path)
    # Cut in the default way: the sample depends on the cut, and part_bytes must not change the result.
    shards = list_shards(settings.source)
    key = hashlib.sha256(json.dumps([settings.describe()["tokenizer"], [s.key for s in shards]]).encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError, DataError):
        found, tokenizer = read_json_value(note), Tokenizer(path)
        if found == {"key": key, "fingerprint": tokenizer.fingerprint}:
            return tokenizer
    logger.info("training a tokenizer of %d pieces", settings.vocabulary)
    tokenizer = train_tokenizer(
        shards, settings.source, settings.vocabulary or 0, path, settings.seed, settings.sample_characters
    )
    write_json(note, {"key": key, "fingerprint": tokenizer.fingerprint})
    return tokenizer


def _tasks(settings: PrepareSettings, shards: list[Shard], tokenizer: Tokenizer, partial: Path) -> list[PartTask]:
    how = (tokenizer.path, tokenizer.fingerprint, token_dtype(tokenizer.vocab_size), str(partial / "parts"))
    groups = group_shards(shards, settings.part_bytes)
    return [PartTask(index, tuple(group), settings.source, *how) for index, group in enumerate(groups)]


def _publish(
    settings: PrepareSettings,
    described: dict,
    fingerprint: str,
    tasks: list[PartTask],
    summaries: list[dict],
    tokenizer: Tokenizer,
    partial: Path,
    output: Path,
) -> None:
    """Merge the parts into `partial/result`, write the manifest, and rename the folder into its place."""
    if not any(summary["documents"] for summary in summaries):
        raise DataError("inputs: the source holds no document with text: check the files and --text_field")
    result = partial / "result"
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    merged = merge_parts(tasks, result, settings.validation_fraction, settings.split_salt, settings.drop_duplicates)
    copy_file(tokenizer.path, result / "tokenizer.model")
    ids = {name: getattr(tokenizer, name) for name in ("fingerprint", "vocab_size", "bos_id", "eos_id", "pad_id")}
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dtype": tasks[0].dtype,
        "tokenizer": ids,
        "splits": merged["splits"],
        "duplicates_dropped": merged["duplicates_dropped"],
        "empty_files": count_empty_files(settings.source),
        "empty_documents": sum(summary["empty_documents"] for summary in summaries),
        "files": merged["files"],
        "settings": described,
        "settings_fingerprint": fingerprint,
    }
    write_json(result / "manifest.json", manifest)
    # In the hours that it took, something else may have been put in the output's place: that is never replaced.
    publish_directory(result, output, replace=_is_prepared(output))
    with contextlib.suppress(DataError):
        _remove_partial(partial)
