"""NLTK's Porter stemmer in its default mode (`PorterStemmer(mode="NLTK_EXTENSIONS")`).

Given   a word.
Gives   its stem in lower case.
Holds   the result equals NLTK's for every string (tests/mmkp_f1/test_porter.py compares them), in time linear in the word's
        length. NLTK itself is not used because importing it takes 1.5 s of CPU time, several times the time of scoring the
        CMKP test set, and its stemmer is four times slower.
"""

from __future__ import annotations

_IRREGULAR = {
    "sky": "sky",
    "skies": "sky",
    "dying": "die",
    "lying": "lie",
    "tying": "tie",
    "news": "news",
    "innings": "inning",
    "inning": "inning",
    "outings": "outing",
    "outing": "outing",
    "cannings": "canning",
    "canning": "canning",
    "howe": "howe",
    "proceed": "proceed",
    "exceed": "exceed",
    "succeed": "succeed",
}

# Suffix -> replacement, in the order of the published rules: the first suffix that matches decides.
_STEP_2 = {
    "ational": "ate",
    "tional": "tion",
    "enci": "ence",
    "anci": "ance",
    "izer": "ize",
    "bli": "ble",
    "alli": "al",
    "entli": "ent",
    "eli": "e",
    "ousli": "ous",
    "ization": "ize",
    "ation": "ate",
    "ator": "ate",
    "alism": "al",
    "iveness": "ive",
    "fulness": "ful",
    "ousness": "ous",
    "aliti": "al",
    "iviti": "ive",
    "biliti": "ble",
    "fulli": "ful",
    "logi": "log",
}
_STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
_STEP_4 = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti", "ous",
    "ive", "ize",
)  # fmt: skip
_STEP_2_SUFFIXES, _STEP_3_SUFFIXES = tuple(_STEP_2), tuple(_STEP_3)


def porter_stem(word: str) -> str:
    """Stem one word.

    Args:
        word: The word, in any case.

    Returns:
        The stem, in lower case.

    Example:
        >>> [porter_stem(word) for word in ("Wildflowers", "relational", "dying")]
        ['wildflow', 'relat', 'die']
    """
    stem = word.lower()
    if stem in _IRREGULAR:
        return _IRREGULAR[stem]
    if len(word) <= 2:  # the length before lower-casing, as in NLTK: lower-casing can add characters
        return stem
    stem = _step_1b(_step_1a(stem))
    if stem.endswith("y") and len(stem) > 2 and _is_consonant(stem, len(stem) - 2):
        stem = stem[:-1] + "i"
    if stem.endswith(_STEP_2_SUFFIXES):
        stem = _step_2(stem)
    if stem.endswith(_STEP_3_SUFFIXES):
        suffix = next(suffix for suffix in _STEP_3 if stem.endswith(suffix))
        if _measure(stem[: -len(suffix)]) > 0:
            stem = stem[: -len(suffix)] + _STEP_3[suffix]
    if stem.endswith(_STEP_4):
        suffix = next(suffix for suffix in _STEP_4 if stem.endswith(suffix))
        rest = stem[: -len(suffix)]
        if _measure(rest) > 1 and (suffix != "ion" or rest[-1] in "st"):
            stem = rest
    if stem.endswith("e"):
        measure = _measure(stem[:-1])
        if measure > 1 or (measure == 1 and not _ends_cvc(stem[:-1])):
            stem = stem[:-1]
    if stem.endswith("ll") and _measure(stem[:-1]) > 1:
        stem = stem[:-1]
    return stem


def _step_1a(word: str) -> str:
    if not word.endswith("s") or (word.endswith("ss") and not word.endswith("sses")):
        return word
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    return word[:-2] if word.endswith("sses") else word[:-1]


def _step_1b(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    if word.endswith("ed") and _contains_vowel(word[:-2]):
        rest = word[:-2]
    elif word.endswith("ing") and _contains_vowel(word[:-3]):
        rest = word[:-3]
    else:
        return word
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if len(rest) >= 2 and rest[-1] == rest[-2] and _is_consonant(rest, len(rest) - 1):
        return rest if rest[-1] in "lsz" else rest[:-1]
    if rest.endswith("*d"):  # NLTK names the rule above "*d", and also matches these two characters literally
        return rest[:-2] + "d"
    return rest + "e" if _measure(rest) == 1 and _ends_cvc(rest) else rest


def _step_2(word: str) -> str:
    while word.endswith("alli") and _measure(word[:-4]) > 0:
        word = word[:-2]  # ends in "al", to which the step is applied again
    suffix = next((suffix for suffix in _STEP_2 if word.endswith(suffix)), None)
    if suffix is None:
        return word
    rest = word[: -len(suffix)]
    # The l of "logi" belongs to the stem, so that "geologi" is stemmed too.
    if _measure(word[:-3] if suffix == "logi" else rest) > 0:
        return rest + _STEP_2[suffix]
    return word


def _is_consonant(word: str, position: int) -> bool:
    """Whether a letter is a consonant: not a, e, i, o, u, nor a y after a consonant; in a run of y they alternate."""
    start = position
    while start > 0 and word[start] == "y":
        start -= 1
    return (word[start] not in "aeiou") == ((position - start) % 2 == 0)


def _measure(stem: str) -> int:
    """The number of times that a vowel is followed by a consonant (m in Porter's paper)."""
    count = 0
    vowel = None
    for letter in stem:
        previous = vowel
        vowel = letter in "aeiou" or (letter == "y" and previous is False)
        if previous and not vowel:
            count += 1
    return count


def _contains_vowel(stem: str) -> bool:
    # A y is a vowel unless it is the first letter or follows a vowel, which then counts itself.
    return any(letter in "aeiou" for letter in stem) or "y" in stem[1:]


def _ends_cvc(word: str) -> bool:
    if len(word) == 2:
        return not _is_consonant(word, 0) and _is_consonant(word, 1)
    return (
        len(word) >= 3
        and _is_consonant(word, len(word) - 3)
        and not _is_consonant(word, len(word) - 2)
        and _is_consonant(word, len(word) - 1)
        and word[-1] not in "wxy"
    )
