"""The suite `scoring`: the cost of the metric, cold and warm, by number of posts.

Given   the number of posts; they are random, of CMKP's sizes: 27 words of text, 5 predictions, 1.3 gold keyphrases.
Gives   seconds of CPU (importing the metric included when cold) and the MiB by which the process grew from batch to batch.
Holds   every row is measured in a process of its own, with empty caches; all, present and absent keyphrases are scored at 1, 3
        and 5; drawing posts is not timed.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # that module imports torch, which the measured processes must not
    from dynkp.bench.measure import Setting

HEADINGS = ("posts", "CPU s, cold", "CPU s, warm", "µs per post", "process grew by")
SIZES = (5_372, 10_000, 100_000, 1_000_000)
_BATCH = 10_000
_WORDS = 200_000


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure every size.

    Args:
        setting: `repeats` holds for the sizes below 100,000; the larger ones are measured once. The device is not used.

    Yields:
        Rows with `posts`, `cold_s`, `warm_s` (`None` for sizes measured once) and `grown_mib`.
    """
    from dynkp.bench.measure import environment

    for posts in (500, 2_000) if setting.quick else SIZES:
        repeats = setting.repeats if posts < 100_000 else 1
        runs = [_in_own_process(posts) for _ in range(repeats)]
        yield {
            "suite": "scoring",
            "posts": posts,
            "quick": setting.quick,
            "cold_s": statistics.median(row["cold_s"] for row in runs),
            "warm_s": statistics.median(row["warm_s"] for row in runs) if posts < 100_000 else None,
            "grown_mib": max(row["grown_mib"] for row in runs),
            # The metric runs on the CPU, on one thread, whatever the setting.
            **environment(setting),
            "device": "cpu",
            "threads": 1,
            "clock": "process CPU time",
            "repeats": repeats,
        }


def cells(row: dict[str, Any]) -> list[str]:
    """Format a row for the printed table, under `HEADINGS`."""
    warm = "-" if row["warm_s"] is None else f"{row['warm_s']:.3f}"
    per_post = 1e6 * row["cold_s"] / row["posts"]
    return [f"{row['posts']:,}", f"{row['cold_s']:.3f}", warm, f"{per_post:.1f}", f"{row['grown_mib']:.0f} MiB"]


def _in_own_process(posts: int) -> dict[str, Any]:
    code = f"from dynkp.bench.scoring import measure_here; measure_here({posts})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def measure_here(posts: int) -> None:
    """Score random posts in this process, in batches, and print the cost as JSON.

    Args:
        posts: Number of posts.
    """
    import psutil

    process = psutil.Process()
    batches = _drawn_batches(posts)
    first = next(batches)
    before = process.memory_info().rss
    began = time.process_time()
    from dynkp.mmkp_f1.scoring import KeyphraseScorer

    scorer = KeyphraseScorer(subsets=["all", "present", "absent"])
    scorer.add_batch(*first)
    seconds = time.process_time() - began
    largest = process.memory_info().rss
    for batch in batches:
        began = time.process_time()
        scorer.add_batch(*batch)
        seconds += time.process_time() - began
        largest = max(largest, process.memory_info().rss)
    began = time.process_time()
    scores = scorer.compute()
    seconds += time.process_time() - began
    assert scores["all"]["posts"] == posts and scores["present"]["posts"] and scores["absent"]["posts"]
    warm = None
    if posts <= _BATCH:
        began = time.process_time()
        again = KeyphraseScorer(subsets=["all", "present", "absent"])
        again.add_batch(*first)
        again.compute()
        warm = time.process_time() - began
    print(json.dumps({"cold_s": seconds, "warm_s": warm, "grown_mib": (largest - before) / 2**20}))


def _drawn_batches(posts: int) -> Iterator[tuple[list[list[str]], list[list[str]], list[str]]]:
    """Draw batches of predictions, gold keyphrases and texts; the n-th word's probability is proportional to 1/n."""
    draw = random.Random(0)
    ends = ["", "s", "ing", "ed", "ation", "ness", "ly", "er"]
    letters = "bcdfghklmnprstvw", "aeiou"
    words = []
    for _ in range(_WORDS):
        beginning = (draw.choice(letters[place % 2]) for place in range(draw.randint(2, 8)))
        words.append("".join(beginning) + draw.choice(ends))
    weights = list(accumulate(1 / rank for rank in range(1, _WORDS + 1)))
    for start in range(0, posts, _BATCH):
        size = min(_BATCH, posts - start)
        texts = [draw.choices(words, cum_weights=weights, k=27) for _ in range(size)]
        phrases = iter(draw.choices(words, cum_weights=weights, k=12 * size))
        gold, ranked = [], []
        for text in texts:
            present = " ".join(text[:2])  # the others are mostly absent from the text
            other = [f"{next(phrases)} {next(phrases)}", *(next(phrases) for _ in range(3))]
            gold.append([present, other[0]] if draw.random() < 0.3 else [draw.choice([present, other[0]])])
            ranked.append([present, *other])
        yield ranked, gold, [" ".join(text) for text in texts]
