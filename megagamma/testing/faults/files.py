"""Files of a run that were changed, cut off, removed, or put there by the user."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megagamma.testing.drill import Drill, last_line, require


def _flip(path: Path, drill: Drill) -> str:
    """Change one bit of a file; returns where."""
    content = bytearray(path.read_bytes())
    place = drill.random.randrange(len(content))
    content[place] ^= 1 << drill.random.randrange(8)
    path.write_bytes(content)
    return f"{path.name} at byte {place}"


def _cut(path: Path, drill: Drill) -> str:
    """Cut a file off somewhere."""
    size = drill.random.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{path.name} cut to {size} bytes"


def _remove(path: Path, _: Drill) -> str:
    """Remove a file."""
    path.unlink()
    return f"{path.name} removed"


def _refused_then_previous(drill: Drill, damage: Callable[[Path, Drill], str], pattern: str, times: int) -> str:
    """Damage the newest checkpoint: refused by name, and left out when that is asked for."""
    whole = drill.train(name="whole")
    seen = []
    files = sorted(path.name for path in whole.folder.checkpoint(6).glob(pattern))
    for _ in range(times):
        shutil.rmtree(drill.place / "run", ignore_errors=True)
        drill.train(steps=6)
        name = drill.random.choice(files)
        what = damage(drill.place / "run" / "checkpoints" / "step_00000006" / name, drill)
        refused = drill.train(expect=2)
        require(name in refused.said, f"{what}: {last_line(refused.said)}")
        run = drill.train("--checkpoint.on_damage", "previous")
        require("step_00000004" in run.said, f"{what}: {last_line(run.said)}")
        require(drill.losses(run) == drill.losses(whole), f"{what}: other losses")
        seen.append(what)
    return f"{'; '.join(seen)}: refused by name, the one before taken when asked for"


def bit_flip(drill: Drill) -> str:
    """One bit of a weight or moment."""
    return _refused_then_previous(drill, _flip, "*.safetensors", 3)


def bit_flip_manifest(drill: Drill) -> str:
    """One bit of checkpoint.json."""
    return _refused_then_previous(drill, _flip, "checkpoint.json", 3)


def cut_off(drill: Drill) -> str:
    """A file cut off."""
    return _refused_then_previous(drill, _cut, "*.safetensors", 2)


def removed(drill: Drill) -> str:
    """A file removed."""
    return _refused_then_previous(drill, _remove, "*.safetensors", 2)


def edited(drill: Drill) -> str:
    """checkpoint.json changed by hand."""

    def other_step(path: Path, _: Drill) -> str:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"consumed_samples": 8}))
        return "consumed_samples edited"

    def no_files(path: Path, _: Drill) -> str:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"files": []}))
        return "list of files emptied"

    return "; ".join(_refused_then_previous(drill, change, "checkpoint.json", 1) for change in (other_step, no_files))


def file_of_the_user(drill: Drill) -> str:
    """Notes put into a checkpoint that is old enough to be pruned."""
    drill.train("--checkpoint.keep_last", "1", steps=4)
    notes = drill.place / "run" / "checkpoints" / "step_00000004" / "notes.txt"
    notes.write_text("mine")
    run = drill.train("--checkpoint.keep_last", "1")
    require(notes.is_file() and notes.read_text() == "mine", "deleted")
    require("notes.txt" in run.said, "kept without a word")
    return "kept, with a warning that names it"


def checkpoints_gone(drill: Drill) -> str:
    """All checkpoints deleted; metrics are there."""
    run = drill.train()
    before = run.folder.metrics_file.read_text()
    shutil.rmtree(run.folder.checkpoints)
    drill.train(name="run")
    kept = [path for path in run.folder.path.glob("metrics*.jsonl") if path != run.folder.metrics_file]
    require(any(path.read_text() == before for path in kept), "the earlier metrics are gone")
    return f"begun anew; the earlier metrics are in {kept[0].name}"


def metrics_garbled(drill: Drill) -> str:
    """A byte in metrics.jsonl that is not UTF-8."""
    whole = drill.train(name="whole")
    run = drill.train(steps=6)
    lines = run.folder.metrics_file.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"loss", b"lo\xffs")
    run.folder.metrics_file.write_bytes(b"".join(lines))
    again = drill.train()
    expected = {step: loss for step, loss in enumerate(drill.losses(whole), 1) if step != 3}
    found = {
        line["step"]: line["loss"] for line in again.folder.metrics().read() if "loss" in line and line["step"] != 3
    }
    require(found == expected, f"steps {sorted(found)}")
    return "resumed; every other line is there"


def _with_own_data(drill: Drill) -> Path:
    copy = drill.place / "tiny"
    shutil.copytree(drill.place.parent / "data" / "tiny", copy)
    return copy


def _data_changed(drill: Drill, change: Callable[[Path], str]) -> str:
    drill.train(name="whole")  # prepares the data once
    data = _with_own_data(drill)
    flags = ("--data.corpus", "", "--data.paths", json.dumps([str(data)]))
    drill.train(*flags, name="before")
    what = change(data)
    run = drill.train(*flags, expect=2, name="after")
    require(not run.folder.metrics().read(), "steps were made")
    return f"{what}: refused before a step: {last_line(run.said)[:140]}"


def tokens_changed(drill: Drill) -> str:
    """A bit of the token file."""
    return _data_changed(drill, lambda data: _flip(data / "train.bin", drill))


def index_changed(drill: Drill) -> str:
    """A number in the middle of the token index."""

    def change(data: Path) -> str:
        content = bytearray((data / "train.idx").read_bytes())
        place = len(content) // 2
        content[place] ^= 0x40
        (data / "train.idx").write_bytes(content)
        return f"train.idx at byte {place}"

    return _data_changed(drill, change)
