"""Invariants of locks: one run at a time has an output, in one process and in several; the lock of a killed process is free at
once, and what it left does not lock; a locked output can be read, and its lock file is no part of it; where there are no
locks, a warning says so."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from dynkp.files.locks import OutputLock, output_lock

HOLD = """
import sys, time
from dynkp.files.locks import output_lock
lock = output_lock(sys.argv[1])
print("locked", flush=True)
sys.stdin.readline()
lock.close()
print("free", flush=True)
time.sleep(60)
"""


def holding(output: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_one_at_a_time_in_one_process(tmp_path: Path) -> None:
    output = tmp_path / "new" / "p.jsonl"
    with output_lock(output) as lock:
        with pytest.raises(BlockingIOError, match=r"another run is writing to .*p.jsonl: wait for it, or choose another"):
            output_lock(output)
        with OutputLock(tmp_path / "lock"):  # another output
            pass
    lock.close()  # twice does no harm
    with output_lock(output):
        pass
    assert os.listdir(output.parent) == []


def test_one_at_a_time_in_several_processes(tmp_path: Path) -> None:
    process = holding(tmp_path / "p.jsonl")
    try:
        with pytest.raises(BlockingIOError):
            output_lock(tmp_path / "p.jsonl")
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "free\n"
        with output_lock(tmp_path / "p.jsonl"):  # while the process lives
            assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    for _ in range(3):
        process = holding(tmp_path / "p.jsonl")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert os.listdir(tmp_path) == [".p.jsonl.lock"]
        with output_lock(tmp_path / "p.jsonl"):
            pass
        assert os.listdir(tmp_path) == []


def test_a_locked_output_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("1\n")
    process = holding(tmp_path / "p.jsonl")
    try:
        assert (tmp_path / "p.jsonl").read_text() == "1\n"
        os.replace(tmp_path / "p.jsonl", tmp_path / "q.jsonl")
        with pytest.raises(BlockingIOError):  # the name is locked, not the file that had it
            output_lock(tmp_path / "p.jsonl")
    finally:
        process.kill()
        process.communicate()


def test_a_forked_process_neither_holds_nor_frees_the_lock(tmp_path: Path) -> None:
    code = f"""
import os, sys, time
from dynkp.files.locks import output_lock
lock = output_lock({str(tmp_path / "p.jsonl")!r})
child = os.fork()
if not child:
    del lock
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
sys.stdin.readline()
lock.close()
print("closed", flush=True)
sys.stdin.readline()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    child = int(process.stdout.readline())
    try:
        with pytest.raises(BlockingIOError):
            output_lock(tmp_path / "p.jsonl")
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "closed\n"
        with output_lock(tmp_path / "p.jsonl"):  # the child lives
            os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        process.kill()
        process.communicate()


def test_without_locks_there_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "_acquire", refused)
    with output_lock(tmp_path / "p.jsonl"):
        assert "p.jsonl cannot be locked" in caplog.text


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        OutputLock(tmp_path / "missing" / "lock")
