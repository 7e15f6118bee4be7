"""Invariants of atomic writes: a final name never stands for an incomplete file, whether the writer fails, is killed or
meets a full disk; several files appear together, and a new file never lies beside an old one; processes that write the same
file do not mix their data, and do not remove each other's partial files; the partial files of a killed process are removed;
what is not a regular file is never replaced, and text can be written to a pipe.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dynkp.files.atomic import atomic_files, atomic_folder, write_bytes, write_text
from dynkp.files.json_files import write_json
from dynkp.files.json_lines import write_json_lines


def run(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def test_files_appear_and_replace(tmp_path):
    one, two = tmp_path / "new" / "one", tmp_path / "two"
    two.write_text("old")
    with atomic_files(one, two) as (first, second):
        first.write_text("1")
        second.write_text("2")
        assert not one.exists() and two.read_text() == "old"
    assert (one.read_text(), two.read_text()) == ("1", "2")
    assert sorted(os.listdir(tmp_path)) == ["new", "two"] and os.listdir(one.parent) == ["one"]


def test_an_error_leaves_everything_as_it_was(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_files(tmp_path / "a", tmp_path / "b") as (a, b):
        a.write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_starts_anew(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    code = (
        "import os, signal\nfrom dynkp.files.atomic import atomic_files\n"
        f"with atomic_files({str(path)!r}) as (partial,):\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run(code).returncode == -signal.SIGKILL
    assert path.read_text() == "old" and len(os.listdir(tmp_path)) == 2
    with atomic_files(path) as (partial,):
        assert not partial.exists()
        partial.write_text("new")
    assert os.listdir(tmp_path) == ["a"] and path.read_text() == "new"


def test_only_what_killed_writers_left_of_the_same_file_is_removed(tmp_path):
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    with atomic_files(tmp_path / "a", tmp_path / "b.a") as (a, other):
        host = a.name.removeprefix(".a.").partition("-")[0]
        dead, living = f"{host}-{finished.pid}-0.partial", f"{host}-{os.getppid()}-0.partial"
        reused = f"{host}-{os.getpid()}-99999.partial"  # of an earlier process with this one's number
        kept = [f".a.{living}", f".b.{dead}", f".a.other-{finished.pid}-0.partial", "a.partial", f"a.{dead}"]
        for name in (f".a.{dead}", f".a.{reused}", *kept):
            (tmp_path / name).write_text("half")
        a.write_text("1")
        other.write_text("2")
        with atomic_files(tmp_path / "a") as (partial,):  # another thread's, say
            assert partial != a
            partial.write_text("inner")
        assert (tmp_path / "a").read_text() == "inner"
    assert (tmp_path / "a").read_text() == "1"
    assert sorted(os.listdir(tmp_path)) == sorted(["a", "b.a", *kept])


def test_processes_that_write_one_file_do_not_mix_rows(tmp_path):
    code = (
        "import sys\nfrom dynkp.files.json_lines import write_json_lines\n"
        "for attempt in range(30):\n"
        f"    write_json_lines({str(tmp_path / 'rows.jsonl')!r}, ([sys.argv[1], attempt] for _ in range(200)))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "xyz"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "rows.jsonl").exists():
            lines = (tmp_path / "rows.jsonl").read_text().splitlines()
            assert len(lines) == 200 and len(set(lines)) == 1
            seen.add(lines[0])
    assert [writer.returncode for writer in writers] == [0, 0, 0] and seen
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("function", ["atomic_files", "write_text", "write_json_lines", "atomic_folder"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, function):
    if function != "atomic_folder":
        (tmp_path / "a").write_text("old")
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
from dynkp.files.atomic import *
from dynkp.files.json_lines import write_json_lines
try:
    if {function!r} == "write_text":
        write_text("a", "x" * 100_000)
    elif {function!r} == "write_json_lines":
        write_json_lines("a", ["x" * 100] * 1000)
    elif {function!r} == "atomic_files":
        with atomic_files("b", "a") as (b, a):
            b.write_text("small")
            a.write_text("x" * 100_000)
    else:
        with atomic_folder("a") as folder:
            (folder / "0").write_text("small")
            (folder / "1").write_text("x" * 100_000)
except OSError as error:
    sys.exit(error.strerror)
"""
    done = run(code, cwd=tmp_path)
    assert done.returncode == 1 and "File too large" in done.stderr
    if function == "atomic_folder":
        assert os.listdir(tmp_path) == []
    else:
        assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_old_files_go_before_new_ones_come(tmp_path, monkeypatch):
    names = [tmp_path / name for name in "abc"]
    for name in names:
        name.write_text("old")
    replace = os.replace

    def killed_after_the_first(source, target):
        if str(target).endswith("b"):
            raise OSError("killed")
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_after_the_first)
    with pytest.raises(OSError, match="killed"), atomic_files(*names) as partials:
        for partial in partials:
            partial.write_text("new")
    assert {name.name: name.read_text() for name in names if name.exists()} == {"a": "new"}


def test_a_file_that_is_not_written_is_none(tmp_path):
    (tmp_path / "a").write_text("old")
    with atomic_files(tmp_path / "a", tmp_path / "b") as (_, b):
        b.write_text("new")
    assert os.listdir(tmp_path) == ["b"]


def test_only_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link", "."):
        with pytest.raises(ValueError, match="is not a file"), atomic_files(tmp_path / name):
            pass
    (tmp_path / "real").write_text("old")
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    with atomic_files(tmp_path / "alias") as (partial,):
        partial.write_text("new")
    assert (tmp_path / "real").read_text() == "new" and (tmp_path / "alias").is_symlink()


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda path: write_text(path, "text\n"), "text\n"),
        (lambda path: write_json(path, {"a": 1}), '{\n  "a": 1\n}\n'),
        (lambda path: write_json_lines(path, [1, 2]), "1\n2\n"),
    ],
)
def test_text_can_be_written_to_a_pipe(tmp_path, write, expected):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=write, args=[pipe])
    writer.start()
    assert pipe.read_text() == expected
    writer.join()
    assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_surrogates_are_replaced_on_demand(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "\ud800")
    write_text(tmp_path / "b", "é\ud800", errors="replace")
    assert os.listdir(tmp_path) == ["b"] and (tmp_path / "b").read_text() == "é?"


def test_small_files_are_whole(tmp_path, monkeypatch):
    write_bytes(tmp_path / "a", b"old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("full")))
        write_bytes(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a" / "b") as folder:
        (folder / "1").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path / "a") == []
    with atomic_folder(tmp_path / "a" / "b") as folder:
        (folder / "1").write_text("1")
        assert os.listdir(tmp_path / "a") == [folder.name]
    assert (tmp_path / "a" / "b" / "1").read_text() == "1"
    with pytest.raises(ValueError, match="exists"), atomic_folder(tmp_path / "a" / "b"):
        pass


def test_names_of_any_length_and_alphabet(tmp_path):
    for name in ("x" * 255, "é" * 127, "日" * 85, "a\nb", ".hidden"):
        write_text(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name
    assert len(os.listdir(tmp_path)) == 5
