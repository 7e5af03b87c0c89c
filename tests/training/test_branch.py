"""run.branch_from: a run that starts from the middle of another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.ranks import RankPool
from support.train import run_trainer

WSD = [
    "--schedule.shape", "wsd", "--schedule.warmup_steps", "2", "--schedule.decay_ratio", "0.3",
    "--validation.at_end", "false", "--validation.interval", "0", "--logging.sample_tokens", "0",
]  # fmt: skip


def arguments(folder: Path, cache: str, steps: int, *more: str) -> list[str]:
    return ["--run.folder", str(folder), "--data.cache", cache, "--run.steps", str(steps), *WSD, *more]


def refusal(arguments: list[str]) -> str:
    """What a run on this rank is refused with."""
    from megagamma.errors import MegagammaError

    with pytest.raises(MegagammaError) as refused:
        run_trainer(arguments)
    return str(refused.value)


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line["loss"] for line in lines}


def test_a_trunk_gives_every_budget(tmp_path: Path, data_cache: str, one_rank: RankPool, two_ranks: RankPool) -> None:
    """Branches at step 4 with a budget of 6 steps equal a run of 6 steps from scratch, to the bit: under WSD the first four
    have the same learning rates. On another layout to rounding; and a decay that began before the branch does not."""
    trunk = tmp_path / "trunk"
    assert one_rank.run(run_trainer, arguments(trunk, data_cache, 12, "--checkpoint.permanent", "[4]")) == [0]
    before = {path: path.stat().st_mtime_ns for path in trunk.rglob("*")}
    start = ["--run.branch_from", str(trunk / "checkpoints" / "step_00000004")]

    one_rank.run(run_trainer, arguments(tmp_path / "whole", data_cache, 6))
    one_rank.run(run_trainer, arguments(tmp_path / "branch", data_cache, 6, *start))
    whole, branch = losses(tmp_path / "whole"), losses(tmp_path / "branch")
    assert branch == {step: whole[step] for step in (5, 6)}
    assert branch[6] != losses(trunk)[6]  # the trunk's rate had not decayed there

    layout = ["--parallel.tensor", "2"]
    two_ranks.run(run_trainer, arguments(tmp_path / "wide", data_cache, 6, *start, *layout))
    assert losses(tmp_path / "wide") == pytest.approx(branch, rel=1e-5)

    # A branch resumes from its own checkpoints, also without its trunk; the trunk is as it was.
    assert {path: path.stat().st_mtime_ns for path in trunk.rglob("*")} == before
    events = [json.loads(line) for line in (tmp_path / "branch" / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "branch"] == [4]
    shutil.rmtree(trunk)
    one_rank.run(run_trainer, arguments(tmp_path / "branch", data_cache, 8, *start))
    assert sorted(losses(tmp_path / "branch")) == [5, 6, 7, 8]


def test_what_cannot_be_branched_from(tmp_path: Path, data_cache: str, one_rank: RankPool) -> None:
    trunk = tmp_path / "trunk"
    one_rank.run(run_trainer, arguments(trunk, data_cache, 2))
    for more, message in (
        (["--run.branch_from", str(tmp_path / "none")], "there is no such folder"),
        (["--run.branch_from", str(trunk), "--run.steps", "2"], "this run ends at step 2"),
        (["--run.branch_from", str(trunk), "--model.hidden_size", "32"], "of another model"),
        (["--run.branch_from", str(trunk), "--run.seed", "7"], "run.seed"),
    ):
        assert message in one_rank.run(refusal, arguments(tmp_path / "branch", data_cache, 4, *more))[0]
        assert not (tmp_path / "branch" / "metrics.jsonl").exists()
    weights = next((trunk / "checkpoints" / "step_00000002").glob("weight-*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    more = ["--run.branch_from", str(trunk)]
    assert weights.name in one_rank.run(refusal, arguments(tmp_path / "branch", data_cache, 4, *more))[0]
