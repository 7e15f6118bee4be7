"""Invariants of text for terminals: what is printable stays as it is, and everything else becomes a visible escape."""

from __future__ import annotations

import sys

from dynkp.files.terminal import printable


def test_no_control_character_is_left() -> None:
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    assert printable(everything).isprintable()


def test_texts_of_all_scripts_stay_as_they_are() -> None:
    for text in ("", "déjà vu #nba", "日本語", "한국어", "مرحبا", "🎉👍"):
        assert printable(text) == text
    assert printable("a\x1b]0;title\x07b\x9b\u202e\n") == "a\\x1b]0;title\\x07b\\x9b\\u202e\\n"
