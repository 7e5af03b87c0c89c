"""megagamma checkpoint on checkpoints made by hand, whose every number is known, and on those of real runs."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import weakref
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from support.checkpoints import assert_same_training
from support.ranks import RankPool
from support.train import run_trainer

from megagamma.checkpoint import inspection as checkpoint_tools
from megagamma.checkpoint.inspection import compare_tensors, config_differences, natural
from megagamma.checkpoint.manifest import sealed
from megagamma.checkpoint.reader import FORMAT_VERSION, CheckpointReader, folder_name, tensor_key
from megagamma.checkpoint.safetensors_writer import ShardWriter
from megagamma.cli import main_guard
from megagamma.commands import checkpoint
from megagamma.config.schema import ModelConfig, resolve_model
from megagamma.model.parameters import logical_parameters

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "checkpoint.py"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
NAMES = ("lm_head.weight", "model.layers.10.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight")


@pytest.fixture
def tool():
    return checkpoint


@pytest.fixture
def run(tool, capsys):
    def call(*arguments):
        code = main_guard(lambda: tool.main([str(argument) for argument in arguments]))
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def tensors():
    """By kind and name; the same at every call."""
    generator = torch.Generator().manual_seed(3)
    return {kind: {name: torch.randn(6, 4, generator=generator) for name in NAMES} for kind in KINDS}


MODEL = ModelConfig(hidden_size=4, num_layers=1, num_attention_heads=1, vocab_size=6, vocab_size_multiple=2)


def whole():
    """By kind and name, all that `MODEL` has."""
    generator = torch.Generator().manual_seed(3)
    parameters = logical_parameters(resolve_model(MODEL))
    return {kind: {one.name: torch.randn(one.shape, generator=generator) for one in parameters} for kind in KINDS}


def write(root: Path, step: int, values=None, learning_rate=1e-3, split=1, model=None) -> Path:
    """A checkpoint of the run `root`, each kind in `split` files. `verify` wants one whose config has its model."""
    folder = root / "checkpoints" / folder_name(step)
    folder.mkdir(parents=True)
    files = []
    for kind, found in (values or tensors()).items():
        names = list(found)
        for part in range(split):
            mine = names[part::split]
            entries = [(tensor_key(kind, name), tuple(found[name].shape)) for name in mine]
            writer = ShardWriter(folder / f"{kind}-{part:05d}.safetensors", entries)
            for name in mine:
                writer.write(tensor_key(kind, name), found[name])
            size, digest = writer.close()
            files.append(
                {"file": writer.path.name, "kind": kind, "bytes": size, "xxh3_128": digest, "tensors": mine}
            )  # fmt: skip
    manifest = {
        "version": FORMAT_VERSION, "step": step, "adam_step": step, "consumed_samples": 8 * step, "seconds": 1.0,
        "config": {"data": {"sequence_length": 32}, "optimizer": {"lr": learning_rate}, "deepspeed_config": "auto"},
        "tokenizer": "x", "progress": {}, "files": files,
    }  # fmt: skip
    manifest["config"] |= {"model": asdict(model)} if model else {}
    (folder / "checkpoint.json").write_text(json.dumps(sealed(manifest)))
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


# inspect


def test_inspect_tells_what_is_in_it(run, tmp_path):
    values = tensors()
    values["weight"]["lm_head.weight"] += 2
    folder = write(tmp_path / "run", 5, values)
    code, out, err = run("inspect", folder, "--json", tmp_path / "x.json")
    assert (code, err) == (0, "")
    assert f"step 5, 40 samples, 1,280 tokens, format {FORMAT_VERSION}" in out
    found = json.loads((tmp_path / "x.json").read_text())
    assert [row["name"] for row in found["tensors"]] == [NAMES[2], NAMES[1], NAMES[0]]
    for row in found["tensors"]:
        expected = values["weight"][row["name"]].double()
        assert (row["shape"], row["dtype"], row["not_finite"]) == ([6, 4], "float32", 0)
        assert row["std"] == pytest.approx(expected.std(correction=0).item(), rel=1e-9)
        assert row["rms"] == pytest.approx(expected.square().mean().sqrt().item(), rel=1e-9)
        assert f"{row['name']} " in out and f"{row['std']:.4e}" in out
    assert found["weights"] == 72 and found["kinds"] == dict.fromkeys(KINDS, 3)
    assert found["total_bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_the_table_does_not_depend_on_the_files(run, tmp_path):
    tables = []
    for split in (1, 3):
        folder = write(tmp_path / str(split), 1, split=split)
        assert run("inspect", folder, "--json", tmp_path / "x.json")[0] == 0
        tables.append(json.loads((tmp_path / "x.json").read_text())["tensors"])
    assert tables[0] == tables[1]


def test_a_run_means_its_newest_checkpoint(run, tmp_path):
    for step in (2, 10):
        write(tmp_path / "run", step)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        assert "step 10," in run("inspect", path)[1]
    assert "step 2," in run("inspect", tmp_path / "run", "--step", 2)[1]
    code, _, err = run("inspect", tmp_path / "run", "--step", 3)
    assert code == 2 and "has checkpoints of steps 2, 10" in err
    code, _, err = run("inspect", tmp_path / "run" / "checkpoints" / folder_name(2), "--step", 10)
    assert code == 2 and "is one checkpoint" in err


def test_numbers_that_are_not_finite_are_counted(run, tmp_path):
    values = tensors()
    values["weight"][NAMES[0]][0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    code, out, _ = run("inspect", write(tmp_path, 1, values), "--json", tmp_path / "x.json")
    assert code == 0 and "3 not finite" in out
    text = (tmp_path / "x.json").read_text()
    assert "NaN" not in text and json.loads(text)["tensors"][-1]["std"] is None


# verify


def test_verify_names_the_damaged_file_and_the_newest_sound_checkpoint(run, tmp_path):
    folders = [write(tmp_path / "run", step, whole(), model=MODEL) for step in (1, 2, 3)]
    code, out, err = run("verify", tmp_path / "run")
    assert (code, err) == (0, "") and out.count(" ok\n") == 3 * 4
    assert f"newest valid checkpoint: {folders[2]}\n" in out
    flip(folders[2] / "exp_avg-00000.safetensors")
    code, out, err = run("verify", tmp_path / "run", "--json", tmp_path / "x.json")
    assert code == 2 and err.count("\n") == 1
    assert f"{folders[2] / 'exp_avg-00000.safetensors'}: its content is not what was written" in err
    assert out.count(" ok\n") == 3 * 4 - 1
    assert json.loads((tmp_path / "x.json").read_text())["newest_sound"] == str(folders[1])
    # A flipped bit leaves the size alone.
    assert run("verify", folders[2], "--quick")[0] == 0
    assert run("verify", folders[1])[0] == 0


@pytest.mark.parametrize("fault", ["cut", "missing", "manifest cut", "manifest missing"])
def test_verify_sees_other_damage_without_checksums(run, tmp_path, fault):
    folder = write(tmp_path / "run", 1, whole(), model=MODEL)
    assert run("verify", tmp_path / "run", "--quick")[0] == 0
    victim = folder / ("checkpoint.json" if "manifest" in fault else "weight-00000.safetensors")
    victim.unlink() if "missing" in fault else victim.write_bytes(victim.read_bytes()[:-1])
    code, out, err = run("verify", tmp_path / "run", "--quick")
    assert code == 2 and victim.name in err
    assert "newest valid checkpoint: none" in out


@pytest.mark.parametrize("command", ["inspect", "diff"])
def test_damage_is_one_line_elsewhere_too(run, tmp_path, command):
    good, bad = write(tmp_path / "good", 1), write(tmp_path / "bad", 1)
    path = bad / "weight-00000.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    code, _, err = run(command, *([good] if command == "diff" else []), bad)
    assert code == 2 and str(path) in err and err.count("\n") == 1


def test_folders_that_hold_no_checkpoint(run, tmp_path):
    for path, message in (
        (tmp_path / "nowhere", "there is no such folder"),
        (tmp_path, "holds no finished checkpoint"),
    ):
        code, _, err = run("verify", path)
        assert code == 2 and message in err


# diff


def test_equal_checkpoints_in_other_files(run, tmp_path):
    code, out, err = run("diff", write(tmp_path / "a", 1), write(tmp_path / "b", 1, split=3))
    assert (code, err) == (0, "") and "0 of 9 tensors differ" in out


def test_diff_measures_each_tensor(run, tmp_path):
    values = tensors()
    changed = values["exp_avg"][NAMES[1]]
    changed[2, 2] += 0.25
    write(tmp_path / "a", 1)
    write(tmp_path / "b", 2, values, learning_rate=5e-4)
    code, out, _ = run("diff", tmp_path / "a", tmp_path / "b", "--json", tmp_path / "x.json")
    assert code == 1
    assert "option  optimizer.lr: 0.001 -> 0.0005" in out
    found = json.loads((tmp_path / "x.json").read_text())
    (row,) = found["different"]
    assert (row["kind"], row["name"]) == ("exp_avg", NAMES[1])
    assert row["absolute"] == pytest.approx(0.25, rel=1e-6)
    largest = max(changed.abs().max(), tensors()["exp_avg"][NAMES[1]].abs().max())
    assert row["relative"] == pytest.approx(0.25 / float(largest), rel=1e-6)
    assert found["steps"] == [1, 2] and found["knobs"] == ["optimizer.lr: 0.001 -> 0.0005"]
    # The tolerance is on the relative difference.
    assert run("diff", tmp_path / "a", tmp_path / "b", "--tolerance", row["relative"] * 1.01)[0] == 0
    assert run("diff", tmp_path / "a", tmp_path / "b", "--tolerance", row["relative"] * 0.99)[0] == 1
    assert run("diff", tmp_path / "a", tmp_path / "b", "--tolerance", "nan")[0] == 2


def test_tensors_that_cannot_be_compared_differ_at_any_tolerance(run, tmp_path):
    values = tensors()
    values["weight"]["model.norm.weight"] = values["weight"].pop(NAMES[0])
    values["weight"][NAMES[1]] = values["weight"][NAMES[1]].T.contiguous()
    code, out, _ = run("diff", write(tmp_path / "a", 1), write(tmp_path / "b", 1, values), "--tolerance", 1e9)
    assert code == 1 and "3 of 10 tensors differ" in out
    for note in ("only in the first", "only in the second", "[6, 4] and [4, 6]"):
        assert note in out


def test_differences_of_special_numbers(monkeypatch):
    nan, inf = math.nan, math.inf
    for piece in (checkpoint_tools._CHUNK, 1):
        monkeypatch.setattr(checkpoint_tools, "_CHUNK", piece)
        for a, b, expected in (
            ([1.0, nan, inf], [1.0, nan, inf], (0.0, 0.0)),
            ([0.0, 2.0], [-0.0, 1.0], (1.0, 0.5)),
            ([1.0, nan], [1.0, 1.0], (inf, inf)),
            ([1.0, inf], [1.0, -inf], (inf, inf)),
            ([0.0], [0.0], (0.0, 0.0)),
            ([], [], (0.0, 0.0)),
        ):
            assert compare_tensors(torch.tensor(a), torch.tensor(b)) == expected


def test_knobs_of_other_versions():
    assert config_differences({"a": {"x": 1}, "b": 2}, {"a": {"x": 1, "y": 3}, "b": 2}) == ["a.y: (not an option) -> 3"]
    assert config_differences({"a": {"m": {"k": 1}}}, {"a": {"m": {"k": 2}}}) == ["a.m: {'k': 1} -> {'k': 2}"]


def test_layers_are_in_the_order_of_the_model():
    names = ["model.layers.0.x", "model.layers.2.x", "model.layers.10.a", "model.norm.weight", "lm_head.weight"]
    shuffled = [names[index] for index in (4, 2, 0, 3, 1)]
    assert sorted(shuffled, key=natural) == names


# How


@pytest.mark.parametrize("command", ["inspect", "diff"])
def test_one_tensor_of_a_checkpoint_at_a_time(run, tmp_path, monkeypatch, command):
    read, alive, most = CheckpointReader.read, [], [0]

    def counted(self, kind, name, *more):
        gc.collect()
        alive[:] = [reference for reference in alive if reference() is not None]
        tensor = read(self, kind, name, *more)
        alive.append(weakref.ref(tensor))
        most[0] = max(most[0], len(alive))
        return tensor

    monkeypatch.setattr(CheckpointReader, "read", counted)
    folders = [write(tmp_path / name, 1) for name in ("a", "b")]
    assert run(command, *folders[: 2 if command == "diff" else 1])[0] == 0
    # The one before is let go when the next has been read.
    assert 1 <= most[0] <= (4 if command == "diff" else 2)


def test_neither_megatron_nor_deepspeed_is_imported(tmp_path):
    """Negative control: the same question finds torch."""
    folder = write(tmp_path, 1)
    code = (
        f"import sys; sys.argv = ['x']; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        f"import checkpoint\nassert checkpoint.main(['diff', {str(folder)!r}, {str(folder)!r}]) == 0\n"
        "print('FOUND', *sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'megatron', 'deepspeed'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert out.stdout.splitlines()[-1] == "FOUND torch", out.stderr[-2000:]


def test_real_runs_on_two_layouts(
    run, tmp_path: Path, one_rank: RankPool, two_ranks: RankPool, data_cache: str
) -> None:
    more = ("--run.steps", "1", "--checkpoint.save_initial", "true", "--validation.interval", "0", "--data.cache")
    for pool, name, layout in ((one_rank, "one", ()), (two_ranks, "two", ("--parallel.tensor", "2"))):
        arguments = ["--run.folder", str(tmp_path / name), *more, data_cache, *layout]
        assert pool.run(run_trainer, arguments) == [0] * pool.size
        code, out, err = run("verify", tmp_path / name)
        assert (code, err) == (0, ""), out
    folders = (tmp_path / "one", tmp_path / "two")
    assert run("diff", *folders, "--step", 0)[0] == 0  # the same weights are drawn on any layout
    code, out, _ = run("diff", *folders)
    assert code == 1 and "parallel.tensor: 1 -> 2" in out
    first, last = (Path("checkpoints") / folder_name(step) for step in (0, 1))
    assert_same_training(folders[1] / last, folders[0] / last, folders[0] / first)
    _, out, _ = run("inspect", folders[1])
    assert "model.layers.3.self_attn.q_proj.weight" in out and "8 samples, 512 tokens" in out
