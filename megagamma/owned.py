"""Which files of a folder are this tool's own. Only those are ever deleted or replaced; all others are strangers.

A folder that was published lists what was written into it, with sizes and checksums: an exported model and a mirror of
benchmark data in `.own_files.json`, a checkpoint in its checkpoint.json, prepared text in its manifest.json. A file is
a stranger when it is not in the list, or when somebody has changed it. Links and special files are strangers always.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.files import write_json
from megagamma.reading import Unreadable, read_json_value

LIST = ".own_files.json"
_FORMAT = "megagamma.own_files"
_ALGORITHMS = ("sha256", "xxh3_128")
_TOKEN_FILES = ("train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer.model")
# What exports wrote before they listed it.
_EXPORT_FILES = re.compile(
    r"(config|generation_config|parity|tokenizer|tokenizer_config|special_tokens_map)\.json|README\.md|"
    r"(sentencepiece|tokenizer)\.model|modeling_gated_llama\.py|chat_template\.jinja|"
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
_SECONDS_OF_AN_EXPORT = 600.0
_LARGEST_LIST = 1 << 28  # bytes


@dataclass(frozen=True)
class Written:
    """A file as it was written."""

    size: int | None = None
    """None: not known. Unit: bytes."""
    digest: str | None = None
    """`sha256:...` or `xxh3_128:...`; None: not known."""


@dataclass(frozen=True)
class OwnFiles:
    """What this tool has written into a folder."""

    files: dict[str, Written]
    """By path relative to the folder, with slashes."""
    lists: tuple[str, ...]
    """The files that hold this list: deleted last."""
    time: float
    """When the list was written: a file that has not changed since need not be read. Unix time. Unit: s."""
    data: tuple[str, ...] = ()
    """Suffixes of files of numbers: one that has changed is corrupt, and nobody's work."""


@dataclass(frozen=True, order=True)
class Stranger:
    """A file, link or empty folder that this tool did not write."""

    name: str
    """Relative to the folder, with slashes."""
    is_changed: bool = field(default=False)
    """Written by this tool, and changed by somebody since."""

    def __str__(self) -> str:
        return f"{self.name} (changed)" if self.is_changed else self.name


def file_digest(path: Path, algorithm: str = "xxh3_128") -> str:
    """`ALGORITHM:HEX` of a file's content."""
    import xxhash

    digest: Any = xxhash.xxh3_128() if algorithm == "xxh3_128" else hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return f"{algorithm}:{digest.hexdigest()}"


def _entries(folder: Path) -> Iterator[tuple[str, Path, bool]]:
    """Relative name, path, and whether it is a folder, of everything below a folder; links are not followed."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        for name in [*folders, *files]:
            path = Path(parent, name)
            yield path.relative_to(folder).as_posix(), path, name in folders and not path.is_symlink()


def list_own_files(folder: Path) -> None:
    """Write the list of a folder that is complete: all that is in it is this tool's own.

    Raises:
        MegagammaError: it cannot be written.
    """
    files = {
        name: {"bytes": path.stat().st_size, "digest": file_digest(path)}
        for name, path, is_folder in sorted(_entries(folder))
        if not is_folder and name != LIST
    }
    write_json(folder / LIST, {"format": _FORMAT, "version": 1, "files": files})


def _read(path: Path) -> tuple[Any, float]:
    """The JSON value of a file, None where it is no JSON, and when it was written.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    written = path.stat().st_mtime
    with contextlib.suppress(Unreadable):
        return read_json_value(path, finite=False, limit=_LARGEST_LIST), written
    return None, written


def _listed(folder: Path) -> OwnFiles | None:
    value, written = _read(folder / LIST)
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        return None
    files = {name: Written(entry["bytes"], str(entry["digest"])) for name, entry in value["files"].items()}
    return OwnFiles(files, (LIST,), written, (".safetensors",))


