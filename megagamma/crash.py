"""The report of a failure that nobody foresaw: all that its fixing needs, secrets removed, in a file."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import sys
import tempfile
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "megagamma", "torch", "megatron-core", "deepspeed", "numpy", "safetensors", "transformers", "tokenizers", "datasets",
    "lm_eval", "jsonargparse", "PyYAML",
)  # fmt: skip
_VARIABLES = re.compile(
    r"(?:MEGAGAMMA|SLURM|OMP|KMP|GOMP|MKL|CUDA|NCCL|GLOO|DS|DEEPSPEED|TORCH|TORCHELASTIC|PYTORCH|PYTHON|HF|WANDB|MASTER|LOCAL|"
    r"GROUP|WORLD)_\w+|RANK|TMPDIR|LANG|LC_ALL|VIRTUAL_ENV"
)
_SECRET = (
    r"(?:(?:api|access|private)_?key|token|passw(?:or)?d|pwd|passphrase|secret|credentials?|auth|authorization|cookie)"
)
_SECRET_NAME = re.compile(rf"(?:^|.*[_\-. ])(?:{_SECRET}|key)(?:s?$|[_\-. ].*)", re.IGNORECASE)
# name=value, "name": "value" and --name value in running text. Of `tokens` and `tokenizer` nothing is secret.
_SECRET_TEXT = re.compile(
    rf"""((?<![A-Za-z])[\w.\-]*(?<![A-Za-z]){_SECRET}(?![A-Za-z])[\w.\-]*["']?\s*(?:[=:]\s*|(?<=\w)\s+(?!=))["']?(?:bearer\s+|basic\s+)?)"""
    r"""([^\s"',;&}\]]+)""",
    re.IGNORECASE,
)
_URL_LOGIN = re.compile(r"(\w+://)[^/\s@]+@")
_KNOWN_TOKENS = re.compile(r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_\-]{12,}")
HIDDEN = "<removed>"


def attach(error: BaseException, folder: str, config: dict[str, Any]) -> None:
    """Give an error what its report shall have: the run's folder, and its config as plain values."""
    error.__dict__.setdefault("_report", (folder, config))


def without_secrets(text: str) -> str:
    """A text without what looks like a secret: values of names like `token`, logins in URLs, known forms of tokens, and
    the values of this process's variables of such names."""
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAME.fullmatch(name) and not value.isdigit():
            text = text.replace(value, HIDDEN)
    text = _URL_LOGIN.sub(rf"\1{HIDDEN}@", text)
    text = _KNOWN_TOKENS.sub(HIDDEN, text)
    return _SECRET_TEXT.sub(lambda found: found[0] if _is_plain(found[2]) else found[1] + HIDDEN, text)


def _is_plain(value: str) -> bool:
    """Whether a value says nothing: a short number or a word of JSON."""
    return value in ("null", "true", "false", "None", "True", "False", HIDDEN) or bool(
        re.fullmatch(r"-?[\d.]{1,6}", value)
    )


def _command_line() -> list[str]:
    """The command line, without the values of flags whose names look like a secret's."""
    words, hide = [], False
    for word in sys.argv:
        name, equals, _ = word.partition("=")
        secret = name.startswith("-") and bool(_SECRET_NAME.fullmatch(name.lstrip("-")))
        words.append(HIDDEN if hide and not word.startswith("-") else f"{name}={HIDDEN}" if secret and equals else word)
        hide = secret and not equals
    return words


def _plain(value: Any, name: str = "") -> Any:
    """A config's values without those whose names look like a secret's."""
    if isinstance(value, dict):
        return {str(key): _plain(item, str(key)) for key, item in value.items()}
    return HIDDEN if isinstance(value, str) and value and _SECRET_NAME.fullmatch(name) else value


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def report_text(error: BaseException, rank: int) -> str:
    """The report, secrets removed."""
    _, config = error.__dict__.get("_report", ("", None))
    environment = {
        name: HIDDEN if _SECRET_NAME.fullmatch(name) else value
        for name, value in sorted(os.environ.items())
        if _VARIABLES.fullmatch(name)
    }
    values = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": _command_line(),
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "rank": rank,
        "versions": _versions(),
        "environment": environment,
        "config": _plain(config),
    }
    trace = "".join(traceback.format_exception(error))
    return without_secrets(f"{trace}\n{json.dumps(values, indent=2, default=str)}\n")


def write_report(error: BaseException, rank: int) -> Path | None:
    """Write the report into the run's folder where it is known, else the working directory, else the temporary folder.

    Returns:
        The file; None when none of these can be written.
    """
    folder, _ = error.__dict__.get("_report", ("", None))
    try:
        text = report_text(error, rank)
    except Exception as problem:  # noqa: BLE001 - a report must not hide what it reports
        text = f"{without_secrets(''.join(traceback.format_exception(error)))}\nno more could be said ({problem!r})\n"
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-rank{rank}.txt"
    for place in (folder, ".", tempfile.gettempdir()):
        try:
            if place and os.path.isdir(place):
                path = Path(place) / name
                # Command lines and hosts are nobody else's business.
                with open(
                    os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", errors="backslashreplace"
                ) as file:
                    file.write(text)
                return path
        except OSError:
            continue
    return None
