"""The index of a journal, an SQLite database: where each answer is, and which posts need no more requests.

The index is disposable: the journal builds it again from its answers where it is missing, damaged or of other answers. Posts
that it then no longer knows to be settled are settled again from the answers, which takes time, but no request.

New entries stay in memory until `commit`, which the journal calls every few seconds, so a full disk or a killed process costs
no more than reading the journal's last lines again. The journal's lock lets one process have the database; SQLite's own locks,
which some network file systems lack, are switched off.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

_SETUP = """
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA cache_size = -65536;
CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY, file INTEGER, offset INTEGER, failed INTEGER, model TEXT, prompt INTEGER, completion INTEGER
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS settled (post BLOB PRIMARY KEY, key BLOB) WITHOUT ROWID;
"""
# The last answer to a request counts; the tokens of all of them were paid for.
_INSERT = """
INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET
    file = excluded.file, offset = excluded.offset, failed = excluded.failed,
    model = coalesce(nullif(excluded.model, ''), model),
    prompt = prompt + excluded.prompt, completion = completion + excluded.completion
"""
_URI_OPTIONS = "?vfs=unix-none" if os.name == "posix" else ""
# New entries that are committed without waiting for `commit`.
_MOST_NEW = 10_000


class Entry(NamedTuple):
    """What the index holds of an answer.

    Attributes:
        key: The request's key, 16 bytes.
        file: Number of the journal's file.
        offset: Where the answer's line begins in it, in bytes.
        failed: Whether the request failed.
        model: The model's name, as JSON writes it in ASCII.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens of the answer.
    """

    key: bytes
    file: int
    offset: int
    failed: bool
    model: str
    prompt_tokens: int
    completion_tokens: int


class AnswerIndex:
    """Opens an index; creates it where it is missing or damaged.

    Args:
        path: The database file.

    Attributes:
        failed: Keys of the requests whose last answer is a failure.
        tokens: `(model, "prompt")` and `(model, "completion")` -> number of tokens of all answers.

    Raises:
        sqlite3.DatabaseError: If the database can be neither opened nor created.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._new: dict[bytes, Entry] = {}
        self._new_settled: dict[bytes, bytes] = {}
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            logger.info("%s is damaged (%s); it is built again", self.path, error)
            for name in (self.path, Path(f"{self.path}-wal")):
                name.unlink(missing_ok=True)
            self._open()

    def _open(self) -> None:
        address = self.path.absolute().as_uri() + _URI_OPTIONS
        self._database = sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False)
        try:
            self._database.executescript(_SETUP)
            if (found := self._database.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(found)
            self._load()
        except sqlite3.DatabaseError:
            self._database.close()
            raise

    def _load(self) -> None:
        """Read what is kept in memory."""
        self.failed = {key for (key,) in self._database.execute("SELECT key FROM answers WHERE failed")}
        self.tokens: Counter[tuple[str, str]] = Counter()
        sums = self._database.execute("SELECT model, sum(prompt), sum(completion) FROM answers GROUP BY model")
        for model, prompt, completion in sums:
            self.tokens += {(model, "prompt"): prompt, (model, "completion"): completion}

    def __len__(self) -> int:
        self.commit()
        return self._database.execute("SELECT count(*) FROM answers").fetchone()[0]

    def find(self, key: bytes) -> tuple[int, int] | None:
        """Number of the file, and offset in it, of the last answer to a request; None if there is none."""
        if (new := self._new.get(key)) is not None:
            return new.file, new.offset
        return self._database.execute("SELECT file, offset FROM answers WHERE key = ?", (key,)).fetchone()

    def settled(self, post: bytes) -> bytes | None:
        """Key of the last answer of the post with this fingerprint; None if the post may need more requests."""
        if post in self._new_settled:
            return self._new_settled[post]
        found = self._database.execute("SELECT key FROM settled WHERE post = ?", (post,)).fetchone()
        return found and found[0]

    def last_answers(self) -> list[tuple[int, int, bytes]]:
        """Of each file of the journal its number, and offset and key of the last line that is in the index."""
        return self._database.execute("SELECT file, max(offset), key FROM answers GROUP BY file").fetchall()

    def add(self, entry: Entry) -> None:
        """Add an answer; it replaces an earlier one to the same request."""
        if entry.key in self._new:
            self.commit()
        self._new[entry.key] = entry
        (self.failed.add if entry.failed else self.failed.discard)(entry.key)
        self.tokens[entry.model, "prompt"] += entry.prompt_tokens
        self.tokens[entry.model, "completion"] += entry.completion_tokens
        if len(self._new) >= _MOST_NEW:
            self.commit()

    def settle(self, post: bytes, key: bytes) -> None:
        """Note the key of the last answer of a post that needs no more requests."""
        self._new_settled[post] = key
        if len(self._new_settled) >= _MOST_NEW:
            self.commit()

    def extend(self, entries: Iterable[Entry]) -> None:
        """Add many answers in one transaction, before any others are added."""
        with self._transaction():
            self._database.executemany(_INSERT, entries)
        self._load()

    def rebuild(self, entries: Iterable[Entry]) -> None:
        """Replace all answers in one transaction; posts whose last answer is no longer there are not settled."""
        with self._transaction():
            self._database.execute("DELETE FROM answers")
            self._database.executemany(_INSERT, entries)
            self._database.execute("DELETE FROM settled WHERE key NOT IN (SELECT key FROM answers)")
        self._load()

    def commit(self) -> None:
        """Write new entries to the database. If that fails, as on a full disk, they stay in memory, with a warning."""
        try:
            with self._transaction():
                self._database.executemany(_INSERT, self._new.values())
                self._database.executemany("REPLACE INTO settled VALUES (?, ?)", self._new_settled.items())
        except sqlite3.OperationalError as error:
            logger.warning("%s cannot be written (%s); it will be completed from the answers", self.path, error)
        else:
            self._new.clear()
            self._new_settled.clear()

    def close(self) -> None:
        """Commit, and close the database."""
        self.commit()
        self._database.close()

    def _transaction(self) -> sqlite3.Connection:
        """To be used in a `with` statement, which commits or rolls back."""
        self._database.execute("BEGIN")
        return self._database
