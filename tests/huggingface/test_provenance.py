"""Hashes of exported folders, and what an export may take the place of."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.huggingface.contents import file_hashes, is_export
from megagamma.huggingface.formats import Exported
from megagamma.huggingface.provenance import (
    check_destination,
    exported_provenance,
    folder_hash,
    is_proven,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What an export leaves, of one tensor."""
    output = tmp_path / "hf"
    output.mkdir()
    save_file({"a": torch.ones(2)}, output / "model.safetensors")
    config = {"megagamma": {"identity": "hash", "step": 3}, "eos_token_id": 2}
    (output / "config.json").write_text(json.dumps(config))
    proof(output)
    return output


def proof(folder: Path, **values: object) -> None:
    """Write parity.json for what the folder holds now."""
    parity = {"holds": True, "tolerance": 1e-4, "compared": "whole model", "files": file_hashes(folder)} | values
    (folder / "parity.json").write_text(json.dumps(parity))


def proven(
    folder: Path, content_hash: str = "hash", name: str = "a", tolerance: float = 1e-4, whole: bool = True
) -> bool:
    tensors = [Exported(name, (2,), None)]  # type: ignore[arg-type]
    return is_proven(folder, content_hash, tensors, tolerance=tolerance, whole_model=whole)


def test_provenance(folder: Path) -> None:
    assert exported_provenance(folder) == {"identity": "hash", "step": 3, "eos_token_id": 2}
    assert folder_hash(folder) == "hash"
    (folder / "config.json").write_text("{}")
    assert exported_provenance(folder) == {}
    (folder / "config.json").unlink()
    with pytest.raises(MegagammaError, match=r"config\.json: cannot be read"):
        exported_provenance(folder)


def test_the_hash_of_a_foreign_folder_follows_its_files(folder: Path) -> None:
    hashes = set()
    (folder / "parity.json").unlink()
    for text, values, seconds in (("{}", 1.0, 1), ('{"a": 1}', 1.0, 1), ("{}", 2.0, 1), ("{}", 1.0, 2)):
        (folder / "config.json").write_text(text)
        save_file({"a": torch.full((2,), values)}, folder / "model.safetensors")
        os.utime(folder / "model.safetensors", (seconds, seconds))
        assert folder_hash(folder) == folder_hash(folder)
        hashes.add(folder_hash(folder))
    assert len(hashes) == 3, "the time of a file is none of its content"


def test_a_folder_that_is_proven(folder: Path) -> None:
    assert proven(folder)
    assert (
        not proven(folder, content_hash="other") and not proven(folder, name="b") and not proven(folder, tolerance=1e-5)
    )
    proof(folder, compared="layers 0, 1, each alone")
    assert not proven(folder) and proven(folder, whole=False)
    proof(folder, compared="layers 0, 1, each alone", holds=False)
    assert not proven(folder, whole=False)
    (folder / "parity.json").write_text("{")
    assert not proven(folder, whole=False)
    (folder / "parity.json").unlink()
    assert not is_export(folder) and not proven(folder, whole=False)


def test_destinations(folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    check_destination(tmp_path / "new", checkpoint, overwrite=False)
    check_destination(tmp_path / "empty", checkpoint, overwrite=False)
    check_destination(folder, checkpoint, overwrite=True)
    for output, overwrite, message in (
        (folder, False, "holds another export: use --overwrite"),
        (tmp_path / "file", True, "is a file"),
        (tmp_path / "run" / "checkpoints", True, "holds the checkpoint"),
        (tmp_path, True, "holds the checkpoint"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            check_destination(output, checkpoint, overwrite)
    (tmp_path / "empty" / "thesis.txt").touch()
    with pytest.raises(ConfigurationError, match=r"--save .*empty: holds files, and is no exported model"):
        check_destination(tmp_path / "empty", checkpoint, True, option="--save")
