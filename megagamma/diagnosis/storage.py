"""Disk and data: speed and space of a folder, checksums of what a config reads."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

from megagamma.config.schema import Config
from megagamma.data.preparation.indexing import verify_prepared
from megagamma.data.sources import tokenizer_of
from megagamma.diagnosis.findings import Finding
from megagamma.errors import MegagammaError
from megagamma.files import advice
from megagamma.planning.flops import parameter_counts

GIB, MIB = 2**30, 2**20
SLOW_BYTES_PER_SECOND = 100 * MIB  # a checkpoint of 7 billion parameters takes 15 minutes at this speed
CHECKPOINT_BYTES = 12  # per parameter: fp32 weight and Adam's two moments


def existing_parent(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def check_disk(folder: Path, mib: int, config: Config | None = None) -> list[Finding]:
    """Write a file beside where a run would be, sync it, read it, delete it; and look at the space that is left.

    Args:
        folder: of runs. It is not created: the nearest folder above it that is there is tried.
        mib: size of the file. Unit: MiB.
        config: of a run, whose checkpoints must have space; its vocabulary is taken as 32,000 where it is not known.
    """
    place = existing_parent(folder)
    path = place / f".doctor.{os.uname().nodename}.{os.getpid()}"
    try:
        written, read = _speeds(path, mib)
    except OSError as error:
        return [Finding("disk", "FAIL", f"{place}: cannot be written ({error.strerror})", advice(error))]
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    speed = f"{place}: {written / MIB:,.0f} MiB/s written and synced, {read / MIB:,.0f} MiB/s read ({mib} MiB)"
    values = {"write_bytes_per_second": written, "read_bytes_per_second": read}
    slow = min(written, read) < SLOW_BYTES_PER_SECOND
    fix = "give a faster file system; checkpoints and data would wait for this one" if slow else ""
    return [Finding("disk", "WARN" if slow else "OK", speed, fix, values=values), _space(place, config)]


def _speeds(path: Path, mib: int) -> tuple[float, float]:
    """Bytes per second of a write with its sync, and of a read."""
    block, count = os.urandom(MIB), mib
    begin = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(count):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - begin
        if hasattr(os, "posix_fadvise"):
            # Else the read would be of memory.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.read(4 * MIB):
            pass
    return count * MIB / written, count * MIB / max(time.perf_counter() - begin, 1e-9)


def _space(place: Path, config: Config | None) -> Finding:
    free = shutil.disk_usage(place).free
    text, values = f"{place}: {free / GIB:,.1f} GiB free", {"free_bytes": free}
    least, wanted, why = float(GIB), 10.0 * GIB, ""
    if config is not None:
        config.model.vocab_size = config.model.vocab_size or 32_000
        one = parameter_counts(config.model).total * CHECKPOINT_BYTES
        kept = config.checkpoint.keep_last or 1
        least, wanted = one, one * (kept + 1.0)  # the new one is complete before an old one goes
        why = f"; a checkpoint takes {one / GIB:,.1f} GiB, and checkpoint.keep_last={config.checkpoint.keep_last}"
        values["checkpoint_bytes"] = one
    fix = "free some space, keep fewer checkpoints, or choose another folder"
    if free < least:
        return Finding("space", "FAIL", text + why, fix, values=values)
    return Finding("space", "WARN" if free < wanted else "OK", text + why, fix if free < wanted else "", values=values)


def check_data(config: Config) -> list[Finding]:
    """Checksums of all tokens of a config's folders, and its tokenizer.

    Args:
        config: an embedded corpus, which is prepared on first use, is left alone.
    """
    if config.data.corpus:
        return [Finding("data", "OK", f"data.corpus={config.data.corpus} is prepared on first use: nothing to check")]
    if config.data.toy:
        return [Finding("data", "OK", f"data.toy={config.data.toy} is drawn as it is trained on: nothing to check")]
    found = []
    for folder in dict.fromkeys([*config.data.paths, *config.validation.paths.values()]):
        try:
            begin = time.perf_counter()
            manifest = verify_prepared(folder, full=True)
        except (MegagammaError, OSError) as error:
            found.append(Finding("data", "FAIL", str(error)))
            continue
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        text = f"{folder}: checksums of {size / MIB:,.1f} MiB are the manifest's ({time.perf_counter() - begin:.1f} s)"
        found.append(Finding("data", "OK", text, values={"folder": folder, "bytes": size}))
    if any(one.status == "FAIL" for one in found):
        return found
    try:
        tokenizer = tokenizer_of(config.data.paths, config)
    except MegagammaError as error:
        return [*found, Finding("data", "FAIL", str(error))]
    text = f"tokenizer {tokenizer.fingerprint[:12]} of {tokenizer.vocab_size:,} pieces is that of all folders"
    return [*found, Finding("data", "OK", text, values={"fingerprint": tokenizer.fingerprint})]
