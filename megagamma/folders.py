"""Folders published atomically: one under its final name is complete, or it is what it was.

A folder is written under a hidden name beside its place, `.NAME.partial`. Where one of its name is there already, the
two exchange their names in one step. A file system that cannot do so (NFS, Lustre) sets the old one aside as
`.NAME.replaced` for the moment of the rename, and `recover_directory` puts it back at the next start when a kill came
between. Of what was replaced only this tool's own files are deleted, see `megagamma.owned`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.files import advice, first_free, keep_mode, require_writable, sync_folder
from megagamma.owned import LIST, discard, list_own_files, own_files, require_own

_RENAME_EXCHANGE, _AT_FDCWD = 2, -100  # of Linux, see renameat2(2)


def hidden_name(folder: Path, suffix: str) -> Path:
    """`.NAME.suffix` beside a folder."""
    return folder.with_name(f".{folder.name}.{suffix}")


def exchange(one: Path, other: Path) -> bool:
    """Let two folders exchange their names in one step; False where the kernel or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return done == 0


def publish_directory(partial: Path, final: Path, replace: bool = True) -> None:
    """Give a complete folder its final name, durably.

    The files must be synced by whoever wrote them. At every moment the old or the new folder has the name, or, on a
    file system that cannot exchange names, `recover_directory` gives it back to the old one. Strangers in the old folder
    move to the new one (`megagamma.owned.discard`).

    Args:
        partial: on the same file system as `final`.
        replace: take the place of a folder that holds something; else only of an empty one.

    Raises:
        OSError: the disk refuses, or a folder is there that may not be replaced. What was there stays.
    """
    for folder, _, _ in os.walk(partial):
        sync_folder(folder)
    recover_directory(final)
    old = hidden_name(final, "replaced")
    if not replace or not os.path.lexists(final) or _is_empty(final):
        partial.rename(final)
        sync_folder(final.parent)
        return
    keep_mode(final, partial)
    # Under this name what is exchanged is recognized after a kill, on whichever side of the exchange it came.
    partial.rename(old)
    if not exchange(old, final):
        old.rename(partial)
        final.rename(old)
        try:
            partial.rename(final)
        except OSError:
            old.rename(final)
            raise
    sync_folder(final.parent)
    _discard(old, final, final)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def recover_directory(final: Path) -> None:
    """Finish what a kill interrupted in `publish_directory`: the folder of this name is the old or the new one again.

    Raises:
        OSError: the disk refuses.
    """
    old = hidden_name(final, "replaced")
    if not os.path.lexists(old):
        return
    try:
        old.rename(final)  # also where an empty folder has been made in its place
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise
        _discard(old, final, final)


def recover_at_start(output: Path, option: str = "--out") -> None:
    """`recover_directory` for who does not hold the folder's lock yet; nothing when another process writes the folder.

    Raises:
        MegagammaError: the disk refuses.
    """
    if not os.path.lexists(hidden_name(output, "replaced")):
        return
    try:
        with contextlib.suppress(ConfigurationError), directory_lock(output, option):
            recover_directory(output)
    except OSError as error:
        raise MegagammaError(
            f"{option} {output}: cannot be put in order ({error.strerror}): {advice(error)}"
        ) from error


def remove_directory(folder: Path) -> None:
    """Delete a folder of this tool's own so that it is never seen half deleted: it is hidden first.

    What it does not own stays, in a folder `NAME.kept-1`.

    Raises:
        OSError: it cannot be renamed.
    """
    to_delete = hidden_name(folder, "deleted")
    finish_removal(folder)
    folder.rename(to_delete)
    _discard(to_delete, None, folder)


def finish_removal(folder: Path) -> None:
    """Finish a `remove_directory` that a kill interrupted."""
    to_delete = hidden_name(folder, "deleted")
    if os.path.lexists(to_delete):
        _discard(to_delete, None, folder)


def _discard(hidden: Path, successor: Path | None, named: Path) -> None:
    """Delete what is ours in a hidden folder; what is not stays beside it, under a name that can be seen."""
    try:
        left = discard(hidden, successor)
    except OSError:
        return  # nothing is lost, and the next start tries again
    if left:
        hidden.rename(first_free(named.parent, f"{named.name}.kept-"))


@contextlib.contextmanager
def directory_lock(output: Path, option: str = "--out", waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold `.NAME.lock` beside a folder, so that one process at a time writes it.

    Args:
        option: named in the error.
        waiting: called when another process holds the lock, before waiting for it. None: do not wait.

    Raises:
        ConfigurationError: another process holds the lock, and `waiting` is None.
        OSError: the lock's file cannot be written, or the file system has no locks.
    """
    path = hidden_name(output, "lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, f"{option} {output}", waiting)
            # The holder before may have removed the file that was waited for: a lock on it keeps nobody out.
            if _is_named(descriptor, path):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        # While it is held: who has opened it meanwhile looks again, see above.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(descriptor: int, place: str, waiting: Callable[[], None] | None) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            raise ConfigurationError(
                f"{place}: another process writes it now: wait, or choose another folder"
            ) from None
        waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def atomic_directory(
    output: Path,
    option: str = "--out",
    may_replace: Callable[[Path], bool] | None = None,
    carried: tuple[str, ...] = (),
) -> Iterator[Path]:
    """A hidden folder beside `output` to write into, which takes its name when the block ends well.

    After an error nothing is left but what was there before. One process at a time. The folder gets a list of its
    files, by which a later replacement knows them.

    Args:
        output: folder to write; an empty one of that name is replaced.
        option: named in errors.
        may_replace: whether a folder of that name that holds something is replaced too. None: never.
        carried: names in it that are no reason to refuse: they move to the new folder.

    Raises:
        MegagammaError: another process writes the same folder, it holds files of somebody else, or the disk refuses.
    """
    require_writable(output.parent, option)
    partial = hidden_name(output, "partial")
    try:
        with directory_lock(output, option):
            recover_directory(output)
            if may_replace is not None and may_replace(output):
                require_own(output, f"{option} {output}", carried)
            _remove_unfinished(partial, option)
            try:
                partial.mkdir()
                (partial / LIST).touch()  # says whose it is
                yield partial
                list_own_files(partial)
                publish_directory(partial, output, replace=may_replace is not None and may_replace(output))
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise MegagammaError(f"{output}: cannot be written ({error.strerror or error}): {advice(error)}") from error


def _remove_unfinished(partial: Path, option: str) -> None:
    """Delete the hidden folder of an earlier attempt, if it is one.

    Raises:
        ConfigurationError: a folder of that name holds something else.
    """
    if not os.path.lexists(partial):
        return
    if not (partial / LIST).is_file() and own_files(partial) is None and not _is_empty(partial):
        raise ConfigurationError(
            f"{option}: {partial} is in the way, and this tool did not write it: move it away, or choose another folder"
        )
    shutil.rmtree(partial)
