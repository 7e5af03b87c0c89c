"""One number from a live run, its checkpoint and its exported folder; and lineage."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exports import SHAPE
from support.ranks import RankPool
from support.train import run_trainer

from megagamma.checkpoint.manifest import MANIFEST, sealed
from megagamma.checkpoint.reader import CheckpointReader
from megagamma.checkpoint.safetensors_writer import checksum
from megagamma.commands import analyze_run, checkpoint
from megagamma.config.schema import INSTRUMENTS
from megagamma.dynamics.analysis import analyze_folder, records, turning_point
from megagamma.dynamics.lineage import lineage
from megagamma.errors import MegagammaError
from megagamma.huggingface.export import ExportOptions, export
from megagamma.huggingface.native import parity_outputs
from megagamma.runs.folder import RunFolder

STEPS = [0, 1, 2, 4, 6]


def options(folder: Path, cache: str, *more: str) -> list[str]:
    return [
        *SHAPE, "--run.folder", str(folder), "--data.cache", cache, "--run.steps", "6",
        *("--checkpoint.log_spaced", "true", "--checkpoint.save_initial", "true", "--dynamics.log_spaced", "true"),
        *("--dynamics.instruments", json.dumps(INSTRUMENTS), *more),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, four_ranks: RankPool, data_cache: str) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    layout = [
        "--parallel.tensor",
        "2",
        "--parallel.pipeline",
        "2",
        "--deepspeed_config",
        "configs/deepspeed/zero1.json",
    ]
    assert four_ranks.run(run_trainer, options(folder, data_cache, *layout)) == [0] * 4
    return folder


def numbers(line: dict[str, Any]) -> dict[tuple[str, str, int], float]:
    found = {}
    for name, values in line["matrices"].items():
        for key, value in values.items():
            for index, one in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(one, float):
                    found[name, key, index] = one
    return found


def activations(line: dict[str, Any]) -> dict[str, float]:
    found = line["activations"]
    return {"logit_rms": found["output"]["logit_rms"]} | {
        f"{kind} {place} {key}": value
        for kind in ("layers", "heads")
        for place, values in found[kind].items()
        for key, value in values.items()
    }


def test_live_checkpoint_and_export_agree(run: Path, tmp_path: Path, one_rank: RankPool) -> None:
    lines = RunFolder(run).dynamics().read()
    assert [line["step"] for line in lines] == STEPS
    live = numbers(lines[-1])
    folder = run / "checkpoints" / "step_00000006"
    saved_line = analyze_folder(folder, INSTRUMENTS)
    saved = numbers(saved_line)
    assert saved == pytest.approx(live, rel=1e-5) and len(live) > 700
    assert ("model.embed_tokens.weight", "signature_correlation", 0) in live
    flat = pytest.approx(activations(lines[-1]), rel=2e-5, abs=1e-7)
    assert activations(saved_line) == flat and len(activations(saved_line)) > 40
    exported = export(
        folder, tmp_path / "hf", ExportOptions(), quiet=True, say=lambda _: None,
        native=lambda inputs: one_rank.run(parity_outputs, inputs)[0],
    )  # fmt: skip
    with pytest.raises(MegagammaError, match="embeddings and activations need held-out text, and it lies in no run"):
        analyze_folder(exported, INSTRUMENTS)
    exported_line = analyze_folder(exported, INSTRUMENTS, RunFolder(run))
    assert activations(exported_line) == flat
    theirs = numbers(exported_line)
    # An exported model has neither norms' roles nor moments; its matrices are these.
    kinds = {key for name, key, _ in live if "norm.weight" not in name and not key.startswith(("update", "exp_avg"))}
    expected = {key: value for key, value in live.items() if key[1] in kinds and "norm.weight" not in key[0]}
    assert theirs == pytest.approx(expected, rel=1e-5)
    # Negative control: another step's numbers are not these.
    other = analyze_folder(run / "checkpoints" / "step_00000004", INSTRUMENTS)
    assert numbers(other) != pytest.approx(live, rel=1e-3) and activations(other) != flat


def test_the_update_is_the_update(tmp_path: Path, two_ranks: RankPool, data_cache: str) -> None:
    """What the moments say of the last update is the difference of two checkpoints, a step apart, under ZeRO 1."""
    folder = tmp_path / "run"
    every = ["--checkpoint.interval", "1", "--checkpoint.keep_last", "0", "--optimizer.lr_factors", "{mlp_down: 0.5}"]
    assert two_ranks.run(run_trainer, options(folder, data_cache, *every)) == [0, 0]
    before, after = (CheckpointReader(folder / "checkpoints" / f"step_0000000{step}") for step in (5, 6))
    line = RunFolder(folder).dynamics().read()[-1]
    for name in after.names():
        update = after.read("weight", name).double() - before.read("weight", name).double()
        if "embed" not in name and "lm_head" not in name:  # those have padded rows
            rms = float(update.square().mean().sqrt())
            assert line["matrices"][name]["update_rms"] == pytest.approx(rms, rel=1e-3), name
    assert line["roles"]["query"]["gradient_norm"] > 0
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["dynamics/query/condensation"] == line["roles"]["query"]["condensation"]
    whole = sum(line["roles"][role]["gradient_norm"] ** 2 for role in line["roles"])
    assert whole**0.5 == pytest.approx(last["grad_norm"], rel=1e-4)


def test_analysis_fills_in_what_was_not_measured(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    lines = (copy / "dynamics.jsonl").read_text().splitlines()
    (copy / "dynamics.jsonl").write_text("\n".join(lines[:2]) + "\n{cut off")
    output = tmp_path / "all.json"
    assert analyze_run.main([str(copy), "--json", str(output)]) == 0
    out = capsys.readouterr().out
    assert "step 6 (3 of 3) took" in out and "in brackets a random matrix" in out
    assert [line["step"] for line in records(RunFolder(copy))] == STEPS
    assert [line["step"] for line in json.loads(output.read_text())[str(copy)]] == STEPS
    assert len((copy / "analysis.jsonl").read_text().splitlines()) == 3
    assert analyze_run.main([str(copy)]) == 0
    assert len((copy / "analysis.jsonl").read_text().splitlines()) == 3, "nothing is measured twice"
    found, whole = records(RunFolder(copy))[-1], records(RunFolder(run))[-1]
    assert found["roles"]["mlp_up"]["stable_rank"] == pytest.approx(whole["roles"]["mlp_up"]["stable_rank"], rel=1e-5)


def test_what_cannot_be_analyzed(run: Path, tmp_path: Path) -> None:
    with pytest.raises(MegagammaError, match=r"has no checkpoint of step 5: it has 0, 1, 2, 4, 6"):
        analyze_run.main([str(run), "--steps", "5"])
    with pytest.raises(MegagammaError, match="instrument 'weight' is not known: use weights"):
        analyze_run.main([str(run), "--instruments", "weight"])
    with pytest.raises(MegagammaError, match="neither a checkpoint nor a Hugging Face folder"):
        analyze_run.main([str(tmp_path)])
    shutil.copy(run / "config.yaml", tmp_path)
    with pytest.raises(MegagammaError, match="has no checkpoints to measure"):
        analyze_run.main([str(tmp_path)])


def test_turning_point() -> None:
    assert turning_point([0, 1, 2, 4], [0.1, 0.3, 0.5, 0.2]) == 2
    assert turning_point([0, 1, 2], [0.1, 0.2, 0.3]) is None and turning_point([0, 1], [1.0, 0.0]) is None


def reseal(folder: Path, **changes: Any) -> None:
    """As somebody would who copies steps with care: checksums and the manifest fit what is there."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for entry in manifest["files"]:
        path = folder / entry["file"]
        entry["bytes"], entry["xxh3_128"] = path.stat().st_size, checksum(path)
    manifest.pop("xxh3_128", None)
    (folder / MANIFEST).write_text(json.dumps(sealed({**manifest, **changes})))


