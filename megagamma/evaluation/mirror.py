"""Benchmark data on machines without a network: a folder that stands for the Hugging Face hub.

A mirror is `ROOT/<org>/<name>/`, each a plain copy of that data set's repository on the hub: its data files, and the
README.md whose header names the configs and their files. `tools/fetch_benchmarks.py` fills one on a machine that has
a network. A copy of the hub's cache alone is not enough for lm-eval's stock tasks.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megagamma.config.yaml_reader import read_card_header
from megagamma.errors import EvaluationError
from megagamma.evaluation.compat import is_file_format, replaced_attribute
from megagamma.reading import Unreadable

VARIABLE = "MEGAGAMMA_MIRROR"
HEADER = re.compile(r"---[ \t]*\n(.*?)\n---", re.DOTALL)
_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)?")


def find_mirror(root: str | Path | None = None) -> Path | None:
    """The mirror's folder, absolute: `root`, or else the environment variable MEGAGAMMA_MIRROR, or None.

    Raises:
        EvaluationError: there is no such folder.
    """
    given, where = (str(root), "mirror") if root else (os.environ.get(VARIABLE, ""), VARIABLE)
    if not given:
        return None
    folder = Path(given).expanduser().resolve()
    if not folder.is_dir():
        raise EvaluationError(
            f"{where}={given}: there is no folder {folder}: give the folder that tools/fetch_benchmarks.py filled"
        )
    return folder


def is_hub_name(path: str | None) -> bool:
    """Whether `datasets.load_dataset(path)` would ask the hub: neither a local folder nor a file format's name."""
    if not path or not _NAME.fullmatch(path) or os.path.exists(path):
        return False
    return not is_file_format(path)


def folder_of(root: Path, name: str) -> Path:
    """Where a data set of the hub lies in a mirror."""
    return root.joinpath(*name.split("/"))


def header(readme: Path) -> dict[str, list[str]]:
    """Configs that the header of a set's README names, and the patterns of their files; empty where it names none."""
    if not readme.is_file():
        return {}
    text = HEADER.match(readme.read_text(encoding="utf-8", errors="replace"))
    try:
        values = read_card_header(text[1]) if text else None
    except Unreadable:
        return {}
    configs = values.get("configs") if isinstance(values, dict) else None
    patterns: dict[str, list[str]] = {}
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict) and "data_files" in config:
            base = str(config.get("data_dir") or "")
            files = [f"{base}/{pattern}".lstrip("/") for pattern in _patterns(config["data_files"])]
            patterns[str(config.get("config_name", "default"))] = files
    return patterns


def _patterns(files: Any) -> list[str]:
    """Every pattern of a header's data_files: a string, a list of them, or of {split, path}."""
    if isinstance(files, str):
        return [files]
    if isinstance(files, dict):
        return (
            _patterns(files["path"])
            if "path" in files
            else [pattern for value in files.values() for pattern in _patterns(value)]
        )
    return [pattern for one in files for pattern in _patterns(one)]


def patterns_of(configs: dict[str, list[str]], config: str | None) -> list[str] | None:
    """Patterns of the files that a config needs; None where no header names them; empty where it does not name the config."""
    if not configs:
        return None
    if config is None:
        return configs.get("default") or [pattern for patterns in configs.values() for pattern in patterns]
    return configs.get(config, [])


def holds(root: Path, name: str, config: str | None = None) -> bool:
    """Whether a mirror has a data set, and of the config, where its README names the files, at least one."""
    folder = folder_of(root, name)
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    patterns = patterns_of(header(folder / "README.md"), config)
    if patterns is None:
        return any(file != "README.md" for file in files)
    return any(fnmatch.fnmatch(file, pattern) for file in files for pattern in patterns)


def require(
    root: Path | None, datasets: Iterable[tuple[str, str | None, str | None]], requested: Iterable[str] = ()
) -> None:
    """Check, before any work is done, that the data of all tasks are in the mirror.

    Args:
        root: of the mirror; None checks nothing, since only the hub could answer.
        datasets: a task, the data set that its YAML names, and the set's config.
        requested: names for the command that gets them, where they are shorter than the tasks'.

    Raises:
        EvaluationError: naming every set that is missing, where it should be, and the command that gets it.
    """
    if root is None:
        return
    lacking: dict[str, list[str]] = {}
    for task, name, config in datasets:
        if name and is_hub_name(name) and not holds(root, name, config):
            lacking.setdefault(name, []).append(task)
    if lacking:
        raise EvaluationError(_missing(root, lacking, requested))


