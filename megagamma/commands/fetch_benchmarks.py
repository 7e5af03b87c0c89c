"""Fill a mirror of benchmark data on a machine with a network, for machines without one.

    megagamma fetch_benchmarks --tasks reasoning knowledge --mirror mirror
    megagamma fetch_benchmarks --tasks reasoning --mirror mirror --list        # what is asked for, and what is there
    megagamma convert_and_eval runs/mine --tasks reasoning --mirror mirror     # later, without a network

Tasks are presets (reasoning, knowledge, quick), tasks, groups or tags of lm-eval, and your own with --include_path. Each
data set goes to MIRROR/<org>/<name>/, whole or not at all; what is there already is left alone. Exit codes: 0; 1 when
`--list` finds sets that are missing; 2 when a name is unknown or a set cannot be had.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from megagamma.config.yaml_reader import read_card_header
from megagamma.errors import ConfigurationError, EvaluationError
from megagamma.evaluation.mirror import HEADER, VARIABLE, folder_of, header, holds
from megagamma.evaluation.tasks import TaskRequest, dataset_configs, plan
from megagamma.evaluation.trust import require_trust
from megagamma.files import advice, require_writable
from megagamma.folders import directory_lock, hidden_name, publish_directory, recover_directory
from megagamma.owned import list_own_files

# Data, and the README whose header names the configs. Loading scripts are left out: `datasets` runs none any more.
PATTERNS = [
    "README.md",
    "*.parquet",
    "*.json",
    "*.jsonl",
    "*.csv",
    "*.tsv",
    "*.txt",
    "*.arrow",
    "*.gz",
    "*.zst",
    "*.zip",
]


def fetch(name: str, configs: list[str | None], root: Path, revision: str | None = None) -> int:
    """Copy what some configs need of a data set's repository into a mirror, whole or not at all.

    A repository can be many times what a task reads. Where the README does not say which files a config has, all are
    copied. Configs that the mirror has already are copied anew with the others.

    Args:
        name: `<org>/<name>` on the hub.
        configs: names of configs; None is the set's default.
        root: of the mirror.
        revision: branch, tag or commit; None takes the newest.

    Returns:
        Bytes fetched.

    Raises:
        EvaluationError: the hub cannot be reached or does not have it.
    """
    final = folder_of(root, name)
    partial = hidden_name(final, "partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with directory_lock(final, "--mirror", waiting=lambda: print(f"  waiting for another process: {final}")):
            recover_directory(final)
            shutil.rmtree(partial, ignore_errors=True)
            try:
                return _download(name, configs, root, revision, partial)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, ValueError) as error:
        # Of the hub: no network, offline by the environment, no such repository, or one that needs a login.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        hint = advice(error) if isinstance(error, OSError) and error.errno else "needs a network and, for some, a login"
        raise EvaluationError(f"{name} cannot be had from the Hugging Face hub ({reason}): {hint}") from error


def _download(name: str, configs: list[str | None], root: Path, revision: str | None, partial: Path) -> int:
    """Fill the hidden folder and give it its name; returns the bytes fetched."""
    from huggingface_hub import snapshot_download

    final = folder_of(root, name)
    partial.mkdir()
    options: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "local_dir": str(partial)}
    snapshot_download(name, allow_patterns=["README.md"], **options)
    listed = header(partial / "README.md")
    kept = [config for config in listed if config in configs or (final.exists() and holds(root, name, config))]
    whole = not listed or any(config not in listed for config in configs)
    files = PATTERNS if whole else [pattern for config in kept for pattern in listed[config]]
    snapshot_download(name, allow_patterns=["README.md", *files], **options)
    if not whole:
        keep_configs(partial / "README.md", kept)
    # The hub's own notes about the download.
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    if not any(path.is_file() and path.name != "README.md" for path in partial.rglob("*")):
        raise EvaluationError(f"{name}: its repository holds no data files: it may need a loading script")
    list_own_files(partial)
    publish_directory(partial, final)
    return size


def keep_configs(readme: Path, kept: list[str]) -> None:
    """Take the configs that were not copied out of a README's header: `datasets` reads none when the first is missing."""
    text = readme.read_text(encoding="utf-8")
    found = HEADER.match(text)
    assert found is not None
    values = read_card_header(found[1])
    values["configs"] = [one for one in values["configs"] if one.get("config_name", "default") in kept]
    note = "\n<!-- A part of the data set: the header names only the configs that were copied. -->"
    readme.write_text(f"---\n{yaml.safe_dump(values, sort_keys=False)}---{note}{text[found.end() :]}", encoding="utf-8")


def revisions(pairs: list[str]) -> dict[str, str]:
    """`org/name=revision` as a mapping.

    Raises:
        ConfigurationError: a pair without a sign.
    """
    found = {}
    for pair in pairs:
        name, sign, revision = pair.partition("=")
        if not (name and sign and revision):
            raise ConfigurationError(f"--revision {pair}: give a data set and its revision, such as openai/gsm8k=main")
        found[name] = revision
    return found


def main(arguments: list[str] | None = None) -> int:
    """Parse, find the data sets of the tasks, fetch or list them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="NAME", help="presets, tasks, groups or tags")
    parser.add_argument("--mirror", type=Path, help=f"folder to fill (default: the environment's {VARIABLE})")
    parser.add_argument("--include_path", type=Path, help="folder of task YAMLs of your own")
    parser.add_argument("--trust_tasks", action="store_true", help="let the tasks of --include_path run their code")
    parser.add_argument(
        "--revision", nargs="*", default=[], metavar="SET=REVISION", help="pin sets to a branch, tag or commit"
    )
    parser.add_argument("--list", action="store_true", help="only show what is asked for and what is there")
    args = parser.parse_args(arguments)
    mirror = args.mirror or os.environ.get(VARIABLE)
    if not mirror:
        raise ConfigurationError(f"--mirror is missing, and {VARIABLE} is not set: give the folder to fill")
    root = Path(mirror).expanduser().resolve()
    pinned = revisions(args.revision)
    if args.include_path:
        require_trust(args.include_path, args.trust_tasks, "--trust_tasks")
    found = plan(TaskRequest(args.tasks, args.include_path))
    wanted = dataset_configs(found)
    names = list(wanted)
    stray = [name for name in pinned if name not in names]
    if stray:
        raise ConfigurationError(f"--revision {stray[0]}: no task asked for reads it; they read {', '.join(names)}")
    unknown = [task.name for task in found.tasks if task.dataset is None]
    if unknown:
        print(f"note: only the Python code of {', '.join(unknown)} knows what data it reads", file=sys.stderr)
    missing = [name for name in names if not all(holds(root, name, config) for config in wanted[name])]
    if args.list:
        for name in names:
            tasks = [task for task, dataset, _ in found.datasets if dataset == name]
            more = f" and {len(tasks) - 3} more" if len(tasks) > 3 else ""
            print(f"{'missing' if name in missing else 'there':<8} {name:<32} {', '.join(tasks[:3])}{more}")
        return 1 if missing else 0
    require_writable(root, "--mirror")
    for number, name in enumerate(names, 1):
        if name not in missing:
            print(f"[{number}/{len(names)}] {name}: there already", flush=True)
            continue
        print(f"[{number}/{len(names)}] {name}", flush=True)
        size = fetch(name, wanted[name], root, pinned.get(name))
        print(f"  {size / 2**20:,.1f} MiB in {folder_of(root, name)}", flush=True)
    return 0
