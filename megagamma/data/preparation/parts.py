"""Encoding in parts: the unit of parallel work and of resuming.

A source is cut into parts without regard to the number of workers, and the parts are joined in order, so
the result does not depend on who encoded what. Nothing here imports torch or megatron: workers start in
half a second."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait as wait_for_sentinel
from pathlib import Path
from typing import Any

import numpy as np

from megagamma.data.preparation.corpus import read_documents
from megagamma.data.preparation.indexing import FORMAT_VERSION, writing
from megagamma.data.preparation.source import Shard, Source
from megagamma.data.tokenizer import Tokenizer
from megagamma.errors import DataError
from megagamma.reading import read_json_value

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, int], None]  # documents, tokens and bytes of text since the last call


@dataclass(frozen=True)
class PartTask:
    """One unit of work: encode these shards into part number `index` below `folder`."""

    index: int
    shards: tuple[Shard, ...]
    source: Source
    tokenizer: str
    fingerprint: str
    dtype: str
    folder: str

    @property
    def key(self) -> str:
        """Identity of the part's content: a finished part with another key is written again."""
        source = asdict(self.source)
        how = [
            source["text_field"],
            source["document_separator"],
            self.fingerprint,
            self.dtype,
            FORMAT_VERSION,
        ]
        text = json.dumps([how, [shard.key for shard in self.shards]])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of the source, for progress."""
        return sum(shard.size for shard in self.shards)

    def path(self, suffix: str) -> Path:
        return Path(self.folder) / f"{self.index:06d}.{suffix}"


def finished_part(task: PartTask) -> dict | None:
    """The summary of a part that an earlier run finished with the same key, or None."""
    try:
        summary = read_json_value(task.path("json"))
        sizes = {suffix: task.path(suffix).stat().st_size for suffix in ("tokens", "documents")}
    except (OSError, ValueError):
        return None
    if not isinstance(summary, dict):
        return None
    return summary if summary.get("key") == task.key and summary.get("sizes") == sizes else None


@functools.lru_cache(maxsize=2)
def _tokenizer(path: str, _fingerprint: str) -> Tokenizer:
    return Tokenizer(path)


def write_part(task: PartTask, progress: Progress | None = None) -> dict:
    """Encode the documents of one part. Empty documents are counted and skipped.

    Writes NNNNNN.tokens (token ids, one eos after each document), NNNNNN.documents (per document:
    tokens, bytes of UTF-8 text, 128 bits of hash) and last NNNNNN.json, the summary, whose presence means:
    complete.

    Returns:
        The summary: key, sizes, documents, tokens, bytes, empty_documents.
    """
    tokenizer = _tokenizer(task.tokenizer, task.fingerprint)
    temporary = {name: task.path(f"{name}.{os.getpid()}.tmp") for name in ("tokens", "documents", "json")}
    done, told, empty = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64), 0
    with (
        writing(task.folder),
        open(temporary["tokens"], "wb") as file,
        open(temporary["documents"], "wb") as table,
    ):
        for shard in task.shards:
            for text in read_documents(shard, task.source):
                if not text:
                    empty += 1
                    continue
                data = text.encode()
                ids = np.asarray([*tokenizer.encode(text), tokenizer.eos_id], dtype=task.dtype)
                file.write(ids.tobytes())
                # One indexing.DOCUMENT_RECORD: the hash is its last two fields.
                digest = hashlib.blake2b(data, digest_size=16).digest()
                table.write(struct.pack("<qq", len(ids), len(data)) + digest)
                done += (1, len(ids), len(data))
                if progress and done[2] - told[2] > 1 << 18:
                    progress(*(done - told).tolist())
                    told[:] = done
        for stream in (file, table):
            stream.flush()
            os.fsync(stream.fileno())
        sizes = {name: temporary[name].stat().st_size for name in ("tokens", "documents")}
        summary = {"key": task.key, "sizes": sizes, "empty_documents": empty}
        summary.update(zip(("documents", "tokens", "bytes"), done.tolist(), strict=True))
        temporary["json"].write_text(json.dumps(summary))
        for name, path in temporary.items():
            os.replace(path, task.path(name))
    if progress:
        progress(*(done - told).tolist())
    return summary


class _Bar:
    """Progress over source bytes, with documents/s and tokens/s of this run."""

    def __init__(self, tasks: list[PartTask], show: bool | None) -> None:
        import tqdm

        self.began, self.documents, self.tokens, self.done = time.monotonic(), 0, 0, 0
        total = sum(task.size for task in tasks)
        disable = None if show is None else not show  # None: tqdm shows itself on a terminal only
        self.bar = tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="encoding", disable=disable)

    def show(self, documents: int, tokens: int, read: int) -> None:
        """Show totals so far; `read` counts bytes of text, a lower bound where files hold more than text."""
        seconds = max(1e-9, time.monotonic() - self.began)
        self.documents, self.tokens = documents, tokens
        self.bar.set_postfix_str(f"{documents / seconds:,.0f} documents/s, {tokens / seconds:,.0f} tokens/s", False)
        self.bar.update(max(0, min(self.bar.total, max(self.done, read)) - self.bar.n))

    def finish(self, task: PartTask) -> None:
        self.done += task.size


_counters: Any = None


def _start_worker(counters: Any) -> None:
    global _counters
    _counters = counters
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C for all
    parent = multiprocessing.parent_process()
    sentinel = parent.sentinel if parent else 0

    def leave_with_parent() -> None:
        # A parent killed by SIGKILL cannot stop its workers: they would encode on, and then wait for ever.
        wait_for_sentinel([sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _count(*amounts: int) -> None:
    with _counters.get_lock():
        if _counters[3]:
            raise DataError("stopped: another part failed, or the run was interrupted")
        for index, amount in enumerate(amounts):
            _counters[index] += amount


def _work(task: PartTask) -> dict:
    return write_part(task, _count)


def run_parts(tasks: list[PartTask], workers: int = 1, progress: bool | None = None) -> list[dict]:
    """Write the parts that are not there yet, with `workers` processes; return all summaries, in order.

    Args:
        progress: show a progress bar; None: on a terminal only.

    Raises:
        DataError: what reading or writing a part raised, or a worker process that died.
    """
    summaries = [finished_part(task) for task in tasks]
    missing = [task for task, summary in zip(tasks, summaries, strict=True) if summary is None]
    if len(missing) < len(tasks):
        logger.info("continuing: %d of %d parts are done already", len(tasks) - len(missing), len(tasks))
    bar = _Bar(missing, progress)
    totals = [0, 0, 0]
    try:
        if workers == 1 or len(missing) <= 1:
            for task in missing:

                def tell(*amounts: int) -> None:
                    totals[:] = [a + b for a, b in zip(totals, amounts, strict=True)]
                    bar.show(*totals)

                summaries[task.index] = write_part(task, tell)
                bar.finish(task)
        else:
            _run_pool(missing, workers, summaries, bar)
    finally:
        bar.bar.close()
    seconds = time.monotonic() - bar.began
    if missing:
        logger.info("encoded %s documents, %s tokens in %.1f s", f"{bar.documents:,}", f"{bar.tokens:,}", seconds)
    return [summary for summary in summaries if summary is not None]


def _run_pool(missing: list[PartTask], workers: int, summaries: list, bar: _Bar) -> None:
    # Spawned, not forked: the caller may hold threads (torch, MPI, NCCL) that do not survive a fork.
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 4)  # documents, tokens, bytes of text; and 1 once all must stop
    pool = ProcessPoolExecutor(min(workers, len(missing)), context, _start_worker, (counters,))
    try:
        futures = {pool.submit(_work, task): task for task in missing}
        while futures:
            for future in wait(futures, timeout=0.2, return_when=FIRST_COMPLETED).done:
                task = futures.pop(future)
                summaries[task.index] = future.result()
                bar.finish(task)
            bar.show(*counters[:3])
    except BrokenProcessPool as error:
        raise DataError(
            "workers: a worker process died (killed, or out of memory; or the calling script lacks an "
            '`if __name__ == "__main__"` guard): run again with fewer than '
            f"workers={workers}; finished parts are kept"
        ) from error
    finally:
        counters[3] = 1
        pool.shutdown(wait=True, cancel_futures=True)
