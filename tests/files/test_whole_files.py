"""Invariants of `whole_files`: a final name never stands for a half-written file, whether the writer raises or is killed;
several files appear together; a new file never lies beside an old one; what is not a file is never replaced.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from dynkp.files.whole_files import whole_files


def test_files_appear_and_replace(tmp_path):
    one, two = tmp_path / "new" / "one", tmp_path / "two"
    two.write_text("old")
    with whole_files(one, two) as (first, second):
        first.write_text("1")
        second.write_text("2")
        assert not one.exists() and two.read_text() == "old"
    assert (one.read_text(), two.read_text()) == ("1", "2")
    assert sorted(os.listdir(tmp_path)) == ["new", "two"] and os.listdir(one.parent) == ["one"]


def test_an_error_leaves_everything_as_it_was(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_files(tmp_path / "a", tmp_path / "b") as (a, b):
        a.write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_starts_anew(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    code = (
        "import os, signal\nfrom dynkp.files.whole_files import whole_files\n"
        f"with whole_files({str(path)!r}) as (partial,):\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGKILL
    assert path.read_text() == "old" and len(os.listdir(tmp_path)) == 2
    with whole_files(path) as (partial,):
        assert not partial.exists()
        partial.write_text("new")
    assert os.listdir(tmp_path) == ["a"] and path.read_text() == "new"


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
    with pytest.raises(OSError, match="killed"), whole_files(*names) as partials:
        for partial in partials:
            partial.write_text("new")
    assert {name.name: name.read_text() for name in names if name.exists()} == {"a": "new"}


def test_a_file_that_is_not_written_is_none(tmp_path):
    (tmp_path / "a").write_text("old")
    with whole_files(tmp_path / "a", tmp_path / "b") as (_, b):
        b.write_text("new")
    assert os.listdir(tmp_path) == ["b"]


def test_only_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link", "."):
        with pytest.raises(ValueError, match="is not a file"), whole_files(tmp_path / name):
            pass
    (tmp_path / "real").write_text("old")
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    with whole_files(tmp_path / "alias") as (partial,):
        partial.write_text("new")
    assert (tmp_path / "real").read_text() == "new" and (tmp_path / "alias").is_symlink()
