"""Texts that say again what an earlier one said.

Given   many texts, one by one.
Gives   for each near-copy the earlier text it copies.
Holds   two texts are near-copies if the Jaccard similarity of their runs of three words reaches the threshold, computed
        exactly on candidates that MinHash finds; at 0.8 it misses about one in a hundred, above 0.9 none to speak of. Of
        several alike the first is no copy. Memory is 128 bytes a text, twice that at the end; time grows as n log n.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_SHINGLE_WORDS = 3
_BANDS, _ROWS = 8, 4
# Texts of one bucket that the others are compared with: boilerplate may fill a bucket with all texts there are.
_MOST_ORIGINALS = 16
# The share of equal values of two signatures is their similarity give or take 0.07.
_SLACK = 0.2
_CHUNK = 4096
_WORD = re.compile(r"\w+")

_generator = np.random.default_rng(20251104)
_MULTIPLIERS = _generator.integers(1, 2**63, (_BANDS * _ROWS, 1), dtype=np.uint64) | np.uint64(1)
_OFFSETS = _generator.integers(0, 2**63, (_BANDS * _ROWS, 1), dtype=np.uint64)
_WORD_WEIGHTS = _generator.integers(1, 2**63, _SHINGLE_WORDS, dtype=np.uint64) | np.uint64(1)


def shingles(text: str) -> NDArray[np.uint64]:
    """Hashes of all runs of three words, upper and lower case and punctuation aside; sorted, each once.

    A text of fewer words is one run; an empty one has none.

    Example:
        >>> len(shingles("A dog, a cat.")), len(shingles("a dog"))
        (2, 1)
    """
    words = [zlib.crc32(word.encode("utf-8", "replace")) for word in _WORD.findall(text.casefold())]
    if not words:
        return np.empty(0, np.uint64)
    words += [0] * (_SHINGLE_WORDS - len(words))
    hashes = np.array(words, np.uint64)
    runs = len(hashes) - _SHINGLE_WORDS + 1
    mixed = sum((hashes[k : k + runs] * weight for k, weight in enumerate(_WORD_WEIGHTS)), np.zeros(runs, np.uint64))
    return np.unique(mixed ^ (mixed >> np.uint64(29)))


def similarity(one: NDArray[np.uint64], two: NDArray[np.uint64]) -> float:
    """Jaccard similarity of two results of `shingles`; 0 where one is empty."""
    if not len(one) or not len(two):
        return 0.0
    common = len(np.intersect1d(one, two, assume_unique=True))
    return common / (len(one) + len(two) - common)


class NearCopies:
    """Finds them.

    Args:
        threshold: least Jaccard similarity, above 0 and at most 1; candidates are found well from about 0.7 on.

    Example:
        >>> texts = ["A dog plays in the park today.", "Two cats sleep on a red chair.", "a dog plays in the park today"]
        >>> copies = NearCopies()
        >>> for text in texts:
        ...     copies.add(text)
        >>> copies.find(texts.__getitem__)
        {2: 0}
    """

    def __init__(self, threshold: float = 0.8):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold!r} must be above 0 and at most 1")
        self.threshold = threshold
        self._chunks: list[NDArray[np.uint32]] = []
        self._count = 0

    def add(self, text: str) -> None:
        """Take the next text."""
        if self._count % _CHUNK == 0:
            self._chunks.append(np.empty((_CHUNK, _BANDS * _ROWS), np.uint32))
        runs = shingles(text)
        if len(runs):
            signature = ((runs * _MULTIPLIERS + _OFFSETS) >> np.uint64(32)).min(axis=1)
        else:  # like no other
            signature = _generator_of(self._count).integers(0, 2**32, _BANDS * _ROWS)
        self._chunks[-1][self._count % _CHUNK] = signature.astype(np.uint32)
        self._count += 1

    def find(self, text_of: Callable[[int], str]) -> dict[int, int]:
        """The near-copies among all texts.

        Args:
            text_of: gives a text again, by its number from 0.

        Returns:
            Number of the copy -> number of an earlier text that is no copy itself.
        """
        copies: dict[int, int] = {}
        signatures = self._signatures()
        for band in range(_BANDS):
            pairs = np.ascontiguousarray(signatures[:, band * _ROWS : (band + 1) * _ROWS]).view(np.uint64)
            mixed = pairs[:, 0] * _WORD_WEIGHTS[0] + pairs[:, 1]
            order = np.argsort(mixed, kind="stable")
            ordered = mixed[order]
            bounds = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] ^ np.uint64(1), append=ordered[-1:] ^ np.uint64(1)))
            for start, end in zip(bounds[:-1], bounds[1:], strict=True):
                if end - start > 1:
                    self._compare(order[start:end], signatures, text_of, copies)
        # A text may have been called a copy of one that a later band called a copy, too.
        for copy in sorted(copies):
            copies[copy] = copies.get(copies[copy], copies[copy])
        return copies

    def _signatures(self) -> NDArray[np.uint32]:
        """All signatures in one piece; the chunks are given up for it."""
        joined = np.empty((self._count, _BANDS * _ROWS), np.uint32)
        for number in range(len(self._chunks)):
            part = joined[number * _CHUNK : (number + 1) * _CHUNK]
            part[:] = self._chunks[number][: len(part)]
            self._chunks[number] = part  # `add` may go on: a last chunk that is not full is made whole below
        if self._count % _CHUNK:
            self._chunks[-1] = np.concatenate([self._chunks[-1], np.empty((-self._count % _CHUNK, _BANDS * _ROWS), np.uint32)])
        return joined

    def _compare(
        self, bucket: NDArray[np.int64], signatures: NDArray[np.uint32], text_of: Callable[[int], str], copies: dict[int, int]
    ) -> None:
        """Find the copies in a bucket: by what the signatures say roughly, then exactly."""
        left = np.array([number for number in bucket.tolist() if number not in copies])
        for _ in range(_MOST_ORIGINALS):
            if len(left) < 2:
                return
            original, left = int(left[0]), left[1:]
            alike = (signatures[left] == signatures[original]).mean(axis=1) >= self.threshold - _SLACK
            if not alike.any():
                continue
            runs = shingles(text_of(original))
            found = {number for number in left[alike].tolist() if similarity(runs, shingles(text_of(number))) >= self.threshold}
            copies.update(dict.fromkeys(found, original))
            left = np.array([number for number in left.tolist() if number not in found])


def _generator_of(number: int) -> np.random.Generator:
    return np.random.default_rng((20251104, number))
