"""Invariants of the index: what is added is found, committed or not, by this index and the next one; of several answers to a
request the last is found, and the tokens of all are counted; a damaged database is replaced by an empty one; a transaction
that fails changes nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynkp.chat.answer_index import AnswerIndex, Entry


def entry(number: int, **more: object) -> Entry:
    return Entry(number.to_bytes(16, "big"), 1, 100 * number, False, "m", 10, number)._replace(**more)  # type: ignore[arg-type]


def test_what_is_added_is_found(tmp_path: Path) -> None:
    index = AnswerIndex(tmp_path / "index.sqlite")
    index.extend(entry(number) for number in range(5))
    index.add(entry(5, file=2, failed=True))
    index.settle(b"post", entry(5).key)
    for _ in range(2):
        assert [index.find(entry(number).key) for number in range(7)] == [
            *((1, 100 * number) for number in range(5)),
            (2, 500),
            None,
        ]
        assert index.failed == {entry(5).key} and len(index) == 6
        assert (index.tokens["m", "prompt"], index.tokens["m", "completion"]) == (60, 15)
        assert index.settled(b"post") == entry(5).key and index.settled(b"other") is None
        assert index.last_answers() == [(1, 400, entry(4).key), (2, 500, entry(5).key)]
        index.close()
        index = AnswerIndex(tmp_path / "index.sqlite")
    index.close()


def test_the_last_answer_is_found_and_all_tokens_are_counted(tmp_path: Path) -> None:
    index = AnswerIndex(tmp_path / "index.sqlite")
    failure = entry(7, failed=True, model="", prompt_tokens=0, completion_tokens=0)
    index.extend([failure, entry(7, offset=1), failure])
    assert index.failed == {failure.key}
    for offset in (2, 3, 4):
        index.add(entry(7, offset=offset))
    for _ in range(2):
        assert index.find(entry(7).key) == (1, 4)
        assert not index.failed and len(index) == 1
        index.close()
        index = AnswerIndex(tmp_path / "index.sqlite")
    assert (index.tokens["m", "prompt"], index.tokens["m", "completion"]) == (40, 28)
    index.close()


def test_many_new_entries_are_committed_unasked(tmp_path: Path) -> None:
    index = AnswerIndex(tmp_path / "index.sqlite")
    for number in range(25_000):
        index.add(entry(number))
        index.settle(b"%d" % number, entry(number).key)
    assert len(index._new) < 10_000 and len(index._new_settled) < 10_000
    assert all(index.find(entry(number).key) and index.settled(b"%d" % number) for number in range(0, 25_000, 100))
    index.close()


def test_answers_are_replaced_and_the_posts_they_settled_kept(tmp_path: Path) -> None:
    index = AnswerIndex(tmp_path / "index.sqlite")
    index.extend(entry(number) for number in range(4))
    for number in range(4):
        index.settle(b"%d" % number, entry(number).key)
    index.commit()
    index.rebuild(entry(number, offset=7) for number in (1, 2, 9))
    assert [index.find(entry(number).key) for number in (0, 1, 9)] == [None, (1, 7), (1, 7)]
    assert [index.settled(b"%d" % number) is not None for number in range(4)] == [False, True, True, False]
    assert index.tokens["m", "completion"] == 12
    index.close()


def test_a_transaction_that_fails_changes_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Entry]:
        yield entry(5)
        raise ValueError("not an answer")

    index = AnswerIndex(tmp_path / "index.sqlite")
    index.extend([entry(1)])
    for change in (index.extend, index.rebuild):
        with pytest.raises(ValueError, match="not an answer"):
            change(broken())
        assert index.find(entry(1).key) == (1, 100) and index.find(entry(5).key) is None
    index.close()


@pytest.mark.parametrize("content", [b"rubbish" * 1000, b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_database_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index.sqlite").write_bytes(content)
    (tmp_path / "index.sqlite-wal").write_bytes(content)
    index = AnswerIndex(tmp_path / "index.sqlite")
    assert len(index) == 0
    index.close()


def test_what_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.DatabaseError):
        AnswerIndex(tmp_path / "missing" / "index.sqlite")
