"""Documents shared over processes, as lm-eval does under `accelerate launch`, score as they do in one process.

lm-eval shares them over GPUs only. Here two CPU processes are told their ranks by hand, and torch.distributed gathers in
accelerate's place; everything else is lm-eval's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.benchmarks import make_mirror, make_model
from support.ranks import RankPool

# Without examples in the prompt: lm-eval draws those anew in every process, so that they depend on the number of them.
NAMES = ["arc_challenge", "arc_easy", "gsm8k:0"]


def score(mirror: Path, model: Path, output: Path, broken: bool = False) -> Any:
    """Scores of this rank."""
    import torch
    import torch.distributed as dist
    from lm_eval.models.huggingface import HFLM

    from megagamma.config.io import parse_config
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import world_from_environment
    from megagamma.evaluation import scoring
    from megagamma.evaluation.harness import evaluate
    from megagamma.evaluation.tasks import TaskRequest

    world = world_from_environment()
    runtime = Runtime(parse_config(["--config", "configs/smoke.yaml"], world_size=world.size), world)

    class Shared(HFLM):
        def all_gather(self, tensor: Any) -> Any:
            found = [torch.zeros_like(tensor) for _ in range(self.world_size)]
            dist.all_gather(found, tensor)
            return torch.stack(found)

        def barrier(self) -> None:
            dist.barrier()

    lm = Shared(pretrained=str(model), device="cpu", batch_size=2)
    lm._rank, lm._world_size = world.rank, world.size
    whole = scoring._build
    if broken and world.rank == 1:

        def build(planned: Any, seed: int) -> Any:
            if planned.name == "arc_easy":
                raise OSError("this host's disk is gone")
            return whole(planned, seed)

        scoring._build = build
    try:
        found = evaluate(lm, TaskRequest(NAMES), content_hash="w", mirror=mirror, output=output, limit=5, say=str)
    finally:
        scoring._build = whole
    runtime.close_groups()
    return found


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("shared")
    return make_mirror(folder / "mirror"), make_model(folder / "model", window=128)


def test_two_processes_score_as_one(
    one_rank: RankPool, two_ranks: RankPool, places: tuple[Path, Path], tmp_path: Path
) -> None:
    one = one_rank.run(score, *places, tmp_path / "one")[0]
    first, second = two_ranks.run(score, *places, tmp_path / "two")
    assert (first.failures, second.failures, second.records) == ({}, {}, [])
    assert first.new == one.new == ["arc_challenge", "arc_easy", "gsm8k"]
    for ours, theirs in zip(first.records, one.records, strict=True):
        assert (ours["processes"], theirs["processes"]) == (2, 1)
        assert ours["n"] == theirs["n"] == 5
        assert ours["prompts_sha256"] == theirs["prompts_sha256"]
        for mine, other in zip(ours["metrics"], theirs["metrics"], strict=True):
            assert mine["metric"] == other["metric"]
            assert mine["value"] == pytest.approx(other["value"], rel=1e-4), (ours["task"], mine["metric"])
            assert mine["stderr"] == pytest.approx(other["stderr"], rel=1e-3)
    assert (tmp_path / "two" / "scores.json").exists()


def test_a_process_that_cannot_read_a_task(two_ranks: RankPool, places: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = two_ranks.run(score, *places, tmp_path, True, seconds=120)
    assert [one["task"] for one in first.records] == ["arc_challenge", "gsm8k"]
    assert "another process failed" in first.failures["arc_easy"]
    assert "disk is gone" in second.failures["arc_easy"]
