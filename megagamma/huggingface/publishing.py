"""Folders that appear under their name when they are complete, and that never take the place of something else."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock

from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.files import advice, require_writable, sync_folder


def is_export(folder: Path) -> bool:
    """Whether a folder is an exported model of ours, whole or damaged."""
    return (folder / "parity.json").is_file() and (folder / "config.json").is_file()


def check_destination(output: Path, source: Path, overwrite: bool, what: str = "--out") -> None:
    """Refuse to write where something else would be lost.

    Args:
        output: folder to write.
        source: checkpoint that is read.
        overwrite: whether an exported model there may be replaced.

    Raises:
        ConfigurationError: naming what is there.
    """
    if source.resolve().is_relative_to(output.resolve()):
        raise ConfigurationError(f"{what} {output}: holds the checkpoint {source} itself: choose another folder")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output.is_dir() and is_export(output)):
        kind = "is a file" if not output.is_dir() else "holds files, and is no exported model"
        raise ConfigurationError(f"{what} {output}: {kind}: choose another folder")
    if not overwrite:
        raise ConfigurationError(
            f"{what} {output}: holds another export: use --overwrite to replace it, or another folder"
        )


@contextlib.contextmanager
def publishing(output: Path, what: str = "--out") -> Iterator[Path]:
    """A hidden folder beside `output` to write into, which takes its name when the block ends well.

    An exported model or an empty folder of that name is replaced. After an error nothing is left but what was there.

    Raises:
        MegagammaError: another process writes the same folder, or the disk refuses.
    """
    require_writable(output.parent, what)
    lock_path = output.parent / f".{output.name}.lock"
    lock = filelock.FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigurationError(
            f"{what} {output}: another process writes it now: wait, or choose another folder"
        ) from None
    partial, old = output.parent / f".{output.name}.partial", output.parent / f".{output.name}.replaced"
    try:
        if old.exists() and not output.exists():
            old.rename(output)  # killed between the two renames
        for litter in (partial, old):
            shutil.rmtree(litter, ignore_errors=True)
        partial.mkdir()
        yield partial
        sync_folder(partial)
        if output.exists():
            output.rename(old)
        try:
            partial.rename(output)
        except OSError:
            if old.exists():
                old.rename(output)
            raise
        sync_folder(output.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise MegagammaError(f"{output}: cannot be written ({error.strerror or error}): {advice(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock_path.unlink(missing_ok=True)
        lock.release()