def swapped(run: Path) -> None:
    one, two = (run / "checkpoints" / f"step_0000000{step}" for step in (2, 4))
    manifests = [json.loads((folder / MANIFEST).read_text()) for folder in (one, two)]
    one.rename(run / "aside")
    two.rename(one)
    (run / "aside").rename(two)
    for folder, old in zip((one, two), manifests, strict=True):
        reseal(folder, step=old["step"], adam_step=old["adam_step"], consumed_samples=old["consumed_samples"])


def copied(run: Path) -> None:
    for file in (run / "checkpoints" / "step_00000002").glob("*.safetensors"):
        shutil.copy(file, run / "checkpoints" / "step_00000004" / file.name)
    reseal(run / "checkpoints" / "step_00000004")


def reseeded(run: Path) -> None:
    folder = run / "checkpoints" / "step_00000000"
    config = json.loads((folder / MANIFEST).read_text())["config"]
    config["run"]["seed"] = 99
    reseal(folder, config=config)


def touched(run: Path) -> None:
    """One weight of step 0 is changed a little."""
    (path,) = (run / "checkpoints" / "step_00000000").glob("weight-00000*")
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("proj.weight"))
    tensors[name][0, 0] += 1e-6
    save_file(tensors, path)
    reseal(path.parent)


def spoiled_moments(run: Path) -> None:
    """One second moment in the middle of the last file is below zero."""
    path = sorted((run / "checkpoints" / "step_00000004").glob("exp_avg_sq-*"))[-1]
    tensors = load_file(path)
    sorted(tensors.items())[len(tensors) // 2][1].view(-1)[3] = -1e-9
    save_file(tensors, path)
    reseal(path.parent)


def forgotten_moments(run: Path) -> None:
    folder = run / "checkpoints" / "step_00000004"
    for path in folder.glob("exp_avg_sq-*"):
        save_file({name: torch.zeros_like(values) for name, values in load_file(path).items()}, path)
    reseal(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (spoiled_moments, "is negative or not finite"),
        (forgotten_moments, "adam_step=4, and its moments are all zero"),
        (swapped, "steps are swapped"),
        (copied, "share the content of"),
        (reseeded, r"is not the draw of run\.seed=99"),
        (touched, "is not the draw of"),
    ],
)
def test_lineage_catches(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, message: str
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    whole = lineage(RunFolder(copy))
    assert whole.problems == [] and "to the bit" in whole.shown[0] and "5 steps" in whole.shown[1]
    make(copy)
    assert checkpoint.main(["lineage", str(copy)]) == 1
    assert re.search(f"WRONG .*{message}", capsys.readouterr().out)


def test_lineage_of_exports_and_of_less(run: Path, tmp_path: Path, one_rank: RankPool) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for step in (4, 6):
        export(
            copy / "checkpoints" / f"step_0000000{step}", copy / "hf" / f"step_0000000{step}",
            ExportOptions(dtype=torch.bfloat16), quiet=True, say=lambda _: None,
            native=lambda inputs: one_rank.run(parity_outputs, inputs)[0],
        )  # fmt: skip
    assert sum("holds the weights of step" in line for line in lineage(RunFolder(copy)).shown) == 2
    shutil.copy(copy / "hf/step_00000004/model.safetensors", copy / "hf/step_00000006/model.safetensors")
    assert "is not that of step 6" in lineage(RunFolder(copy)).problems[0]
    for step in (0, 1, 2):
        shutil.rmtree(copy / "checkpoints" / f"step_0000000{step}")
    found = lineage(RunFolder(copy))
    assert any("step 0 was not saved" in line for line in found.not_shown)
    assert any("2 checkpoints are too few" in line for line in found.not_shown)
