"""Ranking by people: an HTML form to fill in, and the judgements read from its answers (Dynamic CoT, Table 8, column "Human").

Given   posts and candidates (`dynkp.judging.candidates`).
Gives   an HTML form, a key file that maps its letters to systems, and judgements from exported answers.
Holds   the form is self-contained (`dynkp.report.pages`) and does not contain the systems' names; only the key does, and
        answers can be read only with the key of their form; a post counts for an annotator once every candidate has its three
        ranks; posts on which all systems agree are not shown, and count as ties.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynkp.chat.post_stream import PostStream, SourcePost
from dynkp.chat.settings import RunPaths
from dynkp.files.atomic import atomic_files, write_text
from dynkp.files.json_files import read_json, write_json
from dynkp.files.json_lines import write_json_lines
from dynkp.judging.candidates import LABELS, Candidate
from dynkp.judging.prompts import check_judgeable, checked_ranks
from dynkp.judging.ranks import CRITERIA, Judgement, rank_tables
from dynkp.report.pages import write_page

_IMAGE_SIDE = 640
_QUESTIONS = {
    "correctness": "Do the phrases match the author's, or could they stand in their place?",
    "relevance": "Do they belong to what the post says and shows?",
    "usefulness": "As hashtags, would they help the post to be spread, found or sorted?",
}


def key_path(form: str | os.PathLike[str]) -> Path:
    """Return the path of a form's key: `form.key.json` beside `form.html`.

    Args:
        form: The form's path.

    Example:
        >>> key_path("out/form.html").name
        'form.key.json'
    """
    return Path(form).with_suffix(".key.json")


def write_form(
    path: str | os.PathLike[str],
    posts: PostStream,
    candidates: Mapping[str, Sequence[Candidate]],
    *,
    sample: int | None = None,
    seed: int = 0,
    title: str = "Which keyphrases fit best?",
) -> dict[str, int]:
    """Write a form, and its key beside it.

    Args:
        path: The HTML file; form and key are replaced together when both are complete.
        posts: The posts.
        candidates: Post id -> candidates, in the order in which they are shown.
        sample: The number of posts to draw; None for all. The same seed draws the same posts.
        seed: The seed of the draw.
        title: The page's title and heading.

    Returns:
        The numbers of posts `drawn`, of these `shown` (those on which systems differ), and of posts that cannot be judged
        (`unjudgeable`).

    Raises:
        ValueError: If no post drawn has predictions that differ.

    Example:
        >>> import json, pathlib, tempfile
        >>> from dynkp.judging.candidates import draw_candidates
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "posts.jsonl").write_text(json.dumps({"id": "7", "text": "Finals!", "keyphrases": ["nba"]}))
        >>> candidates = {"7": draw_candidates("7", {"a": ["nba"], "b": ["cats"]})}
        >>> write_form(folder / "form.html", PostStream(folder / "posts.jsonl"), candidates)
        {'drawn': 1, 'shown': 1, 'unjudgeable': 0}
    """
    judgeable = [source for source in posts if _is_judgeable(source)]
    drawn = judgeable
    if sample is not None:
        # Sorted by a digest of the id, so that the draw does not depend on the other posts.
        shuffled = sorted(
            judgeable, key=lambda source: hashlib.blake2b(f"{seed} {source.id}".encode("utf-8", "replace")).digest()
        )
        drawn = sorted(shuffled[:sample], key=lambda source: source.index)
    shown = [source for source in drawn if len(candidates[source.id]) > 1]
    if not shown:
        raise ValueError(f"{posts.path}: of {len(drawn)} posts none has predictions that differ: there is nothing to rank")
    content = [[source.id, [one.keyphrases for one in candidates[source.id]]] for source in drawn]
    form = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
    key = {
        "form": form,
        "systems": sorted({system for source in drawn for one in candidates[source.id] for system in one.systems}),
        "posts": [{"id": source.id, "order": [list(one.systems) for one in candidates[source.id]]} for source in drawn],
    }
    with atomic_files(Path(path), key_path(path)) as (page, key_file):
        write_page(
            page,
            "human_form.html",
            package="dynkp.judging",
            title=title,
            form=form,
            questions=_QUESTIONS,
            posts=(_form_values(source, candidates[source.id], number) for number, source in enumerate(shown, start=1)),
            max_side=_IMAGE_SIDE,
        )
        write_json(key_file, key)
    return {"drawn": len(drawn), "shown": len(shown), "unjudgeable": len(posts) - len(judgeable)}


def _is_judgeable(source: SourcePost) -> bool:
    try:
        if source.findings():
            return False
        check_judgeable(source.post)
    except Exception:  # a post that cannot be read cannot be judged
        return False
    return True


def _form_values(source: SourcePost, candidates: Sequence[Candidate], number: int) -> dict[str, Any]:
    """What the template shows of a post."""
    post = source.post
    letters = LABELS[: len(candidates)]
    return {
        "number": number,
        **{name: post[name] for name in ("id", "text", "keyphrases", "images")},
        "candidates": {letter: one.keyphrases for letter, one in zip(letters, candidates, strict=True)},
    }


@dataclass(frozen=True)
class HumanAnswers:
    """The judgements of annotators.

    Attributes:
        systems: The names of the systems compared.
        judgements: One judgement per annotator and post.
        annotators: Name -> number of posts that the annotator ranked completely.
        unfinished: The number of posts that annotators did not rank completely, summed over annotators.
    """

    systems: list[str]
    judgements: list[Judgement]
    annotators: dict[str, int]
    unfinished: int


def read_answers(files: Sequence[str | os.PathLike[str]], keys: Sequence[str | os.PathLike[str]]) -> HumanAnswers:
    """Read the answers that annotators exported.

    A post counts for the annotators who ranked it completely; a post on which all systems agree counts for every annotator
    whose form drew it.

    Args:
        files: The exported answers, one file per annotator.
        keys: The keys of the forms, as `write_form` wrote them; several forms may show the same posts in different orders.

    Returns:
        The judgements.

    Raises:
        ValueError: If a file does not contain answers, belongs to a form whose key is missing, contains invalid ranks, or has
            the same annotator as another file; or if the forms compare different systems. The error names the file.
    """
    by_form = {key["form"]: key for key in map(_read_key, keys)}
    systems = [key["systems"] for key in by_form.values()]
    if any(one != systems[0] for one in systems):
        raise ValueError(f"the keys are of forms that compare different systems: {systems}")
    judgements: list[Judgement] = []
    annotators: dict[str, int] = {}
    unfinished = 0
    for path in files:
        content = _read(path, ("form", "annotator", "answers"))
        annotator = str(content["annotator"]).strip()
        if content["form"] not in by_form:
            raise ValueError(f"{path}: its form is {content['form']!r}, and the keys are of {sorted(by_form)}: give its key")
        if not annotator or annotator in annotators:
            raise ValueError(
                f"{path}: the annotator's name, {annotator!r}, is empty or occurs in another file: change it in one of them"
            )
        annotators[annotator] = 0
        found = _by_post(content["answers"], path)
        posts = by_form[content["form"]]["posts"]
        if unknown := set(found) - {post["id"] for post in posts}:
            raise ValueError(f"{path}: the form has no posts {sorted(unknown)[:5]}")
        for post in posts:
            order = post["order"]
            if len(order) == 1:
                judgements.append(Judgement(post["id"], order, {name: [1] for name in CRITERIA}, annotator))
                continue
            answer = found.get(post["id"])
            if answer is None or not answer.get("complete"):
                unfinished += 1
                continue
            try:
                ranks = checked_ranks(answer.get("ranks"), len(order))
            except ValueError as error:
                raise ValueError(f"{path}, post {post['id']!r}: {error}") from error
            judgements.append(Judgement(post["id"], order, ranks, annotator))
            annotators[annotator] += 1
    return HumanAnswers(systems[0] if systems else [], judgements, annotators, unfinished)


def write_judgements(
    output: str | os.PathLike[str], judgements: Sequence[Judgement], report: Mapping[str, Any], *, ties: str = "dense"
) -> None:
    """Write the judgements as JSON Lines, and the report as JSON and as Markdown tables, all named after the output.

    Args:
        output: The JSON Lines file; the other files are named after it (`RunPaths`).
        judgements: The judgements.
        report: The report; see `dynkp.judging.ranks.rank_report`.
        ties: The ranks of equal candidates; see `dynkp.judging.ranks.mean_ranks`.
    """
    paths = RunPaths(output)
    write_json_lines(paths.output, (judgement.row(ties) for judgement in judgements), errors="replace")
    write_json(paths.report, report)
    write_text(paths.table, rank_tables(report) + "\n")


def _read_key(path: str | os.PathLike[str]) -> dict[str, Any]:
    key = _read(path, ("form", "systems", "posts"))
    posts = key["posts"]
    if not isinstance(posts, list) or not all(isinstance(post, dict) and {"id", "order"} <= post.keys() for post in posts):
        raise ValueError(
            f"{path}: 'posts' must be a list of objects with 'id' and 'order': give the file that came with the form"
        )
    return key


def _by_post(answers: Any, path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    if not isinstance(answers, list) or not all(isinstance(one, dict) and isinstance(one.get("id"), str) for one in answers):
        raise ValueError(f"{path}: 'answers' must be a list of objects with 'id', 'ranks' and 'complete'")
    found = {one["id"]: one for one in answers}
    if len(found) < len(answers):
        raise ValueError(f"{path}: a post is answered twice")
    return found


def _read(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or set(names) - set(content) or not isinstance(content["form"], str):
        raise ValueError(f"{path}: must be a JSON object with {', '.join(names)}, the first of them a string")
    return content
