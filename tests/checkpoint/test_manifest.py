"""What is wrong with a checkpoint is named before a step is made of it: values, names, tensors, links, older forms."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megagamma.checkpoint.inspection import seal, verify_files
from megagamma.checkpoint.manifest import _digest, check_complete, read_manifest, sealed
from megagamma.checkpoint.reader import CheckpointReader, tensor_key, verify_all
from megagamma.checkpoint.retention import prune
from megagamma.checkpoint.safetensors_writer import ShardWriter
from megagamma.cli import main_guard
from megagamma.commands import checkpoint as command
from megagamma.config.schema import ModelConfig, resolve_model
from megagamma.errors import CheckpointError
from megagamma.model.parameters import KINDS, logical_parameters
from megagamma.runs.folder import step_links, steps_saved

MODEL = resolve_model(
    ModelConfig(hidden_size=4, num_layers=1, num_attention_heads=1, vocab_size=6, vocab_size_multiple=2)
)


def shard(folder: Path, kind: str, more_rows: int = 0) -> dict[str, Any]:
    """Write a file with all tensors of a kind; its entry. With more rows than the model has where asked."""
    shapes = {one.name: (one.shape[0] + more_rows, *one.shape[1:]) for one in logical_parameters(MODEL)}
    writer = ShardWriter(
        folder / f"{kind}-00000.safetensors", [(tensor_key(kind, name), shape) for name, shape in shapes.items()]
    )
    for name, shape in shapes.items():
        writer.write(tensor_key(kind, name), torch.ones(shape))
    size, digest = writer.close()
    return {"file": writer.path.name, "kind": kind, "bytes": size, "xxh3_128": digest, "tensors": list(shapes)}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of step 10, as a run writes it."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "step_00000010"
    folder.mkdir(parents=True)
    manifest = {
        "format": "megagamma checkpoint", "version": 2, "step": 10, "adam_step": 9, "consumed_samples": 80, "seconds": 1.5,
        "config": {"model": asdict(MODEL), "data": {"sequence_length": 32}}, "tokenizer": "x", "progress": {},
        "files": [shard(folder, kind) for kind in KINDS],
    }  # fmt: skip
    store(folder, sealed(manifest))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "checkpoints" / original.name))


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoint.json").read_text())  # type: ignore[no-any-return]


def store(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "checkpoint.json").write_text(json.dumps(manifest))


def old_form(folder: Path) -> dict[str, Any]:
    """The manifest as versions before 0.2 wrote it."""
    manifest = stored(folder)
    del manifest["checksum"], manifest["moments"]
    store(folder, manifest)
    return manifest


def check(folder: Path) -> None:
    """What a resume checks."""
    verify_all(folder, read_manifest(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", 11), ("consumed_samples", 88), ("adam_step", 8), ("seconds", 2.5), ("tokenizer", "y"),
        ("progress", {"a": 1}), ("moments", False), ("new", 1),
    ],
)  # fmt: skip
def test_an_edited_value_is_seen(folder: Path, key: str, value: Any) -> None:
    check(folder)
    store(folder, {**stored(folder), key: value})
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: its content is not what was written \(checksum\)"):
        read_manifest(folder)
    (row,) = verify_files(folder)
    assert "checksum" in row["problem"]


def test_order_and_spacing_are_no_content(folder: Path) -> None:
    text = json.dumps(dict(sorted(stored(folder).items())), indent=7)
    (folder / "checkpoint.json").write_text(text)
    check(folder)


def entry(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["files"][1].update(values)


def value(key: str, new: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.update({key: new})


def of_config(section: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["config"].setdefault(section, {}).update(values)


# What a checksum does not see: written so, or in the form of earlier versions.
WRONG = {
    "step of another folder": (value("step", 9), "is named step_00000010: give the folder the name step_00000009"),
    "step is a text": (value("step", "10"), "step='10' must be a whole number"),
    "step is true": (value("step", True), "step=True must be"),
    "negative": (value("adam_step", -1), "adam_step=-1 must be"),
    "adam ahead": (value("adam_step", 11), "adam_step=11 must be at most step=10"),
    "too few samples": (value("consumed_samples", 3), "consumed_samples=3 must be at least step=10"),
    "not a time": (value("seconds", float("nan")), "seconds=nan must be"),
    "no time": (value("seconds", None), "seconds=None must be"),
    "tokenizer": (value("tokenizer", []), "tokenizer=a list must be a text"),
    "progress": (value("progress", []), "progress=a list must be an object"),
    "config": (value("config", "x"), "config='x' must be an object"),
    "config's section": (lambda manifest: manifest["config"].update(run=[1]), "'run' must be a section of options"),
    "length": (of_config("data", sequence_length=0), r"data\.sequence_length=0 must be"),
    "option": (of_config("run", sausage=1), "its config cannot be used .*sausage"),
    "exponents": (of_config("init", exponents=7), "config"),
    "width": (of_config("model", hidden_size="wide"), "checkpoint.json"),
    "another model": (of_config("model", hidden_size=8), "is F32 .*where the config of checkpoint.json asks for F32"),
    "layers without end": (of_config("model", num_layers=10**9), "num_layers=1000000000 must be at most"),
    "no vocabulary": (of_config("model", vocab_size=None), "names no model.vocab_size"),
    "no files": (value("files", []), "files=a list must be a list that is not empty"),
    "files is text": (value("files", "weight"), "files='weight' must be a list"),
    "an entry is text": (value("files", ["weight"]), r"files\[0\]: is not an object"),
    "a path": (entry(file="../../x.safetensors"), r"files\[1\]: file='../../x.safetensors' must be the plain name"),
    "an absolute path": (entry(file="/etc/x.safetensors"), "must be the plain name"),
    "a null byte": (entry(file="a\0.safetensors"), "must be the plain name"),
    "kind": (entry(kind=["weight"]), "kind=a list must be weight, exp_avg, exp_avg_sq"),
    "bytes": (entry(bytes=1.5), "bytes=1.5 must be"),
    "digest": (entry(xxh3_128="x"), "xxh3_128='x' must be"),
    "tensors": (entry(tensors=[]), "tensors must be a list of names that is not empty"),
    "tensor names": (entry(tensors=[1]), "tensors must be a list of names"),
    "listed twice": (lambda manifest: manifest["files"].append(manifest["files"][0]), "is listed twice"),
    "moments": (lambda manifest: manifest["files"].pop(), "some are missing"),
    "no moments": (lambda manifest: manifest["files"].__delitem__(slice(1, None)), "some are missing|says that there were"),
    "a tensor too few": (lambda manifest: manifest["files"][1]["tensors"].pop(), "exp_avg of 'lm_head.weight' is missing"),
    "a tensor renamed": (
        lambda manifest: manifest["files"][1]["tensors"].__setitem__(0, "x"), "is missing|is not of the model",
    ),
    "version": (value("version", True), "format version True is not 2"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["sealed", "old"])
@pytest.mark.parametrize("name", WRONG)
def test_values_that_make_no_sense(folder: Path, name: str, form: str) -> None:
    change, message = WRONG[name]
    manifest = old_form(folder) if form == "old" else stored(folder)
    change(manifest)
    if form == "sealed":
        manifest["checksum"] = _digest(manifest)
    store(folder, manifest)
    with pytest.raises(CheckpointError, match=message) as raised:
        check(folder)
    assert "\n" not in str(raised.value)
    assert any(row["problem"] for row in verify_files(folder))


@pytest.mark.parametrize(
    "text",
    [
        "", "[", "3", "null", "[]", '"x"', "1" * 5000, "[" * 100_000, '{"version":' * 5000, "\udcff", '{"version": 1e999}',
        '{"version": 2, "step": ' + "9" * 4000 + "}", '{"version": 2, "config": ' + "[" * 900 + "]" * 900 + "}",
    ],
)  # fmt: skip
def test_a_manifest_of_any_text(folder: Path, text: str) -> None:
    (folder / "checkpoint.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
        read_manifest(folder)


def test_a_manifest_that_is_no_file(folder: Path) -> None:
    (folder / "checkpoint.json").unlink()
    os.mkfifo(folder / "checkpoint.json")
    with pytest.raises(CheckpointError, match="not a file"):
        read_manifest(folder)


def test_larger_tensors_are_not_cut_to_fit(folder: Path) -> None:
    manifest = stored(folder)
    manifest["files"][0] = shard(folder, "weight", more_rows=1)
    store(folder, sealed(manifest))
    with pytest.raises(
        CheckpointError, match=r"is F32 \[7, 4\], where the config of checkpoint.json asks for F32 \[6, 4\]"
    ):
        check(folder)
    name, shape = "model.embed_tokens.weight", (6, 4)
    with pytest.raises(CheckpointError, match=r"has shape \[7, 4\], the model needs \[6, 4\]"):
        CheckpointReader(folder).read("weight", name, (0, 0), shape, shape)
    assert CheckpointReader(folder).read("exp_avg", name, (0, 0), shape, shape).shape == shape


def test_a_file_with_another_ones_tensors(folder: Path) -> None:
    """Same size, its checksum in the manifest, and its tensors those of another kind."""
    manifest = stored(folder)
    first, second = (entry["file"] for entry in manifest["files"][:2])
    shutil.copy(folder / first, folder / second)
    manifest["files"][1] |= {key: manifest["files"][0][key] for key in ("bytes", "xxh3_128")}
    store(folder, sealed(manifest))
    with pytest.raises(
        CheckpointError, match=r"exp_avg-00000\.safetensors: holds other tensors than checkpoint\.json lists"
    ):
        check(folder)


def test_a_model_without_moments_says_so(folder: Path) -> None:
    manifest = stored(folder) | {"adam_step": 0}
    manifest["files"] = manifest["files"][:1]
    store(folder, sealed(manifest))
    check(folder)
    assert read_manifest(folder)["moments"] is False
    # The same list with the word of a checkpoint that has them.
    store(folder, {key: one for key, one in manifest.items() if key != "checksum"})
    with pytest.raises(CheckpointError, match="some are missing"):
        check(folder)


# -- checkpoints of earlier versions -------------------------------------------------------------------------------


def test_seal_adds_what_earlier_versions_lack(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = old_form(folder)
    check(folder)
    run = folder.parent.parent
    assert main_guard(lambda: command.main(["verify", str(run)])) == 0
    assert "no checksum of its own" in capsys.readouterr().out
    assert main_guard(lambda: command.main(["seal", str(run)])) == 0
    assert "step_00000010: sealed" in capsys.readouterr().out
    after = stored(folder)
    assert {key: after[key] for key in before} == before and after["moments"] is True
    check(folder)
    content = (folder / "checkpoint.json").read_bytes()
    assert not seal(folder) and (folder / "checkpoint.json").read_bytes() == content
    assert main_guard(lambda: command.main(["seal", str(run)])) == 0
    assert "is sealed already" in capsys.readouterr().out


def test_what_is_corrupt_is_not_sealed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old_form(folder)
    path = folder / "weight-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    before = (folder / "checkpoint.json").read_bytes()
    assert main_guard(lambda: command.main(["seal", str(folder)])) == 2
    assert "weight-00000.safetensors: its content is not what was written" in capsys.readouterr().err
    assert (folder / "checkpoint.json").read_bytes() == before


# -- links ---------------------------------------------------------------------------------------------------------


def test_a_link_is_none_of_the_runs_checkpoints(folder: Path) -> None:
    root = folder.parent
    link = root / "step_00000099"
    link.symlink_to(folder.name)
    (root / "step_00000098").symlink_to("nowhere")
    assert steps_saved(root) == [10]
    assert step_links(root) == [root / "step_00000098", link]
    # To keep one is to keep the checkpoint, not the link to it.
    assert prune(root, 1, set()) == []
    check(folder)
    assert link.is_symlink()
    # A path that the user gives is followed: what it leads to counts.
    assert read_manifest(link)["step"] == 10
    assert main_guard(lambda: command.main(["verify", str(link)])) == 0
    # A copy under another step's name is none of that step.
    shutil.copytree(folder, root / "step_00000011")
    with pytest.raises(CheckpointError, match="holds step 10, and its folder is named step_00000011"):
        read_manifest(root / "step_00000011")
    shutil.copytree(folder, root / "kept")
    assert read_manifest(root / "kept")["step"] == 10


def test_a_shard_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    """Its content counts; the link is somebody's, and keeps the checkpoint from being pruned."""
    path, elsewhere = folder / "weight-00000.safetensors", tmp_path / "elsewhere.safetensors"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)
    check(folder)
    content = elsewhere.read_bytes()
    elsewhere.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"weight-00000\.safetensors: its content is not what was written"):
        check(folder)
    (folder.parent / "step_00000011").mkdir()
    assert prune(folder.parent, 1, set()) == []
    assert elsewhere.is_file() and path.is_symlink()


def test_complete_means_each_tensor_of_the_model(folder: Path) -> None:
    shapes = check_complete(folder, read_manifest(folder))
    assert shapes == {one.name: one.shape for one in logical_parameters(MODEL)}
