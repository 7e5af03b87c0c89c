"""A console that is closed, full or gone neither stops a run nor changes what it reports by its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.forked import context
from support.processes import SMOKE, losses

from megagamma.checkpoint.reader import steps_saved

pytestmark = pytest.mark.xdist_group("forked")

ROOT = Path(__file__).resolve().parent.parent
# How a shell starts a process without a console that works.
CONSOLES = {
    "reader gone": "{command} | head -1 >{out}",
    "stdout closed": "{command} >&-",
    "both closed": "{command} >&- 2>&-",
    "all closed": "{command} <&- >&- 2>&-",
    "disk full": "{command} >/dev/full",
    "both full": "{command} >/dev/full 2>/dev/full",
    "as it is": "{command} >{out}",
}
PROGRAM = """
import os, sys
from megagamma.cli import keep_console, leave, main_guard
from megagamma.errors import MegagammaError

def run():
    mode, path = sys.argv[1:]
    if mode == "run":
        keep_console("stdout", "stderr")
    with open(path, "w") as file:
        assert file.fileno() > 2, "no file stands where libraries print"
        for step in range(2000):
            print(f"step {step} \\u00e9", "." * 60, flush=step % 2 == 0)  # more than a pipe holds
            print("warning", file=sys.stderr)
            file.write(f"{step}\\n")
    if mode == "fails":
        raise MegagammaError("no such thing")

leave(main_guard(run))
"""


def start(tmp_path: Path, console: str, mode: str, **environment: str) -> tuple[int, list[str]]:
    """Exit code of the program, and the lines of its file."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = f"{sys.executable} {tmp_path / 'program.py'} {mode} {tmp_path / 'file'}"
    text = CONSOLES[console].format(command=command, out=tmp_path / "out")
    found = subprocess.run(
        ["bash", "-c", f"{text}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, timeout=60, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    return found.returncode, (tmp_path / "file").read_text().splitlines()


@pytest.mark.parametrize("console", CONSOLES)
def test_a_run_trains_on_without_a_console(tmp_path: Path, console: str) -> None:
    assert start(tmp_path, console, "run") == (0, [str(step) for step in range(2000)])


@pytest.mark.parametrize("console", ["reader gone", "both closed", "both full"])
def test_an_error_keeps_its_exit_code_without_a_console(tmp_path: Path, console: str) -> None:
    code, lines = start(tmp_path, console, "fails")
    assert code == (0 if console == "reader gone" else 2)
    assert (len(lines) == 2000) is (console == "both closed")


def test_a_table_for_a_reader_that_is_gone_still_ends_at_once(tmp_path: Path) -> None:
    """Negative control: without `keep_console` the reader that is gone ends the program, with exit code 0."""
    code, lines = start(tmp_path, "reader gone", "table")
    assert code == 0 and len(lines) < 2000


def test_a_character_that_the_console_lacks(tmp_path: Path) -> None:
    code, lines = start(tmp_path, "as it is", "run", PYTHONIOENCODING="ascii")
    assert (code, len(lines)) == (0, 2000)
    assert (tmp_path / "out").read_text().startswith("step 0 \\xe9 ")


def _train_with(descriptors: str, arguments: list[str]) -> None:
    """A run whose standard streams are broken pipes, or a device that is always full."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", OMP_NUM_THREADS="1")
    os.chdir(ROOT)
    reader, writer = os.pipe()
    os.close(reader)
    target = writer if descriptors == "reader gone" else os.open("/dev/full", os.O_WRONLY)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.argv = ["pretrain.py", *SMOKE, *arguments]
    from megagamma.cli import main_guard
    from megagamma.pretrain import main

    os._exit(main_guard(main))


@pytest.mark.parametrize("descriptors", ["reader gone", pytest.param("disk full", marks=pytest.mark.slow)])
def test_training_without_a_console(tmp_path: Path, data_cache: str, descriptors: str) -> None:
    arguments = ["--run.folder", str(tmp_path / "run"), "--data.cache", data_cache, "--run.steps", "4"]
    process = context().Process(target=_train_with, args=(descriptors, arguments))
    process.start()
    process.join(180)
    assert process.exitcode == 0
    assert len(losses(tmp_path / "run")) == 4
    assert steps_saved(tmp_path / "run" / "checkpoints") == [4]
