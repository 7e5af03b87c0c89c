"""Files written tensor by tensor are what the safetensors package reads and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megagamma.checkpoint.safetensors_writer import ShardWriter, checksum

# The writer converts 2^20 numbers at a time; this is a few more.
LONG = (1 << 20) + 7


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "matrix": torch.randn(3, 5, generator=generator),
        "long": torch.randn(LONG, generator=generator),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(4, 6, generator=generator).t(),
        "special": torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 1e-45, 3.4e38]),
        "name with ünicode/and.dots": torch.ones(1, 1, 1, 2),
    }


def write(path: Path, values: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> tuple[int, str]:
    writer = ShardWriter(path, [(name, tuple(tensor.shape)) for name, tensor in values.items()], dtype)
    for name, tensor in values.items():
        writer.write(name, tensor)
    return writer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_package_reads_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    path, values = tmp_path / "x.safetensors", tensors()
    size, digest = write(path, values, dtype)
    assert (path.stat().st_size, checksum(path)) == (size, digest)
    loaded = load_file(path)
    assert loaded.keys() == values.keys()
    for name, tensor in values.items():
        assert loaded[name].dtype == dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].nan_to_num(7.0), tensor.to(dtype).nan_to_num(7.0)), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_slice("long")[LONG - 10 :], values["long"][LONG - 10 :].to(dtype))


def test_tensors_lie_as_the_package_lays_them(tmp_path: Path) -> None:
    values = {name: tensor.contiguous() for name, tensor in tensors().items()}
    write(tmp_path / "ours.safetensors", values)
    save_file(values, tmp_path / "theirs.safetensors")

    def header_and_data(name: str) -> tuple[dict[str, dict[str, object]], bytes, int]:
        content = (tmp_path / name).read_bytes()
        length = int.from_bytes(content[:8], "little")
        return json.loads(content[8 : 8 + length]), content[8 + length :], length

    ours, theirs = header_and_data("ours.safetensors"), header_and_data("theirs.safetensors")
    assert ours[2] % 8 == theirs[2] % 8 == 0, "the data are aligned"
    assert len(ours[1]) == len(theirs[1])
    for name in values:
        assert (ours[0][name]["dtype"], ours[0][name]["shape"]) == (theirs[0][name]["dtype"], theirs[0][name]["shape"])
        (a, b), (c, d) = ours[0][name]["data_offsets"], theirs[0][name]["data_offsets"]  # type: ignore[misc]
        assert ours[1][a:b] == theirs[1][c:d], name


def test_shard_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x.safetensors", [("a", (2, 3)), ("b", (4,))])
    with pytest.raises(ValueError, match="expected a"):
        writer.write("b", torch.ones(4))
    writer.abandon()
    writer = ShardWriter(tmp_path / "x.safetensors", [("a", (2, 3))])
    with pytest.raises(ValueError, match=r"expected a \(2, 3\), was given a \(3, 2\)"):
        writer.write("a", torch.ones(3, 2))
    writer.abandon()
    writer = ShardWriter(tmp_path / "y.safetensors", [("a", (2, 3)), ("b", (4,))])
    writer.write("a", torch.arange(6.0).view(2, 3))
    with pytest.raises(ValueError, match="1 tensors are missing"):
        writer.close()
    writer.write("b", torch.ones(4, dtype=torch.bfloat16))
    size, digest = writer.close()
    path = tmp_path / "y.safetensors"
    assert (path.stat().st_size, checksum(path)) == (size, digest)
    loaded = load_file(path)
    assert loaded["a"].equal(torch.arange(6.0).view(2, 3))
    assert loaded["b"].equal(torch.ones(4))


def test_checksum_sees_one_bit(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    _, digest = write(path, {"a": torch.ones(100)})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert checksum(path) != digest


def test_a_file_of_another_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        ShardWriter(tmp_path / "x.safetensors", [("a", (1,))], torch.float16)
    assert not (tmp_path / "x.safetensors").exists()
