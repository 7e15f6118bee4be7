"""The scores as their formulas read, one post and one phrase at a time: what tests hold `dynkp.mmkp_f1.scoring` against.

Written from the definitions, with NLTK's stemmer; nothing is shared with the package.
"""

from __future__ import annotations

import math
import re
import unicodedata
from functools import lru_cache

from nltk.stem.porter import PorterStemmer

_stem_word = lru_cache(None)(PorterStemmer().stem)


# Format characters (zero-width spaces and joiners, marks of direction) that no script puts at the end of a word.
INVISIBLE = "[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
ENDS = rf"(?:[\s#\uff03\ufe5f\x1c-\x1f]|{INVISIBLE})*"


def stem(text: str) -> str:
    words = [re.sub(rf"^{INVISIBLE}+|{INVISIBLE}+$", "", word) for word in unicodedata.normalize("NFC", text).split()]
    return " ".join(_stem_word(word) for word in words if word)


def normal(phrase: str) -> str:
    return re.sub(rf"^{ENDS}|{ENDS}$", "", unicodedata.normalize("NFC", phrase))


def stem_phrase(phrase: str) -> str:
    return stem(normal(phrase))


def is_run(phrase: str, text: str) -> bool:
    words, tokens = phrase.split(), text.split()
    return bool(words) and any(tokens[i : i + len(words)] == words for i in range(len(tokens) - len(words) + 1))


def belongs(phrase: str, subset: str, text: str, seen: set[str]) -> bool:
    truth = {"present": is_run(phrase, text), "seen": phrase in seen, "all": True}
    truth |= {"absent": not truth["present"], "unseen": not truth["seen"]}
    return all(truth[kind] for kind in subset.split("&"))


def once(phrases: list[str]) -> list[str]:
    return [phrase for index, phrase in enumerate(phrases) if phrase not in phrases[:index]]


def ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def f1(p: float, r: float) -> float:
    return ratio(2 * p * r, p + r)


def dcg(hits: list[bool]) -> float:
    return sum(1 / math.log2(rank + 1) for rank, hit in enumerate(hits, start=1) if hit)


def plain_scores(predictions, references, *, subset="all", texts=None, train_keyphrases=(), ks=(1, 3, 5), convention="cmkp"):
    seen = {stem_phrase(phrase) for phrase in train_keyphrases}
    posts = []
    for index, (ranked, gold) in enumerate(zip(predictions, references, strict=True)):
        text = stem(texts[index]) if texts else ""
        ranked, gold = [stem_phrase(phrase) for phrase in ranked], [stem_phrase(phrase) for phrase in gold]
        if convention != "aimkp":
            ranked, gold = once(ranked), once(gold)
        if convention == "cmkp":
            ranked = [phrase for phrase in ranked if not {"<unk>", ",", "."} & set(phrase.split())]
        if convention in ("padded", "unpadded"):
            ranked = [phrase for phrase in ranked if phrase]
        ranked = [phrase for phrase in ranked if belongs(phrase, subset, text, seen)]
        gold = [phrase for phrase in gold if belongs(phrase, subset, text, seen)]
        if gold:
            posts.append((ranked, gold))

    row = {"posts": len(posts), "phrases": sum(len(gold) for _, gold in posts)}
    for k in ks:
        p, r, f, ap, ndcg = [], [], [], [], []
        micro = [0, 0]
        for ranked, gold in posts:
            top = ranked[:k]
            hits = len(set(gold) & set(top))
            p.append(ratio(hits, k if convention in ("aimkp", "padded") else len(top)))
            r.append(hits / len(gold))
            f.append(f1(p[-1], r[-1]))
            micro[0] += hits
            micro[1] += len(top) + len(gold)
            # Of repeats only the first is relevant.
            relevant = [phrase in gold and phrase not in ranked[:rank] for rank, phrase in enumerate(ranked)]
            if convention == "aimkp":
                ap.append(ratio(sum(len(set(gold) & set(top[:j])) / j for j in range(1, len(top) + 1)), len(top)))
            else:
                ap.append(sum(sum(relevant[:j]) / j for j in range(1, len(top) + 1) if relevant[j - 1]) / len(gold))
            ideal = sorted(relevant, reverse=True) if convention == "cmkp" else [True] * len(set(gold))
            ndcg.append(ratio(dcg(relevant[:k]), dcg(ideal[:k])))
        mean = [sum(values) / len(posts) if posts else None for values in (p, r, f, ap, ndcg)]
        if convention == "cmkp":
            mean[2] = f1(mean[0], mean[1]) if posts else None
            row[f"micro_f1@{k}"] = ratio(2 * micro[0], micro[1]) if posts else None
        row |= zip([f"p@{k}", f"r@{k}", f"f1@{k}", f"map@{k}", f"ndcg@{k}"], mean, strict=True)
    if convention in ("padded", "unpadded"):
        columns = {name: [] for name in ("p@m", "r@m", "f1@m", "f1@o", "r_precision")}
        for ranked, gold in posts:
            hits, first = len(set(gold) & set(ranked)), len(set(gold) & set(ranked[: len(gold)]))
            p, r = ratio(hits, len(ranked)), hits / len(gold)
            at_o = ratio(first, len(gold) if convention == "padded" else min(len(gold), len(ranked)))
            for name, value in zip(columns, (p, r, f1(p, r), f1(at_o, first / len(gold)), first / len(gold)), strict=True):
                columns[name].append(value)
        row |= {name: sum(values) / len(posts) if posts else None for name, values in columns.items()}
    return row
