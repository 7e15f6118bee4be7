"""Invariants of the journal:

- what was appended is read back, by this journal and by the next one, across files, long lines and failures;
- a torn last line is cut off and nothing else; cut anywhere, no whole answer is lost;
- the index is a copy: with it missing, damaged, behind or of other files, the answers are the same; a process killed at any
  moment loses no answer, and of the settled posts only the last;
- a damaged line in the middle is an error that names it; a full disk leaves no part of one; two runs do not write at once;
- tokens are added up by model, over all runs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from dynkp.chat.journal import AnswerJournal
from tests.conftest import REPOSITORY
from tests.support.journals import check, filled, key, row


@pytest.mark.parametrize("shard_bytes", [1 << 20, 30_000, 1])
def test_what_was_written_is_read_back(tmp_path: Path, shard_bytes: int) -> None:
    filled(tmp_path, shard_bytes=shard_bytes)
    check(tmp_path)
    files = len(list(tmp_path.glob("answers-*.jsonl")))
    assert {1 << 20: files == 1, 30_000: 5 < files < 30, 1: files == 30}[shard_bytes]


def test_an_open_journal_reads_what_it_writes(tmp_path: Path) -> None:
    with AnswerJournal(tmp_path, shard_bytes=1) as journal:
        for number in range(5):
            journal.append(key(number), row(number))
            assert journal.read(key(number))["completion_tokens"] == number


def test_the_last_word_counts(tmp_path: Path) -> None:
    with AnswerJournal(tmp_path) as journal:
        journal.append(key(1), {"failed": True, "error": "no"})
        assert journal.has_failed(key(1))
        journal.append(key(1), row(1))
        assert not journal.has_failed(key(1))
        journal.append(key(2), row(2))
        journal.append(key(2), {"failed": True, "error": "no"})
        journal.append(key(3), row(3))
        journal.sync()
        journal.append(key(3), row(3))
        journal.append(key(3), row(3))
        assert journal.tokens('m "1"') == (50, 1 + 2 + 9)  # all of them were paid for
    for _ in range(2):
        with AnswerJournal(tmp_path) as journal:
            assert journal.tokens('m "1"') == (50, 1 + 2 + 9)
            assert not journal.has_failed(key(1)) and journal.has_failed(key(2))
            assert journal.read(key(2))["error"] == "no"
        (tmp_path / "index.sqlite").unlink()


@pytest.mark.parametrize("damage", ["missing", "empty", "behind", "torn", "overwritten", "text", "other tables", "other files"])
def test_the_index_is_only_a_copy(tmp_path: Path, damage: str) -> None:
    filled(tmp_path, 17, shard_bytes=50_000)
    index = tmp_path / "index.sqlite"
    behind = index.read_bytes()
    filled(tmp_path, start=17, shard_bytes=50_000)
    data = index.read_bytes()
    if damage == "missing":
        index.unlink()
    elif damage == "other files":
        filled(tmp_path / "other", 40, shard_bytes=50_000)
        os.replace(tmp_path / "other" / "index.sqlite", index)
    elif damage == "other tables":
        index.unlink()
        with contextlib.closing(sqlite3.connect(index)) as database:
            database.execute("CREATE TABLE answers (key)")
    else:
        half = len(data) // 2
        overwritten = data[:half] + random.Random(0).randbytes(half)
        damaged = {"empty": b"", "behind": behind, "torn": data[:-5000], "overwritten": overwritten, "text": b"rubbish" * 9000}
        index.write_bytes(damaged[damage])
    for _ in range(2):
        check(tmp_path, settled=damage == "other files")
    if damage == "behind":
        with AnswerJournal(tmp_path) as journal:
            assert [journal.settled(key(1000 + number)) is not None for number in range(30)] == [True] * 17 + [False] * 13


def test_settled_posts_are_kept_when_the_answers_are_indexed_again(tmp_path: Path) -> None:
    filled(tmp_path, 4)
    file = tmp_path / "answers-00001.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:1] + lines[2:]))
    with AnswerJournal(tmp_path) as journal:
        assert [key(number) in journal for number in range(4)] == [True, False, True, True]
        assert [journal.settled(key(1000 + number)) is not None for number in range(4)] == [True, False, True, True]


KILLED = """
import os, signal, sys
from dynkp.chat.journal import AnswerJournal
from tests.support.journals import key, row
journal = AnswerJournal(sys.argv[1], shard_bytes=50_000)
for number in range(30):
    journal.append(key(number), row(number))
    journal.settle(key(1000 + number), key(number))
    if number == 20:
        journal.sync()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_no_answer(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=REPOSITORY, timeout=60)
    assert done.returncode == -signal.SIGKILL
    with AnswerJournal(tmp_path) as journal:
        assert [journal.settled(key(1000 + number)) == key(number) for number in range(21)] == [True] * 21
    check(tmp_path, settled=False)


