"""The manifest of a prepared folder: what its files are. Standard library only, so that a wrong path is answered at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megagamma.errors import DataError
from megagamma.reading import read_json_value

FORMAT = "megagamma.prepared"
FORMAT_VERSION = 1


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        DataError: no such folder, no manifest, one that cannot be read, that lacks something, or that is of another format
            version.
    """
    folder = Path(folder)
    fix = "prepare it with tools/prepare_data.py"
    if not folder.is_dir():
        raise DataError(f"data: folder '{folder}' does not exist: {fix}")
    try:
        manifest = read_json_value(folder / "manifest.json")
    except FileNotFoundError as error:
        raise DataError(f"data: '{folder}' has no manifest.json, so it is not a prepared folder: {fix}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"data: '{folder}/manifest.json' cannot be read ({error}): {fix} --overwrite") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"data: '{folder}/manifest.json' is not a manifest of prepared text: {fix}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"data: '{folder}' has format version {str(manifest.get('format_version'))[:40]}, this program reads "
            f"{FORMAT_VERSION}: {fix} again"
        )
    problem = _problem(manifest)
    if problem:
        raise DataError(f"data: '{folder}/manifest.json': {problem}: copy it again, or {fix} --overwrite")
    return manifest


def _problem(manifest: dict[str, Any]) -> str:
    """What of a manifest is not what was written; empty when nothing is."""
    files, splits, tokenizer = (manifest.get(name) for name in ("files", "splits", "tokenizer"))
    if manifest.get("dtype") not in ("uint16", "int32"):
        return f"dtype={str(manifest.get('dtype'))[:40]} must be uint16 or int32"
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("fingerprint"), str):
        return "tokenizer.fingerprint must be text"
    for name in ("vocab_size", "eos_id", "pad_id"):
        if not isinstance(tokenizer.get(name), int) or isinstance(tokenizer[name], bool):
            return f"tokenizer.{name} must be a whole number"
    if not isinstance(files, dict) or not isinstance(splits, dict) or not splits:
        return "files and splits must be mappings"
    for split, counts in splits.items():
        if split not in ("train", "validation"):
            return f"splits.{split[:40]} must be train or validation"
        if not isinstance(counts, dict) or not all(_is_count(counts.get(k), 1) for k in ("documents", "tokens")):
            return f"splits.{split} must have documents and tokens, whole numbers of 1 or more"
        if not _is_count(counts.get("bytes")):
            return f"splits.{split} must have bytes, a whole number of 0 or more"
    names = {f"{split}{suffix}" for split in splits for suffix in (".bin", ".idx")}
    if set(files) != names:
        return f"files must be {', '.join(sorted(names))}"
    for name, entry in files.items():
        if not isinstance(entry, dict) or not _is_count(entry.get("bytes")) or not isinstance(entry.get("sha256"), str):
            return f"files.{name} must have bytes, a whole number of 0 or more, and sha256"
    return ""


def _is_count(value: Any, minimum: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value < 2**63
