"""Runs whose gradients, losses or weights are not finite do not end as successes. All are real, under every ZeRO stage."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.processes import metrics
from support.ranks import RankPool
from support.synthetic import train_with

from megagamma.checkpoint.manifest import sealed
from megagamma.checkpoint.reader import read_manifest, steps_saved, verify_all
from megagamma.checkpoint.safetensors_writer import ShardWriter
from megagamma.training.callbacks.base import Callback, Step


class PoisonBackward(Callback):
    """Makes the gradients of some steps not finite, on the last rank alone: the losses stay as they are."""

    def __init__(self, steps: range) -> None:
        self.steps, self.now = steps, 1

    def begin(self) -> None:
        def poison(_: Any, __: Any, output: Any) -> Any:
            output = output[0] if isinstance(output, tuple) else output
            last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
            if output.requires_grad and last and self.session.step + 1 in self.steps:
                output.register_hook(lambda gradient: gradient * math.nan)

        self.engine.chunks[0].decoder.layers[0].register_forward_hook(poison)


class PoisonLoss(Callback):
    """Makes the losses of some steps not finite."""

    def __init__(self, steps: range) -> None:
        self.steps = steps

    def before_update(self, step: Step) -> bool:
        step.loss = math.nan if step.number in self.steps else step.loss
        return True


def poisoned(arguments: list[str], gradients: range, losses: range) -> tuple[int, str]:
    """Inside a rank: a run some of whose steps are not finite."""
    return train_with(arguments, lambda: [PoisonBackward(gradients), PoisonLoss(losses)], first=True)


def run(folder: Path, *more: str, steps: int = 20, stage: int = 0) -> list[str]:
    rules = ("--validation.at_end", "false", "--guard.on_nan", "skip", "--guard.spike_window", "64")
    zero = ("--deepspeed_config", f"configs/deepspeed/zero{stage}.json")
    return ["--run.folder", str(folder), "--run.steps", str(steps), *rules, *zero, *more]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


NONE, ALL = range(0), range(1, 100)


@pytest.mark.parametrize("stage", [3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2))])
def test_gradients_that_are_never_finite_end_the_run(tmp_path: Path, two_ranks: RankPool, stage: int) -> None:
    given = run(tmp_path / "run", "--guard.max_skips", "4", stage=stage)
    for code, text in two_ranks.run(poisoned, given, ALL, NONE):
        assert code == 3 and "at step 5," in text and "policy stop" in text
    assert len(events(tmp_path / "run", "nan")) == 5


@pytest.mark.slow
def test_so_do_losses_that_are_never_finite(tmp_path: Path, two_ranks: RankPool) -> None:
    given = run(tmp_path / "run", "--guard.max_skips", "4", stage=2)
    assert [code for code, _ in two_ranks.run(poisoned, given, NONE, ALL)] == [3, 3]


@pytest.mark.parametrize(
    ("steps", "gradients", "code"),
    [
        (6, range(4, 7), 3),
        (6, range(5, 7), 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((6, range(3, 6), 0), (2, range(1, 3), 3), (2, range(2, 3), 0))
        ),
    ],
)
def test_a_run_that_ends_on_steps_without_an_update(
    tmp_path: Path, one_rank: RankPool, steps: int, gradients: range, code: int
) -> None:
    """Three at the end, or all of a shorter run, are no success; what it saved is there, and it is no success again."""
    given = run(tmp_path / "run", steps=steps)
    for _ in range(2):
        ((found, text),) = one_rank.run(poisoned, given, gradients, NONE)
        assert found == code
        if code:
            left = len(gradients)
            assert f"the last {left} of {steps} steps made no update" in text
            assert f"the weights are those of step {steps - left}" in text
    assert bool(events(tmp_path / "run", "no_update_at_end")) is (code == 3)
    assert steps_saved(tmp_path / "run" / "checkpoints") == [steps]


def test_a_resume_counts_on(tmp_path: Path, one_rank: RankPool) -> None:
    """A job that is restarted every few steps stops too."""
    given = run(tmp_path / "run", "--guard.max_skips", "4", steps=3)
    assert one_rank.run(poisoned, given, range(2, 100), NONE)[0][0] == 0
    ((code, text),) = one_rank.run(poisoned, [*given, "--run.steps", "20"], range(2, 100), NONE)
    assert code == 3 and "at step 6," in text


# -- not finite right after loading --------------------------------------------------------------------------------


def ruin(checkpoint: Path) -> None:
    """Put NaN into a weight of a checkpoint that is valid otherwise, and leave it valid."""
    manifest = read_manifest(checkpoint)
    entry = next(one for one in manifest["files"] if one["kind"] == "weight")
    # Copies: what is mapped from the file would go with it.
    tensors = {name: tensor.clone() for name, tensor in load_file(checkpoint / entry["file"]).items()}
    tensors["model.norm.weight"][3] = math.nan
    writer = ShardWriter(checkpoint / entry["file"], [(name, tuple(tensors[name].shape)) for name in entry["tensors"]])
    for name in entry["tensors"]:
        writer.write(name, tensors[name])
    entry["bytes"], entry["xxh3_128"] = writer.close()
    (checkpoint / "checkpoint.json").write_text(json.dumps(sealed(manifest)))
    verify_all(checkpoint, read_manifest(checkpoint))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, one_rank: RankPool) -> Path:
    """A run of 6 steps that saved after every second one, and whose last step is not done: it continues to 8."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    assert one_rank.run(poisoned, resumed(folder, 6), NONE, NONE)[0] == (0, "")
    return folder


