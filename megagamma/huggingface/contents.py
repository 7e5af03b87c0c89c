"""The files of a Hugging Face folder by their content: what an export proved, and whether it is still there.

parity.json of an exported model lists the hash of every file that decides what the model does: weights, configs, tokenizer
and code. It is compared whenever the model is used: exported again, scored, or imported. The weights are hashed as they are
written, and read again to be compared, at the speed of the disk.
"""

from __future__ import annotations

import re
from pathlib import Path

from megagamma.checkpoint.safetensors_writer import checksum
from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.files import read_json

PARITY = "parity.json"
# What a loader reads: weights, tokenizers, templates and code, and JSON files of these names.
_SUFFIXES = frozenset((".safetensors", ".model", ".py", ".jinja", ".bin", ".pt", ".pth", ".ckpt", ".gguf"))
_NAME = re.compile(
    r"(tokenizer.*|.*config|special_tokens_map|added_tokens|vocab|chat_template|.*\.index)\.json|vocab\.txt|merges\.txt"
)


def is_export(folder: Path) -> bool:
    """Whether a folder is an exported model of ours, complete or not."""
    return (folder / PARITY).is_file() and (folder / "config.json").is_file()


def model_files(folder: Path) -> list[str]:
    """Names of the files in a Hugging Face folder that a loader may read: all that decides what the model does."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.name != PARITY and (path.suffix in _SUFFIXES or _NAME.fullmatch(path.name))
    )


def file_hashes(folder: Path, known: dict[str, str] | None = None) -> dict[str, str]:
    """Name and xxh3-128 of every file of the model in a folder; reads them all.

    Args:
        known: hashes that were taken as the files were written: those files are not read.

    Raises:
        MegagammaError: a file cannot be read.
    """
    try:
        return {name: (known or {}).get(name) or checksum(folder / name) for name in model_files(folder)}
    except OSError as error:
        raise MegagammaError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error


def altered_files(folder: Path, found: dict[str, str] | None = None) -> list[str] | None:
    """Files of an exported model that are not what its parity.json proved: altered, missing, or added since.

    Args:
        found: its `file_hashes`, when they are taken already.

    Raises:
        MegagammaError: parity.json or another file cannot be read.

    Returns:
        None where parity.json has no hashes, as those of version 0.1.
    """
    proven = read_json(folder / PARITY).get("files")
    if not isinstance(proven, dict):
        return None
    found = file_hashes(folder) if found is None else found
    return sorted(name for name in {*found, *proven} if found.get(name) != proven.get(name))


def check_unaltered(folder: Path, found: dict[str, str] | None = None) -> bool:
    """Refuse an exported model whose files are not those that were proven.

    Args:
        found: its `file_hashes`, when they are taken already.

    Raises:
        ConfigurationError: naming the files.

    Returns:
        True for one that is as it was proven, False for another program's, and for those of version 0.1, which have no
        hashes to compare with.
    """
    if not is_export(folder) or (altered := altered_files(folder, found)) is None:
        return False
    if altered:
        raise ConfigurationError(
            f"{folder}: {', '.join(altered[:3])} {'is' if len(altered) == 1 else 'are'} not what parity.json proved "
            f"({len(altered)} altered, missing or added): convert the checkpoint again, or delete parity.json to use the "
            "folder as any other model"
        )
    return True
