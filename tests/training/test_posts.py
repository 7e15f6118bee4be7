"""Posts of a training run: one modality of them, and the images that a model expects."""

from __future__ import annotations

import pytest

from dynkp import load_posts
from dynkp.data.posts import InvalidPostsError, validate_posts
from dynkp.training.posts import check_images_present, only

ROWS = [
    {"id": "1", "text": "a", "keyphrases": ["k"], "image": "a.jpg", "image_url": "http://x/a.jpg"},
    {"id": "2", "text": "b", "keyphrases": ["k"], "image_url": "http://x/b.jpg"},
    {"id": "3", "text": "", "keyphrases": ["k"], "image": "c.jpg"},
]


@pytest.mark.parametrize("streaming", [False, True])
def test_text_alone_may_be_meant(streaming):
    posts = load_posts(ROWS, streaming=streaming)
    with pytest.raises(InvalidPostsError, match="post '1': no_image_dir"):
        list(validate_posts(posts, progress=False)[0])
    kept = list(validate_posts(only(posts, "text"), progress=False)[0])
    assert [post["id"] for post in kept] == ["1", "2"] and not any(post["images"] for post in kept)


def test_posts_whose_image_was_not_found_stay_for_the_error():
    with pytest.raises(InvalidPostsError, match="3 invalid posts"):
        validate_posts(only(load_posts(ROWS), "image"), progress=False)


def test_a_set_without_any_image_is_an_error():
    with pytest.raises(ValueError, match=r"none of the 1 training posts has one.*--modality text"):
        check_images_present(load_posts([{"id": "1", "text": "a"}]), "training")
    check_images_present(load_posts([{"id": "1", "text": "a"}, {"id": "2", "image": b"..."}]), "training")
    check_images_present(load_posts([{"prompt": [], "completion": []}]), "training")
    check_images_present(load_posts([{"id": "1", "text": "a"}], streaming=True), "training")