def _checkpoint(folder: Path) -> OwnFiles | None:
    value, written = _read(folder / "checkpoint.json")
    if not isinstance(value, dict) or value.get("format") != "megagamma checkpoint":
        return None
    files = {entry["file"]: Written(entry["bytes"], f"xxh3_128:{entry['xxh3_128']}") for entry in value["files"]}
    return OwnFiles(files, ("checkpoint.json",), written, (".safetensors",))


def _prepared(folder: Path) -> OwnFiles | None:
    value, written = _read(folder / "manifest.json")
    suffixes = (".bin", ".idx", ".model")
    if value is None:  # a manifest that is corrupt: the names have to do
        return OwnFiles(dict.fromkeys(_TOKEN_FILES, Written()), ("manifest.json",), math.inf, suffixes)
    if not isinstance(value, dict) or value.get("format") != "megagamma.prepared":
        return None
    files = {name: Written(entry["bytes"], f"sha256:{entry['sha256']}") for name, entry in value["files"].items()}
    files["tokenizer.model"] = Written(None, f"sha256:{value['tokenizer']['fingerprint']}")
    return OwnFiles(files, ("manifest.json",), written, suffixes)


def _unlisted_export(folder: Path) -> OwnFiles | None:
    config, _ = _read(folder / "config.json")
    if not isinstance(config, dict):
        return None
    _, written = _read(folder / "parity.json")
    files = {name: Written() for name in os.listdir(folder) if _EXPORT_FILES.fullmatch(name)}
    return OwnFiles(files, ("parity.json",), written + _SECONDS_OF_AN_EXPORT, (".safetensors",))


_KINDS: tuple[Callable[[Path], OwnFiles | None], ...] = (_listed, _checkpoint, _prepared, _unlisted_export)


def own_files(folder: Path) -> OwnFiles | None:
    """What this tool has written into a folder; None when nothing there says so.

    Folders of earlier versions, which have no `.own_files.json`, are known by checkpoint.json, manifest.json, or the
    names of an export.
    """
    for read in _KINDS:
        # A list that is not what was written lists nothing.
        with contextlib.suppress(OSError, KeyError, TypeError, AttributeError):
            found = read(folder)
            if found is not None:
                return found
    return None


def _is_own(path: Path, written: Written, own: OwnFiles) -> bool:
    state = path.lstat()
    if not stat.S_ISREG(state.st_mode):
        return False
    if written.size is not None and state.st_size != written.size:
        return False
    # The time of the last change of a file's inode, which `mv` of another file to its name changes too.
    if state.st_ctime <= own.time:
        return True
    if written.digest is None:
        return state.st_mtime <= own.time
    algorithm = written.digest.partition(":")[0]
    return algorithm in _ALGORITHMS and file_digest(path, algorithm) == written.digest


def strangers(folder: Path, allowed: tuple[str, ...] = (), strict: bool = False) -> list[Stranger]:
    """What this tool did not write in a folder, or somebody changed, by name.

    Files that were not touched since the list was written are not read.

    Args:
        allowed: names directly in the folder that are left out, with all below them.
        strict: also files of numbers that have changed, which else count as corrupt (`OwnFiles.data`).

    Raises:
        OSError: something cannot be read.
    """
    if not os.path.lexists(folder):
        return []
    if folder.is_symlink() or not folder.is_dir():
        return [Stranger(".")]
    own = own_files(folder)
    files, data = (own.files, own.data) if own else ({}, ())
    parents = {parent.as_posix() for name in files for parent in Path(name).parents}
    found = []
    for name, path, is_folder in _entries(folder):
        if name.partition("/")[0] in allowed or (own and name in own.lists and path.is_file()):
            continue
        if is_folder:
            if name not in parents and not any(path.iterdir()):
                found.append(Stranger(f"{name}/"))
        elif own is None or name not in files or path.is_symlink():
            found.append(Stranger(name))
        elif (strict or not name.endswith(data)) and not _is_own(path, files[name], own):
            found.append(Stranger(name, is_changed=True))
    return sorted(found)


