"""A second launch on a folder that is in use is refused, and takes nothing from the first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.processes import attempt, finish, metrics, start, wait_until
from support.ranks import RankPool


@pytest.mark.launcher
def test_second_launch_is_refused(tmp_path: Path, data_cache: str, one_rank: RankPool) -> None:
    common = ["--data.cache", data_cache, "--run.folder", str(tmp_path / "run"), "--run.steps", "400"]
    first = start([*common, "--checkpoint.at_end", "false"])
    try:
        wait_until(lambda: len(metrics(tmp_path / "run")) >= 2, first)
        kind, code, err = one_rank.run(attempt, common, True)[0]
        assert (kind, code) == ("ConfigurationError", 2)
        assert f"run.folder={tmp_path / 'run'}" in err and str(first.pid) in err
        assert first.poll() is None
    finally:
        first.terminate()
    assert finish(first)[0] == 75
    # Each step of the first is there once, and the folder is free again.
    steps = [line["step"] for line in metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))
    assert not (tmp_path / "run" / ".lock").exists()
    assert json.loads((tmp_path / "run" / "resolved.json").read_text())["zero_stage"] == 0
