"""Resume equals an uninterrupted run, on the same layout to the bit and on another to rounding."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import assert_same_training
from support.processes import snapshot
from support.ranks import RankError, RankPool
from support.train import run_trainer

from megagamma.checkpoint.reader import CheckpointReader, read_manifest, steps_saved, verify
from megagamma.checkpoint.retention import clean_up, prune
from megagamma.checkpoint.safetensors_writer import checksum
from megagamma.checkpoint.saver import Saver
from megagamma.errors import CheckpointError

HALF = 4


def arguments(folder: Path, cache: str, stage: int, *more: str) -> list[str]:
    return [
        *("--run.folder", str(folder), "--data.cache", cache, "--run.steps", str(2 * HALF)),
        *("--checkpoint.interval", str(HALF), "--validation.interval", "3"),
        *("--deepspeed_config", f"configs/deepspeed/zero{stage}.json", *more),
    ]


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == list(range(1, len(steps) + 1)), "each step once"
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}


def halfway(folder: Path, to: Path) -> Path:
    """A copy of a finished run as it was after its first half."""
    to.mkdir(parents=True)
    shutil.copytree(folder / "checkpoints" / f"step_{HALF:08d}", to / "checkpoints" / f"step_{HALF:08d}")
    shutil.copy(folder / "config.yaml", to)
    shutil.copy(folder / "metrics.jsonl", to)
    return to


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, one_rank: RankPool, data_cache: str) -> Path:
    """An uninterrupted run on one process, ZeRO 1."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert one_rank.run(run_trainer, arguments(folder, data_cache, 1)) == [0]
    return folder


