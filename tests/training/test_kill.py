"""kill -9 in the middle of a save: the checkpoints before are whole, and the next start resumes from the last of them."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from support.forked import launch
from support.processes import attempt, losses, metrics
from support.ranks import RankPool

from megagamma.checkpoint.reader import read_manifest, steps_saved, verify

# They share the server that runs are forked from.
pytestmark = pytest.mark.xdist_group("forked")

STEPS = 8


def arguments(folder: Path, data_cache: str) -> list[str]:
    """A model of 10 million parameters, whose checkpoint of 120 MB takes long enough to be met while it is written."""
    return [
        *("--run.folder", str(folder), "--data.cache", data_cache, "--run.steps", str(STEPS), "--run.threads", "1"),
        *("--model.hidden_size", "512", "--model.num_layers", "2", "--model.ffn_hidden_size", "2048"),
        *("--data.global_batch_size", "1", "--data.sequence_length", "16", "--validation.at_end", "false"),
        *("--validation.interval", "0", "--logging.sample_tokens", "0", "--checkpoint.interval", "1"),
        *("--checkpoint.keep_last", "2", "--optimizer.lr", "0.0003"),
    ]


def partials(root: Path) -> list[Path]:
    return sorted(root.glob(".step_*.partial")) if root.is_dir() else []


def kill_in_a_save(folder: Path, data_cache: str, saved: int, files: int) -> None:
    """Start a run; kill it when `saved` checkpoints are there and `files` files of a further one have been begun."""
    root, log = folder / "checkpoints", folder.parent / "log"
    stale = {path.name for path in partials(root)}

    def in_a_save() -> bool:
        if len(steps_saved(root)) < saved:
            return False
        new = [path for path in partials(root) if path.name not in stale]
        return any(len(list(path.glob("*.safetensors"))) >= files for path in new)

    (process,) = launch(1, arguments(folder, data_cache), log)
    deadline = time.monotonic() + 120
    while not in_a_save():
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.launcher
def test_killed_in_a_save(tmp_path: Path, data_cache: str, one_rank: RankPool) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert one_rank.run(attempt, arguments(whole, data_cache), True)[0] == ("", 0, "")
    root = broken / "checkpoints"

    # With checkpoints before it; tests of publishing stop at every other point. A save can end between the look and the
    # signal.
    for _ in range(4):
        kill_in_a_save(broken, data_cache, saved=1, files=1)
        if partials(root):
            break
    left = partials(root)
    assert len(left) == 1, "no save was met in 4 runs"
    newest = steps_saved(root)[-1]
    assert not (root / f"step_{newest + 1:08d}").exists()
    # The metrics tell how far it had come: no more than one interval beyond the checkpoint.
    assert newest <= metrics(broken)[-1]["step"] <= newest + 1
    for step in steps_saved(root):
        verify(root / f"step_{step:08d}", read_manifest(root / f"step_{step:08d}"))

    # Negative control: the kills came before the end.
    assert newest < STEPS
    assert one_rank.run(attempt, arguments(broken, data_cache), True)[0] == ("", 0, "")
    assert losses(broken) == losses(whole), "to the bit"
    assert not list(root.glob(".step_*")), "what the kills left is gone"
    # Negative control: the losses differ from step to step.
    assert len(set(losses(whole))) == STEPS
    events = (broken / "events.jsonl").read_text()
    assert events.count('"event": "resume"') >= 1


def test_killed_before_the_first_checkpoint(tmp_path: Path, data_cache: str, one_rank: RankPool) -> None:
    """Nothing to resume from: the run begins anew, in the same folder, without repeating lines."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / ".step_00000001.partial").mkdir(parents=True)
    (folder / "checkpoints" / ".step_00000001.partial" / "weight-00000.safetensors").write_bytes(b"half")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 6.0}\n{"step": 2, "lo')
    given = ["--run.folder", str(folder), "--data.cache", data_cache, "--run.steps", "3"]
    assert one_rank.run(attempt, given, True)[0] == ("", 0, "")
    assert len(losses(folder)) == 3
    assert losses(folder)[0] != 6.0
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000003"]