def test_cut_anywhere_no_whole_answer_is_lost(tmp_path: Path) -> None:
    filled(tmp_path / "whole", 4)
    data = (tmp_path / "whole" / "answers-00001.jsonl").read_bytes()
    ends = [place + 1 for place, byte in enumerate(data) if byte == 10]
    for cut in {*range(0, len(data), 97), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}:
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "answers-00001.jsonl").write_bytes(data[:cut])
        (folder / "index.sqlite").write_bytes((tmp_path / "whole" / "index.sqlite").read_bytes())
        whole = sum(end <= cut for end in ends)
        with AnswerJournal(folder) as journal:
            assert len(journal) == whole
            assert [journal.settled(key(1000 + number)) is not None for number in range(4)] == [n < whole for n in range(4)]
            journal.append(key(99), row(99))
        with AnswerJournal(folder) as journal:
            assert len(journal) == whole + 1
            assert journal.read(key(99))["text"] == row(99)["text"]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    file = tmp_path / "answers-00001.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b"rubbish\n" + lines[2])
    with pytest.raises(ValueError, match=rf"answers-00001.jsonl, byte {len(lines[0])}: not an answer: b'rubbish"):
        AnswerJournal(tmp_path)
    file.write_bytes(lines[0] + lines[2])  # the remedy
    with AnswerJournal(tmp_path) as journal:  # which the error left unlocked
        assert [key(number) in journal for number in range(3)] == [True, False, True]


def test_a_line_cut_short_behind_the_index_is_named(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    file = tmp_path / "answers-00001.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1].rstrip(b"}\n") + b" \n" + lines[2])
    with AnswerJournal(tmp_path) as journal, pytest.raises(ValueError, match=rf"byte {len(lines[0])}: not an answer"):
        journal.read(key(1))
    file.write_bytes(lines[0] + lines[2])  # the remedy
    with AnswerJournal(tmp_path) as journal:
        assert [key(number) in journal for number in range(3)] == [True, False, True]


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, 30)
    written = os.write
    tries = 0

    def write(to: int, data: bytes) -> int:
        nonlocal tries
        tries += 1
        if tries > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(to, data[:20])

    with AnswerJournal(tmp_path) as journal:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, "write", write)
            journal.append(key(30), row(30))
        assert key(30) not in journal
        # Another request of the run was answered, and there is room again.
        journal.append(key(31), row(31))
        journal.append(key(30), row(30))
        for number in (30, 31):
            journal.settle(key(1000 + number), key(number))
    check(tmp_path, 32)


@pytest.mark.parametrize("room_again", [True, False])
def test_an_index_on_a_full_disk_loses_nothing(tmp_path: Path, room_again: bool, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path, 30)
    count = 500
    with AnswerJournal(tmp_path) as journal:
        limit = journal._index._database.execute("PRAGMA page_count").fetchone()[0]
        journal._index._database.execute(f"PRAGMA max_page_count = {limit}")
        for number in range(30, count):
            journal.append(key(number), {**row(number), "text": "short"})
            journal.settle(key(1000 + number), key(number))
            if number % 100 == 0:
                journal.sync()
        assert "index.sqlite cannot be written (database or disk is full)" in caplog.text
        assert all(journal.read(key(number))["completion_tokens"] == number for number in range(count))
        assert journal.settled(key(1000 + count - 1)) == key(count - 1)
        if room_again:
            journal._index._database.execute("PRAGMA max_page_count = 1000000")
    with AnswerJournal(tmp_path) as journal:
        assert len(journal) == count and journal.tokens('m "1"') == (10 * count, sum(range(count)))
        assert all(journal.read(key(number))["completion_tokens"] == number for number in range(count))
        assert (journal.settled(key(1000 + count - 1)) is not None) == room_again


def test_an_index_that_cannot_be_made_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite-wal").mkdir()
    with pytest.raises(OSError, match="index.sqlite"):
        AnswerJournal(tmp_path)


def test_a_line_changed_behind_the_index_is_noticed(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    file = tmp_path / "answers-00001.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0].replace(key(0).hex().encode(), key(77).hex().encode()) + lines[1] + lines[2])
    with AnswerJournal(tmp_path) as journal, pytest.raises(ValueError, match="was changed: at byte 0 is no answer 000"):
        journal.read(key(0))


def test_two_runs_do_not_write_at_once(tmp_path: Path) -> None:
    with AnswerJournal(tmp_path), pytest.raises(BlockingIOError, match="another run is writing"):
        AnswerJournal(tmp_path)
    check_empty = AnswerJournal(tmp_path)
    check_empty.close()
    check_empty.close()  # twice does no harm


def test_the_cursor_is_a_hint(tmp_path: Path) -> None:
    with AnswerJournal(tmp_path) as journal:
        assert journal.cursor() == {}
        journal.set_cursor({"offset": 5})
        assert journal.cursor() == {"offset": 5}
        for rubbish in ("", "{", "[1]"):
            (tmp_path / "cursor.json").write_text(rubbish)
            assert journal.cursor() == {}