def resumed(folder: Path, steps: int = 8, *more: str) -> list[str]:
    rules = ("--checkpoint.interval", "2", "--schedule.shape", "constant", "--schedule.warmup_steps", "1")
    return run(folder, *rules, "--guard.on_nan", "stop", *more, steps=steps)


def test_a_checkpoint_that_is_not_finite_is_left_for_the_one_before(
    tmp_path: Path, one_rank: RankPool, two_ranks: RankPool, trained: Path
) -> None:
    for name, pool, stage in (("whole", one_rank, 0), ("ruined", one_rank, 0), ("two", two_ranks, 3)):
        folder = tmp_path / name
        shutil.copytree(trained, folder)
        root = folder / "checkpoints"
        if name != "whole":
            ruin(root / "step_00000006")
        given = [*resumed(folder), "--deepspeed_config", f"configs/deepspeed/zero{stage}.json"]
        # Of the newest it keeps one; the one with NaN must not count as that.
        assert pool.run(poisoned, [*given, "--checkpoint.keep_last", "1"], NONE, NONE) == [(0, "")] * pool.size
        assert steps_saved(root) == [8]
        aside = root / "step_00000006.not_finite"
        assert aside.is_dir() is (name != "whole")
        if name == "whole":
            assert not events(folder, "went_back")
            continue
        (event,) = events(folder, "went_back")
        assert (event["step"], event["not_finite"], event["folder"]) == (4, "step_00000006", "step_00000004")
        (warning,) = [event["text"] for event in events(folder, "warning") if "not finite" in event["text"]]
        assert "step_00000006: the loss of the first step after loading it is not finite" in warning
        assert "kept as step_00000006.not_finite; resuming from step_00000004" in warning
        verify_all(aside, read_manifest(aside))
    losses = {name: [line["loss"] for line in metrics(tmp_path / name)] for name in ("whole", "ruined", "two")}
    assert losses["ruined"] == losses["whole"]
    assert losses["two"] == pytest.approx(losses["whole"], rel=1e-5)


def test_two_that_are_not_finite_are_an_error(tmp_path: Path, two_ranks: RankPool, trained: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    root = folder / "checkpoints"
    for step in (4, 6):
        ruin(root / f"step_{step:08d}")
    for code, text in two_ranks.run(poisoned, resumed(folder), NONE, NONE):
        assert code == 2 and "step_00000006: the loss of the first step after loading" in text
        assert "neither is it after step_00000004" in text
    assert steps_saved(root) == [2, 4, 6], "nothing is renamed or deleted"


@pytest.mark.slow
def test_the_only_checkpoint_is_left_to_the_guard(tmp_path: Path, one_rank: RankPool, trained: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    root = folder / "checkpoints"
    for step in (2, 4):
        shutil.rmtree(root / f"step_{step:08d}")
    ruin(root / "step_00000006")
    ((code, text),) = one_rank.run(poisoned, resumed(folder), NONE, NONE)
    assert code == 3 and "at step 7," in text
    assert any("there is no checkpoint before it" in event["text"] for event in events(folder, "warning"))
    assert steps_saved(root) == [6]
    assert torch.isnan(load_file(root / "step_00000006" / "weight-00000.safetensors")["model.norm.weight"][3])
