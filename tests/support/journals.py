"""Journals with known answers."""

from __future__ import annotations

from pathlib import Path

from dynkp.chat.journal import AnswerJournal


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def row(number: int, **more: object) -> dict[str, object]:
    text = f"answer {number} “é” " + "x" * (number * 1000 % 20_000)
    return {"model": 'm "1"', "text": text, "prompt_tokens": 10, "completion_tokens": number, **more}


def filled(folder: Path, count: int = 30, *, start: int = 0, **options: int) -> None:
    """Write answers with the numbers from `start` to `count`."""
    with AnswerJournal(folder, **options) as journal:
        for number in range(start, count):
            journal.append(key(number), row(number))
            journal.settle(key(1000 + number), key(number))


def check(folder: Path, count: int = 30, *, settled: bool = True) -> None:
    """Hold the journal against what `filled` wrote; `settled`: the settled posts, too."""
    with AnswerJournal(folder) as journal:
        assert len(journal) == count
        for number in range(count):
            found = journal.read(key(number))
            assert found["text"] == row(number)["text"]
            assert found["failed"] is False
            assert not settled or journal.settled(key(1000 + number)) == key(number)
        assert key(count) not in journal and journal.settled(key(5000)) is None
        assert journal.tokens('m "1"') == (10 * count, sum(range(count)))
        assert journal.tokens("other") == (0, 0)
