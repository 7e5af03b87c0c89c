"""A copy of the code and configs, so that edits after a job was queued change nothing of it."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.files import advice
from megagamma.source import source_of, write_record

# What a job runs and reads; the rest of a checkout, its runs and data above all, is not copied.
_CONTENT = ("megagamma", "configs", "launch", "tools", "pyproject.toml")
_LEFT_OUT = ("__pycache__", ".pyc", ".pyo", ".swp", "~")


def _files(root: Path) -> list[Path]:
    """Files of a checkout that belong to its code, relative, sorted. Links are followed: the copy has their content."""
    found = []
    for name in _CONTENT:
        path = root / name
        if path.is_file():
            found.append(Path(name))
            continue
        for folder, folders, files in os.walk(path):
            folders[:] = [one for one in folders if not one.startswith(".") and not one.endswith(_LEFT_OUT)]
            found += [
                (Path(folder) / file).relative_to(root)
                for file in files
                if not file.startswith(".") and not file.endswith(_LEFT_OUT)
            ]
    return sorted(found)


def snapshot(source_root: str | Path, destination: str | Path) -> Path:
    """Copy the code and configs of a checkout, once per content.

    Args:
        source_root: the checkout.
        destination: folder for the copies; created when it is not there.

    Raises:
        ConfigurationError: there is no code of ours.
        MegagammaError: the copy cannot be written.

    Returns:
        The copy, `DESTINATION/code-HASH`: a root like the checkout's, to be first in PYTHONPATH, with a record of the commit
        that was checked out (`megagamma.source`). It is complete whenever it is there, also when several jobs make it at once.
    """
    root, destination = Path(source_root), Path(destination)
    if not (root / "megagamma" / "pretrain.py").is_file():
        raise ConfigurationError(f"{root}: holds no megagamma/pretrain.py: give the folder of a checkout")
    files, digest = _files(root), hashlib.sha256()
    contents = {name: (root / name).read_bytes() for name in files}
    for name, content in contents.items():
        digest.update(f"{name.as_posix()}\0{len(content)}\0".encode() + content)
    source = source_of(root)
    target = destination / f"code-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    partial = destination / f".{target.name}.{os.urandom(6).hex()}"
    try:
        for name, content in contents.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
            shutil.copymode(root / name, partial / name)
        write_record(source, partial)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # another job was first
                raise
    except OSError as error:
        raise MegagammaError(f"{destination}: cannot be written ({error.strerror}): {advice(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


if __name__ == "__main__":  # of launch/common.sh
    from megagamma.cli import main_guard

    sys.exit(main_guard(lambda: print(snapshot(*sys.argv[1:3]))))
