"""Spellings of keyphrases that are equal, the normalised one first: Unicode's forms, number signs, invisible characters."""

from __future__ import annotations

import unicodedata

_PHRASES = ("b\u00f3ng \u0111\u00e1 Vi\u1ec7t", "\ud55c\uad6d \ucd95\uad6c", "\u00e9t\u00e9", "nba")

SPELLINGS = [
    (
        phrase,
        unicodedata.normalize("NFD", phrase),
        f"#{phrase}",
        f"\uff03{phrase}",
        f"\ufe5f {phrase}",
        f"\u200b{phrase}\u200d",
        f"\u200f#{phrase}\u200e",
        f"\u2068{unicodedata.normalize('NFD', phrase)}\u2069",
        f"\ufeff{phrase}",
    )
    for phrase in _PHRASES
]
