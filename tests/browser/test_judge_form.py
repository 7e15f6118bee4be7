"""Invariants of the annotators' form in a browser: entries are kept when the page is closed and opened again, and exported; the
exported file reads back as what was entered; text of posts is shown as text; nothing is fetched.
"""

from __future__ import annotations

import json

import pytest

from dynkp.chat.post_stream import PostStream
from dynkp.judging.candidates import draw_candidates
from dynkp.judging.human_form import key_path, read_answers, write_form
from dynkp.judging.ranks import CRITERIA
from tests.support.posts import picture

EVIL = "</section></script><script>document.title = 'evil'</script> <b>bold</b> &amp; 'quoted'"


@pytest.fixture
def form(tmp_path):
    picture(1, (1600, 900)).save(tmp_path / "one.png")
    posts = [
        {"id": 'p"0" <i>', "text": EVIL, "keyphrases": ["gold", "<b>"], "images": ["one.png"]},
        {"id": "p1", "text": "second", "keyphrases": ["gold"]},
    ]
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in posts))
    predictions = {"good": ["gold"], "evil": [EVIL], "none": []}
    candidates = {row["id"]: draw_candidates(row["id"], predictions) for row in posts}
    write_form(tmp_path / "form.html", PostStream(tmp_path / "posts.jsonl", tmp_path), candidates)
    return tmp_path / "form.html"


def choose(page, post: int, ranks: str) -> None:
    """Ranks of A, B, C by each criterion in turn, such as "123 112 321"."""
    section = page.locator("section").nth(post)
    for criterion, row in zip(CRITERIA, ranks.split(), strict=True):
        for label, rank in zip("ABC", row, strict=True):
            section.locator(f'select[data-criterion="{criterion}"][data-label="{label}"]').select_option(rank)


def export(page, folder):
    with page.expect_download() as download:
        page.click("#export")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_what_the_form_shows(open_page, form):
    page = open_page(form)
    assert page.title() == "Which keyphrases fit best?"
    assert page.locator("section").count() == 2 and page.locator("section script, section b b").count() == 0
    first = page.locator("section").first
    assert EVIL in first.inner_text() and "gold; <b>" in first.inner_text() and "nothing" in first.inner_text()
    assert first.locator("img").evaluate("image => [image.complete, image.naturalWidth]") == [True, 640]
    assert page.inner_text("#progress") == "0 of 2 posts ranked"
    narrow = open_page(form, viewport={"width": 400, "height": 800})
    assert narrow.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_filled_in_kept_exported_and_read_back(open_page, form, tmp_path):
    page = open_page(form)
    page.fill("#annotator", "Ann Ö. / <b>")
    choose(page, 0, "123 112 321")
    assert page.inner_text("#progress") == "1 of 2 posts ranked"
    assert "done" in page.locator("section").first.get_attribute("class")
    page.locator("section").nth(1).locator("select").first.select_option("2")
    page.reload()
    assert page.inner_text("#progress") == "1 of 2 posts ranked" and page.input_value("#annotator") == "Ann Ö. / <b>"
    half = read_answers([export(page, tmp_path)], [key_path(form)])
    assert half.annotators == {"Ann Ö. / <b>": 1} and half.unfinished == 1

    choose(page, 1, "111 213 132")
    path = export(page, tmp_path)
    assert path.name == "answers-Ann-Ö-b-.json"
    found = read_answers([path], [key_path(form)])
    assert found.annotators == {"Ann Ö. / <b>": 2} and found.unfinished == 0
    assert [judgement.post for judgement in found.judgements] == ['p"0" <i>', "p1"]
    assert [list(judgement.ranks.values()) for judgement in found.judgements] == [
        [[1, 2, 3], [1, 1, 2], [3, 2, 1]],
        [[1, 1, 1], [2, 1, 3], [1, 3, 2]],
    ]
    key = json.loads(key_path(form).read_text())
    assert [judgement.order for judgement in found.judgements] == [post["order"] for post in key["posts"]]
    # A rank that is taken back is open again.
    page.locator("select").first.select_option("")
    assert page.inner_text("#progress") == "1 of 2 posts ranked"


def test_a_name_is_asked_for(open_page, form):
    page = open_page(form)
    page.click("#export")
    assert page.evaluate("document.querySelector('#annotator').matches(':invalid')")
    assert page.evaluate("document.activeElement.id") == "annotator"


def test_two_annotators_do_not_see_each_other(open_page, form):
    page = open_page(form)
    choose(page, 0, "123 123 123")
    assert open_page(form).inner_text("#progress") == "0 of 2 posts ranked"
