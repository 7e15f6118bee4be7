"""Invariants of output statistics: shares and means of hand-counted outputs; a zero denominator gives None."""

from __future__ import annotations

import pytest

from dynkp.mmkp_f1.outputs import list_statistics, output_statistics

OUTPUTS = [
    "<think>A dog sleeps.</think><answer>dogs; dog; #dog; cat</answer>",  # 3 + 4 words
    "sun set; sea",
    "<think>it never comes to",  # cut off
    "",
    " \n",
    "; ;",
]


def test_of_lists():
    assert list_statistics([["dogs", "Dog", "cat", " "], [], [""]]) == {
        "empty_share": pytest.approx(2 / 3),
        "keyphrases_per_post": 1.0,
        "repeat_share": pytest.approx(1 / 3),
    }


def test_of_outputs():
    statistics = output_statistics(OUTPUTS, count_tokens=len)
    assert statistics == pytest.approx(
        {
            "empty_share": 4 / 6,
            "keyphrases_per_post": 6 / 6,
            "repeat_share": 2 / 6,
            "unparsable_share": 2 / 6,  # the one cut off and "; ;", not the two that are blank
            "reasoning_share": 2 / 6,
            "output_words": (7 + 3 + 4 + 0 + 0 + 2) / 6,
            "output_tokens": sum(map(len, OUTPUTS)) / 6,
        }
    )


def test_a_degenerate_loop_is_seen_although_the_parser_drops_repeats():
    assert output_statistics(["dog; " * 50])["repeat_share"] == pytest.approx(0.98)


def test_the_separator():
    assert output_statistics(["a, b"], separator=",")["keyphrases_per_post"] == 2


def test_nothing():
    assert set(output_statistics([]).values()) == {None}
    assert list_statistics([[]])["repeat_share"] is None