def require_own(
    folder: Path, place: str, allowed: tuple[str, ...] = (), error: type[MegagammaError] = ConfigurationError
) -> None:
    """Refuse to replace a folder that holds strangers.

    Args:
        place: option and folder, for the message.
        allowed: see `strangers`.

    Raises:
        MegagammaError: of the kind `error`, naming them.
    """
    found = strangers(folder, allowed)
    if found:
        raise error(
            f"{place}: holds {enumerated(found)}, not as this tool wrote it: move it away, or choose another folder"
        )


def enumerated(found: list[Stranger]) -> str:
    """The first few of them as text."""
    return ", ".join(map(str, found[:4])) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def discard(folder: Path, successor: Path | None = None) -> list[Stranger]:
    """Delete what is this tool's own in a folder, and the folder when nothing else is in it.

    Strangers move to the same place in `successor` where that is free, are deleted where the same bytes are there
    already, and stay otherwise.

    Args:
        folder: one that has lost its name; its files are deleted one after the other, its list last.
        successor: the folder that has taken its place.

    Returns:
        What stays.
    """
    if folder.is_symlink() or not folder.is_dir():
        return [Stranger(".")]
    own, left = own_files(folder), []
    others = strangers(folder)
    for stranger in others:
        if successor is None or not _hand_over(folder / stranger.name, successor / stranger.name):
            left.append(stranger)
    kept = {stranger.name.rstrip("/") for stranger in left}
    entries = sorted(_entries(folder), reverse=True)  # what is in a folder comes before the folder
    last = own.lists if own else ()
    for name, path, is_folder in entries:
        if is_folder or name in kept or name in last:
            continue
        path.unlink()
    for name, path, is_folder in entries:
        if is_folder and name not in kept:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
    if not left:
        for name in last:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
    return left


def _hand_over(source: Path, target: Path) -> bool:
    """Move a file, link or empty folder to a place that is free, or delete it where the same bytes are there already."""
    if not os.path.lexists(target):
        if target.parent.exists() and not target.parent.is_dir():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        return True
    if source.is_symlink() or target.is_symlink():
        return False
    if source.is_dir() and target.is_dir():  # an empty one
        source.rmdir()
        return True
    if not (source.is_file() and target.is_file()):
        return False
    if source.stat().st_size != target.stat().st_size or file_digest(source) != file_digest(target):
        return False
    source.unlink()
    return True


def owners(path: Path) -> Iterator[tuple[str, Path]]:
    """What the place belongs to, from the nearest outwards: its kind and folder.

    Kinds: "checkpoint", "prepared data", "exported model", "checkpoints" (of a run), "run".
    """
    path = Path(os.path.realpath(path))
    for folder in (path, *path.parents):
        if (folder / "checkpoint.json").is_file():
            yield "checkpoint", folder
        elif (folder / "manifest.json").is_file() and _prepared_manifest(folder):
            yield "prepared data", folder
        elif (folder / "parity.json").is_file() and (folder / "config.json").is_file():
            yield "exported model", folder
        elif folder.name == "checkpoints" and ((folder.parent / "config.yaml").is_file() or any(folder.glob("step_*"))):
            yield "checkpoints", folder
        elif (folder / "config.yaml").is_file() and ((folder / "checkpoints").is_dir() or any(folder.glob("*.jsonl"))):
            yield "run", folder


def _prepared_manifest(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        value, _ = _read(folder / "manifest.json")
        return isinstance(value, dict) and value.get("format") == "megagamma.prepared"
    return False


def require_place(path: Path, place: str, itself: tuple[str, ...], around: tuple[str, ...]) -> None:
    """Refuse to write into what something else owns.

    Args:
        path: the folder to write.
        place: option and folder, for the message.
        itself: kinds of `owners` that the folder may be itself.
        around: kinds that it may lie in.

    Raises:
        ConfigurationError: naming the owner.
    """
    real = Path(os.path.realpath(path))
    for kind, owner in owners(path):
        if kind not in (itself if owner == real else around):
            where = "is" if owner == real else "lies in"
            name = f"the {kind} of a run, {owner}" if kind == "checkpoints" else f"the {kind} {owner}"
            raise ConfigurationError(f"{place}: {where} {name}: choose another folder")
