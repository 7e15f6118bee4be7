"""Invariants of JSON Lines: rows are read back with their line numbers; lines are appended as a whole or not at all; a torn
last line is repaired, wherever it was torn and however long it is, and nothing else is changed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dynkp.files.json_lines import LineAppender, json_line, read_json_lines, repair_last_line, write_json_lines


def test_rows_are_read_back(tmp_path: Path) -> None:
    rows = [{"id": "1", "text": "a\u2028b é"}, [], "x", None, {"id": "2"}]
    assert write_json_lines(tmp_path / "new" / "a.jsonl", iter(rows)) == 5
    found = list(read_json_lines(tmp_path / "new" / "a.jsonl"))
    assert [row for _, row in found] == rows
    assert found[2][0] == f"{tmp_path / 'new' / 'a.jsonl'}, line 3"


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("1\n")
    with pytest.raises(ZeroDivisionError):
        write_json_lines(tmp_path / "a.jsonl", (1 // number for number in (1, 1, 0)))
    assert os.listdir(tmp_path) == ["a.jsonl"] and (tmp_path / "a.jsonl").read_text() == "1\n"


def test_nan_is_refused_on_demand(tmp_path: Path) -> None:
    assert json_line(float("nan")) == "NaN\n"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_lines(tmp_path / "a.jsonl", [float("nan")], allow_nan=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{\n", r"a.jsonl, line 2: not valid JSON"),
        (b"[" * 100_000 + b"\n", "a.jsonl, line 2: not usable JSON"),
        (b'"\xff"\n', "a.jsonl, line 2: not usable JSON"),
        (b'{"id"', "a.jsonl, line 2: not valid JSON .*the line is torn"),
    ],
)
def test_an_error_names_the_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"1\n" + line)
    with pytest.raises(ValueError, match=message):
        list(read_json_lines(tmp_path / "a.jsonl"))


def test_blank_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"1\n\n2\n \r\n")
    assert list(read_json_lines(tmp_path / "a.jsonl")) == [
        (f"{tmp_path / 'a.jsonl'}, line 1", 1),
        (f"{tmp_path / 'a.jsonl'}, line 3", 2),
    ]


def test_a_last_line_without_line_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"1\n2")
    assert [row for _, row in read_json_lines(tmp_path / "a.jsonl")] == [1, 2]
    assert [row for _, row in read_json_lines(tmp_path / "a.jsonl", skip_torn=True)] == [1]


@pytest.mark.parametrize("long", [10, 200_000])
def test_a_torn_last_line_is_removed_wherever_it_was_torn(tmp_path: Path, long: int) -> None:
    lines = [b"1\n", b"", b'"' + b"x" * long + b'"\n', b'"' + b"y" * long + b'"\n']
    path = tmp_path / "a.jsonl"
    whole = b"".join(lines)
    for cut in {0, 1, 2, 3, long // 2, len(whole) - long, len(whole) - long // 2, len(whole) - 1, len(whole)}:
        path.write_bytes(whole[:cut])
        kept = whole[: whole[:cut].rfind(b"\n") + 1]
        assert repair_last_line(path) == (kept != whole[:cut])
        assert path.read_bytes() == kept
        assert repair_last_line(path) is False


def test_a_last_line_that_lacks_only_its_line_end_is_completed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n22")
    assert repair_last_line(path, lambda line: line == b"22") is False
    assert path.read_bytes() == b"1\n22\n"
    path.write_bytes(b"1\n2")
    assert repair_last_line(path, lambda line: line == b"22") is True
    assert path.read_bytes() == b"1\n"


def test_lines_are_appended_behind_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("1\n")
    with LineAppender(tmp_path / "a.jsonl") as appender:
        assert appender.size == 2
        assert appender.append(b"22\n") == 2
        appender.append_rows([{"é": 1}, {}])
        assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '1\n22\n{"é": 1}\n{}\n'
        assert appender.size == (tmp_path / "a.jsonl").stat().st_size
        appender.sync()
    appender.close()  # twice does no harm


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = os.write
    tries = 0

    def write(file: int, data: bytes) -> int:
        nonlocal tries
        tries += 1
        if tries > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(file, data[:20])

    with LineAppender(tmp_path / "a.jsonl") as appender:
        appender.append(b"1\n")
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, "write", write)
            appender.append(b"x" * 100 + b"\n")
        assert appender.append(b"2\n") == 2
    assert (tmp_path / "a.jsonl").read_text() == "1\n2\n"


def test_a_file_at_its_limit_of_size_holds_whole_lines(tmp_path: Path) -> None:
    code = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
from dynkp.files.json_lines import LineAppender
appender = LineAppender("a.jsonl")
for number in range(100):
    appender.append(b"x" * 29 + b"\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "File too large" in done.stderr
    assert (tmp_path / "a.jsonl").read_bytes() == (b"x" * 29 + b"\n") * 33


def test_what_was_appended_survives_the_process(tmp_path: Path) -> None:
    code = """
import os, signal
from dynkp.files.json_lines import LineAppender
appender = LineAppender("a.jsonl")
appender.append(b"1\\n2\\n")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60).returncode == -signal.SIGKILL
    assert (tmp_path / "a.jsonl").read_text() == "1\n2\n"