def slow(*values: object) -> list[Any]:
    """Parameters of tests that only `make test-all` runs."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# Every stage is resumed on two ranks below.
@pytest.mark.parametrize("stage", [0, 3, *slow(1, 2)])
def test_resume_is_the_uninterrupted_run_to_the_bit(
    tmp_path: Path, one_rank: RankPool, data_cache: str, stage: int
) -> None:
    full = tmp_path / "full"
    assert one_rank.run(run_trainer, arguments(full, data_cache, stage)) == [0]
    resumed = halfway(full, tmp_path / "resumed")
    assert one_rank.run(run_trainer, arguments(resumed, data_cache, stage)) == [0]
    assert losses(resumed) == losses(full)
    final = f"checkpoints/step_{2 * HALF:08d}/checkpoint.json"
    for left, right in zip(
        json.loads((full / final).read_text())["files"], json.loads((resumed / final).read_text())["files"], strict=True
    ):
        assert left["xxh3_128"] == right["xxh3_128"], left["file"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_on_two_ranks_under_any_stage(
    tmp_path: Path, two_ranks: RankPool, data_cache: str, whole: Path, stage: int
) -> None:
    resumed = halfway(whole, tmp_path / "resumed")
    assert two_ranks.run(run_trainer, arguments(resumed, data_cache, stage)) == [0, 0]
    expected = losses(whole)
    for step, (loss, norm) in losses(resumed).items():
        assert loss == pytest.approx(expected[step][0], rel=1e-5)
        assert norm == pytest.approx(expected[step][1], rel=1e-5)


LAYOUTS = {
    "tensor": ["--parallel.tensor", "2"],
    "sequence": ["--parallel.tensor", "2", "--parallel.sequence", "true"],
    "pipeline": ["--parallel.pipeline", "2"],
    "virtual": ["--parallel.pipeline", "2", "--parallel.virtual_pipeline", "2"],
}


# Sequence parallelism splits the weights as tensor parallelism does, virtual stages as pipeline stages do.
@pytest.mark.parametrize("layout", ["sequence", "virtual", *slow("tensor", "pipeline")])
def test_a_checkpoint_moves_between_layouts(
    tmp_path: Path, one_rank: RankPool, two_ranks: RankPool, data_cache: str, whole: Path, layout: str
) -> None:
    there = halfway(whole, tmp_path / "there")
    assert two_ranks.run(run_trainer, arguments(there, data_cache, 1, *LAYOUTS[layout])) == [0, 0]
    expected = losses(whole)
    for step, (loss, norm) in losses(there).items():
        assert loss == pytest.approx(expected[step][0], rel=1e-5)
        assert norm == pytest.approx(expected[step][1], rel=1e-5)
    # And what that layout wrote holds the same logical tensors as one process wrote.
    middle, last = (f"checkpoints/step_{step:08d}" for step in (HALF, 2 * HALF))
    assert_same_training(there / last, whole / last, whole / middle)
    # Negative control: the comparison sees a checkpoint of another step.
    with pytest.raises(AssertionError):
        assert_same_training(there / middle, whole / last, whole / middle)


def test_gates_and_tied_embeddings_are_saved(tmp_path: Path, two_ranks: RankPool, data_cache: str) -> None:
    more = ["--model.attention_gate", "headwise", "--model.tie_embeddings", "true"]
    folder = tmp_path / "run"
    run = arguments(folder, data_cache, 1, *more, "--parallel.tensor", "2")
    assert two_ranks.run(run_trainer, run) == [0, 0]
    names = CheckpointReader(folder / "checkpoints" / f"step_{HALF:08d}").names()
    assert "model.layers.3.self_attn.gate_proj.weight" in names
    assert "lm_head.weight" not in names
    resumed = halfway(folder, tmp_path / "resumed")
    pipeline = arguments(resumed, data_cache, 1, *more, "--parallel.pipeline", "2")
    assert two_ranks.run(run_trainer, pipeline) == [0, 0]
    expected = losses(folder)
    for step, (loss, _) in losses(resumed).items():
        assert loss == pytest.approx(expected[step][0], rel=1e-5)


def test_files_are_plain_safetensors_with_logical_names(whole: Path) -> None:
    folder = whole / "checkpoints" / f"step_{HALF:08d}"
    manifest = read_manifest(folder)
    assert {entry["kind"] for entry in manifest["files"]} == {"weight", "exp_avg", "exp_avg_sq"}
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".safetensors", ".safetensors", ".safetensors"]
    weights = load_file(folder / "weight-00000.safetensors")
    assert weights["model.layers.2.self_attn.q_proj.weight"].shape == (64, 64)
    assert weights["model.embed_tokens.weight"].dtype == torch.float32
    assert manifest["step"] == manifest["adam_step"] == HALF
    assert manifest["consumed_samples"] == HALF * 8


def test_distributed_checkpoint_of_torch_reads_it(tmp_path: Path, two_ranks: RankPool, data_cache: str) -> None:
    """Weights and moments, written by two ranks, through a reader that knows nothing of this project."""
    import torch.distributed.checkpoint as dcp

    run = tmp_path / "run"
    flags = ["--parallel.tensor", "2", "--run.steps", "3"]
    assert two_ranks.run(run_trainer, [*arguments(run, data_cache, 1), *flags]) == [0, 0]
    folder = run / "checkpoints" / "step_00000003"
    reader = dcp.HuggingFaceStorageReader(str(folder))
    found = {name: torch.zeros(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()}
    dcp.load(found, storage_reader=reader, no_dist=True)
    ours = CheckpointReader(folder)
    assert len(found) == 3 * len(ours.names())
    for name in ours.names():
        assert torch.equal(found[name], ours.read("weight", name))
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(found[f"{kind}.{name}"], ours.read(kind, name))
            assert found[f"{kind}.{name}"].abs().max() > 0


@pytest.mark.parametrize("fault", ["truncated", "bit flipped", "missing", "manifest cut"])
def test_damage_is_named(tmp_path: Path, whole: Path, fault: str) -> None:
    folder = halfway(whole, tmp_path / "corrupt") / "checkpoints" / f"step_{HALF:08d}"
    verify(folder, read_manifest(folder))
    victim = folder / ("checkpoint.json" if fault == "manifest cut" else "exp_avg-00000.safetensors")
    content = bytearray(victim.read_bytes())
    if fault in ("truncated", "manifest cut"):
        victim.write_bytes(content[: len(content) // 2])
    elif fault == "bit flipped":
        content[-1000] ^= 1
        victim.write_bytes(content)
    else:
        victim.unlink()
    with pytest.raises(CheckpointError, match=victim.name):
        verify(folder, read_manifest(folder))


def test_asynchronous_checkpoints_are_the_same_files(
    tmp_path: Path, two_ranks: RankPool, data_cache: str, whole: Path
) -> None:
    now, later = tmp_path / "now", tmp_path / "later"
    assert two_ranks.run(run_trainer, arguments(now, data_cache, 2)) == [0, 0]
    more = ["--checkpoint.asynchronous", "true", "--checkpoint.interval", "2", "--checkpoint.keep_last", "0"]
    assert two_ranks.run(run_trainer, arguments(later, data_cache, 2, *more)) == [0, 0]
    assert steps_saved(later / "checkpoints") == list(range(2, 2 * HALF + 1, 2))
    for step in (HALF, 2 * HALF):
        left, right = (read_manifest(run / "checkpoints" / f"step_{step:08d}") for run in (now, later))
        assert [entry["xxh3_128"] for entry in left["files"]] == [entry["xxh3_128"] for entry in right["files"]]
        verify(later / "checkpoints" / f"step_{step:08d}", right)
    assert losses(now) == losses(later)
    assert not list((later / "checkpoints").glob(".*"))


def train_with_slow_copies(arguments: list[str], waits: bool) -> int:
    """A run whose saves take longer to copy a tensor than a step takes."""
    copy, wait = Saver._copy, Saver.wait_for_copy

    def slow_copy(self: Saver, *what: Any) -> torch.Tensor:
        time.sleep(0.02)
        return copy(self, *what)

    Saver._copy = slow_copy  # type: ignore[method-assign]
    if not waits:
        Saver.wait_for_copy = lambda self: None  # type: ignore[method-assign]
    try:
        return run_trainer(arguments)
    finally:
        Saver._copy, Saver.wait_for_copy = copy, wait  # type: ignore[method-assign]


def test_the_next_update_waits_for_the_copy(tmp_path: Path, one_rank: RankPool, data_cache: str) -> None:
    """And without that, the negative control, another state is saved."""
    more = ["--checkpoint.interval", "2", "--checkpoint.keep_last", "0", "--run.steps", "4"]
    saved = {}
    for name, waits in (("now", True), ("later", True), ("too late", False)):
        asynchronous = ["--checkpoint.asynchronous", str(name != "now").lower()]
        given = arguments(tmp_path / name, data_cache, 0, *more, *asynchronous)
        assert one_rank.run(train_with_slow_copies, given, waits) == [0]
        manifest = read_manifest(tmp_path / name / "checkpoints" / "step_00000002")
        saved[name] = [entry["xxh3_128"] for entry in manifest["files"]]
    assert saved["now"] == saved["later"] != saved["too late"]


def test_a_damaged_newest_checkpoint(tmp_path: Path, one_rank: RankPool, data_cache: str, whole: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    victim = run / "checkpoints" / f"step_{2 * HALF:08d}" / "weight-00000.safetensors"
    victim.write_bytes(victim.read_bytes()[:-7])
    with pytest.raises(RankError, match=r"weight-00000\.safetensors"):
        one_rank.run(run_trainer, arguments(run, data_cache, 1))
    go_back = arguments(run, data_cache, 1, "--checkpoint.on_damage", "previous")
    assert one_rank.run(run_trainer, go_back) == [0]
    assert losses(run) == losses(whole)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert any("weight-00000.safetensors" in event.get("text", "") for event in events)
    verify(victim.parent, read_manifest(victim.parent))
    for step in (HALF, 2 * HALF):
        (run / "checkpoints" / f"step_{step:08d}" / "checkpoint.json").write_text("{")
    with pytest.raises(RankError, match="every checkpoint"):
        one_rank.run(run_trainer, go_back)


def test_pruning_keeps_the_newest_and_the_permanent(tmp_path: Path) -> None:
    for step in range(1, 8):
        (tmp_path / f"step_{step:08d}").mkdir()
    (tmp_path / ".step_00000009.partial").mkdir()
    assert prune(tmp_path, 0, set()) == []
    assert prune(tmp_path, 2, {1, 3}) == [2, 4, 5]
    assert steps_saved(tmp_path) == [1, 3, 6, 7]


def test_a_checkpoint_loads_in_another_precision(
    tmp_path: Path, one_rank: RankPool, two_ranks: RankPool, data_cache: str, whole: Path
) -> None:
    """The masters are fp32 either way: bf16 starts from the very weights, and what it saves goes back to fp32."""
    bf16 = halfway(whole, tmp_path / "bf16")
    flags = ["--precision.dtype", "bf16"]
    # One step, so that what was loaded is what the moments and masters of the next checkpoint grew from.
    one = [*arguments(bf16, data_cache, 2, *flags), "--run.steps", str(HALF + 1), "--optimizer.lr", "0"]
    assert two_ranks.run(run_trainer, [*one, "--schedule.min_lr_ratio", "0"]) == [0, 0]
    before = CheckpointReader(whole / "checkpoints" / f"step_{HALF:08d}")
    after = CheckpointReader(bf16 / "checkpoints" / f"step_{HALF + 1:08d}")
    for name, tensor in before.tensors():
        assert torch.equal(after.read("weight", name), tensor), f"{name}: at a rate of 0 a master must not move"
        assert not torch.equal(after.read("exp_avg", name), before.read("exp_avg", name)), "a step was made"
    # bf16 sees the same loss to its rounding, and not to fp32's.
    expected, found = losses(whole)[HALF + 1][0], losses(bf16)[HALF + 1][0]
    assert found == pytest.approx(expected, rel=5e-3)
    assert found != pytest.approx(expected, rel=1e-6)

    # And back: an fp32 run from what bf16 saved is the fp32 run from what fp32 saved, whose masters are equal.
    back = tmp_path / "back"
    back.mkdir()
    shutil.copytree(bf16 / "checkpoints", back / "checkpoints")
    shutil.copy(bf16 / "metrics.jsonl", back)
    again = [*arguments(back, data_cache, 1), "--run.steps", str(HALF + 2), "--optimizer.lr", "0"]
    assert one_rank.run(run_trainer, again) == [0]
    assert losses(back)[HALF + 2][0] != pytest.approx(losses(bf16)[HALF + 1][0], rel=1e-6)
    final = CheckpointReader(back / "checkpoints" / f"step_{HALF + 2:08d}")
    for name, tensor in before.tensors():
        assert torch.equal(final.read("weight", name), tensor)


def test_a_checkpoint_that_was_set_aside_comes_back(tmp_path: Path) -> None:
    """A kill between the two renames of publishing a step again leaves it under a hidden name."""
    root = tmp_path / "checkpoints"
    hidden = [".step_00000002.replaced", ".step_00000002.partial", ".step_00000003.replaced", ".step_00000004.deleted"]
    for name in (*hidden, "step_00000003"):
        small_checkpoint(root / name, note=name)
    clean_up(root)
    assert sorted(path.name for path in root.iterdir()) == ["step_00000002", "step_00000003"]
    assert json.loads((root / "step_00000002" / "checkpoint.json").read_text())["note"] == ".step_00000002.replaced"
    assert json.loads((root / "step_00000003" / "checkpoint.json").read_text())["note"] == "step_00000003"


def small_checkpoint(folder: Path, **more: Any) -> Path:
    """What deletion looks at: a file of numbers, and the manifest that lists it."""
    folder.mkdir(parents=True)
    weights = folder / "weight-00000.safetensors"
    weights.write_bytes(folder.name.encode())
    entry = {"file": weights.name, "kind": "weight", "bytes": weights.stat().st_size, "xxh3_128": checksum(weights)}
    values = {"format": "megagamma checkpoint", "version": 2, "files": [entry], **more}
    (folder / "checkpoint.json").write_text(json.dumps(values))
    return folder


def test_pruning_leaves_what_this_tool_did_not_write(tmp_path: Path) -> None:
    """An export put inside a checkpoint, notes, edited weights, a link: the checkpoint stays, and is named once asked."""
    for step in range(1, 9):
        small_checkpoint(tmp_path / f"step_{step:08d}")
    (tmp_path / "step_00000002" / "hf").mkdir()
    (tmp_path / "step_00000002" / "hf" / "model.safetensors").write_text("export")
    (tmp_path / "step_00000003" / "notes.txt").write_text("mine")
    (tmp_path / "step_00000004" / "weight-00000.safetensors").write_text("step_00000005")
    (tmp_path / "step_00000005").rename(tmp_path / "elsewhere")
    (tmp_path / "step_00000005").symlink_to(tmp_path / "elsewhere")
    before, said = snapshot(tmp_path), {}
    assert prune(tmp_path, 2, set(), said.__setitem__) == [1, 6]
    assert {step: text.split(" it holds ")[1].split(", not as")[0] for step, text in said.items()} == {
        2: "hf/model.safetensors", 3: "notes.txt", 4: "weight-00000.safetensors (changed)",
    }  # fmt: skip
    assert "step_00000003 is kept beyond checkpoint.keep_last=2" in said[3]
    after = snapshot(tmp_path)
    assert {name for name in before if name not in after} == {
        f"step_0000000{step}/{name}" for step in (1, 6) for name in ("checkpoint.json", "weight-00000.safetensors")
    }
    assert all(after[name] == before[name] for name in after)


def test_a_copied_checkpoint_is_known_by_its_checksums(tmp_path: Path) -> None:
    """A copy has later times than its manifest: its files are read, and are this tool's own."""
    small_checkpoint(tmp_path / "there" / "step_00000001")
    for step in (1, 2):
        shutil.copytree(tmp_path / "there" / "step_00000001", tmp_path / "root" / f"step_{step:08d}")
        os.utime(tmp_path / "root" / f"step_{step:08d}" / "checkpoint.json", (1, 1))
    assert prune(tmp_path / "root", 1, set()) == [1]
    assert steps_saved(tmp_path / "root") == [2]


def test_only_hidden_folders_of_saving_are_cleaned_up(tmp_path: Path) -> None:
    names = [".step_by_step", ".step_00000001", ".step_1.partial", ".step_00000001.mine", ".step_00000001.partial.old"]
    for name in (*names, ".step_00000001.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    clean_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
