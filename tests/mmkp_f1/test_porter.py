"""Invariant of the stemmer: it equals NLTK's Porter stemmer in its default mode, for every string.

Compared on every word of CMKP's posts, and on random words made of the rules' own suffixes, of letters on which the rules
depend, and of any Unicode.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynkp.mmkp_f1 import porter
from dynkp.mmkp_f1.porter import porter_stem

RULES = [*porter._STEP_2, *porter._STEP_3, *porter._STEP_4]
SUFFIXES = [*RULES, "s", "ies", "ied", "eed", "ed", "ing", "y", "e", "ll", "sses", "*d"]


@pytest.fixture(scope="module")
def nltk_stem():
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer().stem


def test_every_word_of_cmkp(shared: Path, nltk_stem):
    words: set[str] = set()
    for name in ("test", "valid"):
        for line in (shared / f"data/cmkp/{name}.jsonl").open(encoding="utf-8"):
            post = json.loads(line)
            words.update(" ".join([post["text"], post["ocr"], *post["keyphrases"]]).split())
    words |= {word[:cut] for word in words for cut in range(3, len(word))}
    assert len(words) > 40_000
    assert [word for word in words if porter_stem(word) != nltk_stem(word)] == []


STEMS = st.text("aeiouybdlstzwx*", max_size=5)


@settings(max_examples=1500)
@given(STEMS, st.lists(st.sampled_from(SUFFIXES), max_size=3).map("".join))
@example("a", "*ding")
@example("y", "y" * 50 + "ing")
@example("", "alli")
@example("e", "allialli")
def test_drawn_words(nltk_stem, stem, suffix):
    assert porter_stem(stem + suffix) == nltk_stem(stem + suffix)


@pytest.mark.parametrize("word", sorted(porter._IRREGULAR))
def test_irregular_words(nltk_stem, word):
    assert porter_stem(word) == porter_stem(word.upper()) == nltk_stem(word)


@settings(max_examples=500)
@given(st.text(max_size=12))
@example("İS")
@example("ΣΣΣ")
@example("ß" * 2 + "ing")
def test_any_string(nltk_stem, word):
    assert porter_stem(word) == nltk_stem(word)


def test_a_word_of_a_megabyte_is_no_trouble():
    for letter in "ay":
        assert len(porter_stem(letter * 1_000_000)) > 999_990
