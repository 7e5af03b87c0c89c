"""A second launch on a folder that is in use is refused, and takes nothing from the first."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from support.forked import launch
from support.processes import attempt, metrics
from support.ranks import RankPool


@pytest.mark.ranks
def test_second_launch_is_refused(tmp_path: Path, data_cache: str, one_rank: RankPool) -> None:
    common = ["--data.cache", data_cache, "--run.folder", str(tmp_path / "run"), "--run.steps", "400"]
    log = tmp_path / "log"
    (first,) = launch(1, [*common, "--checkpoint.at_end", "false"], log)
    try:
        deadline = time.monotonic() + 90
        while len(metrics(tmp_path / "run")) < 2:
            assert first.is_alive() and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.005)
        kind, code, err = one_rank.run(attempt, common, True)[0]
        assert (kind, code) == ("ConfigurationError", 2)
        assert f"run.folder={tmp_path / 'run'}" in err and str(first.pid) in err
        assert first.is_alive()
    finally:
        first.terminate()
    first.join(60)
    assert first.exitcode == 75
    # Each step of the first is there once, and the folder is free again.
    steps = [line["step"] for line in metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))
    assert not (tmp_path / "run" / ".lock").exists()
    assert json.loads((tmp_path / "run" / "resolved.json").read_text())["zero_stage"] == 0
