"""Which checkpoints of a run are kept, and which one it resumes from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megagamma.checkpoint.manifest import MANIFEST, is_sealed
from megagamma.checkpoint.reader import folder_name, read_manifest, steps_saved, verify_all
from megagamma.distributed.runtime import Runtime
from megagamma.errors import CheckpointError
from megagamma.files import advice, free_name
from megagamma.folders import finish_removal, recover_directory, remove_directory
from megagamma.owned import enumerated, strangers
from megagamma.runs.folder import step_links

T = TypeVar("T")


def explained(action: Callable[[], T], path: Path) -> T:
    """Do something with files.

    Raises:
        CheckpointError: in place of an OSError, naming the path and what can be done.
    """
    try:
        return action()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}): {advice(error)}") from error


def prune(root: Path, keep_last: int, permanent: set[int], warn: Callable[[int, str], None] | None = None) -> list[int]:
    """Delete the oldest checkpoints that are neither permanent nor among the newest `keep_last` (0: keep all).

    Args:
        warn: told the step, and why, of a checkpoint that stays because it holds what this tool did not write.

    Returns:
        The steps that were deleted.
    """
    if keep_last == 0:
        return []
    deleted = []
    for step in [step for step in steps_saved(root) if step not in permanent][:-keep_last]:
        folder = root / folder_name(step)
        found = strangers(folder, strict=True)
        if found and warn is not None:
            warn(
                step,
                f"{folder} is kept beyond checkpoint.keep_last={keep_last}: it holds {enumerated(found)}, not as this run "
                "wrote it: move it away, or delete the checkpoint yourself",
            )
        if found:
            continue
        remove_directory(folder)
        deleted.append(step)
    return deleted


_HIDDEN_NAME = re.compile(r"\.(step_\d{8})\.(partial|replaced|deleted)")


def clean_up(root: Path) -> None:
    """Put in order what a run that was killed while saving left: a checkpoint that was set aside comes back, and what is
    unfinished goes. Only under the names that saving and pruning give."""
    for hidden in sorted(root.glob(".step_*")):
        name = _HIDDEN_NAME.fullmatch(hidden.name)
        if name is None:
            continue
        if name.group(2) == "replaced":
            recover_directory(root / name.group(1))
        elif name.group(2) == "deleted":
            finish_removal(root / name.group(1))
        else:
            shutil.rmtree(hidden, ignore_errors=True)


@dataclass
class Found:
    """The checkpoint that a run resumes from."""

    folder: Path
    manifest: dict[str, Any]
    notes: list[str]
    """What a user must know: newer ones that are corrupt, links that are ignored, a manifest without a checksum."""


def newest_valid(runtime: Runtime, root: Path, go_back: bool, before: int | None = None) -> Found | None:
    """The newest checkpoint whose files are what was written; all ranks call it and share the checking.

    Args:
        go_back: when the newest is corrupt, take the one before.
        before: only those of earlier steps.

    Raises:
        CheckpointError: the newest is corrupt and `go_back` is off, or all are.

    Returns:
        None when there is no checkpoint.
    """
    corrupt: list[str] = []
    runtime.run_on_rank0(lambda: explained(lambda: clean_up(root), root))
    steps, links = runtime.run_on_rank0(lambda: (steps_saved(root), [str(link) for link in step_links(root)]))
    notes = [f"{link}: is a link, and none of the run's checkpoints: it is ignored and left alone" for link in links]
    for step in reversed([step for step in steps if before is None or step < before]):
        folder, problem, manifest = root / folder_name(step), None, {}
        try:
            manifest = read_manifest(folder)
            verify_all(folder, manifest, share=(runtime.rank, runtime.size))
        except CheckpointError as error:
            problem = str(error)
        problems = [one for one in runtime.gather(problem) if one]
        if not problems:
            if not is_sealed(manifest):
                notes.append(
                    f"{folder / MANIFEST}: has no checksum of its own, as those of earlier versions: it is taken as it is; "
                    "tools/checkpoint.py seal adds one"
                )
            return Found(folder, manifest, [*(f"{one}: resuming from {folder.name}" for one in corrupt), *notes])
        if not go_back:
            raise CheckpointError(f"{problems[0]}, or let --checkpoint.on_damage previous choose it")
        corrupt.append(problems[0])
    if corrupt:
        raise CheckpointError(f"every checkpoint in {root} is corrupt; the newest: {corrupt[0]}")
    return None


def require_valid(runtime: Runtime, folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are what was written; all ranks call it and share the checking.

    Raises:
        CheckpointError: it is missing or corrupt, on every rank.
    """

    def check() -> dict[str, Any]:
        manifest = read_manifest(folder)
        verify_all(folder, manifest, share=(runtime.rank, runtime.size))
        return manifest

    return runtime.run_on_all_ranks(check)


def set_aside(runtime: Runtime, folder: Path, why: str) -> Path:
    """Give a checkpoint a name that is none of a checkpoint, so that no resume takes it and no pruning counts or deletes it.

    Raises:
        CheckpointError: it cannot be renamed.
    """

    def rename() -> str:
        aside = free_name(folder.with_name(f"{folder.name}.{why}"), ".")
        folder.rename(aside)
        return str(aside)

    return Path(runtime.run_on_rank0(lambda: explained(rename, folder)))
