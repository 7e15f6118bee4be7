"""Invariants of judging by people (the form in a browser: tests/browser/test_judge_form.py):

- the form is self-contained and has no system's name; text of posts is text in it; the key beside it has the systems;
- the same seed draws the same posts; posts on which all systems agree, and posts that cannot be judged, are not shown;
- answers give the mean ranks computed by hand, whatever the order shown; unfinished posts do not count; answers without a key,
  or with invalid content, are errors that name file and post.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dynkp.chat.post_stream import PostStream
from dynkp.judging.candidates import Candidate, draw_candidates
from dynkp.judging.human_form import key_path, read_answers, write_form, write_judgements
from dynkp.judging.ranks import CRITERIA, agreement, mean_ranks, rank_tables
from tests.support.posts import picture

EVIL = "</script><script>document.title = 'evil'</script><b>&amp;"


def make(folder: Path, count: int = 4, seed: int = 0) -> tuple[PostStream, dict[str, list[Candidate]]]:
    """Posts p0 to p{count-1}; on p1 the systems agree, p2 cannot be judged."""
    picture(1).save(folder / "one.png")
    posts: list[dict[str, Any]] = [{"id": f"p{n}", "text": f"post {n}", "keyphrases": ["gold"]} for n in range(count)]
    posts[0] |= {"images": ["one.png"], "text": EVIL}
    posts[2] |= {"keyphrases": []}
    (folder / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in posts))
    predictions = {"system-good": ["gold"], "system-evil": [EVIL]}
    candidates = {
        row["id"]: draw_candidates(row["id"], {**predictions, **({"system-evil": ["gold"]} if n == 1 else {})}, seed=seed)
        for n, row in enumerate(posts)
    }
    return PostStream(folder / "posts.jsonl", folder), candidates


def answer(form: Path, annotator: str, best: str | None = "system-good", **more: Any) -> Path:
    """What someone exports who likes one system best; None likes all."""
    key = json.loads(key_path(form).read_text())
    answers = []
    for post in key["posts"]:
        if len(post["order"]) > 1:
            ranks = {label: 1 if best in (None, *systems) else 2 for label, systems in zip("AB", post["order"], strict=True)}
            answers.append({"id": post["id"], "ranks": dict.fromkeys(CRITERIA, ranks), "complete": True})
    path = form.with_name(f"answers-{annotator}.json")
    path.write_text(json.dumps({"form": key["form"], "annotator": annotator, "answers": answers, **more}))
    return path


def test_the_form_and_its_key(tmp_path: Path) -> None:
    form = tmp_path / "form.html"
    assert write_form(form, *make(tmp_path)) == {"drawn": 3, "shown": 2, "unjudgeable": 1}
    page = form.read_text()
    assert (
        "system-good" not in page and "system-evil" not in page and "evil'</script>" not in page and page.count("<script>") == 1
    )
    assert page.count("<section ") == 2 and page.count("<select ") == 2 * 2 * 3 and page.count("data:image/jpeg;base64,") == 1
    assert "http://" not in page and "https://" not in page
    key = json.loads(key_path(form).read_text())
    assert key["systems"] == ["system-evil", "system-good"] and key["form"] in page
    assert [post["id"] for post in key["posts"]] == ["p0", "p1", "p3"]


def test_the_same_seed_draws_the_same_posts(tmp_path: Path) -> None:
    def drawn(seed: int) -> list[str]:
        write_form(tmp_path / "form.html", *make(tmp_path, 60), sample=20, seed=seed)
        return [post["id"] for post in json.loads((tmp_path / "form.key.json").read_text())["posts"]]

    first = drawn(0)
    assert len(set(first)) == 20 and first == drawn(0) and sorted(first, key=lambda one: int(one[1:])) == first
    assert first != drawn(1)


def test_a_form_without_a_question_is_refused(tmp_path: Path) -> None:
    stream, candidates = make(tmp_path)
    alike = {post_id: [Candidate(("gold",), ("a", "b"))] for post_id in candidates}
    with pytest.raises(ValueError, match="of 3 posts none has predictions that differ"):
        write_form(tmp_path / "form.html", stream, alike)
    assert not (tmp_path / "form.html").exists() and not key_path(tmp_path / "form.html").exists()


def test_mean_ranks_and_agreement_by_hand(tmp_path: Path) -> None:
    # Two forms with other orders, four annotators: of p0 and p3, three like one system, one the other; p1 is equal.
    forms = [tmp_path / "one.html", tmp_path / "two.html"]
    for seed, form in enumerate(forms):
        write_form(form, *make(tmp_path, seed=seed))
    files = [answer(forms[0], "Ann"), answer(forms[0], "Ben"), answer(forms[1], "Cem")]
    files.append(answer(forms[1], "Dov", "system-evil"))
    found = read_answers(files, [key_path(form) for form in forms])
    assert found.systems == ["system-evil", "system-good"]
    assert found.annotators == {"Ann": 2, "Ben": 2, "Cem": 2, "Dov": 2} and found.unfinished == 0
    ranks = mean_ranks(found.judgements, found.systems, resamples=10)
    assert ranks["system-good"]["overall"].score == pytest.approx((1.25 + 1 + 1.25) / 3)
    assert ranks["system-evil"]["overall"].score == pytest.approx((1.75 + 1 + 1.75) / 3)
    # 4 units of four ranks, three of one kind: each has 6 disagreeing pairs of 12, weighed 1/3, so 8 in all; expected are
    # 2 * 8 * 8 / 15.
    assert agreement(found.judgements)["overall"] == pytest.approx(1 - 8 / (128 / 15))
    write_judgements(tmp_path / "human.jsonl", found.judgements, {**report(found), "alpha": agreement(found.judgements)})
    rows = [json.loads(line) for line in (tmp_path / "human.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and rows[0]["judge"] == "Ann"
    assert rows[0]["ranks"]["relevance"] == {"system-good": 1, "system-evil": 2}
    assert "Krippendorff's α" in (tmp_path / "human.report.md").read_text()
    assert json.loads((tmp_path / "human.report.json").read_text())["judged"] == 3


def report(found: Any) -> dict[str, Any]:
    from dynkp.judging.ranks import rank_report

    return rank_report(found.judgements, found.systems, resamples=10)


@pytest.mark.parametrize("control", ["\0", "\r", "\r\n", "\x1b[2J", "\x9b", "\u2028", "\ufeff", "'\"><b>"])
def test_ids_with_control_characters_come_back(tmp_path: Path, control: str) -> None:
    post_id = f"a{control}b"
    (tmp_path / "posts.jsonl").write_text(json.dumps({"id": post_id, "text": "x", "keyphrases": ["gold"]}) + "\n")
    form = tmp_path / "form.html"
    candidates = {post_id: draw_candidates(post_id, {"a": ["gold"], f"b{control}": ["cats"]})}
    write_form(form, PostStream(tmp_path / "posts.jsonl"), candidates)
    page = form.read_text()
    (attribute,) = re.findall("<section data-post='([^']*)'>", page)
    # As a browser reads it: the attribute has no character that HTML replaces, and its JSON is the id.
    assert attribute.isprintable() and json.loads(html.unescape(attribute)) == post_id
    found = read_answers([answer(form, "Ann", "a")], [key_path(form)])
    assert [judgement.post for judgement in found.judgements] == [post_id]
    write_judgements(tmp_path / "human.jsonl", found.judgements, report(found))
    assert rank_tables(report(read_answers([answer(form, "Ben", "a")], [key_path(form)]))).replace("\n", "").isprintable()
    assert json.loads((tmp_path / "human.jsonl").read_text())["id"] == post_id


def test_unfinished_posts_do_not_count(tmp_path: Path) -> None:
    form = tmp_path / "form.html"
    write_form(form, *make(tmp_path))
    path = answer(form, "Ann")
    content = json.loads(path.read_text())
    content["answers"][0] |= {"complete": False, "ranks": {"correctness": {"A": 1}}}
    del content["answers"][1]
    path.write_text(json.dumps(content))
    found = read_answers([path], [key_path(form)])
    assert found.annotators == {"Ann": 0} and found.unfinished == 2
    assert [judgement.post for judgement in found.judgements] == ["p1"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda content: content.update(form="0"), r"answers-Ann\.json: its form is '0', and the keys are of"),
        (lambda content: content.update(annotator=" "), r"answers-Ann\.json: the annotator's name, '', is empty"),
        (lambda content: content.update(annotator="Ben"), r"the annotator's name, 'Ben', is empty or occurs in another file"),
        (
            lambda content: content.update(form=["0"]),
            r"Ann\.json: must be a JSON object with form, .* the first of them a string",
        ),
        (lambda content: content.pop("answers"), r"answers-Ann\.json: must be a JSON object with form, annotator, answers"),
        (lambda content: content.update(answers={}), "'answers' must be a list of objects"),
        (lambda content: content["answers"].append(content["answers"][0]), "a post is answered twice"),
        (lambda content: content["answers"][0].update(id="p9"), "the form has no posts .'p9'"),
        (lambda content: content["answers"][0]["ranks"]["relevance"].update(A=3), "post 'p0': the rank of A by relevance must"),
        (lambda content: content["answers"][0].update(ranks=None), "post 'p0': the object must have correctness"),
    ],
)
def test_answers_that_make_no_sense(tmp_path: Path, change: Any, error: str) -> None:
    form = tmp_path / "form.html"
    write_form(form, *make(tmp_path))
    ben, path = answer(form, "Ben"), answer(form, "Ann")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=error):
        read_answers([ben, path], [key_path(form)])


def test_files_that_are_none(tmp_path: Path) -> None:
    form = tmp_path / "form.html"
    write_form(form, *make(tmp_path))
    (tmp_path / "torn.json").write_text('{"form": ')
    with pytest.raises(ValueError, match=r"torn\.json: not valid JSON"):
        read_answers([tmp_path / "torn.json"], [key_path(form)])
    with pytest.raises(ValueError, match=r"answers-Ann\.json: must be a JSON object with form, systems, posts"):
        read_answers([], [answer(form, "Ann")])
    key = json.loads(key_path(form).read_text())
    (tmp_path / "other.key.json").write_text(json.dumps({**key, "form": "1", "systems": ["x", "y"]}))
    (tmp_path / "odd.key.json").write_text(json.dumps({**key, "posts": [{"id": "p0"}]}))
    with pytest.raises(ValueError, match=r"odd\.key\.json: 'posts' must be a list of objects with 'id' and 'order'"):
        read_answers([], [tmp_path / "odd.key.json"])
    with pytest.raises(ValueError, match="forms that compare different systems"):
        read_answers([], [key_path(form), tmp_path / "other.key.json"])
