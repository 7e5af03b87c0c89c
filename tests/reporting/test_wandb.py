"""wandb mirrors the run's own files, and nothing that happens to it harms the run."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.processes import attempt_with_broken_wandb, attempt_with_wandb, losses, metrics
from support.ranks import RankPool

from megagamma.config.schema import LoggingConfig
from megagamma.reporting.log import WandbMirror


def arguments(folder: Path, data_cache: str, mode: str) -> list[str]:
    return [
        *("--run.folder", str(folder), "--data.cache", data_cache, "--run.steps", "6", "--run.name", "mirrored"),
        *("--logging.wandb", mode, "--logging.sample_tokens", "0", "--init.gamma", "0.75"),
    ]


def blocks(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    data, whole = path.read_bytes(), b""
    assert data[:4] == b":W&B"
    place = 7
    while place + 7 <= len(data):
        rest = 32768 - place % 32768
        if rest < 7:
            place += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        # 1: whole; 2, 3, 4: first, middle and last piece.
        if kind in (1, 4):
            yield whole
            whole = b""


def records(folder: Path) -> list[Any]:
    """What wandb wrote offline, as its own messages."""
    from wandb.proto import wandb_internal_pb2 as messages

    files = list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 1
    found = []
    for block in blocks(files[0]):
        record = messages.Record()
        record.ParseFromString(block)
        found.append(record)
    return found


def test_offline_run_is_read_back(tmp_path: Path, data_cache: str, one_rank: RankPool) -> None:
    folder = tmp_path / "run"
    assert one_rank.run(attempt_with_wandb, arguments(folder, data_cache, "offline"))[0] == ("", 0, "")
    mirrored: dict[int, dict[str, Any]] = {}
    names = []
    for record in records(folder):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            mirrored[row["_step"]] = row
        elif kind == "run":
            settings = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            names.append((record.run.display_name, record.run.project, settings.get("init", {}).get("gamma")))
    assert ("mirrored", "megagamma", 0.75) in names
    ours = {line["step"]: line for line in metrics(folder)}
    assert sorted(mirrored) == sorted(ours) == [1, 2, 3, 4, 5, 6]
    for step, line in ours.items():
        for key in ("loss", "grad_norm", "lr", "tokens"):
            assert mirrored[step][key] == pytest.approx(line[key], rel=1e-12)
    # Negative control: the losses are not all the same.
    assert len({row["loss"] for row in mirrored.values()}) == 6
    assert mirrored[6]["val/tiny/loss"] == pytest.approx(ours[6]["val/tiny/loss"])


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_failure_only_warns(tmp_path: Path, data_cache: str, one_rank: RankPool, place: str) -> None:
    folder = tmp_path / "run"
    result, said = one_rank.run(attempt_with_broken_wandb, arguments(folder, data_cache, "offline"), place)[0]
    assert result == ("", 0, "")
    assert len(losses(folder)) == 6
    warnings = [line for line in said.splitlines() if "wandb" in line]
    assert warnings == [f"WARNING wandb failed and is left out from here on: {place} is broken"], "once, not per step"


def test_disabled_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    # None in place of a module makes its import fail.
    monkeypatch.setitem(sys.modules, "wandb", None)
    mirror = WandbMirror(LoggingConfig(wandb="disabled"), "run", tmp_path, {})
    mirror.write({"step": 1, "loss": 1.0})
    mirror.close()
    assert not list(tmp_path.iterdir())


def test_missing_package_only_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    mirror = WandbMirror(LoggingConfig(wandb="offline"), "run", tmp_path, {})
    mirror.write({"step": 1, "loss": 1.0})
    mirror.close()
    assert capsys.readouterr().err.count("WARNING wandb failed") == 1
