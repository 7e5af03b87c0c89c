"""A failure that nobody foresaw: one line, exit code 70, and a report without secrets."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from megagamma import pretrain
from megagamma.cli import main_guard
from megagamma.crash import HIDDEN, without_secrets

SECRETS = ("hunter2hunter2", "hf_abcdefghijklmnopqrstuv", "s3cr3tvalue", "pass-in-url", "flagsecret1")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID", "MEGAGAMMA_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def raising(error: BaseException) -> Any:
    def function() -> int:
        raise error

    return function


def test_a_failure_inside_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Injected where training starts: the report lies in the run's folder and has config, versions and command line."""
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3tvalue")
    monkeypatch.setenv("MEGAGAMMA_PASSWORD", "hunter2hunter2")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    words = [
        "pretrain.py",
        "--data.corpus",
        "tiny",
        "--api_key",
        "flagsecret1",
        "--url",
        "https://me:pass-in-url@host/x",
    ]
    monkeypatch.setattr("sys.argv", words)
    run = tmp_path / "run"
    run.mkdir()

    def broken(config: Any) -> int:
        raise RuntimeError(f"first line\nsecond: s3cr3tvalue hf_abcdefghijklmnopqrstuv at step {config.run.steps}")

    monkeypatch.setattr("megagamma.job.train", broken)
    arguments = ["--data.corpus", "tiny", "--run.folder", str(run), "--run.steps", "77", "--optimizer.lr", "0.00123"]
    assert main_guard(lambda: pretrain.main(arguments)) == 70
    said = capsys.readouterr().err
    (report,) = run.iterdir()
    assert report.name.startswith("crash-")
    assert report.name.endswith("-rank0.txt")
    assert report.stat().st_mode & 0o077 == 0
    assert said.count("\n") == 1
    assert said.startswith("error: not foreseen: RuntimeError: first line second: ")
    assert said.endswith(f"the report is {report}\n")
    text = report.read_text()
    for part in ("Traceback", "in broken", "0.00123", '"torch":', '"python":', "--data.corpus", '"4711"', HIDDEN):
        assert part in text, part
    assert not [secret for secret in SECRETS if secret in text + said]


def test_the_next_place_is_taken_where_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "gone"
    error = RuntimeError("x")
    error.__dict__["_report"] = (str(missing), {})
    assert main_guard(raising(error)) == 70
    assert len(list(Path().glob("crash-*"))) == 1
    assert not missing.exists()
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    os.rmdir(tmp_path / "cwd") if not list((tmp_path / "cwd").iterdir()) else None
    for path in Path().glob("crash-*"):
        path.unlink()
    os.rmdir(tmp_path / "cwd")  # the working directory is gone
    assert main_guard(raising(RuntimeError("y"))) == 70
    (report,) = (tmp_path / "temp").iterdir()
    assert str(report) in capsys.readouterr().err
    assert "RuntimeError: y" in report.read_text()


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: No space left on device: free some space"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files: too many files are open: raise the limit"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a\nb"), "a b: No such file"),
        (MemoryError(), "out of memory (of the host): use a smaller model or batch"),
        (RecursionError("maximum"), "the input is nested too deep"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), "out of memory (CUDA): use a smaller model or batch"),
    ],
)
def test_what_the_machine_lacks_is_one_line(error: Exception, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_guard(raising(error)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {part}")
    assert said.count("\n") == 1
    assert not list(Path().glob("crash-*"))


def test_the_traceback_is_shown_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGAGAMMA_DEBUG", "1")
    main_guard(raising(RuntimeError("x")))
    assert "Traceback" in capsys.readouterr().err


def test_two_ranks_with_two_failures_both_say_theirs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, error in (("0", RuntimeError("one")), ("1", ValueError("other"))):
        monkeypatch.setenv("RANK", rank)
        assert main_guard(raising(error)) == 70
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: not foreseen: RuntimeError: one")
    assert second.startswith("error: rank 1: not foreseen: ValueError: other")


def test_secrets_are_removed_and_other_words_stay() -> None:
    text = (
        "token=abcdefgh1234 'api_key': 'abcdefgh' https://u:p@h/x?access_token=zzzzzzzz&a=1 Authorization: Bearer qwertyui "
        "--hf_token qqqqqqqq password: pppppppp"
    )
    found = without_secrets(text)
    for secret in ("abcdefgh", "u:p@", "zzzzzzzz", "qwertyui", "qqqqqqqq", "pppppppp"):
        assert secret not in found, found
    plain = "tokens: 12345678, tokenizer: data/tokenizer.model, run.tokens=100000, init.key=0.5, keep_last=3, h/x?a=1"
    assert without_secrets(plain) == plain


def test_what_torch_says_is_one_sentence() -> None:
    from megagamma.distributed.rendezvous import first_sentence

    text = (
        "The client socket has timed out.\nException raised from throwTimeoutError at socket.cpp\nframe #0: c10::Error"
    )
    assert first_sentence(RuntimeError(text)) == "The client socket has timed out."
    assert first_sentence(RuntimeError("two\nlines")) == "two lines"