def _missing(root: Path, lacking: dict[str, list[str]], requested: Iterable[str] = ()) -> str:
    parts = []
    for name, tasks in lacking.items():
        more = f" and {len(tasks) - 3} more" if len(tasks) > 3 else ""
        parts.append(f"{name} (for {', '.join(tasks[:3])}{more}) is not in {folder_of(root, name)}")
    names = " ".join(requested or (task for tasks in lacking.values() for task in tasks))
    return f"mirror={root}: {'; '.join(parts)}: on a machine with a network run {command(names, root)}"


def command(tasks: str, root: Path | str = "ROOT") -> str:
    """The command that gets the data of some tasks."""
    return f"python tools/fetch_benchmarks.py --tasks {tasks} --mirror {root}"


def _fingerprint(folder: Path) -> str:
    """Changes with the folder's place and with its files' names, sizes and times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _local_arguments(folder: Path, name: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `load_dataset` for a set's folder in the mirror."""
    import datasets

    # What only makes sense for the hub.
    options = {key: value for key, value in options.items() if key not in ("revision", "token")}
    # `datasets` knows a folder by its last name and configs only, and would give the cached rows of another mirror, or of
    # files that have changed since.
    cache = options.get("cache_dir") or datasets.config.HF_DATASETS_CACHE
    options["cache_dir"] = str(Path(cache) / "mirror" / _fingerprint(folder))
    if name and name != "default" and not header(folder / "README.md") and (folder / name).is_dir():
        # Without a header a config is known by its folder.
        return {"path": str(folder), "data_dir": name, **options}
    return {"path": str(folder), "name": name, **options}


@contextlib.contextmanager
def reading(root: Path | None, task: str = "X") -> Iterator[None]:
    """Within it `datasets.load_dataset` reads the hub's data sets from a mirror; with root None it asks the hub.

    Either way one sentence names what is missing. Files and folders of this machine are read as ever.

    Args:
        root: from `find_mirror`.
        task: named in messages.

    Raises:
        EvaluationError: a set that is not in the mirror, cannot be read, or cannot be had from the hub.
    """
    import datasets

    original = datasets.load_dataset
    parameters = inspect.signature(original).parameters
    active = True

    def load(path: str, name: str | None = None, *arguments: Any, **options: Any) -> Any:
        # A task's own module may have taken this function by name, and keeps it beyond this block.
        options |= dict(zip(list(parameters)[2:], arguments, strict=False))
        if not active or not is_hub_name(path):
            return original(path, name, **options)
        if root is None:
            return _from_hub(original, task, path, name, options)
        if not holds(root, path, name):
            raise EvaluationError(_missing(root, {path: [task]}))
        folder = folder_of(root, path)
        try:
            return original(**_local_arguments(folder, name, options))
        except Exception as error:
            raise EvaluationError(
                f"{task}: {path} in {folder} cannot be read ({_short(error)}): fetch it anew with {command(task, root)}, "
                "after deleting the folder"
            ) from error

    with replaced_attribute(datasets, "load_dataset", load):
        try:
            yield
        finally:
            active = False


def _from_hub(original: Any, task: str, path: str, name: str | None, options: dict[str, Any]) -> Any:
    from datasets.exceptions import DatasetNotFoundError

    try:
        return original(path, name, **options)
    except (OSError, DatasetNotFoundError) as error:
        # Without a network: a ConnectionError, OfflineModeIsEnabled or LocalEntryNotFoundError, all of them OSErrors.
        raise EvaluationError(
            f"{task}: {path} cannot be had from the Hugging Face hub ({_short(error)}): without a network, fill a mirror on "
            f"a machine that has one ({command(task)}) and give it by --mirror ROOT or {VARIABLE}=ROOT"
        ) from error


def _short(error: BaseException, length: int = 200) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[:length] + "..."
