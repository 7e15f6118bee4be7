"""Near-copies among texts, by MinHash and Jaccard similarity.

Given   many texts, one by one.
Gives   for each near-copy the earlier text of which it is a copy.
Holds   two texts are near-copies if the Jaccard similarity of their shingles (runs of three words) reaches the threshold,
        computed exactly on candidate pairs that MinHash finds; at 0.8 about one pair in a hundred is missed, above 0.9 almost
        none. Of several similar texts the first is not a copy. Memory is 128 bytes per text, twice that in `find`; time grows
        as n log n.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_SHINGLE_WORDS = 3
_BANDS, _ROWS = 8, 4
# The number of texts of a bucket with which its others are compared: boilerplate may put all texts into one bucket.
_MOST_ORIGINALS = 16
# The share of equal values of two signatures estimates their similarity, with a standard error of 0.07.
_SLACK = 0.2
_CHUNK = 4096
_WORD = re.compile(r"\w+")

_generator = np.random.default_rng(20251104)
_MULTIPLIERS = _generator.integers(1, 2**63, (_BANDS * _ROWS, 1), dtype=np.uint64) | np.uint64(1)
_OFFSETS = _generator.integers(0, 2**63, (_BANDS * _ROWS, 1), dtype=np.uint64)
_WORD_WEIGHTS = _generator.integers(1, 2**63, _SHINGLE_WORDS, dtype=np.uint64) | np.uint64(1)


def shingles(text: str) -> NDArray[np.uint64]:
    """Hash all runs of three words of a text, ignoring case and punctuation.

    Args:
        text: The text. If it has one or two words, they are one run; if it has none, there is no run.

    Returns:
        The distinct hashes, sorted.

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
    """Compute the Jaccard similarity of two texts from their shingles.

    Args:
        one: The first text's `shingles`.
        two: The second text's.

    Returns:
        The similarity, in [0, 1]; 0 if one of them is empty.

    Example:
        >>> similarity(shingles("a b c d"), shingles("a b c e"))
        0.3333333333333333
    """
    if not len(one) or not len(two):
        return 0.0
    common = len(np.intersect1d(one, two, assume_unique=True))
    return common / (len(one) + len(two) - common)


class NearCopies:
    """Finds the near-copies among texts.

    Args:
        threshold: The least Jaccard similarity of near-copies, above 0 and at most 1. MinHash finds candidate pairs reliably
            from about 0.7 on.

    Raises:
        ValueError: If the threshold is out of range.

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
        """Add the next text; its number is the count of texts added before."""
        if self._count % _CHUNK == 0:
            self._chunks.append(np.empty((_CHUNK, _BANDS * _ROWS), np.uint32))
        runs = shingles(text)
        if len(runs):
            signature = ((runs * _MULTIPLIERS + _OFFSETS) >> np.uint64(32)).min(axis=1)
        else:  # an empty text is similar to no other
            signature = _generator_of(self._count).integers(0, 2**32, _BANDS * _ROWS)
        self._chunks[-1][self._count % _CHUNK] = signature.astype(np.uint32)
        self._count += 1

    def find(self, text_of: Callable[[int], str]) -> dict[int, int]:
        """Find the near-copies among all texts added so far.

        Args:
            text_of: Returns the text with a number, from 0.

        Returns:
            Number of the near-copy -> number of an earlier text that is not a near-copy itself.
        """
        copies: dict[int, int] = {}
        signatures = self._signatures()
        for band in range(_BANDS):
            pairs = np.ascontiguousarray(signatures[:, band * _ROWS : (band + 1) * _ROWS]).view(np.uint64)
            mixed = pairs[:, 0] * _WORD_WEIGHTS[0] + pairs[:, 1]
            order = np.argsort(mixed, kind="stable")
            ordered = mixed[order]
            bounds = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] ^ np.uint64(1), append=ordered[-1:] ^ np.uint64(1)))
            for start, end in pairwise(bounds):
                if end - start > 1:
                    self._compare(order[start:end], signatures, text_of, copies)
        # A later band may have found that the original of a copy is a copy itself.
        for copy in sorted(copies):
            copies[copy] = copies.get(copies[copy], copies[copy])
        return copies

    def _signatures(self) -> NDArray[np.uint32]:
        """All signatures in one array; the chunks become views of it, so that memory is needed once."""
        joined = np.empty((self._count, _BANDS * _ROWS), np.uint32)
        for number in range(len(self._chunks)):
            part = joined[number * _CHUNK : (number + 1) * _CHUNK]
            part[:] = self._chunks[number][: len(part)]
            self._chunks[number] = part  # more texts may be added: an incomplete last chunk is extended below
        if self._count % _CHUNK:
            self._chunks[-1] = np.concatenate([self._chunks[-1], np.empty((-self._count % _CHUNK, _BANDS * _ROWS), np.uint32)])
        return joined

    def _compare(
        self, bucket: NDArray[np.int64], signatures: NDArray[np.uint32], text_of: Callable[[int], str], copies: dict[int, int]
    ) -> None:
        """Find the copies in a bucket: candidates by their signatures, then exactly by their shingles."""
        left = np.array([number for number in bucket.tolist() if number not in copies])
        for _ in range(_MOST_ORIGINALS):
            if len(left) < 2:
                return
            original, left = int(left[0]), left[1:]
            similar = (signatures[left] == signatures[original]).mean(axis=1) >= self.threshold - _SLACK
            if not similar.any():
                continue
            runs = shingles(text_of(original))
            found = {
                number for number in left[similar].tolist() if similarity(runs, shingles(text_of(number))) >= self.threshold
            }
            copies.update(dict.fromkeys(found, original))
            left = np.array([number for number in left.tolist() if number not in found])


def _generator_of(number: int) -> np.random.Generator:
    return np.random.default_rng((20251104, number))
