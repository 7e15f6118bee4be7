"""Invariants of the journal:

- what was appended is read back, by this journal and by the next one, across files, long lines and failures;
- a torn last line, index entry or settled post is cut off and nothing else; cut anywhere, no whole answer is lost;
- the index is a copy: with it missing, behind or of other files, the answers are the same;
- a damaged line in the middle is an error that names it; a full disk leaves no part of one; two runs do not write at once;
- tokens are added up by model, over all runs.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dynkp.chat.journal import AnswerJournal


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def row(number: int, **more: object) -> dict[str, object]:
    text = f"answer {number} “é” " + "x" * (number * 1000 % 20_000)
    return {"model": 'm "1"', "text": text, "prompt_tokens": 10, "completion_tokens": number, **more}


def filled(folder: Path, count: int = 30, **options: int) -> None:
    with AnswerJournal(folder, **options) as journal:
        for number in range(count):
            journal.append(key(number), row(number))
            journal.settle(key(1000 + number), key(number))


def check(folder: Path, count: int = 30) -> None:
    with AnswerJournal(folder) as journal:
        assert len(journal) == count
        for number in range(count):
            found = journal.read(key(number))
            assert found["text"] == row(number)["text"]
            assert found["failed"] is False
            assert journal.settled(key(1000 + number)) == key(number)
        assert key(count) not in journal and journal.settled(key(5000)) is None
        assert journal.tokens('m "1"') == (10 * count, sum(range(count)))
        assert journal.tokens("other") == (0, 0)


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
    for _ in range(2):
        with AnswerJournal(tmp_path) as journal:
            assert not journal.has_failed(key(1)) and journal.has_failed(key(2))
            assert journal.read(key(2))["error"] == "no"
        (tmp_path / "answers.index").unlink()


@pytest.mark.parametrize("damage", ["missing", "empty", "behind", "torn", "of other files"])
def test_the_index_is_only_a_copy(tmp_path: Path, damage: str) -> None:
    filled(tmp_path, shard_bytes=50_000)
    index = tmp_path / "answers.index"
    data = index.read_bytes()
    if damage == "missing":
        index.unlink()
    elif damage == "of other files":
        filled(tmp_path / "other", 40, shard_bytes=50_000)
        os.replace(tmp_path / "other" / "answers.index", index)
    else:
        index.write_bytes({"empty": b"", "behind": data[: 36 * 17], "torn": data[:-5]}[damage])
    check(tmp_path)
    check(tmp_path)


def test_cut_anywhere_no_whole_answer_is_lost(tmp_path: Path) -> None:
    filled(tmp_path / "whole", 4)
    data = (tmp_path / "whole" / "answers-00001.jsonl").read_bytes()
    ends = [place + 1 for place, byte in enumerate(data) if byte == 10]
    for cut in {*range(0, len(data), 97), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}:
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "answers-00001.jsonl").write_bytes(data[:cut])
        for name in ("answers.index", "settled.bin"):
            (folder / name).write_bytes((tmp_path / "whole" / name).read_bytes())
        whole = sum(end <= cut for end in ends)
        with AnswerJournal(folder) as journal:
            assert len(journal) == whole
            assert [journal.settled(key(1000 + number)) is not None for number in range(4)] == [n < whole for n in range(4)]
            journal.append(key(99), row(99))
        with AnswerJournal(folder) as journal:
            assert len(journal) == whole + 1
            assert journal.read(key(99))["text"] == row(99)["text"]


def test_a_torn_settled_post_is_cut_off(tmp_path: Path) -> None:
    filled(tmp_path)
    file = tmp_path / "settled.bin"
    file.write_bytes(file.read_bytes()[:-5])
    with AnswerJournal(tmp_path) as journal:
        assert journal.settled(key(1029)) is None and journal.settled(key(1028)) == key(28)
        journal.settle(key(1029), key(29))
    check(tmp_path)


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    file = tmp_path / "answers-00001.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b"rubbish\n" + lines[2])
    with pytest.raises(ValueError, match=rf"answers-00001.jsonl, byte {len(lines[0])}: not an answer: b'rubbish"):
        AnswerJournal(tmp_path)


def test_a_line_cut_short_behind_the_index_is_named(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    file = tmp_path / "answers-00001.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1].rstrip(b"}\n") + b" \n" + lines[2])
    with AnswerJournal(tmp_path) as journal, pytest.raises(ValueError, match=rf"byte {len(lines[0])}: not an answer"):
        journal.read(key(1))


@pytest.mark.parametrize("file", ["answers", "index", "settled"])
def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, 30)
    written = os.write

    with AnswerJournal(tmp_path) as journal:
        full = {"answers": journal._writer, "index": journal._index_writer, "settled": journal._settled_writer}[file]
        tries = 0

        def write(to: int, data: bytes) -> int:
            nonlocal tries
            if to != full:
                return written(to, data)
            tries += 1
            if tries > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return written(to, data[:20])

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, "write", write)
            journal.append(key(30), row(30))
            journal.settle(key(1030), key(30))
        # Another request of the run was answered, and there is room again.
        journal.append(key(31), row(31))
        journal.append(key(30), row(30))
        for number in (30, 31):
            journal.settle(key(1000 + number), key(number))
            assert journal.read(key(number))["text"] == row(number)["text"]
    with AnswerJournal(tmp_path) as journal:
        assert len(journal) == 32
        for number in range(32):
            assert journal.read(key(number))["text"] == row(number)["text"]
            assert journal.settled(key(1000 + number)) == key(number)


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
