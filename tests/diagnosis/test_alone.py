"""What the doctor finds on one process: good machines pass, and each fault is named with its fix."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from megagamma.cli import main_guard
from megagamma.commands import doctor
from megagamma.diagnosis import machine, storage
from megagamma.diagnosis.findings import Finding, lines, within, worst


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    code = main_guard(lambda: doctor.main(["--mib", "1", "--json", *arguments]))
    captured = capsys.readouterr()
    return code, json.loads(captured.out or "{}"), captured.err


@pytest.fixture
def config(data_cache: str, tmp_path: Path) -> list[str]:
    """Options of a run on a prepared folder of its own."""
    (prepared,) = [path.parent for path in Path(data_cache).rglob("manifest.json")]
    shutil.copytree(prepared, tmp_path / "data")
    return ["--data.paths", json.dumps([str(tmp_path / "data")]), "--run.folder", str(tmp_path / "runs" / "one")]


def test_a_good_machine_and_good_data_pass(config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(storage, "SLOW_BYTES_PER_SECOND", 0)
    code, found, err = run(capsys, *config)
    assert (code, err) == (0, "")
    assert {one["check"] for one in found["findings"]} == {
        "versions",
        "devices",
        "threads",
        "files",
        "disk",
        "space",
        "data",
    }
    assert all(one["status"] != "FAIL" for one in found["findings"])
    (disk,) = [one for one in found["findings"] if one["check"] == "disk"]
    assert disk["values"]["write_bytes_per_second"] > 0 and str(tmp_path) in disk["text"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # nothing is left, and no folder of runs is made


def test_corrupt_data_fail(config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One byte of the tokens: the size is right, the checksum is not."""
    tokens = tmp_path / "data" / "train.bin"
    content = bytearray(tokens.read_bytes())
    content[100] ^= 1
    tokens.write_bytes(content)
    code, found, _ = run(capsys, *config)
    (data,) = [one for one in found["findings"] if one["check"] == "data"]
    assert (code, found["status"], data["status"]) == (1, "FAIL", "FAIL")
    assert "train.bin" in data["text"] and "copy it again" in data["text"]


def test_another_tokenizer_fails(config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "data" / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    code, found, _ = run(capsys, *config)
    (data,) = [one for one in found["findings"] if one["check"] == "data"]
    assert code == 1 and "tokenizer" in data["text"]


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code, found, _ = run(capsys, "--folder", str(tmp_path / "file"))
    (disk,) = [one for one in found["findings"] if one["check"] == "disk"]
    assert (code, disk["status"]) == (
        1,
        "FAIL",
    ) and f"{tmp_path / 'file'}: cannot be written (Not a directory)" in disk["text"]
    assert disk["fix"]


def test_a_full_disk_fails(tmp_path: Path) -> None:
    """By a limit on the size of files."""
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        (disk,) = storage.check_disk(tmp_path, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert disk.status == "FAIL" and "cannot be written" in disk.text
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: time.sleep(0.3))
    disk, _ = storage.check_disk(tmp_path, 4)
    assert disk.status == "WARN" and disk.values["write_bytes_per_second"] < 14 * 2**20
    assert disk.fix.startswith("give a faster file system")


def test_a_disk_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: time.sleep(2))
    begin = time.perf_counter()
    (found,) = within(0.3, "disk", str(tmp_path), lambda: storage.check_disk(tmp_path, 1))
    assert time.perf_counter() - begin < 1.5
    assert found.status == "FAIL" and found.text == f"{tmp_path} gave no answer in 0.3 s" and "file server" in found.fix


def test_checkpoints_must_have_space(config: list[str], capsys: pytest.CaptureFixture[str],
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    usage = namedtuple("usage", "total used free")
    options = [*config, "--model.hidden_size", "128", "--model.num_layers", "2", "--model.vocab_size", "512"]
    one = 0.0
    for share, status in ((1e9, "OK"), (0.9, "FAIL"), (1.1, "WARN"), (3.9, "WARN"), (4.1, "OK")):
        free = one * share or 1e15
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        code, found, _ = run(capsys, *options)
        (space,) = [one for one in found["findings"] if one["check"] == "space"]
        one = space["values"]["checkpoint_bytes"]
        assert (space["status"], code) == (status, int(status == "FAIL")), space
        assert "checkpoint.keep_last=3" in space["text"]
    assert one > 12 * 2 * 512 * 128  # embedding and head, at the least


def test_too_few_open_files_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert machine.check_open_files(64).status == "OK"
    found = machine.check_open_files(512)
    assert (found.status, found.fix) == ("FAIL", "ulimit -n 2304 before the start")
    assert machine.check_open_files(8192).fix == "ask for a higher hard limit than 4,096"


def test_too_many_threads_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores_of_this_process", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    found = machine.check_threads(2)
    assert (found.status, found.fix[:27]) == ("WARN", "set OMP_NUM_THREADS to 2 or")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert machine.check_threads(2).status == "OK"


def test_little_memory_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 3 * 2**30)
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    assert machine.check_devices(1).status == "OK"
    assert machine.check_devices(2).status == "WARN"


def test_a_missing_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_versions().status == "OK"
    monkeypatch.setattr(machine, "installed_versions", lambda: {"torch": "2", "deepspeed": None})
    assert machine.check_versions().text == "not installed: deepspeed"


def test_lines_for_people() -> None:
    findings = [Finding("devices", "OK", f"{rank} GiB", rank=rank, host="a") for rank in range(3)]
    findings += [
        Finding("clock", "OK", f"{rank} s", rank=rank, host="a", values={"offset_seconds": rank}) for rank in (1, 2)
    ]
    findings += [Finding("disk", "WARN", "slow", "a faster one", rank, f"node{rank}") for rank in range(10)]
    text = lines(findings)
    assert text[0] == "OK    devices     0 GiB (3 ranks; this is rank 0)"
    assert text[1] == "OK    clock       2 s (2 ranks; this is rank 2)"
    assert text[2].startswith("WARN  disk        slow (rank 0, 1, 2, 3, 4, 5, 6, 7 and 2 more on node0, ")
    assert text[2].endswith("node7 and 2 more): a faster one")
    assert (worst(findings), worst([]), len(text)) == ("WARN", "OK", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mib", "0"], "mib=0 must be at least 1"),
        (["--deadline", "0"], "deadline=0.0 must be at least 0.1"),
        (["--data.corpus", "tiny", "--parallel.tensor", "2"], "must divide the number of processes, 1"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_guard(lambda: doctor.main(arguments)) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


class FourGPUs:
    """torch.cuda of a node with four GPUs, the third in use: there is none here."""

    def __init__(self) -> None:
        self.looked_at: list[int] = []

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 4

    def get_device_name(self, index: int) -> str:
        return "H100"

    def mem_get_info(self, index: int) -> tuple[int, int]:
        self.looked_at.append(index)
        return (30 if index == 2 else 79) * 2**30, 80 * 2**30


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process among several looks at its own alone."""
    gpus = FourGPUs()
    monkeypatch.setattr(machine.torch, "cuda", gpus)
    alone = machine.check_devices(1)
    assert (alone.status, alone.text) == ("WARN", "in use by others: GPU 2 (30.0 GiB free)")
    gpus.looked_at.clear()
    assert machine.check_devices(4, 3).text == "4 x H100, at least 79.0 GiB free each"
    assert gpus.looked_at == [3]
    assert machine.check_devices(8, 3).text == "4 GPUs for 8 processes of this node"
