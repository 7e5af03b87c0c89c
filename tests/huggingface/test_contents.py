"""An exported model is what parity.json proved, or it is not used as that: whatever was altered in its folder is seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exports import save_model
from support.ranks import RankPool

from megagamma.checkpoint.safetensors_writer import checksum
from megagamma.cli import main_guard
from megagamma.commands import convert_and_eval
from megagamma.errors import ConfigurationError
from megagamma.huggingface.contents import altered_files, check_unaltered, model_files
from megagamma.huggingface.export import ExportOptions, export
from megagamma.huggingface.importing import import_model
from megagamma.huggingface.native import ParityInputs, ParityOutputs, parity_outputs
from megagamma.huggingface.provenance import folder_hash, is_proven


@pytest.fixture(scope="module")
def native(one_rank: RankPool) -> Callable[[ParityInputs], ParityOutputs]:
    return lambda inputs: one_rank.run(parity_outputs, inputs)[0]


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, one_rank: RankPool, data_cache: str, native: Callable[..., Any]
) -> tuple[Path, Path]:
    """A checkpoint, and the folder that was made of it."""
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = Path(one_rank.run(save_model, ["--data.cache", data_cache], str(folder / "run"))[0])
    return checkpoint, export(
        checkpoint, folder / "run" / "hf" / checkpoint.name, ExportOptions(), native=native, quiet=True
    )


@pytest.fixture
def folder(exported: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported[1], tmp_path / "hf"))


def edit(name: str, **values: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


def zero(folder: Path) -> None:
    weights = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


FAULTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config": ("config.json", edit("config.json", rope_theta=5e5)),
    "generation": ("generation_config.json", edit("generation_config.json", do_sample=True)),
    "weights are zero": ("model.safetensors", zero),
    "tokenizer is empty": ("tokenizer.json", lambda folder: (folder / "tokenizer.json").write_text("{}")),
    "tokenizer is missing": ("tokenizer.json", lambda folder: (folder / "tokenizer.json").unlink()),
    "its settings": ("tokenizer_config.json", edit("tokenizer_config.json", add_bos_token=True)),
    "weights are added": ("pytorch_model.bin", lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x")),
    "code is added": ("modeling.py", lambda folder: (folder / "modeling.py").write_text("1")),
    "a setting is added": ("added_tokens.json", lambda folder: (folder / "added_tokens.json").write_text("{}")),
}


def test_what_is_proven_is_listed(exported: tuple[Path, Path]) -> None:
    folder = exported[1]
    proven = json.loads((folder / "parity.json").read_text())["files"]
    assert proven == {name: checksum(folder / name) for name in model_files(folder)}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < set(proven)
    assert altered_files(folder) == [] and check_unaltered(folder)
    assert folder_hash(folder) == json.loads((folder / "config.json").read_text())["megagamma"]["identity"]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_altered_is_named_wherever_the_model_is_used(folder: Path, tmp_path: Path, fault: str) -> None:
    name, spoil = FAULTS[fault]
    spoil(folder)
    assert altered_files(folder) == [name]
    for use in (folder_hash, lambda path: import_model(path, tmp_path / "run", quiet=True)):
        with pytest.raises(ConfigurationError, match=f"{name} is not what parity.json proved .1 altered"):
            use(folder)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_it_is_converted_again(
    exported: tuple[Path, Path], folder: Path, native: Callable[..., Any], tmp_path: Path
) -> None:
    checkpoint, _ = exported
    said: list[str] = []

    def convert() -> None:
        export(checkpoint, folder, ExportOptions(), native=native, quiet=True, say=said.append)

    convert()
    assert said == [f"{folder}: is this model already"]
    FAULTS["weights are zero"][1](folder)
    convert()
    assert "parity (whole model)" in said[-1] and altered_files(folder) == []


def proven(folder: Path) -> bool:
    """Whether a conversion would leave the folder as it is."""
    identity = json.loads((folder / "config.json").read_text())["megagamma"]["identity"]
    tensors: list[Any] = [SimpleNamespace(name=name) for name in load_file(folder / "model.safetensors")]
    return is_proven(folder, identity, tensors, tolerance=1e-4, whole_model=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_altered_is_not_proven(folder: Path, fault: str) -> None:
    assert proven(folder)
    FAULTS[fault][1](folder)
    assert not proven(folder)


def test_a_proof_without_hashes_is_none(folder: Path) -> None:
    """As versions before 0.2 wrote it: nothing to compare with, so it is proven anew."""
    parity = json.loads((folder / "parity.json").read_text())
    del parity["files"]
    (folder / "parity.json").write_text(json.dumps(parity))
    assert altered_files(folder) is None and not check_unaltered(folder) and not proven(folder)


def test_it_is_not_scored_in_the_checkpoints_name(
    exported: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, folder = exported
    config = (folder / "config.json").read_bytes()
    try:
        edit("config.json", rope_theta=5e5)(folder)
        assert main_guard(lambda: convert_and_eval.main([str(checkpoint), "--eval_only"])) == 2
        assert "config.json is not what parity.json proved" in capsys.readouterr().err
    finally:
        (folder / "config.json").write_bytes(config)


def test_what_no_loader_reads_is_no_content(folder: Path) -> None:
    before = folder_hash(folder)
    (folder / "README.md").write_text("a card of my own")
    (folder / "notes.json").write_text("{}")
    (folder / "eval").mkdir()
    (folder / "eval" / "config.json").write_text("{}")
    assert folder_hash(folder) == before


def test_without_its_proof_it_is_any_other_model(folder: Path) -> None:
    """Whose hash follows the content of every file, and not their times."""
    (folder / "parity.json").unlink()
    hashes = {folder_hash(folder)}
    (folder / "model.safetensors").touch()
    assert {folder_hash(folder)} == hashes
    for fault in FAULTS:
        copy = Path(shutil.copytree(folder, folder.parent / fault.replace(" ", "_")))
        FAULTS[fault][1](copy)
        hashes.add(folder_hash(copy))
    assert len(hashes) == 1 + len(FAULTS)
