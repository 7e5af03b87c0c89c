"""Files of JSON lines survive a kill, and are read while a run writes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megagamma.errors import MegagammaError
from megagamma.files import JsonLines


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_later_steps_are_dropped(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        file.write({"step": step, "loss": 1.0 / step})
    file.close()
    JsonLines(file.path).keep_until(3)
    assert [line["step"] for line in lines(file.path)] == [1, 2, 3]
    # A resumed run goes on in the same file.
    again = JsonLines(file.path)
    again.keep_until(3)
    again.write({"step": 4, "loss": 0.1})
    assert [line["step"] for line in lines(file.path)] == [1, 2, 3, 4]
    JsonLines(file.path).keep_until(0)
    assert file.path.read_text() == ""


@pytest.mark.parametrize("tail", ['{"step": 2, "lo', "{", '{"step": 2, "loss": 0.5', "\0\0\0"])
def test_line_that_a_kill_cut_off_is_dropped(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n' + tail)
    file = JsonLines(path)
    # Step 2 may stay if it is whole; a part of its line may not, or the next line would be glued to it.
    file.keep_until(2)
    file.write({"step": 2, "loss": 0.5})
    assert lines(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.5}]


BAD_LINES = [
    b"\xff\xfe\x00", b'{"step": 2, "text": ', b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b'{"step": "two"}', b"5",
    b'{"step": null}', b"\0\0\0",
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda line: repr(line[:12]))
def test_a_line_that_cannot_be_read_takes_no_other_with_it(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    # \x85 and \u2028 end a line for str.splitlines, and are text here.
    good = [b'{"step": 1, "text": "a\xc2\x85b\xe2\x80\xa8c"}', b'{"step": 2, "text": "\xff"}']
    path.write_bytes(good[0] + b"\n" + bad + b"\n" + good[1] + b'\n{"step": 9}\n')
    assert [line["step"] for line in JsonLines(path).read() if isinstance(line["step"], int)] == [1, 2, 9]
    for _ in range(2):
        JsonLines(path).keep_until(2)
        assert path.read_bytes() == b"\n".join([*good, b""]), "as it was, to the byte"
    # What could not be read is beside it, once for each time.
    assert JsonLines(path).unreadable_file.read_bytes() == bad + b"\n"
    path.write_bytes(bad)
    assert JsonLines(path).keep_until(2) == 1
    assert JsonLines(path).unreadable_file.read_bytes() == (bad + b"\n") * 2


@pytest.mark.parametrize("tail", ["5", "null", "[1]"])
def test_line_that_is_no_object_is_dropped(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + tail + "\n")
    JsonLines(path).keep_until(2)
    assert lines(path) == [{"step": 1}]


def test_nothing_to_keep(tmp_path: Path) -> None:
    JsonLines(tmp_path / "metrics.jsonl").keep_until(3)
    assert not list(tmp_path.iterdir())


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.write({"step": 1})
    assert lines(file.path) == [{"step": 1}], "without close(), as after a kill"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_json_has_no_word_for(tmp_path: Path, value: float) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.write({"step": 1, "loss": value, "lr": 0.5, "text": "NaN"})
    assert file.path.read_text() == '{"step": 1, "loss": null, "lr": 0.5, "text": "NaN"}\n'


def test_unwritable_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(MegagammaError, match=r"metrics\.jsonl: cannot be written .*directory"):
        JsonLines(tmp_path / "missing" / "metrics.jsonl").write({"step": 1})


def test_full_disk_is_one_clear_error() -> None:
    # The device on which every write fails for want of space.
    file = JsonLines(Path("/dev/full"))
    with pytest.raises(MegagammaError, match=r"cannot be written .*free some space"):
        file.write({"step": 1})
    # What could not be written must not be met again, as an OSError, by the clean-up that follows.
    file.close()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_inside_lists_and_mappings(tmp_path: Path, value: float) -> None:
    file = JsonLines(tmp_path / "events.jsonl")
    file.write({"a": [1.5, value], "b": {"c": value}, "d": (value,)})
    assert file.path.read_text() == '{"a": [1.5, null], "b": {"c": null}, "d": [null]}\n'


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b"\0\0\0", b"5\n", b'{"text": "\xc3'])
def test_reader_leaves_out_what_is_no_object(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    assert JsonLines(path).read() == [{"step": 1}, {"step": 2}]
    # Negative control: the same line, whole, is read.
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}')
    assert JsonLines(path).read() == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert JsonLines(tmp_path / "metrics.jsonl").read() == []
    with pytest.raises(MegagammaError, match=r"cannot be read \(Is a directory\)"):
        JsonLines(tmp_path).read()


def test_line_after_one_that_a_kill_cut_off_is_whole(tmp_path: Path) -> None:
    """events.jsonl is not trimmed on a resume."""
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "start"}\n{"event": "wa')
    file = JsonLines(path)
    file.write({"event": "resume"})
    file.write({"event": "end"})
    assert file.read() == [{"event": "start"}, {"event": "resume"}, {"event": "end"}]
    assert path.read_text().count("\n") == 4, "no empty lines"


def test_file_is_opened_again_after_it_was_closed(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        file.write({"step": step})
        file.close()
    assert file.path.read_text() == '{"step": 1}\n{"step": 2}\n'
